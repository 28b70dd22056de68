"""The suites whose records are kept in the repository, the records that a report is made from, and what may be kept:
what others could make again, and nothing else. No torch here."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meft_bench.fields import one_line
from meft_bench.harness import frontier, smollm2, suites
from meft_bench.harness.numerics import (
    bench_why_not,
    changed,
    comparison_numerics,
    neighbour_why_not,
    numerics,
    profile_why_not,
    scale_why_not,
    selection_why_not,
    why_not,
)
from meft_bench.harness.record import read_records
from meft_bench.harness.rows import ROWS
from meft_bench.named import named_in
from meft_bench.provenance import commit_of, in_history
from meft_bench.reading import JSON_BYTES, read_json
from meft_bench.write import write_json

RECORDS = Path("results/records")
SELECTION = "trained_selection.json"
"""The log of a trained model's selection, in results/profile."""
_SESSION = "-session-"
"""In the names of the files of a GPU session."""
_COMMANDS = {
    "bench": "make bench",
    "profile": "make profile FULL=1",
    "neighbours": "make replicate SUITE=neighbours",
    "comparison": "python docs/comparison/run.py",
}
"""Rooms of results/ that are written at once, by a command, and looked through before a publication."""
_SEED = re.compile(r"-\d+$")
"""How the name of a comparison's file ends: SCRIPT-VARIANT-SEED.json."""


def known_records(runs: Path, published: bool = True) -> list[dict[str, Any]]:
    """Published records, with this machine's own in their place where it has them: those that count, or all where the
    published one does not count either."""
    records = {r["run_key"]: r for r in read_records(RECORDS)} if published else {}
    for own in read_records(runs):
        other = records.get(own["run_key"])
        if other is None or _counts(own) or not _counts(other):
            records[own["run_key"]] = own
    return sorted(records.values(), key=lambda r: r["run_key"])


def _counts(record: dict[str, Any]) -> bool:
    """Whether today's code made it, in a clean checkout."""
    spec = record["spec"]
    try:
        return not why_not(record, numerics(spec["task"], spec["method"], spec["model"]))
    except ValueError:  # of a method that this checkout does not have
        return False


def published_cells(records: list[dict[str, Any]] | None = None) -> dict[str, list[Any]]:
    """The suites whose records are kept in the repository: the full one (the default one is its first seed), and the
    real and the paper's one on the model and data that most of the records (by default the published ones) were made
    with."""
    records = read_records(RECORDS) if records is None else records
    sources = sorted({(r["spec"]["model"], r["spec"]["data"]) for r in records if r["spec"]["data"] != "synthetic"})
    known = {r["run_key"] for r in records}
    made = {
        "full": suites.full(),
        "real": _on_rows(sources, known),
        "smollm2": _on_named(records, known),
        "frontier": frontier.cells(),
        "frontier_smollm2": _frontier_on_named(records, known),
        "paper": _at_scale(sources, known, "llama-7b"),
        "paper_mistral": _at_scale(sources, known, "mistral-7b"),
    }
    return {name: cells for name, cells in made.items() if cells}


def _on_rows(sources: list[tuple[str, str]], known: set[str]) -> list[Any]:
    """The suite of real rows on the model and data that most of its records were made with, as far as it was run."""
    made = [[c for c in suites.real(model, data) if c.spec.run_key in known] for model, data in sources]
    return max(made, key=len, default=[])


def _on_named(records: list[dict[str, Any]], known: set[str]) -> list[Any]:
    """The suite on the named model and the data that most of its records were made with, whole; empty without any."""
    made = {(r["spec"]["model"], r["spec"]["data"]) for r in records if named_in(r["spec"]["model"]) == smollm2.NAME}
    suites_made = [smollm2.cells(model, data) for model, data in sorted(made)]
    best = max(suites_made, key=lambda cells: sum(c.spec.run_key in known for c in cells), default=[])
    return best if any(c.spec.run_key in known for c in best) else []


def _frontier_on_named(records: list[dict[str, Any]], known: set[str]) -> list[Any]:
    """The frontier on the named model, whole; empty while none of its own runs is there."""
    models = sorted({r["spec"]["model"] for r in records if named_in(r["spec"]["model"]) == smollm2.NAME})
    for model in models:
        cells = frontier.real_cells(model)
        if any(c.spec.run_key in known for c in cells if c.variant):
            return cells
    return []


def _at_scale(sources: list[tuple[str, str]], known: set[str], shape: str) -> list[Any]:
    """The paper's suite on the model and data that most records were made with, whole, so that what is missing shows;
    empty without any record."""
    counted = []
    for model, data in sources:
        cells = suites.paper(model, data, "cuda", shape)
        # Rows without a size (the base, full fine-tuning) are the same at every shape.
        own = sum(c.spec.run_key in known for c in cells if not ROWS[c.row].only_share)
        counted.append((own, cells))
    best = max(counted, key=lambda pair: pair[0], default=(0, []))
    return best[1] if best[0] else []


# ---- what may be kept ----


def publish(records: Iterable[dict[str, Any]], folder: Path) -> tuple[int, list[str]]:
    """Write the records that may be kept as folder/KEY.json; (how many, why the others were left out, a line each)."""
    kept, refused = 0, []
    for record in records:
        if why := _why_not_kept(record, folder):
            refused.append(f"{record['run_key']} was {why}")
            continue
        write_json(folder / f"{record['run_key']}.json", record)
        kept += 1
    return kept, refused


def _why_not_kept(record: dict[str, Any], folder: Path) -> str:
    """In words; "" for a record of today's code, made from a commit that the checkout's history holds."""
    spec, made = record["spec"], record["provenance"]
    if why := why_not(record, numerics(spec["task"], spec["method"], spec["model"])):
        return why
    if in_history(folder.parent, made.get("commit")) is False:
        return f"made from commit {made.get('commit')}, which this history lacks"
    return ""


def adopt(results: Path) -> list[str]:
    """Profiles of a GPU session that no git could name the commit of: those whose code is that of a commit in this
    history get it; returns their names. What else they hold stays."""
    found = []
    for path in sorted((results / "profile").glob(f"*{_SESSION}*.json")):
        try:
            content = read_json(path, JSON_BYTES)
            made = content["provenance"]
            code = made.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # not_counting names it
        if made.get("dirty") is not None or not isinstance(code, str):
            continue
        if commit := commit_of(results, code):
            kept = {name: value for name, value in made.items() if name not in ("commit_reason", "dirty_reason")}
            content["provenance"] = {**kept, "commit": commit, "dirty": False}
            write_json(path, content)
            found.append(path.name)
    return found


def not_counting(results: Path) -> list[str]:
    """A line for each file of results/bench, profile, neighbours and comparison that does not count: its name, why, and
    what makes it again."""
    found = []
    for room, command in _COMMANDS.items():
        for path in sorted((results / room).glob("*.json")):
            if not path.name.endswith((".trace.json", "_answer.json")) and (why := _why_not(room, path)):
                found.append(f"{room}/{path.name} {why} ({_made_by(path.name, command)})")
    return found


def _made_by(name: str, command: str) -> str:
    """What makes a file again. command: the room's."""
    if name == SELECTION:
        return "make selection"
    if name.startswith("scale_"):
        return "make profile GPUS=N"
    return "make gpu" if _SESSION in name else command


def _why_not(room: str, path: Path) -> str:
    try:
        content = read_json(path, JSON_BYTES)
    except ValueError:
        return "cannot be read"
    if not isinstance(content, dict):
        return "is no JSON object"
    try:
        return _why_not_now(room, path, content)
    except ValueError as error:  # of a method that this checkout does not have
        return f"cannot be judged ({one_line(error)})"


def _why_not_now(room: str, path: Path, content: dict[str, Any]) -> str:
    """Raises ValueError where what made it is not here."""
    if room == "bench":
        why = bench_why_not(path.stem, content)
    elif room == "neighbours":
        why = neighbour_why_not(path.stem, content)
    elif room == "comparison":
        why = why_not(content, comparison_numerics(_SEED.sub("", path.stem)))
    elif "rows" in content:
        why = profile_why_not(content)
    elif "points" in content:
        why = scale_why_not(content)
    elif path.name == SELECTION:
        why = selection_why_not(content)
    else:  # a selection log of random weights, or a calibration: what it went into says what made it
        why = changed(content.get("provenance"))
    return f"was {why}" if why else ""
