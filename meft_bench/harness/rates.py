"""Learning rates that a sweep on the development split chose, by the model whose sizes are trained."""

import json
from pathlib import Path
from typing import Any

from meft_bench.harness.rows import RATE_OF


def rates_file(sizes: str) -> Path:
    """Where the sweep of a model is kept."""
    return Path(__file__).parent / f"learning_rates{'' if sizes == 'embedded' else '.' + sizes}.json"


def learning_rates(sizes: str = "embedded") -> dict[str, float]:
    """ "row share" (facts, people) or "row share task" -> peak learning rate; empty for a model that was not swept."""
    return _book(sizes)["chosen"]


def learning_rates_swept(sizes: str = "embedded") -> tuple[dict[str, dict[float, dict[str, Any]]], dict[str, float]]:
    """(name -> rate -> what came of it, name -> chosen rate) of the whole sweep."""
    book = _book(sizes)
    return {n: {float(r): e for r, e in rates.items()} for n, rates in book["tried"].items()}, book["chosen"]


def _book(sizes: str) -> dict[str, Any]:
    file = rates_file(sizes)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"chosen": {}, "tried": {}}


def swept_rate(row: str, share: str, task: str, sizes: str = "embedded") -> float | None:
    """The rate the sweep chose for a row and size on a task; where the task was not swept, that of the task which was
    swept for all (facts, or people for a real model); else None."""
    row = RATE_OF.get(row, row)
    rates = learning_rates(sizes)
    return rates.get(f"{row} {share} {task}", rates.get(f"{row} {share}"))
