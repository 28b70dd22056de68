"""Intervals over items and over seeds, tests against fixed bounds, Holm's correction, power. Deterministic: equal
scores, equal intervals.

Symbols: N items, B bootstrap resamples, k seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy

from meft_bench.harness.spec import REAL_TASKS

RESAMPLES = 2000
_SEED = 0
_LOW, _HIGH = 2.5, 97.5  # percentiles of a 95 % interval
_SAME_ITEMS = ("task", "data", "seed", "train_rows")
"""Spec fields that decide what an item id stands for."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of the first minus mean of the second over the same N items, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """higher or lower when the interval excludes 0, else inconclusive."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "inconclusive"


@cache
def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion. Raises ValueError unless 0 <= successes <= n and n >= 1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} items is no proportion")
    from scipy.stats import binomtest  # takes two seconds, so only where a table is made

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson when every score is 0 or 1, else a percentile bootstrap over the N items.

    Raises ValueError for no scores.
    """
    if not len(scores):
        raise ValueError("no scores: an interval needs at least one item")
    if all(s in (0, 1) for s in scores):
        return wilson(int(sum(scores)), len(scores))
    return _percentiles(numpy.asarray(scores, dtype=float))


def same_for_every_seed(task: str, split: str) -> bool:
    """Whether the questions are rows of a test file; all others are drawn or made by the seed."""
    return task in REAL_TASKS and split == "test"


def over_repeats(runs: Sequence[Mapping[Any, float]]) -> list[float]:
    """The mean of every question over the runs that asked it, each run as question -> score. k runs that ask the same N
    questions have asked N questions and not k N, so an interval over questions takes each once."""
    asked: dict[Any, list[float]] = {}
    for run in runs:
        for question, score in run.items():
            asked.setdefault(question, []).append(score)
    return [statistics.fmean(scores) for scores in asked.values()]


def paired_bootstrap(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Difference of two lists of N scores of the same items, in the same order; percentile interval over B resamples.

    Raises ValueError when they are empty or of unequal length.
    """
    if not len(first) or len(first) != len(second):
        raise ValueError(f"paired scores need the same items, got {len(first)} and {len(second)}")
    return _difference(numpy.asarray(first, dtype=float) - numpy.asarray(second, dtype=float))


def _difference(of_items: Sequence[float] | numpy.ndarray) -> Difference:
    delta_N = numpy.asarray(of_items, dtype=float)
    low, high = _percentiles(delta_N)
    return Difference(mean=float(delta_N.mean()), low=low, high=high, n=len(delta_N))


def compare(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], split: str, metric: str) -> Difference:
    """First minus second over pairs of records (one pair per seed) on one split, items matched by id within a pair. A
    question that every seed is asked is one item, with the mean of its differences.

    Raises ValueError when the runs of a pair do not share items (another task, data or seed) or lack the split or
    metric.
    """
    asked: list[dict[Any, float]] = []
    for first, second in pairs:
        for name in _SAME_ITEMS:
            ours, theirs = first["spec"][name], second["spec"][name]
            if ours != theirs:
                raise ValueError(f"the runs do not share items: {name} is {ours!r} and {theirs!r}")
        left, right = _by_id(first, split, metric), _by_id(second, split, metric)
        shared = [i for i in left if i in right]
        if not shared:
            raise ValueError(f"the runs share no item of {split}")
        same = same_for_every_seed(first["spec"]["task"], split)
        asked.append({i if same else (len(asked), i): left[i] - right[i] for i in shared})
    return _difference(over_repeats(asked))


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over k seeds; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t-interval of the mean over k seeds; None for fewer than two."""
    sd = spread(values)
    if sd is None:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def p_above(values: Sequence[float], bound: float) -> float:
    """One-sided p of a t-test over k >= 2 seeds that the mean is not above the bound. Values without any spread decide
    by themselves: 0 if they lie above, 1 if not."""
    mean, sd, k = statistics.fmean(values), statistics.stdev(values), len(values)
    if sd < 1e-12:
        return 0.0 if mean - bound > 1e-12 else 1.0
    from scipy.stats import t

    return float(t.sf((mean - bound) / (sd / math.sqrt(k)), k - 1))


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's adjusted p-values of one family; adjusted p < 0.05 rejects with a family-wise error of 5 %."""
    adjusted, running = {}, 0.0
    for i, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - i) * p))
        adjusted[key] = running
    return adjusted


def power(effect: float, sd: float, k: int) -> float:
    """Chance that a two-sided 5 % t-test over k >= 2 seeds with this standard deviation sees this effect."""
    if sd < 1e-12:
        return 1.0 if effect else 0.05
    from scipy.stats import chi, norm, t

    critical, shift = float(t.ppf(0.975, k - 1)), abs(effect) / (sd / math.sqrt(k))
    scale = critical / math.sqrt(k - 1)

    def seen(x: float) -> float:
        """For a standard deviation that comes out as x / sqrt(k - 1)."""
        return float(norm.sf(scale * x - shift) + norm.cdf(-scale * x - shift))

    # Of scipy's noncentral t, the same in one call, some values at large shifts are NaN.
    return min(1.0, float(chi(k - 1).expect(seen)))


def _by_id(record: dict[str, Any], split: str, metric: str) -> dict[str, float]:
    block = (record["quality"] or {}).get(split) or {}
    if metric not in block.get("metrics", {}):
        raise ValueError(f"run {record['run_key']} has no {metric} on {split}")
    return dict(zip(block["ids"], block["metrics"][metric]["items"], strict=True))


def _percentiles(values_N: numpy.ndarray) -> tuple[float, float]:
    n = len(values_N)
    means_B = values_N[numpy.random.default_rng(_SEED).integers(0, n, size=(RESAMPLES, n))].mean(axis=1)
    low, high = numpy.percentile(means_B, (_LOW, _HIGH))
    return float(low), float(high)
