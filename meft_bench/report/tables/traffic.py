"""What crosses the link and how long a step takes: the table of the methods whose weights live on the host.

Symbols: R neurons per layer, K kept per token, U union of kept neurons of a micro-batch, M trainable keys and values.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from meft_bench.harness.rows import ROWS
from meft_bench.report.records.evidence import listed, weakest
from meft_bench.report.records.results import STALE_MARK, Line, Record, Results, line_order, stale_note
from meft_bench.report.records.stats import spread
from meft_bench.report.records.traffic import (
    LINKED,
    MAIN,
    OVERHEAD,
    has_traffic,
    in_units_of_m,
    kept_share,
    neuron_shares,
    per_step,
)
from meft_bench.report.tables.scores import COMMANDS
from meft_bench.report.text import Table, csv_table, markdown_table, paragraphs, plain

_MIB = 2**20


@dataclass(frozen=True)
class Place:
    """A line and task with its runs that have the numbers wanted, one per seed, and how many were planned."""

    line: Line
    task: str
    records: tuple[Record, ...]
    planned: int
    why: str = ""
    """Why there is none, where there is none."""

    def mean(self, read: Callable[[Record], float], form: str = ",.0f", sd: bool = False) -> str:
        """Mean over seeds, with ± their standard deviation where it is wanted and there are two."""
        found = [read(r) for r in self.records]
        deviation = spread(found) if sd else None
        return f"{statistics.fmean(found):{form}}" + ("" if deviation is None else f" ±{deviation:{form}}")


def traffic_table(results: Results, suite: str) -> Table:
    """Bytes, shares of neurons and step times of every linked place over its seeds, the resident Parallel Adapter's
    time beside."""
    found = _places(results, ("table1", "figure1"), _is_linked, has_traffic)
    missing = [f"- {_name(p)}: {plain(p.why)}" for p in found if not p.records]
    measured = [p for p in found if p.records]
    resident = _places(results, ("table1",), lambda cell: cell.row == "parallel_adapter", _has_times)
    timed = [p for p in (*measured, *resident) if p.records and all(map(_has_times, p.records))]
    timed.sort(key=lambda p: (line_order(p.line), results.tasks().index(p.task)))
    bytes_md = markdown_table(_BYTES_HEADER, [_bytes_cells(results, p) for p in measured], left=3)
    neurons_md = markdown_table(_NEURONS_HEADER, [_neuron_cells(results, p) for p in measured], left=3)
    time_md = markdown_table(_TIME_HEADER, [_time_cells(results, p) for p in timed], left=3)
    markdown = paragraphs(
        stale_note(results, [r for p in (*measured, *timed) for r in p.records]),
        _bytes_caption(measured),
        bytes_md if measured else "",
        _NEURONS_CAPTION if measured else "",
        neurons_md if measured else "",
        _time_caption(timed) if timed else "",
        time_md if timed else "",
        f"Not run (`{COMMANDS.get(suite, 'make replicate')}`):" if missing else "",
        "\n".join(missing),
    )
    return Table("traffic", markdown, _csv(found))


def _places(
    results: Results, artefacts: tuple[str, ...], wanted: Callable[[Any], bool], has: Callable[[Record], bool]
) -> list[Place]:
    """Every place of these artefacts whose cell is wanted, in table order, with all of its seeds that have numbers."""
    found = []
    for line in results.lines(*artefacts):
        for cell in filter(wanted, results.cells_of(line)):
            records = results.records_of(line, cell.spec.task)
            planned = len(results.places[(*line, cell.spec.task, "")])
            why = _why_not(next(iter(records.values()))) if records else "no record"
            found.append(Place(line, cell.spec.task, tuple(r for r in records.values() if has(r)), planned, why))
    return found


def _is_linked(cell: Any) -> bool:
    return cell.spec.method in LINKED and cell.spec.options.get("placement", "host") == "host"


def _has_times(record: Record) -> bool:
    return bool((record["timing"] or {}).get("step_s"))


def _why_not(record: Record) -> str:
    return f"{record['state']}: {record.get('state_reason', 'no traffic was recorded')}"


def _name(place: Place) -> str:
    return f"{ROWS[place.line[0]].title} {place.line[1]} on {place.task}"


def _first_cells(results: Results, place: Place) -> list[str]:
    mark = f" {STALE_MARK}" * any(map(results.stale, place.records))
    return [ROWS[place.line[0]].title + mark, results.size(place.line), place.task, _seeds(place)]


def _seeds(place: Place) -> str:
    made = len(place.records)
    return str(made) if made == place.planned else f"{made} of {place.planned}"


_BYTES_HEADER = (
    "Method", "Size", "Task", "Seeds", "hidden, MiB", "rows, MiB", "gradients, MiB", "**main terms, MiB**",
    "main terms, in M", "index, MiB", "score, MiB", "router hidden, MiB", "**overhead, MiB**",
    "bytes per trained token",
)  # fmt: skip
_NEURONS_HEADER = ("Method", "Size", "Task", "Seeds", "K/R, per token", "U/R, mean of layers", "U/R, by layer")
_TIME_HEADER = ("Method", "Size", "Task", "Seeds", "median step, s", "real tokens per s")
_NEURONS_CAPTION = (
    "Neurons used: K/R is what one token keeps, U/R what a micro-batch moves (mean over micro-batches, then over "
    "seeds). U/R, not K/R, decides how many rows cross."
)


def _bytes_cells(results: Results, place: Place) -> list[str]:
    def mib(*purposes: str, sd: bool = False) -> str:
        return place.mean(lambda r: per_step(r, purposes) / _MIB, ".3f", sd)

    return [
        *_first_cells(results, place),
        *(mib(p) for p in MAIN), mib(*MAIN, sd=True), place.mean(in_units_of_m, ".2f", True),
        *(mib(p) for p in OVERHEAD), mib(*OVERHEAD, sd=True),
        place.mean(lambda r: r["traffic"]["per_trained_token_bytes"], sd=True),
    ]  # fmt: skip


def _neuron_cells(results: Results, place: Place) -> list[str]:
    by_layer = " / ".join(f"{s:.2f}" for s in _shares_by_layer(place))
    mean = place.mean(lambda r: statistics.fmean(neuron_shares(r)), ".3f", True)
    return [*_first_cells(results, place), place.mean(kept_share, ".3f"), mean, by_layer]


def _shares_by_layer(place: Place) -> list[float]:
    return [statistics.fmean(layer) for layer in zip(*map(neuron_shares, place.records), strict=True)]


def _time_cells(results: Results, place: Place) -> list[str]:
    step = place.mean(lambda r: r["timing"]["median_step_s"], ".3f", True)
    return [*_first_cells(results, place), step, place.mean(lambda r: r["timing"]["real_tokens_per_s"], sd=True)]


def _bytes_caption(measured: Sequence[Place]) -> str:
    parts = [
        "Bytes over the host-device link per optimizer step, both directions, 1 MiB = 2^20 bytes. Main terms are those "
        "of the paper's formula: hidden states to find the neurons (tokens x hidden size, however small the adapter), "
        "rows of neurons, their gradients; in M: their elements per micro-batch over the M trainable keys and values. "
        "Overhead is what the formula leaves out. Zeros are exact: nothing of that kind crosses."
    ]
    records = [r for p in measured for r in p.records]
    if records:
        parts += [_over_seeds(measured), f"Evidence: **{listed(r['traffic']['evidence'] for r in records)}** (counted "
                  "at every copy)."]  # fmt: skip
    else:
        parts.append("Not run: no record of a method with a link.")
    return " ".join(parts)


def _over_seeds(places: Sequence[Place]) -> str:
    """How many runs a number stands for, and over how many steps each."""
    seeds = ", ".join(map(str, sorted({r["spec"]["seed"] for p in places for r in p.records})))
    steps = sorted({r["spec"]["steps"] for p in places for r in p.records})
    several = any(len(p.records) > 1 for p in places)
    deviation = ", ± their standard deviation over seeds where it is shown and there are two or more" if several else ""
    length = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return (
        f"Every number is the mean over as many runs as the column Seeds says (of seeds {seeds}), each over all of its "
        f"{length} steps{deviation}."
    )


def _time_caption(timed: Sequence[Place]) -> str:
    """Where the clock ran, read from the records."""
    records = [r for p in timed for r in p.records]
    evidence = listed(r["timing"]["evidence"] for r in records)
    devices = sorted({"a CPU" if r["spec"]["device"] == "cpu" else str(r["provenance"]["gpu"]) for r in records})
    threads = sorted({r["provenance"]["threads"] for r in records})
    words = "single thread" if threads == [1] else f"{', '.join(map(str, threads))} threads"
    noisy = ", noisy: runs shared the machine" if "a CPU" in devices else ""
    return (
        "Time per optimizer step (a run's median, then the mean over seeds), warm-up steps left out, the resident "
        f"Parallel Adapter beside. Evidence: **{evidence}** on {plain(', '.join(devices))}, {words}{noisy}."
    )


_CSV_HEAD = ("row", "share", "task", "seeds", "state", "evidence")
_CSV_NUMBERS: dict[str, tuple[Callable[[Record], float], str]] = {
    "main_terms_in_m": (in_units_of_m, ".4f"),
    "kept_share_of_neurons": (kept_share, ".4f"),
    "union_share_mean": (lambda r: statistics.fmean(neuron_shares(r)), ".4f"),
    "bytes_per_step": (lambda r: r["traffic"]["per_optimizer_step_bytes"], ".0f"),
    "bytes_per_trained_token": (lambda r: r["traffic"]["per_trained_token_bytes"], ".2f"),
    "median_step_s": (lambda r: r["timing"]["median_step_s"], ".5f"),
    "real_tokens_per_s": (lambda r: r["timing"]["real_tokens_per_s"], ".1f"),
}
"""Means over seeds; beside each its standard deviation, "one seed" where there is none."""


def _csv(found: Sequence[Place]) -> str:
    parts = [f"{p}_bytes_per_step" for p in (*MAIN, *OVERHEAD)]
    numbers = [column for name in _CSV_NUMBERS for column in (name, f"{name}_seed_sd")]
    header = [*_CSV_HEAD, *numbers, "union_share_by_layer", "union_rows_p95_by_layer", *parts]
    body: list[list[Any]] = []
    for place in found:
        if not place.records:
            state = "not run: no record" if place.why == "no record" else place.why
            body.append([*place.line, place.task, "0", state, "not-run", *["not run"] * (len(header) - len(_CSV_HEAD))])
            continue
        evidence = weakest(r["traffic"]["evidence"] for r in place.records)
        body.append([*place.line, place.task, _seeds(place), place.records[0]["state"], evidence])
        for read, form in _CSV_NUMBERS.values():
            deviation = spread([read(r) for r in place.records])
            body[-1] += [place.mean(read, form), "one seed" if deviation is None else f"{deviation:.4g}"]
        rows = zip(*(r["traffic"]["rows_moved_by_layer"] for r in place.records), strict=True)
        body[-1] += [" ".join(f"{s:.4f}" for s in _shares_by_layer(place))]
        body[-1] += [" ".join(f"{statistics.fmean(seed['p95'] for seed in layer):g}" for layer in rows)]
        body[-1] += [place.mean(partial(per_step, purposes=(p,)), ".0f") for p in (*MAIN, *OVERHEAD)]
    return csv_table(header, body)
