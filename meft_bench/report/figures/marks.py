"""What a figure is made of before it is drawn: places with their seeds, and what is said of them and their gaps."""

import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meft_bench.harness.rows import rate_source
from meft_bench.report.records import quantities
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.quantities import Values, parse_reference
from meft_bench.report.records.results import Column, Record, Results, headline, seeds_words, title
from meft_bench.report.records.stats import seed_interval
from meft_bench.report.text import one_line


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One place of a figure: its mean over seeds, each seed's value and its interval, or the reason why it is empty."""

    x: float
    by_seed: dict[int, float]
    reference: str = ""
    low: float | None = None
    high: float | None = None
    state: str = "ok"
    """ok, or why there is no value: not run, oom, diverged, failed."""
    lost: int = 0
    """Planned seeds without a value."""
    n: int | None = None
    """Items per seed."""
    evidence: str = "not-run"
    stale: bool = False

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.by_seed.values())


def score_mark(results: Results, reference: str, x: float, split: str = "test", metric: str | None = None) -> Mark:
    """A score: its bar is the 95 % interval over the items of all seeds."""
    row, share, task, variant = parse_reference(reference)
    column = Column(task, split, metric or headline(task).metric)
    score = results.score((row, share), column, variant)
    if score.value is None:
        return Mark(x=x, by_seed={}, reference=reference, state=score.state, stale=score.stale)
    found = quantities.score(results, reference, split, column.metric)
    return Mark(
        x=x, by_seed=found.by_seed, reference=reference, low=score.low, high=score.high, lost=len(score.lost),
        n=score.n, evidence=score.evidence, stale=score.stale,
    )  # fmt: skip


def measure_mark(results: Results, name: str, reference: str, x: float) -> Mark:
    """A measure of quantities.MEASURES: seeds, no bar."""
    return values_mark(results, quantities.measure(results, name, reference), reference, x)


def values_mark(results: Results, values: Values, reference: str, x: float, interval: bool = False) -> Mark:
    """Any quantity seed by seed; with interval, its bar is the 95 % t-interval over seeds (two at least)."""
    if not values.by_seed:
        records = results.records_of(parse_reference(reference)[:2], *parse_reference(reference)[2:])
        states = {r["state"] for r in records.values()} - {"ok"}
        state = ", ".join(sorted(states)) or "not run"
        return Mark(x=x, by_seed={}, reference=reference, state=state, stale=values.stale)
    low, high = (seed_interval(list(values.by_seed.values())) if interval else None) or (None, None)
    planned = results.places.get(parse_reference(reference), {})
    return Mark(
        x=x, by_seed=values.by_seed, reference=reference, low=low, high=high,
        lost=max(0, len(planned) - len(values.by_seed)), evidence=values.evidence, stale=values.stale,
    )  # fmt: skip


def layer_means(results: Results, reference: str, read: Callable[[Record], Sequence[float]]) -> dict[int, list[float]]:
    """Seed -> a list that a record holds by layer; seeds whose record lacks it are left out."""
    row, share, task, variant = parse_reference(reference)
    found = {}
    for seed, record in results.records_of((row, share), task, variant).items():
        try:
            if record["state"] == "ok":
                found[seed] = [float(v) for v in read(record)]
        except (KeyError, TypeError):
            continue  # another method, or a probe that was not made
    return found


def layer_marks(reference: str, by_seed: dict[int, list[float]], first: int = 1) -> list[Mark]:
    """One mark a layer, counted from first."""
    layers = min((len(v) for v in by_seed.values()), default=0)
    return [
        Mark(x=first + i, by_seed={s: v[i] for s, v in by_seed.items()}, reference=reference) for i in range(layers)
    ]


def references(results: Results, rows: Sequence[str], task: str, *artefacts: str) -> list[str]:
    """Every place without a variant of these rows on a task that stands in these artefacts, in the tables' order."""
    found = []
    for row, share in results.lines(*artefacts):
        cells = results.places.get((row, share, task, ""), {}).values()
        if row in rows and any(set(artefacts) & set(c.artefacts) for c in cells):
            found.append(f"{row} {share} {task}")
    return found


def how(marks: Iterable[Mark], bars: str = "") -> str:
    """Evidence, items, seeds and what the bars are, read from what is drawn."""
    made = [m for m in marks if m.by_seed]
    if not made:
        return "not run"
    words = [listed({m.evidence for m in made} - {"not-run"})]
    counts, seeds = sorted({m.n for m in made if m.n is not None}), sorted({len(m.by_seed) for m in made})
    words.append(f"n = {_span(counts)} items a seed" if counts else "")
    words.append(f"{_span(seeds)} seed{'s' * (seeds != [1])}" + (" (small dots)" if seeds[-1] > 1 else ""))
    return ", ".join(w for w in words if w) + (f"; {bars}" if bars and any(m.low is not None for m in made) else "")


def gaps(results: Results, marks: Iterable[Mark], width: int = 78) -> list[str]:
    """What a panel cannot show, in words: places that are missing or failed, lost seeds, places with other numbers of
    seeds than most, stale records, and rows that take another row's learning rate."""
    wanted, told = list(marks), []
    if all(m.state == "not run" for m in wanted):
        return []  # the panel itself says so
    for state in sorted({m.state for m in wanted} - {"ok"}):
        told.append(f"{state}: {names(results, [m.reference for m in wanted if m.state == state])}")
    made = [m for m in wanted if m.by_seed]
    if any(m.lost for m in made):
        told.append(f"seeds missing so far at {sum(m.lost > 0 for m in made)} of {len(made)} points drawn")
    told += textwrap.wrap(_uneven(results, made), width if width > _BESIDE else _BESIDE - 16)
    stale = [m.reference for m in made if m.stale]
    if stale:
        told.append(f"stale (made by other code): {'all points' if len(stale) == len(made) else names(results, stale)}")
    told += _borrowed(results, [m.reference for m in made if m.reference])
    return [line for text in told for line in textwrap.wrap(text, width)]


_LISTED = 3
"""Places that a note below a panel names; more are counted."""


_BESIDE = 64
"""Characters below a panel that stands beside another, at most; a list of places is kept well within them."""


def _uneven(results: Results, made: Sequence[Mark]) -> str:
    """Which places are planned with other numbers of seeds than most of those drawn: "5 seeds: MEFT 10%; others 3"; ""
    where all have as many."""
    by_count: dict[int, list[str]] = {}
    for mark in made:
        if mark.reference:
            by_count.setdefault(len(mark.by_seed) + mark.lost, []).append(mark.reference)
    if len(by_count) < 2:
        return ""
    most = max(by_count, key=lambda count: (len(set(by_count[count])), count))
    rest = sorted(count for count in by_count if count != most)
    told = [f"{seeds_words(count)}: {names(results, by_count[count])}" for count in rest]
    return f"{'; '.join(told)}; others\N{NO-BREAK SPACE}{most}"


def _borrowed(results: Results, found: Sequence[str]) -> list[str]:
    by_source: dict[str, list[str]] = {}
    for reference in found:
        if (source := rate_source(parse_reference(reference)[0])) is not None:
            by_source.setdefault(source, []).append(reference)
    return [
        f"with the learning rate swept for {title(source)}: {names(results, own, _LISTED)}"
        for source, own in by_source.items()
    ]


def names(results: Results, found: Sequence[str], most: int = 8) -> str:
    """LoRA 2%, 10%; MEFT 10%, with the real share where it is another. More than most places are only counted."""
    if len(found) > most:
        return f"{len(found)} of the points"
    parts = [parse_reference(r) for r in dict.fromkeys(found)]
    tasks = {task for _, _, task, _ in parts}
    said: dict[str, list[str]] = {}
    for row, share, task, variant in parts:
        extra = [results.size((row, share))] + [task] * (len(tasks) > 1) + [f"({variant})"] * bool(variant)
        said.setdefault(title(row), []).append(" ".join(extra))
    return "; ".join(f"{name} {', '.join(shares)}" for name, shares in said.items())


def model_name(results: Results) -> str:
    """The suite's model and its size, from the cells and records."""
    found = sorted({c.spec.model.split("@")[0] for seeds in results.places.values() for c in seeds.values()})
    sizes = {r["parameters"]["base"] for r in results.records() if r["parameters"] is not None}
    return f"{one_line(', '.join(found))} model" + (f" ({max(sizes) / 1e6:.2f} M parameters)" if sizes else "")


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
