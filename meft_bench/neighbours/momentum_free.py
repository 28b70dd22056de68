"""LOMO and AdaLomo beside AdamW, all over all weights: how near to its best learning rate each must be."""

import math
from collections.abc import Sequence
from typing import Any

from meft_bench.harness.spec import HEADLINE_METRIC, RunSpec
from meft_bench.harness.suites import EMBEDDED_TASKS, GRID_FACTOR
from meft_bench.neighbours.finding import Finding
from meft_bench.train.contract import describe
from meft_bench.train.methods import complete_options

NUMERICS = 1
TITLE = "LOMO, AdaLomo"
PAPER = "2306.09782"
CLAIM = "Needs 10.8 % of the usual memory, and trains all weights of a 65 B model on 8 RTX 3090."
TESTED = "All weights of the embedded base on facts, at rates a factor of 2.5 apart: the score that each rate reaches."
MINUTES = 13
USES = ("lomo", "adalomo", "full", "facts", "training", "evaluation", "probes", "embedded")
_MIDDLE = {"lomo": 2.0, "adalomo": 1e-2, "full": 2.5e-3}
"""Method -> the rate in the middle of its grid, near the best one."""
_STEPS_EACH_WAY = 2
_SEEDS = (0, 1, 2)
_GOOD = 0.9
"""Of its own best score: what a rate must reach to count as good."""


def specs(quick: bool) -> list[RunSpec]:
    """Every method at every rate of its grid with every seed."""
    size: dict[str, Any] = dict(EMBEDDED_TASKS["facts"])
    if quick:
        size |= {"train_rows": 20, "eval_rows": 6, "steps": 3, "batch_size": 8}
    return [
        RunSpec(method=method, options=complete_options(method, {}), learning_rate=rate, seed=seed, splits=("test",),
                **size)
        for method, middle in _MIDDLE.items()
        for rate in grid(middle, 1 if quick else _STEPS_EACH_WAY)
        for seed in (_SEEDS[:1] if quick else _SEEDS)
    ]  # fmt: skip


def grid(middle: float, each_way: int) -> list[float]:
    """Rates a factor of 2.5 apart, ascending."""
    return [float(f"{middle * GRID_FACTOR**i:.3g}") for i in range(-each_way, each_way + 1)]


def run(quick: bool, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of every run, and what they say of each method."""
    rows = [_row(record) for record in records]
    methods = {m: summary([r for r in rows if r["method"] == m]) for m in _MIDDLE}
    return {"evidence": "measured", "rows": rows, "methods": methods}


def _row(record: dict[str, Any]) -> dict[str, Any]:
    spec = record["spec"]
    row = {"method": spec["method"], "rate": spec["learning_rate"], "seed": spec["seed"], "state": record["state"],
           "run_key": record["run_key"]}  # fmt: skip
    if record["state"] != "ok":
        return {**row, "score": 0.0, "score_note": "a run that diverged answers nothing"}
    return {
        **row,
        "score": record["quality"]["test"]["metrics"][HEADLINE_METRIC[spec["task"]]]["mean"],
        "base_text_nats_per_token": record["probes"]["base_text"]["nats_per_token"],
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one method's runs: mean score by rate, the best rate, which rates are good (at least _GOOD of the best mean
    and no seed diverged), how many times apart the outermost of those next to the best are, and the largest difference
    between two seeds at one rate."""
    rates = sorted({r["rate"] for r in rows})
    at = {rate: [r for r in rows if r["rate"] == rate] for rate in rates}
    means = {rate: sum(r["score"] for r in at[rate]) / len(at[rate]) for rate in rates}
    best = max(rates, key=lambda rate: means[rate])
    good = [means[r] >= _GOOD * means[best] and all(one["state"] == "ok" for one in at[r]) for r in rates]
    low = high = rates.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(rates) and good[high + 1]:
        high += 1
    scores = [r["score"] for r in at[best]]
    return {
        "best_rate": best,
        "best_score": round(means[best], 4),
        "best_scores": scores,
        "means": [{"rate": rate, "score": round(means[rate], 4)} for rate in rates],
        "diverged": sum(r["state"] == "diverged" for r in rows),
        "runs": len(rows),
        "good_from": rates[low],
        "good_to": rates[high],
        "good_times": round(rates[high] / rates[low], 2),
        "edge": low == 0 or high == len(rates) - 1,
        "above": None if high + 1 == len(rates) else round(means[rates[high + 1]], 4),
        **({"above_reason": "no higher rate was tried"} if high + 1 == len(rates) else {}),
        "largest_spread": round(max(max(r["score"] for r in at[q]) - min(r["score"] for r in at[q]) for q in rates), 4),
    }


def findings(found: dict[str, Any]) -> list[Finding]:
    """One for each method."""
    return [_finding(method, about) for method, about in found["methods"].items()]


def _finding(method: str, about: dict[str, Any]) -> Finding:
    above = "" if about["above"] is None else f", {about['above']:.2f} at the next higher one"
    width = f"at rates up to {about['good_times']:g} times apart" if about["good_times"] > 1 else "at no other rate"
    least = " (the grid ends there)" if about["edge"] else ""
    says = (
        f"{describe(method).title}: {about['best_score']:.3f} at rate {about['best_rate']:g}, within a tenth of it "
        f"{width}{least}{above}; {about['diverged']} of {about['runs']} runs diverged; two seeds at one rate are up to "
        f"{about['largest_spread']:.2f} apart"
    )
    scores = about["best_scores"]
    assert all(map(math.isfinite, scores))
    return Finding(says=says, evidence="measured", n=about["runs"], of="runs", interval=(min(scores), max(scores)),
                   covers="score at the best rate, lowest to highest seed", digits=3)  # fmt: skip
