"""Choose each row's learning rate from its sweep on the development split, and keep the whole sweep beside it."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from meft_bench.harness.record import read_record, write_json
from meft_bench.harness.suites import Cell

CHOSEN = Path(__file__).parent / "learning_rates.json"
_METRIC = "contains"
EXTENSIONS = 2
"""How often a grid is extended for a row whose best rate lies at its edge."""
_FACTOR = 2.5


def choose(cells: list[Cell], runs: Path) -> str:
    """Write learning_rates.json; returns a table of what was tried.

    The rate with the highest development score wins; among equals, the one with the lowest last training loss. A rate
    that diverged or failed has no score and is listed as such. Raises ValueError when a row has no score at all.
    """
    tried = _tried(cells, runs)
    chosen, lines = {}, []
    for name, rates in tried.items():
        best = _best(name, rates)
        chosen[name] = best
        shown = "  ".join(f"{rate:g}: {e.get('score', e['state'])}" for rate, e in sorted(rates.items()))
        edge = "  (edge of the grid)" if best in (min(rates), max(rates)) else ""
        lines.append(f"{name:<24} {best:<7g} of  {shown}{edge}")
    about = {"task": "facts", "split": "validation", "metric": _METRIC, "seeds": 1}
    kept = {name: {f"{rate:g}": e for rate, e in rates.items()} for name, rates in tried.items()}
    write_json(CHOSEN, {"about": about, "chosen": chosen, "tried": kept})
    return "\n".join(lines)


def edge_cells(cells: list[Cell], runs: Path) -> list[Cell]:
    """One more rate, further out, for each row and size whose best so far lies at the edge of what was tried."""
    extra = []
    for name, rates in _tried(cells, runs).items():
        best = _best(name, rates)
        if best in (min(rates), max(rates)):
            cell = next(c for c in cells if f"{c.row} {c.share}" == name)
            further = best * _FACTOR if best == max(rates) else best / _FACTOR
            extra.append(replace(cell, spec=replace(cell.spec, learning_rate=float(f"{further:.3g}"))))
    return extra


def _tried(cells: list[Cell], runs: Path) -> dict[str, dict[float, dict[str, Any]]]:
    """What came of each rate, by row and share ("meft 10%") and then by rate."""
    tried: dict[str, dict[float, dict[str, Any]]] = defaultdict(dict)
    for cell in cells:
        path = runs / cell.spec.run_key / "record.json"
        if not path.is_file():
            continue
        record = read_record(path)
        entry = {"state": record["state"], "run_key": record["run_key"]}
        if record["state"] == "ok":
            split = record["quality"]["validation"]
            entry |= {"score": split["metrics"][_METRIC]["mean"], "n": split["n"], "loss": record["curve"]["loss"][-1]}
        tried[f"{cell.row} {cell.share}"][cell.spec.learning_rate] = entry
    return tried


def _best(name: str, rates: dict[float, dict[str, Any]]) -> float:
    scored = {rate: e for rate, e in rates.items() if "score" in e}
    if not scored:
        raise ValueError(f"no learning rate of {name} gave a score: see the logs of its runs")
    return max(scored, key=lambda rate: (scored[rate]["score"], -scored[rate]["loss"]))
