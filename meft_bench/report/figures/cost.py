"""Figures of bytes and time: the data path, the latency of five variants, one step's timeline, accumulation."""

import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import gaps, how, measure_mark, model_name, names, title
from meft_bench.report.figures.panel import draw_marks, grid
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import Record, Results
from meft_bench.report.records.traffic import has_traffic

_PATH = "meft 10% facts"
_ARROWS = (
    ("d2h", "hidden", "hidden states (find neurons)"),
    ("h2d", "rows", "rows of the union: keys and values"),
    ("h2d", "index", "which rows a token keeps"),
    ("h2d", "score", "router scores (gate)"),
    ("d2h", "grads", "gradients of those rows"),
    ("d2h", "score", "gradients of the scores"),
    ("h2d", "router_hidden", "router's share of the hidden gradient"),
)
"""In the order of a step: direction, purpose, words."""
_BACKWARD_FROM = 4
_PARTS = (
    ("retrieval", "retrieval on the host", panel.BLUE),
    ("gather", "gather of rows", panel.SKY),
    ("transfer", "transfer", panel.ORANGE),
    ("device", "device compute", panel.GREEN),
    ("gradients", "gradients into place", panel.PURPLE),
    ("adam", "Adam", panel.RED),
)
_LANES = ("host", "link", "device")
_PALETTE = (panel.BLUE, panel.ORANGE, panel.GREEN, panel.PURPLE, panel.RED, panel.SKY, panel.BLACK, panel.GREY)
_SETTINGS = ("device", "dtype", "batch", "length", "hidden", "layers", "neurons", "experts", "probed", "kept",
             "threads", "repeats")  # fmt: skip
"""Of the timeline's settings, those that its figures name."""
_TIMELINE = "results/bench/step.json"


def figure3(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """One MEFT layer's data path with the measured bytes of every arrow."""
    from matplotlib.patches import FancyBboxPatch

    figure = panel.new_figure(12, 7.4)
    axes = figure.subplots()
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
            axes.text(x + 0.1, y, text, ha="left", va="top", fontsize=9.5, linespacing=1.45)
    for i, (way, purpose, words) in enumerate(_ARROWS):
        _arrow(axes, i, way, words, _bytes_text(found, f"{way}_{purpose}_bytes"))
    axes.text(6.0, 8.05, "forward", ha="center", color=panel.BLUE, fontweight="bold")
    axes.text(6.0, 3.55, "backward", ha="center", color=panel.RED, fontweight="bold")
    evidence = listed(r["traffic"]["evidence"] for r in found)
    made = f"{evidence}, mean of {len(found)} seeds" if len(found) > 1 else f"{evidence}, 1 seed"
    stale = "; stale (made by other code)" if any(results.stale(r) for r in found) else ""
    made = made + stale if found else "not run, needs its record (make replicate)"
    axes.set_title(
        "One layer of MEFT: what crosses the link\n"
        f"per optimizer step, all layers together; {names(results, [_PATH])} on facts; {made}"
    )
    return figure


def _arrow(axes: Any, i: int, way: str, words: str, text: str) -> None:
    y = 7.45 - 0.95 * i - (0.65 if i >= _BACKWARD_FROM else 0.0)
    start, end = (3.45, 8.55) if way == "d2h" else (8.55, 3.45)
    colour = panel.BLUE if i < _BACKWARD_FROM else panel.RED
    axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8})
    axes.text(6.0, y + 0.07, words, ha="center", va="bottom", fontsize=9.5)
    axes.text(6.0, y - 0.08, text, ha="center", va="top", fontsize=9.5, color=colour)


def _boxes(record: Record | None) -> list[tuple[float, str, str, list[str]]]:
    """x, colour, name, and what stands at the top, beside forward and beside backward."""
    options = record["spec"]["options"] if record else None
    sizes = "sizes: not run"
    if options:
        per_expert = options["neurons"] // options["experts"]
        sizes = f"R = {options['neurons']}, N = {options['experts']}, m = {per_expert}\nP = {options['probed']}, "
        sizes += f"K = {options['kept']}"
    device = [
        "base model, frozen:\nattention, FFN(h) + adapter(h)\nof the adapter only the rows\nin flight",
        "forward:\nrelu(gate * (k . h)) v,\nsummed over each token's own K\nneurons",
        "backward:\ngradients of rows, scores and\nhidden states",
    ]
    host = [
        f"keys, values [R, D], router [N, D],\nAdam's moments\n{sizes}",
        "forward:\n1. router: top P of N experts\n2. score their P m neurons\n3. keep K a token\n4. gather the union",
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
    figure = panel.new_figure(11.5, 5.4)
    axes = figure.subplots()
    timeline = _step(bench)
    paper = textwrap.wrap(f"the paper (reported, no numbers printed): {reported['no_numbers_printed']['figure5']}", 110)
    if timeline is None or not timeline.get("variants"):
        axes.set_title("Latency of one training step by variant: not run")
        panel.not_run(axes, _TIMELINE, "make bench")
        axes.set_xlabel("\n".join(paper))
        return figure
    variants = timeline["variants"]
    unit, scale = _time_unit(max(v["total_high_s"] for v in variants))
    for i, variant in enumerate(variants):
        left = 0.0
        for name, words, colour in _PARTS:
            width = variant["median_s"].get(name, 0.0) * scale
            axes.barh(-i, width, left=left, color=colour, height=0.6, label=words if i == 0 else None)
            left += width
        total, low, high = (variant[k] * scale for k in ("total_s", "total_low_s", "total_high_s"))
        bar = [[max(0.0, total - low)], [max(0.0, high - total)]]
        axes.errorbar([total], [-i], xerr=bar, color=panel.BLACK, marker="|", markersize=12, linestyle="none",
                      label="total: median, lowest\nand highest repeat" if i == 0 else None)  # fmt: skip
        axes.text(max(high, left), -i, f"   {total:.{1 if unit == 'ms' else 2}f} {unit}", va="center", fontsize=9.5)
    axes.set_yticks([-i for i in range(len(variants))], labels=[textwrap.fill(v["title"], 26) for v in variants])
    axes.set_xlim(0, 1.13 * axes.get_xlim()[1])
    panel.heading(axes, "OURS: one training step, medians by part", _made(timeline), 100)
    _about(figure, timeline)
    axes.set_xlabel("\n".join([f"{unit} (medians of parts need not add up to the median total)", *paper]))
    panel.beside(axes)
    grid(axes, "x")
    return figure


def figure9(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """What host, link and device do during one step."""
    figure = panel.new_figure(13, 5.6)
    axes = figure.subplots()
    timeline = _step(bench) or {}
    events = timeline.get("events")
    if not events:
        axes.set_title("Timeline of one training step: not run")
        panel.not_run(axes, _TIMELINE, "make bench")
        return figure
    unit, scale = _time_unit(max(e["end_s"] for e in events))
    for y, lane in enumerate(_LANES):
        # A lane starts the palette again: nothing is in two lanes, and one row of colours is too few for all.
        axes.plot([], [], linestyle="none", label=f"{lane}:")
        kinds = list(dict.fromkeys(e["name"] for e in events if e["lane"] == lane))
        for kind, colour in zip(kinds, cycle(_PALETTE), strict=False):
            own = [e for e in events if (e["lane"], e["name"]) == (lane, kind)]
            spans = [(e["start_s"] * scale, (e["end_s"] - e["start_s"]) * scale) for e in own]
            # The edge keeps a span of microseconds visible.
            axes.broken_barh(spans, (-y - 0.35, 0.7), color=colour, linewidth=0.6, label=kind.replace("_", " "))
    for phase in dict.fromkeys(e["phase"] for e in events):
        own = [e for e in events if e["phase"] == phase]
        start, end = min(e["start_s"] for e in own) * scale, max(e["end_s"] for e in own) * scale
        axes.axvline(start, color=panel.GREY, linewidth=1, linestyle=":")
        axes.text((start + end) / 2, 0.45, phase, ha="center", va="bottom", fontsize=10)
    axes.set_yticks([-i for i in range(len(_LANES))], labels=_LANES)
    axes.set_ylim(-2.5, 0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} from the start of the step")
    panel.heading(axes, "OURS: one training step of MEFT", _made(timeline), 100)
    _about(figure, timeline)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.12), fontsize=9, labelspacing=0.25)
    return figure


def _time_unit(longest_s: float) -> tuple[str, float]:
    return ("s", 1.0) if longest_s >= 1 else ("ms", 1000.0)


def _step(bench: dict[str, Any]) -> dict[str, Any] | None:
    """The benchmark of a whole step; older files call it timeline."""
    return bench.get("step") or bench.get("timeline")


def _made(timeline: dict[str, Any]) -> str:
    """Evidence and settings."""
    own = timeline.get("settings") or {}
    settings = ", ".join(f"{name} {own[name]}" for name in _SETTINGS if name in own)
    stale = f"; stale ({timeline['why_not']})" if timeline.get("why_not") else ""
    return f"{timeline['evidence']}{stale}; {settings}"


def _about(figure: Any, timeline: dict[str, Any]) -> None:
    """What the benchmark says of itself, below the axes."""
    figure.supxlabel("\n".join(textwrap.wrap(timeline.get("about", ""), 150)), fontsize=8.5)


def accumulation(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Bytes of an optimizer step in units of M against the micro-batches it accumulates."""
    figure = panel.new_figure(9.6, 5.8)
    axes = figure.subplots()
    drawn = []
    places = ((1, ""), *((n, f" / {n} micro-batches") for n in (4, 8, 16)))
    for row, share, colour, marker in (
        ("meft", "10%", panel.RED, "D"),
        ("meft", "150%", panel.PURPLE, "v"),
        ("parallel_adapter_offload", "10%", panel.GREEN, ">"),
    ):
        planned = [(n, f"{row} {share} facts{v}") for n, v in places]
        planned = [(n, ref) for n, ref in planned if n != 8 or parse_reference(ref) in results.places]
        marks = [measure_mark(results, "bytes_in_m_per_step", ref, n) for n, ref in planned]
        draw_marks(axes, marks, colour, marker, f"{title(row)} {results.size((row, share))}")
        drawn += marks
    axes.set_title(f"Bytes over the link per optimizer step of 64 rows\nfacts, {model_name(results)}; {how(drawn)}")
    axes.set_xlabel("\n".join(["micro-batches accumulated in the step", *gaps(results, drawn)]))
    axes.set_ylabel("main terms, in units of M = 2 D R L elements")
    if not any(m.by_seed for m in drawn):
        panel.not_run(axes, "the full suite's cells tagged accumulation")
        return figure
    claim = reported["traffic"]["in_m"]
    counts = [n for n, _ in places]
    for values, style, words in (
        ([claim * n for n in counts], "--", f"the paper's {claim} M a micro-batch (reported)"),
        ([2.0] * len(counts), ":", "2 M: gradients kept on the device,\nweights down and gradients up once"),
    ):
        axes.plot(counts, values, color=panel.GREY, linestyle=style, linewidth=1.4, label=words)
    panel.log_axis(axes, counts, 2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(_plain_numbers())
    panel.beside(axes)
    grid(axes)
    return figure


def _plain_numbers() -> Any:
    from matplotlib.ticker import FormatStrFormatter

    return FormatStrFormatter("%g")
