"""What a user names on the command line, turned into what a spec holds; folders go into places, never into a spec."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft_bench import reading
from meft_bench.fields import Kind, Maybe, Plain, Text, shown
from meft_bench.named import EMBEDDED, NAMED, folder_of
from meft_bench.text import printable

_NULL = ("null", "~", "")
_PAIR = Text(longest=10_000)


NO_CUDA = "--device cuda: torch finds no CUDA GPU here; see meft-bench doctor, or use --device cpu"
"""Also said where "auto" has found a GPU by its driver, which torch does not see: a build without CUDA, say."""


def device(asked: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a GPU if one answers."""
    if asked != "auto":
        return asked
    from meft_bench.provenance import gpu

    return "cuda" if gpu()["gpu"] else "cpu"


def model(source: str | None, places: dict[str, Any], required: str | None = None) -> str:
    """How a spec names the model; a folder goes into places."""
    if source is None:
        if required:
            raise ValueError(required)
        return EMBEDDED
    Text().check("model", source)
    folder = named_model(source)
    if isinstance(folder, Path):
        from meft_bench.train.models import weights_digest

        places["model_dir"] = str(folder.resolve())
        return f"local/{folder.resolve().name}@{weights_digest(folder)}"
    return source


def named_model(source: str) -> str | Path:
    """A model's folder, hub id or "embedded"; a model that is had by name is fetched where it is not here yet. Raises
    ValueError for a folder that is not there."""
    if source == EMBEDDED:
        return source
    if source in NAMED:
        return folder_of(source)
    if os.path.isdir(source):
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or not all(source.split("/")):
        raise ValueError(
            f"no model folder {printable(source)}, and it is no hub id (owner/name) and none of the names "
            f"{', '.join((EMBEDDED, *NAMED))}"
        )
    return source


def data(asked: str | None, places: dict[str, Any], sets: tuple[str, ...]) -> str:
    """How a spec names the data: "hub", or the digest of a folder, which goes into places."""
    if asked is None:
        asked = os.environ.get("MEFT_DATA") or "synthetic"
    Text().check("data", asked)
    if asked in ("synthetic", "hub"):
        return asked
    folder = Path(asked)
    if not folder.is_dir():
        raise ValueError(f"no data folder {asked}")
    from meft_bench.digests import folder_digest

    places["data_dir"] = str(folder.resolve())
    return f"local@{folder_digest(folder, sets)}"


def assignments(pairs: list[str], table: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """NAME=VALUE pairs. A value is text where table says so, else what it is in YAML. ValueError for the rest."""
    values = {}
    for pair in pairs:
        _PAIR.check("NAME=VALUE", pair)
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{shown(pair)} is not NAME=VALUE")
        kind = (table or {}).get(name, Plain())
        values[name] = _text(value, kind) if kind.text else reading.parse_yaml(value, shown(pair), kind)
    return values


def texts(pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs whose values are texts as they are written: no, 01 and 1e3 are names of columns."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise ValueError(f"{shown(pair)} is not NAME=VALUE")
    return {name.strip(): value for name, _, value in (pair.partition("=") for pair in pairs)}


def _text(value: str, kind: Kind) -> str | None:
    return None if isinstance(kind, Maybe) and value in _NULL else value
