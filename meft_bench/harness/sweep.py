"""Choose each row's learning rate from its sweep on the development split, and keep the whole sweep beside it."""

from collections import defaultdict
from pathlib import Path

from meft_bench.harness.record import read_record, write_json
from meft_bench.harness.suites import Cell

CHOSEN = Path(__file__).parent / "learning_rates.json"
_METRIC = "contains"


def choose(cells: list[Cell], runs: Path) -> str:
    """Write learning_rates.json; returns a table of what was tried.

    The rate with the highest development score wins; among equals, the one with the lowest last training loss. A rate
    that diverged or failed has no score and is listed as such. Raises ValueError when a row has no score at all.
    """
    tried: dict[str, dict[str, dict]] = defaultdict(dict)
    for cell in cells:
        path = runs / cell.spec.run_key / "record.json"
        rate = f"{cell.spec.learning_rate:g}"
        if not path.is_file():
            continue
        record = read_record(path)
        entry = {"state": record["state"], "run_key": record["run_key"]}
        if record["state"] == "ok":
            split = record["quality"]["validation"]
            entry |= {"score": split["metrics"][_METRIC]["mean"], "n": split["n"], "loss": record["curve"]["loss"][-1]}
        tried[f"{cell.row} {cell.share}"][rate] = entry
    chosen, lines = {}, []
    for name, rates in tried.items():
        scored = {rate: e for rate, e in rates.items() if "score" in e}
        if not scored:
            raise ValueError(f"no learning rate of {name} gave a score: see its runs with meft-bench list")
        best = max(scored, key=lambda rate: (scored[rate]["score"], -scored[rate]["loss"]))
        chosen[name] = float(best)
        shown = "  ".join(
            f"{rate}: {e.get('score', e['state'])}" for rate, e in sorted(rates.items(), key=lambda x: float(x[0]))
        )
        edge = "  (edge of the grid)" if float(best) in (min(map(float, rates)), max(map(float, rates))) else ""
        lines.append(f"{name:<30} {best:<8} of  {shown}{edge}")
    about = {"task": "facts", "split": "validation", "metric": _METRIC, "seeds": 1}
    write_json(CHOSEN, {"about": about, "chosen": chosen, "tried": dict(tried)})
    return "\n".join(lines)
