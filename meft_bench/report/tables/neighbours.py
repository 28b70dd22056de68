"""One row or more for each neighbour: what its paper claims, what was tested here, what came out."""

import importlib
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import neighbour_facts, neighbour_names, neighbour_why_not
from meft_bench.neighbours.finding import Finding
from meft_bench.neighbours.suite import module_name
from meft_bench.reading import read_json
from meft_bench.report.records.results import STALE_MARK
from meft_bench.report.text import Table, lowered, table, visible

_COLUMNS = ("Neighbour", "Paper", "What its paper claims", "What was tested here", "How", "What came out", "n",
            "Interval")  # fmt: skip
_ABOUT = (
    "The systems that the paper is listed with, each in the smallest faithful test. What a paper claims is "
    "**reported**; what came out is computed from results/neighbours. An interval says what it is of."
)


def neighbours_table(folder: Path) -> Table:
    """From the files of folder (results/neighbours); a neighbour without one is not run. Raises ValueError for a file
    that cannot be read."""
    rows, stale = [], []
    for name in neighbour_names():
        facts, found = neighbour_facts(name), _read(folder / f"{name}.json")
        why = neighbour_why_not(name, found) if found is not None else ""
        if why:
            stale.append(f"{STALE_MARK} {facts['TITLE']} was {why} (make replicate SUITE=neighbours).")
        rows += _rows(name, facts, None if found is None else _findings(name, found, bool(why)), bool(why))
    return table("neighbours", lowered(_COLUMNS), rows, left=len(_COLUMNS), before=[_ABOUT], after=stale)


def _findings(name: str, found: dict[str, Any], stale: bool) -> list[Finding] | None:
    """None for a file of an earlier version that today's sentences cannot be made from."""
    try:
        return importlib.import_module(module_name(name)).findings(found)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        if stale:
            return None
        raise ValueError(f"cannot read the neighbour {name}.json ({type(error).__name__}): run it again") from None


def _rows(name: str, facts: dict[str, Any], findings: list[Finding] | None, stale: bool) -> list[list[str]]:
    head = [facts["TITLE"], f"arXiv {facts['PAPER']}", facts["CLAIM"], facts["TESTED"]]
    if findings is None:
        how = f"not run {STALE_MARK}" if stale else "not run"
        return [[*head, how, f"make replicate SUITE=neighbours ONLY={name}", "not run", "not run"]]
    mark = f" {STALE_MARK}" if stale else ""
    # The first row says what the others are about as well.
    heads = [head] + [[*head[:2], "as above", "as above"]] * (len(findings) - 1)
    return [
        [*own, f"{f.evidence}{mark}", f.says, f.shown_n, f.shown_interval]
        for own, f in zip(heads, findings, strict=True)
    ]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = visible(read_json(path))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the neighbour {path.name} ({error}): run it again") from None
    return content
