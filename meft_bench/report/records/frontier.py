"""What a method forgets against what it knows, over all the learning rates that the suite frontier tries of it."""

import statistics
from dataclasses import dataclass

from meft_bench.harness import frontier as suite
from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.quantities import Values, forgotten, minus, score
from meft_bench.report.records.results import Line, Results, line_order, title
from meft_bench.report.records.stats import seed_interval

SAME_SCORE = 0.02
"""Scores that lie no further below another count as equal to it, where what was forgotten is compared."""


@dataclass(frozen=True)
class Points:
    """One method's runs at all its rates: what each knows and what it forgot."""

    scores: dict[str, Values]
    """By reference."""
    losses: dict[str, Values]

    def at(self, seed: int) -> list[tuple[float, float]]:
        """(score, what was forgotten) of every run with this seed; one that diverged is a rate less to choose from."""
        both = [(v.by_seed, self.losses[r].by_seed) for r, v in self.scores.items()]
        return [(known[seed], lost[seed]) for known, lost in both if seed in known and seed in lost]

    def best(self, seed: int) -> float:
        """The highest score."""
        return max(score for score, _ in self.at(seed))

    def least(self, seed: int, score: float) -> float:
        """The least that a run forgot which knows at least so much."""
        return min(lost for known, lost in self.at(seed) if known >= score)


def points(results: Results, place: str) -> Points:
    """Of "ROW[,ROW...] SHARE TASK": the runs of these rows at every rate that the suite tries, as one method's."""
    rows, share, task = place.split()
    found = [p for p in results.places if p[0] in rows.split(",") and p[1:3] == (share, task) and p[3]]
    references = [f"{row} {share} {task} / {variant}" for row, _, _, variant in found]
    return Points({r: score(results, r) for r in references}, {r: forgotten(results, r) for r in references})


def forgets_at_equal_score(results: Results, first: str, second: str) -> Values:
    """What the first method forgets over what the second does, seed by seed, at equal score: each at that of its rates
    where it forgets least among those that reach the highest score both reach, less SAME_SCORE."""
    ours, theirs = points(results, first), points(results, second)
    parts = [v for p in (ours, theirs) for v in (*p.scores.values(), *p.losses.values())]
    ratios, ended, planned = {}, {}, frozenset(s for v in parts for s in v.planned)
    for seed in sorted(planned):
        if not (ours.at(seed) and theirs.at(seed)):
            continue
        level = min(ours.best(seed), theirs.best(seed)) - SAME_SCORE
        if (other := theirs.least(seed, level)) > 0:
            ratios[seed] = ours.least(seed, level) / other
        else:
            ended[seed] = f"seed {seed}: {second} forgot nothing"
    missing = [name for name, p in ((first, ours), (second, theirs)) if not p.scores]
    return Values(
        ratios,
        absent="; ".join(f"{name}: not in the suite" for name in missing),
        gaps={s: text for v in parts for s, text in v.gaps.items()},
        ended=ended,
        planned=planned,
        stale=any(v.stale for v in parts),
        evidence=weakest(v.evidence for v in parts if v.by_seed) if ratios else "not-run",
        run_keys=tuple(dict.fromkeys(key for v in parts for key in v.run_keys)),
    )


# ---- every point, and the sentence that they give ----

WELL = 0.8
"""Of the best score of all runs: what counts as having learnt the facts."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one size and rate: means over seeds, and the seeds behind them."""

    line: Line
    rate: str
    score: Values
    forgotten: Values

    @property
    def known(self) -> float:
        return statistics.fmean(self.score.by_seed.values())

    @property
    def lost(self) -> float:
        return statistics.fmean(self.forgotten.by_seed.values())


def made(results: Results, task: str = suite.TASK) -> list[Point]:
    """Every point that has both numbers, small rates first."""
    tagged = [p for p, seeds in results.places.items() if any(suite.TAG in c.artefacts for c in seeds.values())]
    places = [p for p in tagged if p[2] == task and p[3]]
    found = []
    for row, share, _, rate in sorted(places, key=lambda p: (line_order((p[0], p[1])), float(p[3]))):
        reference = f"{row} {share} {task} / {rate}"
        known, lost = score(results, reference), forgotten(results, reference)
        if known.by_seed and lost.by_seed:
            found.append(Point(line=(row, share), rate=rate, score=known, forgotten=lost))
    return found


def on_frontier(points: list[Point]) -> list[Point]:
    """Those that no other point beats or equals in both numbers."""
    return [p for p in points if not any(q is not p and q.known >= p.known and q.lost < p.lost for q in points)]


def sentence(results: Results, task: str = suite.TASK) -> str:
    """Who forgets least of those who learnt the facts, and what distinctive updates do to MEFT at equal score."""
    points = made(results, task)
    if not points:
        return "The frontier was not run."
    planned = sum(len(seeds) for place, seeds in results.places.items() if place[2] == task)
    found = len(results.records())
    so_far = f" ({found} of {planned} runs so far.)" if found < planned else ""
    level = WELL * max(p.known for p in points)
    learnt = sorted((p for p in points if p.known >= level), key=lambda p: p.lost)
    first = learnt[0]
    other = next((p for p in learnt if p.line[0] != first.line[0]), None)
    behind = f", the next method is {title(other.line[0])} at {other.line[1]} ({other.lost:.3f})" if other else ""
    if other and not _forgets_less(first, other):
        behind += "; the seeds do not tell these two apart"
    head = (
        f"Of the runs that reach a score of {level:.2f}, {title(first.line[0])} at {first.line[1]} forgets least "
        f"({first.lost:.3f} nats a token){behind}"
    )
    ratio = forgets_at_equal_score(results, f"meft_distinctive,meft_distinctive_half 10% {task}", f"meft 10% {task}")
    return f"{head}.{' ' + ratio_words(ratio) if ratio.by_seed else ''}{so_far}"


def _forgets_less(first: Point, second: Point) -> bool:
    """True when the first forgets less by the 95 % interval over the seeds that both have."""
    gap = minus(second.forgotten, first.forgotten)
    span = seed_interval(list(gap.by_seed.values()))
    return span is not None and span[0] > 0


def ratio_words(ratio: Values) -> str:
    """Distinctive updates beside MEFT at equal score, in a sentence."""
    mean, span = statistics.fmean(ratio.by_seed.values()), seed_interval(list(ratio.by_seed.values()))
    told = f" (95 % over {len(ratio.by_seed)} seeds: {span[0]:.2f} to {span[1]:.2f})" if span else ""
    head = f"At 10 % distinctive MEFT forgets {mean:.2f} times what MEFT does{told}"
    return f"{head}, each by its run that forgets least of those that know as much as both can, less {SAME_SCORE:g}."
