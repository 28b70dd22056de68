"""Figures of bytes and time: the data path, the latency of five variants, one step's timeline, accumulation."""

import textwrap
from collections.abc import Sequence
from typing import Any

from meft_bench.report.figures import panel
from meft_bench.report.figures.lanes import draw_lanes, stack, time_unit
from meft_bench.report.figures.marks import measure_mark, model_name, names, title
from meft_bench.report.figures.panel import Sheet
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import Record, Results
from meft_bench.report.records.traffic import has_traffic

_PATH = "meft 10% facts"
_ARROWS = (
    ("d2h", "hidden", "hidden states (find neurons)"),
    ("h2d", "rows", "keys and values of the neurons needed"),
    ("h2d", "index", "which neurons a token keeps"),
    ("h2d", "score", "router scores (gate)"),
    ("d2h", "grads", "gradients of those keys and values"),
    ("d2h", "score", "gradients of the scores"),
    ("h2d", "router_hidden", "router's share of the hidden gradient"),
)
"""In the order of a step: direction, purpose, words."""
_BACKWARD_FROM = 4
_PARTS = {
    "retrieval": ("retrieval on the host", panel.BLUE),
    "gather": ("gather of rows", panel.SKY),
    "transfer": ("transfer", panel.ORANGE),
    "device": ("device compute", panel.GREEN),
    "gradients": ("gradients into place", panel.PURPLE),
    "adam": ("Adam", panel.RED),
}
_LANES = {"host": "host", "link": "link", "device": "device"}
_ACCUMULATED = (
    ("meft", "10%", (panel.RED, "D")),
    ("meft", "150%", (panel.PURPLE, "v")),
    ("parallel_adapter_offload", "10%", (panel.GREEN, ">")),
)
_SETTINGS = ("device", "dtype", "batch", "length", "hidden", "layers", "neurons", "experts", "probed", "kept",
             "threads", "repeats")  # fmt: skip
"""Of the timeline's settings, those that its figures name."""
_TIMELINE = "results/bench/step.json"


def figure3(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """One MEFT layer's data path with the measured bytes of every arrow."""
    from matplotlib.patches import FancyBboxPatch

    sheet = Sheet("What crosses between device and host in a training step of MEFT?", height=6.8)
    axes = sheet.panels[0].axes
    axes.set_xlim(0, 12)
    axes.set_ylim(0, 8.6)
    axes.axis("off")
    row, share, task, variant = parse_reference(_PATH)
    records = results.records_of((row, share), task, variant).values()
    found = [r for r in records if r["state"] == "ok" and has_traffic(r)]
    for x, colour, name, lines in _boxes(found[0] if found else None):
        style = "round,pad=0.1"
        axes.add_patch(FancyBboxPatch((x, 0.3), 3.1, 8.0, boxstyle=style, facecolor=colour, edgecolor="#333333"))
        axes.text(x + 1.55, 8.15, name, ha="center", va="top", fontweight="bold")
        for y, text in zip((7.65, 5.3, 2.75), lines, strict=True):
            axes.text(x + 0.1, y, text, ha="left", va="top", fontsize=9, linespacing=1.45)
    for i, (way, purpose, words) in enumerate(_ARROWS):
        _arrow(axes, i, way, words, _bytes_text(found, f"{way}_{purpose}_bytes"))
    axes.text(6.0, 8.05, "forward", ha="center", color=panel.BLUE, fontweight="bold")
    axes.text(6.0, 3.55, "backward", ha="center", color=panel.RED, fontweight="bold")
    evidence = listed(r["traffic"]["evidence"] for r in found)
    made = f"{evidence}, mean of {len(found)} seeds" if len(found) > 1 else f"{evidence}, 1 seed"
    stale = "; stale (made by other code)" if any(results.stale(r) for r in found) else ""
    made = made + stale if found else "not run, needs its record (make replicate)"
    sheet.panels[0].heading(f"Bytes per optimizer step, all layers together; {names(results, [_PATH])} on facts", made)
    return sheet.done()


def _arrow(axes: Any, i: int, way: str, words: str, text: str) -> None:
    y = 7.45 - 0.95 * i - (0.65 if i >= _BACKWARD_FROM else 0.0)
    start, end = (3.45, 8.55) if way == "d2h" else (8.55, 3.45)
    colour = panel.BLUE if i < _BACKWARD_FROM else panel.RED
    axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8})
    axes.text(6.0, y + 0.07, words, ha="center", va="bottom", fontsize=9)
    axes.text(6.0, y - 0.08, text, ha="center", va="top", fontsize=9, color=colour)


def _boxes(record: Record | None) -> list[tuple[float, str, str, list[str]]]:
    """x, colour, name, and what stands at the top, beside forward and beside backward."""
    options = record["spec"]["options"] if record else None
    sizes = "sizes: not run"
    if options:
        per_expert = options["neurons"] // options["experts"]
        sizes = f"R = {options['neurons']} neurons in\nN = {options['experts']} experts of m = {per_expert}\n"
        sizes += f"P = {options['probed']} probed, "
        sizes += f"K = {options['kept']} kept a token"
    device = [
        "base model, frozen:\nattention, FFN(h) + adapter(h)\nof the adapter only the neurons\nthis micro-batch needs",
        "forward:\nrelu(gate * (k . h)) v,\nsummed over each token's own K\nneurons",
        "backward:\ngradients of keys, values,\nscores and hidden states",
    ]
    host = [
        f"keys, values [R, D], router [N, D],\nAdam's moments\n{sizes}",
        "forward:\n1. router: top P of N experts\n2. score their P m neurons\n3. keep K a token\n"
        "4. gather what is needed",
        "backward:\nadd up gradients; after the last\nmicro-batch clip and Adam",
    ]
    return [(0.2, "#E8F3EE", "DEVICE", device), (8.7, "#FBEFE3", "HOST", host)]


def _bytes_text(found: Sequence[Record], name: str) -> str:
    if not found:
        return "not run"
    per_step = [r["traffic"]["by_purpose"].get(name, 0) / r["spec"]["steps"] for r in found]
    totals = [r["traffic"]["per_optimizer_step_bytes"] for r in found]
    mean, share = sum(per_step) / len(per_step), sum(per_step) / max(1, sum(totals))
    return f"{mean / 1024:,.1f} KiB ({100 * share:.0f} %)"


def figure5(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Median time of a step of the five variants, by part."""
    sheet = Sheet("How long does one training step take, and what takes the time?", height=5.6)
    (own,) = sheet.panels
    timeline = _step(bench)
    paper = f"the paper (reported, no numbers printed): {reported['no_numbers_printed']['figure5']}"
    if timeline is None or not timeline.get("variants"):
        own.heading("Latency of one training step by variant", "not run")
        own.name_axes(notes=[paper])
        own.not_run(_TIMELINE, "make bench")
        return sheet.done()
    variants = timeline["variants"]
    unit, scale = time_unit(max(v["total_high_s"] for v in variants))
    for i, variant in enumerate(variants):
        end = stack(own.axes, -i, [(variant["median_s"].get(n, 0.0) * scale, c) for n, (_, c) in _PARTS.items()])
        total, low, high = (variant[k] * scale for k in ("total_s", "total_low_s", "total_high_s"))
        bar = [[max(0.0, total - low)], [max(0.0, high - total)]]
        drawn = own.axes.errorbar([total], [-i], xerr=bar, color=panel.BLACK, marker="|", markersize=12,
                                  linestyle="none", label="total: median, lowest, highest")  # fmt: skip
        text = f"   {total:.{1 if unit == 'ms' else 2}f} {unit}"
        own.axes.text(max(high, end), -i, text, va="center")
    own.axes.set_yticks([-i for i in range(len(variants))], labels=[textwrap.fill(v["title"], 26) for v in variants])
    own.axes.set_xlim(0, 1.13 * own.axes.get_xlim()[1])
    own.heading("OURS: medians by part", _made(timeline))
    own.name_axes(f"{unit} (medians of parts need not add up to the median total)", notes=[paper])
    own.axes.set_xlabel("\n".join([own.axes.get_xlabel(), *textwrap.wrap(_how(timeline), own.chars + 6)]))
    own.grid("x")
    sheet.key(dict(_PARTS.values()), [drawn])
    return sheet.done()


def figure9(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """What host, link and device do during one step."""
    sheet = Sheet("When do host, link and device work in one step of MEFT?")
    (own,) = sheet.panels
    timeline = _step(bench) or {}
    events = timeline.get("events")
    if not events:
        own.heading("Timeline of one training step", "not run")
        own.not_run(_TIMELINE, "make bench")
        return sheet.done()
    draw_lanes(own, events, _LANES)
    own.heading("OURS: one training step", _made(timeline))
    sheet.note(_how(timeline))
    return sheet.done()


def _step(bench: dict[str, Any]) -> dict[str, Any] | None:
    """The benchmark of a whole step; older files call it timeline."""
    return bench.get("step") or bench.get("timeline")


def _how(timeline: dict[str, Any]) -> str:
    """What the step was: where the file says that no card was there, what its transfers are."""
    told = "A step of a Llama with random weights on random tokens."
    if (timeline.get("settings") or {}).get("device") != "cpu":
        return told
    return f"{told} Without a GPU: device and host share one memory, so a transfer is a copy within it, not over PCIe."


def _made(timeline: dict[str, Any]) -> str:
    """Evidence and settings."""
    own = timeline.get("settings") or {}
    settings = ", ".join(f"{name} {own[name]}" for name in _SETTINGS if name in own)
    stale = f"; stale ({timeline['why_not']})" if timeline.get("why_not") else ""
    return f"{timeline['evidence']}{stale}; {settings}"


def accumulation(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Bytes of an optimizer step in units of M against the micro-batches it accumulates."""
    sheet = Sheet("When does gradient accumulation use up what sparse transfer saves?", height=5.6)
    (own,) = sheet.panels
    drawn = []
    places = ((1, ""), *((n, f" / {n} micro-batches") for n in (4, 8, 16)))
    for row, share, style in _ACCUMULATED:
        planned = [(n, f"{row} {share} facts{v}") for n, v in places]
        planned = [(n, ref) for n, ref in planned if n != 8 or parse_reference(ref) in results.places]
        marks = [measure_mark(results, "bytes_in_m_per_step", ref, n) for n, ref in planned]
        own.marks(marks, *style, f"{title(row)}\n{results.size((row, share))}")
        drawn += marks
    name = f"Numbers over the link per optimizer step of 64 examples, facts, {model_name(results)}"
    if not own.scores(results, drawn, name, "the full suite's cells tagged accumulation",
                      "micro-batches accumulated in the step",
                      "numbers moved, in units of M = 2 D R L"):  # fmt: skip
        return sheet.done()
    claim, counts = reported["traffic"]["in_m"], [n for n, _ in places]
    own.line(counts, [claim * n for n in counts], panel.GREY, f"the paper's {claim} M\na micro-batch (reported)",
             linestyle="--")  # fmt: skip
    own.line(counts, [2.0] * len(counts), panel.GREY, "2 M: all weights down,\ngradients up once", linestyle=":")
    own.log_x(counts, 2)
    own.log_plain("y")
    return sheet.done()
