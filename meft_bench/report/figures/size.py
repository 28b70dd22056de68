"""Figures of score against size: the paper's Figure 1 and Table 2, device bytes, and how much a size can hold."""

from collections.abc import Sequence
from typing import Any

from meft_bench.harness.suites import CAPACITY, CAPACITY_ROWS, HEADLINE, TABLE_ROWS
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, gaps, how, measure_mark, model_name, references, score_mark, title
from meft_bench.report.figures.panel import draw_marks, draw_paper, grid, log_axis
from meft_bench.report.records.paper import figure1_points, table1_value
from meft_bench.report.records.quantities import measure, parse_reference
from meft_bench.report.records.results import Results

_CONTROLS = ("lora_alpha_rank", "lora_ffn", "adapter_h_identity")
_SIZES = ("0.5%", "2%", "10%", "40%")
TASK_STYLE = {
    "facts": (panel.BLUE, "o"),
    "cloze": (panel.ORANGE, "s"),
    "tools": (panel.GREEN, "^"),
    "arithmetic": (panel.PURPLE, "D"),
}
_PERCENTS = (0.03, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 100)
_COUNTS = (3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
_ITEM_BARS = "bars: 95 % over items"
_LEVELS = (("base", "0%", "base model", ":"), ("full", "100%", "full\nfine-tuning", "--"))


def figure1(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Facts against trainable parameters, and the paper's NQ beside it."""
    figure = panel.new_figure(13.5, 6.6)
    ours, theirs = figure.subplots(1, 2)
    by_row = {row: _by_size(results, row) for row in (*HEADLINE, *_CONTROLS)}
    for row, marks in by_row.items():
        light = row in _CONTROLS
        draw_marks(ours, marks, *panel.STYLE[row], title(row) + " (control)" * light, light=light)
    levels = [score_mark(results, f"{row} {share} facts", 0.0) for row, share, _, _ in _LEVELS]
    heights = [m.mean for m in levels if m.by_seed]
    for mark, (_, _, label, style) in zip(levels, _LEVELS, strict=True):
        if mark.by_seed and mark.low is not None and mark.high is not None:
            # Names of levels that lie close give way to each other.
            close = len(heights) == 2 and abs(heights[0] - heights[1]) < 0.1
            va = "center" if not close else ("bottom" if mark.mean == max(heights) else "top")
            panel.level(ours, mark.mean, f"{label}\n{mark.mean:.3f}", style, (mark.low, mark.high), va)
    drawn = [m for marks in by_row.values() for m in marks] + levels
    if not any(m.by_seed for m in drawn):
        panel.not_run(ours, "the full suite's cells tagged figure1")
    else:
        log_axis(ours, _PERCENTS)
    panel.heading(ours, f"OURS: closed-book facts, {model_name(results)}", how(drawn, f"{_ITEM_BARS}, as are bands"))
    ours.set_xlabel("\n".join(["trainable parameters, % of base", *gaps(results, drawn)]))
    ours.set_ylabel("facts test: answer contained in output")
    _paper_figure1(theirs, reported)
    for axes in (ours, theirs):
        grid(axes)
    _shared_legend(figure, ours if ours.get_legend_handles_labels()[0] else theirs)
    return figure


def _by_size(results: Results, row: str, task: str = "facts") -> list[Mark]:
    """One mark a size, at its share of the base's parameters."""
    marks = []
    for reference in references(results, [row], task, "figure1", "table1"):
        counts = results.parameters(parse_reference(reference)[:2])
        x = counts["trainable_percent_of_base"] if counts else float("nan")
        marks.append(score_mark(results, reference, x))
    return marks


def _paper_figure1(axes: Any, reported: dict[str, Any]) -> None:
    for row in HEADLINE:
        label = f"{title(row)} (paper's Table 1)" if row == "meft" else title(row)
        draw_paper(axes, figure1_points(reported, row), *panel.STYLE[row], label)
    for row, share, label, style in _LEVELS:
        if (value := table1_value(reported, row, share, "nq")) is not None:
            panel.level(axes, value, f"{label}\n{value:.3f}", style)
    size = reported["figure1"]["base_parameters"] / 1e9
    axes.set_title(
        f"PAPER: Figure 1, NQ, {reported['table1']['model']} ({size:.1f} B parameters)\n"
        "reported, about 501 items, one run each, no intervals given"
    )
    log_axis(axes, _PERCENTS)
    axes.set_xlabel(
        "trainable parameters, % of base\nanother model, task and scale of scores than on the left;\n"
        "MEFT's only point is from the paper's Table 1"
    )
    axes.set_ylabel("NQ accuracy (reported)")


def _shared_legend(figure: Any, axes: Any, columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, title="filled: ours; open: the paper's",
        title_fontsize=9.5,
    )  # fmt: skip


def sizes_by_task(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Table 2: the Parallel Adapter by size on every task, and the paper's two tasks beside it."""
    figure = panel.new_figure(13, 5.6)
    ours, theirs = figure.subplots(1, 2)
    stands_for = {task: paper for paper, task in reported["table1"]["columns"].items()}
    drawn: list[Mark] = []
    counts = {s: results.parameters(("parallel_adapter", s)) for s in _SIZES}
    real = {s: c["trainable_percent_of_base"] if c else float(s.rstrip("%")) for s, c in counts.items()}
    for task, style in TASK_STYLE.items():
        marks = [score_mark(results, f"parallel_adapter {share} {task}", x) for share, x in real.items()]
        draw_marks(ours, marks, *style, f"{task} (for {_paper_task(stands_for[task])})")
        drawn += marks
    if any(m.by_seed for m in drawn):
        log_axis(ours, (0.5, 2, 10, 40))
        ours.set_ylim(0, 1.05 * ours.get_ylim()[1])
        panel.beside(ours)
    else:
        panel.not_run(ours, "parallel_adapter at 0.5 to 40 % on four tasks")
    panel.heading(ours, f"OURS: Parallel Adapter by size, {model_name(results)}", how(drawn, _ITEM_BARS), 70)
    ours.set_xlabel("\n".join(["trainable parameters, % of base", *gaps(results, drawn)]))
    ours.set_ylabel("test score (headline metric of the task)")
    block, unit = reported["table2"], reported["figure1"]["parallel_adapter"]["parameters_per_unit"]
    percents = [100 * size * unit / reported["figure1"]["base_parameters"] for size in block["size"]]
    for name, task in (("squad", "cloze"), ("toolbench", "tools")):
        draw_paper(theirs, list(zip(percents, block[name], strict=True)), *TASK_STYLE[task], _paper_task(name))
    theirs.set_title("PAPER: Table 2, LLaMA-7B\nreported, one run each, no intervals given")
    theirs.set_xlabel("trainable parameters, % of base (computed from R;\nthe percentages printed there are 0.8 times)")
    theirs.set_ylabel("score (reported)")
    log_axis(theirs, (0.5, 1, 2, 5, 10, 20))
    theirs.set_ylim(0, None)
    theirs.legend(loc="center left", bbox_to_anchor=(0.0, 0.6))
    for axes in (ours, theirs):
        grid(axes)
    return figure


def _paper_task(name: str) -> str:
    return {"nq": "NQ", "squad": "SQuAD", "toolbench": "ToolBench", "gsm8k": "GSM8K"}[name]


def pareto(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Facts against what a method holds on the device, and against what it trains."""
    figure = panel.new_figure(13.5, 6.8)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = [row for row in TABLE_ROWS if row != "base"]
    drawn: list[Mark] = []
    shown_in: dict[Any, list[Mark]] = {left: [], right: []}
    for row in rows:
        found = references(results, [row], "facts", "figure1", "table1")
        for axes, xs in ((left, _device_mib(results, found)), (right, _trainable(results, found))):
            marks = [score_mark(results, reference, x) for reference, x in zip(found, xs, strict=True)]
            # A point without its place on the x axis is left out of the panel, not of the count of gaps.
            shown = sorted((m for m in marks if m.x == m.x and m.x > 0), key=lambda m: m.x)
            draw_marks(axes, shown, *panel.STYLE[row], title(row), light=row not in (*HEADLINE, "full"))
            shown_in[axes] += shown
        drawn += marks
    base = score_mark(results, "base 0% facts", 0.0)
    made = any(m.by_seed for m in drawn)
    for axes, ticks in ((left, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)), (right, _COUNTS)):
        if not made:
            panel.not_run(axes, "the full suite's Table 1 on facts")
        else:
            panel.log_axis(axes, ticks)
            front = pareto_front(shown_in[axes])
            axes.step([m.x for m in front], [m.mean for m in front], where="post", color=panel.GREY, linewidth=5,
                      alpha=0.3, zorder=0, label="Pareto front: no smaller one scores as high")  # fmt: skip
        if base.by_seed:
            axes.axhline(base.mean, color=panel.GREY, linestyle=":", linewidth=1.3, label=f"base model {base.mean:.3f}")
        grid(axes, "both")
    panel.heading(left, f"Facts against bytes on the device, {model_name(results)}", how(drawn, _ITEM_BARS), 72)
    left.set_xlabel(
        "\n".join(["bytes held on the device for training, MiB (accounted: parameters,",
                   "gradients, moments; for linked methods rows in flight)", *gaps(results, drawn)])
    )  # fmt: skip
    left.set_ylabel("facts test: answer contained in output")
    right.set_title("The same scores against trainable parameters\nthin and light: rows that are no headline method")
    right.set_xlabel("trainable parameters")
    if left.get_legend_handles_labels()[0]:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def pareto_front(marks: Sequence[Mark]) -> list[Mark]:
    """The marks with a score that no other reaches with as little or less, smallest first."""
    front: list[Mark] = []
    for mark in sorted((m for m in marks if m.by_seed), key=lambda m: (m.x, -m.mean)):
        if not front or mark.mean > front[-1].mean:
            front.append(mark)
    return front


def _device_mib(results: Results, found: Sequence[str]) -> list[float]:
    by_place = [measure(results, "device_bytes", reference).by_seed for reference in found]
    return [sum(v.values()) / len(v) / 2**20 if v else float("nan") for v in by_place]


def _trainable(results: Results, found: Sequence[str]) -> list[float]:
    counts = [results.parameters(parse_reference(reference)[:2]) for reference in found]
    return [float(c["trainable"]) if c else float("nan") for c in counts]


def capacity(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Bits a trainable parameter and recall of the facts taught, by how many are taught."""
    figure = panel.new_figure(12.5, 5.6)
    left, right = figure.subplots(1, 2)
    drawn: list[Mark] = []
    for row, share in CAPACITY_ROWS:
        places = sorted([(taught, f" / {taught} facts") for taught in CAPACITY] + [(900, "")])
        per_bit = [
            measure_mark(results, "bits_per_parameter", f"{row} {share} facts{v}", n // 6 * 6) for n, v in places
        ]
        recall = [score_mark(results, f"{row} {share} facts{v}", n // 6 * 6, "recall", "contains") for n, v in places]
        colour, marker = panel.STYLE[row]
        light = (row, share) == ("parallel_adapter", "2%")
        for axes, marks in ((left, per_bit), (right, recall)):
            draw_marks(
                axes, marks, colour, "v" if light else marker, f"{title(row)} {results.size((row, share))}", light=light
            )
        drawn += recall
    for axes in (left, right):
        if any(m.by_seed for m in drawn):
            log_axis(axes, (300, 900, 1800))
            axes.set_ylim(0, None)
        else:
            panel.not_run(axes, "the full suite's cells tagged capacity")
        grid(axes)
    panel.heading(left, "Bits recalled per trainable parameter", f"facts, {model_name(results)}; 10 bits a fact", 50)
    left.set_ylabel("bits per trainable parameter")
    left.set_xlabel("\n".join(["facts taught (each seen equally often)", *gaps(results, drawn, 58)]))
    panel.heading(right, "Recall of the facts taught", how(drawn, _ITEM_BARS), 50)
    right.set_ylabel("training questions answered, share")
    right.set_xlabel("facts taught (each seen equally often)")
    if right.get_legend_handles_labels()[0]:
        panel.beside(right)
    return figure
