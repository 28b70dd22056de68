"""The run record: its schema, its checks, and how it is written and read. No torch here.

A record is one JSON object. Units stand in the names (_bytes, _s). A null carries its reason beside it, as
<name>_reason; 0 is never used for unknown. Every block that holds numbers says how they came to be (its evidence).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meft_bench.fields import WHOLE_MAX, Anything, Items, Kind, Pairs, Real, Text, Whole, one_line, shown
from meft_bench.harness.spec import HEADLINE_METRIC, RunSpec
from meft_bench.reading import RECORD_BYTES, read_json
from meft_bench.write import write_json

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
    _check_nulls(record, "")
    spec = _checked_spec(record)
    if record["state"] == "ok" and not record["quality"]:
        raise ValueError("a finished run has no quality")
    if record["quality"] is not None:
        _check_quality(record["quality"], spec if record["state"] == "ok" else None)
    if record["parameters"] is not None:
        _check_parameters(record["parameters"])
    if record["curve"] is not None:
        _check_curve(record["curve"])
    _check_units(record, "")


def _checked_spec(record: dict[str, Any]) -> RunSpec:
    """The record's spec, whose key must be the record's."""
    try:
        spec = RunSpec.from_dict(record["spec"])
    except ValueError as error:
        raise ValueError(f"spec: {error}") from None
    if spec.run_key != record["run_key"]:
        raise ValueError(f"run_key {shown(record['run_key'])} is not that of its spec, {spec.run_key}")
    return spec


_SCORE, _COUNT, _REAL, _AMOUNT = Real(least=0, most=1), Whole(0, 2**62), Real(), Real(least=0)


def _check_quality(quality: dict[str, Any], spec: RunSpec | None) -> None:
    """Scores are shares: from 0 to 1, one for each document. A finished run has every split that its spec names."""
    splits = {name: block for name, block in quality.items() if name != "evidence"}
    wanted = spec.splits if spec is not None and "ours" in spec.modes else ()
    if missing := [name for name in wanted if name not in splits]:
        raise ValueError(f"quality lacks {', '.join(missing)}")
    for name, block in splits.items():
        place = f"quality.{name}"
        _has(block, place, {"n": Whole(1), "ids": Items(Text(), most=WHOLE_MAX), "metrics": Pairs(Anything())})
        if len(block["ids"]) != block["n"]:
            raise ValueError(f"{place} has {len(block['ids'])} ids for n={block['n']}")
        if spec is not None and HEADLINE_METRIC[spec.task] not in block["metrics"]:
            raise ValueError(f"{place}.metrics lacks {HEADLINE_METRIC[spec.task]}")
        for metric, scores in block["metrics"].items():
            where = f"{place}.metrics.{metric}"
            _has(scores, where, {"mean": _SCORE, "stderr": Real(least=0), "items": Items(_SCORE, most=WHOLE_MAX)})
            if len(scores["items"]) != block["n"]:
                raise ValueError(f"{where} has {len(scores['items'])} items for n={block['n']}")


def _check_parameters(parameters: dict[str, Any]) -> None:
    table = {"groups": Pairs(_COUNT), "trainable": _COUNT, "base": _COUNT, "trainable_percent_of_base": Real(least=0)}
    _has(parameters, "parameters", table)


def _check_curve(curve: dict[str, Any]) -> None:
    each = Items(_REAL, most=WHOLE_MAX)
    _has(curve, "curve", {"step": Items(_COUNT, most=WHOLE_MAX), "loss": each, "gradient_norm": each})
    if not len(curve["step"]) == len(curve["loss"]) == len(curve["gradient_norm"]):
        raise ValueError("curve has lists of different lengths")


def _has(block: Any, place: str, table: dict[str, Kind]) -> None:
    """Raises ValueError unless block is a dict that holds the table's names with values of their kinds."""
    if not isinstance(block, dict):
        raise ValueError(f"{place} is {type(block).__name__}, not dict")
    for name, kind in table.items():
        if name not in block:
            raise ValueError(f"{place} lacks {name}")
        kind.check(f"{place}.{name}", block[name])


def _check_units(value: Any, path: str) -> None:
    """Bytes and seconds are numbers of at least 0, alone, in lists, or by name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path != ".spec" and key.endswith(("_bytes", "_s")) and inner is not None:
                Items(_AMOUNT, most=WHOLE_MAX).check(f"{path}.{key}".lstrip("."), _numbers_in(inner))
            _check_units(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            if isinstance(inner, dict | list):
                _check_units(inner, f"{path}[{i}]")


def _numbers_in(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [part for part in parts if not isinstance(part, dict | list)]


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


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Check, then write. Raises ValueError for a record that breaks the schema."""
    check_record(record)
    write_json(path, record)


def read_record(path: Path) -> dict[str, Any]:
    """A checked record. Raises ValueError naming the file if it is broken or stands under another run's key."""
    key = path.parent.name if path.name == "record.json" else path.stem
    name = f"{key}/{path.name}" if path.name == "record.json" else path.name
    try:
        record = read_json(path, RECORD_BYTES, "record")
        if isinstance(record, dict):
            record.setdefault("numerics", {})  # the first records have none: they are stale, not broken
        check_record(record)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if name in said else f"{name}: {said}") from None
    return dict(record)


def find_record(key: str, folders: Sequence[Path]) -> Path:
    """The file of the one record whose key begins so, in the first of the folders that has it. Raises ValueError for
    none and for several."""
    for folder in folders:
        found = sorted([*folder.glob(f"{key}*/record.json"), *folder.glob(f"{key}*.json")])
        if len(found) > 1:
            raise ValueError(f"{key} begins {len(found)} run keys: give more digits")
        if found:
            return found[0]
    raise ValueError(f"no record begins with {key!r} in {' or '.join(map(str, folders))}: see meft-bench list")


def _under_its_key(path: Path) -> dict[str, Any]:
    """The record at path, whose name must be the record's key."""
    record = read_record(path)
    key = path.parent.name if path.name == "record.json" else path.stem
    if record["run_key"] != key:
        raise ValueError(f"{path.name} of {key} holds the run {record['run_key']}")
    return record


def read_records(folder: Path, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Every record below folder, ordered by run key. One that is broken or foreign is set aside and named in a line to
    say (default: stderr), once in a process; the rest goes on."""
    paths = sorted([*folder.glob("*/record.json"), *(p for p in folder.glob("*.json") if len(p.stem) == 12)])
    found = []
    for path in paths:
        try:
            found.append(_under_its_key(path))
        except ValueError as error:
            _set_aside(path, str(error), say or _to_stderr)
    return sorted(found, key=lambda r: r["run_key"])


_SAID: set[tuple[str, str]] = set()


def _set_aside(path: Path, why: str, say: Callable[[str], None]) -> None:
    if (str(path), why) not in _SAID:
        _SAID.add((str(path), why))
        say(one_line(f"meft-bench: left out {path}: {why}; delete it, or run it again"))


def left_out() -> list[str]:
    """What read_records has set aside in this process, a line each: the file's name, without its folder (a report is
    published), and what is wrong with it."""
    found = []
    for place, why in _SAID:
        path = Path(place)
        name = f"{path.parent.name}/{path.name}" if path.name == "record.json" else path.name
        told = why.replace(place, name)
        found.append(told if name in told else f"{name}: {told}")
    return sorted(found)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
