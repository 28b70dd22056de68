"""What crosses the link and how long a step takes: the table of the methods whose weights live on the host.

Symbols: R neurons per layer, K kept per token, U union of kept neurons of a micro-batch, M trainable keys and values.
"""

import statistics
from typing import Any

from meft_bench.harness.suites import ROWS
from meft_bench.report.cells import STALE_MARK, Line, Record, Results, line_order
from meft_bench.report.tables import COMMANDS
from meft_bench.report.text import Table, csv_table, markdown_table, paragraphs

LINKED = ("meft", "parallel_adapter_offload")
"""Methods that move bytes over a link."""
MAIN = ("hidden", "rows", "grads")
OVERHEAD = ("index", "score", "router_hidden")
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_MIB = 2**20


def traffic_table(results: Results, suite: str) -> Table:
    """Bytes, shares of neurons and step times of every linked run, and the resident Parallel Adapter's time beside."""
    found = _linked(results)
    missing = [f"- {_name(line, task)}: {why}" for line, task, record, why in found if record is None]
    measured = [(line, task, r) for line, task, r, _ in found if r is not None]
    timed = sorted(measured + _resident(results), key=lambda t: (line_order(t[0]), results.tasks().index(t[1])))
    bytes_md = markdown_table(_BYTES_HEADER, [_bytes_cells(results, *m) for m in measured], left=3)
    neurons_md = markdown_table(_NEURONS_HEADER, [_neuron_cells(results, *m) for m in measured], left=3)
    time_md = markdown_table(_TIME_HEADER, [_time_cells(results, *t) for t in timed], left=3)
    markdown = paragraphs(
        _bytes_caption(results, measured),
        bytes_md if measured else "",
        _NEURONS_CAPTION if measured else "",
        neurons_md if measured else "",
        _time_caption(timed) if timed else "",
        time_md if timed else "",
        f"Not run (`{COMMANDS.get(suite, 'make replicate')}`):" if missing else "",
        "\n".join(missing),
    )
    return Table("traffic", markdown, _csv(found))


def neuron_shares(record: Record) -> list[float]:
    """U/R by layer, mean over the micro-batches."""
    return [layer["mean"] / record["spec"]["options"]["neurons"] for layer in record["traffic"]["rows_moved_by_layer"]]


def kept_share(record: Record) -> float:
    """K/R; 1 for a method that has no K because it uses every neuron."""
    options = record["spec"]["options"]
    return options.get("kept", options["neurons"]) / options["neurons"]


def has_traffic(record: Record | None) -> bool:
    """True for a record of bytes that crossed a link."""
    return record is not None and record["traffic"] is not None and "by_purpose" in record["traffic"]


def per_step(record: Record, purposes: tuple[str, ...]) -> float:
    """Bytes per optimizer step for these purposes, both directions."""
    moved = record["traffic"]["by_purpose"]
    names = {f"{way}_{purpose}_bytes" for way in ("h2d", "d2h") for purpose in purposes}
    return sum(n for name, n in moved.items() if name in names) / record["spec"]["steps"]


def in_units_of_m(record: Record) -> float:
    """Elements of the main terms per micro-batch over M = 2DRL, as the paper counts; 2 for whole-matrix transfers."""
    spec = record["spec"]
    elements = per_step(record, MAIN) / spec["accumulation"] / _ELEMENT_BYTES[spec["dtype"]]
    return elements / (2 * record["parameters"]["groups"]["values"])


def _linked(results: Results) -> list[tuple[Line, str, Record | None, str]]:
    """(line, task, record or None, why not) of every cell whose method moves bytes, in table order."""
    found = []
    for line in results.lines("table1", "figure1"):
        for cell in results.cells_of(line):
            if cell.spec.method in LINKED and cell.spec.options.get("placement", "host") == "host":
                record = results.record(line, cell.spec.task)
                why = "no record" if record is None else _why_not(record)
                found.append((line, cell.spec.task, record if has_traffic(record) else None, why))
    return found


def _resident(results: Results) -> list[tuple[Line, str, Record]]:
    lines = [line for line in results.lines("table1") if line[0] == "parallel_adapter"]
    found = [(line, c.spec.task, results.record(line, c.spec.task)) for line in lines for c in results.cells_of(line)]
    return [(line, task, r) for line, task, r in found if r is not None and (r["timing"] or {}).get("step_s")]


def _why_not(record: Record) -> str:
    return f"{record['state']}: {record.get('state_reason', 'no traffic was recorded')}"


def _name(line: Line, task: str) -> str:
    return f"{ROWS[line[0]].title} {line[1]} on {task}"


def _first_cells(results: Results, line: Line, task: str, record: Record) -> list[str]:
    return [ROWS[line[0]].title + f" {STALE_MARK}" * results.stale(record), line[1], task]


_BYTES_HEADER = (
    "Method", "Size", "Task", "hidden, MiB", "rows, MiB", "gradients, MiB", "**main terms, MiB**", "main terms, in M",
    "index, MiB", "score, MiB", "router hidden, MiB", "**overhead, MiB**", "bytes per trained token",
)  # fmt: skip
_NEURONS_HEADER = ("Method", "Size", "Task", "K/R, per token", "U/R, mean of layers", "U/R, by layer")
_TIME_HEADER = ("Method", "Size", "Task", "median step, s", "real tokens per s")
_NEURONS_CAPTION = (
    "Neurons used: K/R is what one token keeps, U/R what a micro-batch moves (mean over micro-batches). U/R, "
    "not K/R, decides how many rows cross."
)


def _bytes_cells(results: Results, line: Line, task: str, record: Record) -> list[str]:
    def mib(*purposes: str) -> str:
        return f"{per_step(record, purposes) / _MIB:.3f}"

    return [
        *_first_cells(results, line, task, record),
        *(mib(p) for p in MAIN), mib(*MAIN), f"{in_units_of_m(record):.2f}",
        *(mib(p) for p in OVERHEAD), mib(*OVERHEAD),
        f"{record['traffic']['per_trained_token_bytes']:,.0f}",
    ]  # fmt: skip


def _neuron_cells(results: Results, line: Line, task: str, record: Record) -> list[str]:
    shares = neuron_shares(record)
    by_layer = " / ".join(f"{s:.2f}" for s in shares)
    first = _first_cells(results, line, task, record)
    return [*first, f"{kept_share(record):.3f}", f"{statistics.fmean(shares):.3f}", by_layer]


def _time_cells(results: Results, line: Line, task: str, record: Record) -> list[str]:
    timing = record["timing"]
    first = _first_cells(results, line, task, record)
    return [*first, f"{timing['median_step_s']:.3f}", f"{timing['real_tokens_per_s']:,.0f}"]


def _bytes_caption(results: Results, measured: list[tuple[Line, str, Record]]) -> str:
    parts = [
        "Bytes over the host-device link per optimizer step, both directions, 1 MiB = 2^20 bytes. Main terms are those "
        "of the paper's formula: hidden states to find the neurons (tokens x hidden size, however small the adapter), "
        "rows of neurons, their gradients; in M: their elements per micro-batch over the M trainable keys and values. "
        "Overhead is what the formula leaves out. Zeros are exact: nothing of that kind crosses."
    ]
    evidence = sorted({r["traffic"]["evidence"] for _, _, r in measured})
    if evidence:
        parts.append(f"Evidence: **{', '.join(evidence)}** (counted at every copy).")
    else:
        parts.append("Not run: no record of a method with a link.")
    if any(results.stale(r) for _, _, r in measured):
        parts.append(f"{STALE_MARK} stale: made by other code than this.")
    return " ".join(parts)


def _time_caption(timed: list[tuple[Line, str, Record]]) -> str:
    """Where the clock ran, read from the records."""
    evidence = sorted({r["timing"]["evidence"] for _, _, r in timed})
    devices = sorted({"a CPU" if r["spec"]["device"] == "cpu" else r["provenance"]["gpu"] for _, _, r in timed})
    threads = sorted({r["provenance"]["threads"] for _, _, r in timed})
    words = "single thread" if threads == [1] else f"{', '.join(map(str, threads))} threads"
    noisy = ", noisy: runs shared the machine" if "a CPU" in devices else ""
    return (
        f"Time per optimizer step, warm-up steps left out, the resident Parallel Adapter beside. Evidence: "
        f"**{', '.join(evidence)}** on {', '.join(devices)}, {words}{noisy}."
    )


def _csv(found: list[tuple[Line, str, Record | None, str]]) -> str:
    header = [
        "row",
        "share",
        "task",
        "state",
        "evidence",
        "main_terms_in_m",
        "kept_share_of_neurons",
        "union_share_mean",
    ]
    header += ["union_share_by_layer", "union_rows_p95_by_layer", "bytes_per_step", "bytes_per_trained_token"]
    header += [f"{p}_bytes_per_step" for p in (*MAIN, *OVERHEAD)] + ["median_step_s", "real_tokens_per_s"]
    body: list[list[Any]] = []
    for line, task, record, why in found:
        if record is None:
            state = "not run: no record" if why == "no record" else why
            body.append([*line, task, state, "not-run", *["not run"] * (len(header) - 5)])
            continue
        traffic, shares = record["traffic"], neuron_shares(record)
        p95 = " ".join(str(layer["p95"]) for layer in traffic["rows_moved_by_layer"])
        body.append([*line, task, record["state"], traffic["evidence"], f"{in_units_of_m(record):.4f}"])
        body[-1] += [f"{kept_share(record):.4f}", f"{statistics.fmean(shares):.4f}"]
        body[-1] += [" ".join(f"{s:.4f}" for s in shares), p95]
        body[-1] += [traffic["per_optimizer_step_bytes"], f"{traffic['per_trained_token_bytes']:.2f}"]
        body[-1] += [f"{per_step(record, (p,)):.0f}" for p in (*MAIN, *OVERHEAD)]
        body[-1] += [f"{record['timing']['median_step_s']:.5f}", f"{record['timing']['real_tokens_per_s']:.1f}"]
    return csv_table(header, body)
