"""What a user names on the command line, turned into what a spec holds; folders go into places, never into a spec."""

import os
from pathlib import Path
from typing import Any


def device(asked: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a GPU if one answers."""
    if asked != "auto":
        return asked
    from meft_bench.harness.provenance import gpu

    return "cuda" if gpu()["gpu"] else "cpu"


def model(source: str | None, places: dict[str, Any], required: str | None = None) -> str:
    """How a spec names the model; a folder goes into places."""
    if not source and required:
        raise ValueError(required)
    if not source or source == "embedded":
        return "embedded"
    folder = Path(source)
    if folder.is_dir():
        from meft_bench.harness.models import weights_digest

        places["model_dir"] = str(folder.resolve())
        return f"local/{folder.resolve().name}@{weights_digest(folder)}"
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"no model folder {source}, and it is no hub id (owner/name)")
    return source


def data(asked: str | None, places: dict[str, Any], sets: tuple[str, ...]) -> str:
    """How a spec names the data: "hub", or the digest of a folder, which goes into places."""
    asked = asked or os.environ.get("MEFT_DATA")
    if not asked:
        return "synthetic"
    if asked == "hub":
        return "hub"
    folder = Path(asked)
    if not folder.is_dir():
        raise ValueError(f"no data folder {asked}")
    from meft_bench.harness.spec import folder_digest

    places["data_dir"] = str(folder.resolve())
    return f"local@{folder_digest(folder, sets)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Fields of a spec file. Raises ValueError for a missing or broken one."""
    import yaml

    if not path.is_file():
        raise ValueError(f"no spec file {path}")
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} must map field names to values, for example task: facts")
    return fields


def assignments(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, values read as YAML. Raises ValueError for anything else."""
    import yaml

    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not NAME=VALUE")
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):
            try:
                parsed = float(parsed)  # YAML reads 1e-3 as text
            except ValueError:
                pass
        values[name] = parsed
    return values
