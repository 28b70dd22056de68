"""Choose each row's learning rate from its sweep on the development split, and keep the whole sweep beside it.

What learning_rates.json already holds is kept and not run again; delete the file to sweep from nothing.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from meft_bench.harness.record import read_record
from meft_bench.harness.spec import HEADLINE_METRIC
from meft_bench.harness.suites import GRID_FACTOR, Cell
from meft_bench.write import write_json

CHOSEN = Path(__file__).parent / "learning_rates.json"
EXTENSIONS = 2
"""How often a grid is extended for a row whose best rate lies at its edge."""


FIRST_TASKS = ("facts", "people")
"""Swept for every row and size, so that names leave them out."""


def name_of(cell: Cell) -> str:
    """ "row share", with the task behind it unless it is one that all are swept on."""
    return f"{cell.row} {cell.share}" + (f" {cell.spec.task}" if cell.spec.task not in FIRST_TASKS else "")


def untried(cells: list[Cell], book: Path | None = None) -> list[Cell]:
    """The cells whose row, size and rate the kept sweep lacks. book: the file of the sweep; None is the embedded
    model's, here and below."""
    kept = _kept(book)
    return [c for c in cells if c.spec.learning_rate not in kept.get(name_of(c), {})]


def choose(cells: list[Cell], runs: Path, book: Path | None = None) -> str:
    """Write the file of the sweep; returns a table of what was tried.

    The rate with the highest development score wins; among equals, the one with the lowest last training loss. A rate
    that diverged or failed has no score and is listed as such. Raises ValueError when a row has no score at all.
    """
    tried = _tried(cells, runs, book)
    chosen, lines = {}, []
    for name, rates in tried.items():
        best = _best(name, rates)
        chosen[name] = best
        shown = "  ".join(f"{rate:g}: {e.get('score', e['state'])}" for rate, e in sorted(rates.items()))
        edge = "  (edge of the grid)" if best in (min(rates), max(rates)) else ""
        lines.append(f"{name:<24} {best:<7g} of  {shown}{edge}")
    about = {"split": "validation", "metric": HEADLINE_METRIC, "seeds": 1, "names": "row share, and task if not facts"}
    kept = {name: {f"{rate:g}": e for rate, e in rates.items()} for name, rates in tried.items()}
    write_json(book or CHOSEN, {"about": about, "chosen": chosen, "tried": kept})
    return "\n".join(lines)


def edge_cells(cells: list[Cell], runs: Path, book: Path | None = None) -> list[Cell]:
    """One more rate, further out, for each row and size whose best so far lies at the edge of what was tried."""
    extra = []
    for name, rates in _tried(cells, runs, book).items():
        best = _best(name, rates)
        if best in (min(rates), max(rates)):
            cell = next((c for c in cells if name_of(c) == name), None)
            if cell is None:  # kept from an earlier sweep of a row that is no longer planned
                continue
            further = best * GRID_FACTOR if best == max(rates) else best / GRID_FACTOR
            extra.append(replace(cell, spec=replace(cell.spec, learning_rate=float(f"{further:.3g}"))))
    return extra


def _tried(cells: list[Cell], runs: Path, book: Path | None) -> dict[str, dict[float, dict[str, Any]]]:
    """What came of each rate, by row and share ("meft 10%") and then by rate."""
    tried: dict[str, dict[float, dict[str, Any]]] = defaultdict(dict, _kept(book))
    for cell in cells:
        path = runs / cell.spec.run_key / "record.json"
        if not path.is_file():
            continue
        record = read_record(path)
        entry = {"state": record["state"], "run_key": record["run_key"]}
        if record["state"] == "ok":
            split = record["quality"]["validation"]
            metric = split["metrics"][HEADLINE_METRIC[cell.spec.task]]
            entry |= {"score": metric["mean"], "n": split["n"], "loss": record["curve"]["loss"][-1]}
        tried[name_of(cell)][cell.spec.learning_rate] = entry
    return tried


def _kept(book: Path | None) -> dict[str, dict[float, dict[str, Any]]]:
    """The sweep so far, by name and then by rate; empty before the first."""
    book = book or CHOSEN
    if not book.is_file():
        return {}
    tried = json.loads(book.read_text(encoding="utf-8"))["tried"]
    return {name: {float(rate): e for rate, e in rates.items()} for name, rates in tried.items()}


def _best(name: str, rates: dict[float, dict[str, Any]]) -> float:
    scored = {rate: e for rate, e in rates.items() if "score" in e}
    if not scored:
        raise ValueError(f"no learning rate of {name} gave a score: see the logs of its runs")
    return max(scored, key=lambda rate: (scored[rate]["score"], -scored[rate]["loss"]))
