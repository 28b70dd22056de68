"""The suite on a real pretrained model as the report reads it: which places have all their seeds, what is missing, and
what was forgotten."""

import statistics
from collections import Counter
from collections.abc import Sequence

from meft_bench.report.records.quantities import Values, measure
from meft_bench.report.records.results import TASK_TITLES, Line, Record, Results
from meft_bench.report.records.stats import over_repeats

NAME = "SmolLM2-135M"
HEADLINE = (("base", "0%"), ("lora", "10%"), ("lora_ffn", "10%"), ("adapter_h", "10%"), ("parallel_adapter", "10%"),
            ("meft", "10%"), ("full", "100%"))  # fmt: skip
"""(row, share) of the short table."""
TASKS = ("people", "nq")
"""Of the short table; what is forgotten is told after the first."""


def whole(results: Results, line: Line, task: str) -> bool:
    """True when every planned seed of a place has a record, whatever its state."""
    planned = results.places.get((*line, task, ""))
    return planned is not None and set(results.records_of(line, task)) == set(planned)


def leads(results: Results | None) -> bool:
    """True when there is something to tell: MEFT and a trained method beside it, whole on one of the main tasks."""
    return results is not None and any(
        whole(results, ("meft", "10%"), task)
        and any(whole(results, line, task) for line in HEADLINE if line[0] not in ("meft", "base"))
        for task in TASKS
    )


def progress(results: Results) -> str:
    """How many of the planned runs are there, by task: "48 of 112 planned runs are there (people 24 of 51, ...)"; ""
    when all are."""
    planned: Counter[str] = Counter()
    for place, seeds in results.places.items():
        planned[place[2]] += len(seeds)
    made = Counter(r["spec"]["task"] for r in results.records())
    if made.total() == planned.total():
        return ""
    told = [f"{title(task)} {made[task]} of {planned[task]}" for task in planned]
    return f"{made.total()} of {planned.total()} planned runs are there: {', '.join(told)}"


def title(task: str) -> str:
    """A task's name in a sentence."""
    return TASK_TITLES.get(task, task)


def divergence(results: Results, line: Line, task: str) -> Values:
    """Kullback-Leibler divergence from the base on a text that nobody trained on, nats per token, seed by seed."""
    return measure(results, "held_out_kl", " ".join((*line, task)))


def known_records(results: Results, line: Line, task: str) -> list[Record]:
    """The finished runs of a place that were asked what the base had known."""
    found = results.records_of(line, task).values()
    return [r for r in found if r["state"] == "ok" and "forgetting" in (r["probes"] or {})]


def kept(records: Sequence[Record], way: str = "greedy") -> list[float]:
    """For each plain fact that the base states rightly, the share of the runs that still state it. Every run is asked
    the same facts; runs whose base states another number of them (another machine) are not matched."""
    runs = [r["probes"]["forgetting"]["known"][way]["items"] for r in records]
    return over_repeats([{(len(items), i): float(x) for i, x in enumerate(items)} for items in runs])


def kept_by_run(records: Sequence[Record], way: str = "greedy") -> list[float]:
    """The share of those facts that each run still states; none for a run whose base states none."""
    runs = [r["probes"]["forgetting"]["known"][way]["items"] for r in records]
    return [statistics.fmean(items) for items in runs if items]
