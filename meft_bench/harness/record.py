"""The run record: its schema, its checks, and how it is written and read. No torch here.

A record is one JSON object. Units stand in the names (_bytes, _s). A null carries its reason beside it, as
<name>_reason; 0 is never used for unknown. Every block that holds numbers says how they came to be (its evidence).
"""

import json
from pathlib import Path
from typing import Any

from meft_bench.write import replace

SCHEMA = 2
EVIDENCE = ("measured", "capped", "simulated", "reported", "not-run")
STATES = ("ok", "oom", "diverged", "failed")
"""Of a written record; a plan adds missing, partial and stale."""

_BLOCKS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "run_key": (str,),
    "state": (str,),
    "spec": (dict,),
    "numerics": (dict,),
    "provenance": (dict,),
    "parameters": (dict, type(None)),
    "memory": (dict, type(None)),
    "traffic": (dict, type(None)),
    "timing": (dict, type(None)),
    "quality": (dict, type(None)),
    "probes": (dict, type(None)),
    "curve": (dict, type(None)),
}
_MEASURED = ("memory", "traffic", "timing", "quality", "probes")


def check_record(record: Any) -> None:
    """Raises ValueError, naming the place, unless record follows the schema."""
    if not isinstance(record, dict):
        raise ValueError("a record is a JSON object")
    for name, kinds in _BLOCKS.items():
        if name not in record:
            raise ValueError(f"the record lacks {name}")
        if not isinstance(record[name], kinds):
            raise ValueError(f"{name} is {type(record[name]).__name__}, not {kinds[0].__name__}")
    if record["schema"] != SCHEMA:
        raise ValueError(f"schema {record['schema']} is not {SCHEMA}: run it again")
    if record["state"] not in STATES:
        raise ValueError(f"state {record['state']!r} is none of {', '.join(STATES)}")
    for name in _MEASURED:
        block = record[name]
        if block is not None and block.get("evidence") not in EVIDENCE:
            raise ValueError(f"{name}.evidence is {block.get('evidence')!r}, none of {', '.join(EVIDENCE)}")
    if record["state"] == "ok" and not record["quality"]:
        raise ValueError("a finished run has no quality")
    _check_nulls(record, "")


def _check_nulls(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            # The spec's own nulls mean "the default named in its documentation".
            if inner is None and path != ".spec" and not path.startswith(".spec.") and not value.get(f"{key}_reason"):
                raise ValueError(f"{path}.{key} is null without {key}_reason".lstrip("."))
            _check_nulls(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            if inner is None:
                raise ValueError(f"{path}[{i}] is null in a list".lstrip("."))
            _check_nulls(inner, f"{path}[{i}]")


def write_json(path: Path, value: Any) -> None:
    """Replace path by value in one step: a reader sees the old file or the new one, never half of it."""
    replace(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Check, then write. Raises ValueError for a record that breaks the schema."""
    check_record(record)
    write_json(path, record)


def read_record(path: Path) -> dict[str, Any]:
    """A checked record. Raises ValueError naming the file if it is broken."""
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict):
            record.setdefault("numerics", {})  # the first records have none: they are stale, not broken
        check_record(record)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record below folder, ordered by run key."""
    paths = sorted([*folder.glob("*/record.json"), *(p for p in folder.glob("*.json") if len(p.stem) == 12)])
    return sorted((read_record(p) for p in paths), key=lambda r: r["run_key"])
