"""Figures of score against size: the paper's Figure 1 and Table 2, device bytes, and how much a size can hold."""

from collections.abc import Sequence
from typing import Any

from meft_bench.harness.rows import HEADLINE, PEERS, TABLE_ROWS
from meft_bench.harness.suites import CAPACITY, CAPACITY_ROWS
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, measure_mark, model_name, references, score_mark, title
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.records.paper import figure1_points, table1_value
from meft_bench.report.records.quantities import measure, parse_reference
from meft_bench.report.records.results import TASK_TITLES, Results

_CONTROLS = ("lora_alpha_rank", "lora_ffn", "adapter_h_identity")
_SIZES = ("0.5%", "2%", "10%", "40%")
TASK_STYLE = {
    "facts": (panel.BLUE, "o"),
    "cloze": (panel.ORANGE, "s"),
    "tools": (panel.GREEN, "^"),
    "arithmetic": (panel.PURPLE, "D"),
}
_PERCENTS = (0.03, 0.1, 0.5, 2, 10, 40)
_COUNTS = (3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
_MIBS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
ITEM_BARS = "bars: 95 % over items"
FACTS_SCORE = "share of answers right (facts, test)"
_LEVELS = (("base", "0%", "base model", ":"), ("full", "100%", "full fine-tuning", "--"))
_NAMED = ("lora", "lora_ffn", "adapter_h", "parallel_adapter", "parallel_adapter_offload", "meft", "adalomo", "full")
"""Methods that the Pareto figure names; the others are points in grey."""


def figure1(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Facts against trainable parameters, and the paper's NQ beside it."""
    sheet = Sheet("Does a larger adapter know more?", 1, 2, 6.0)
    ours, theirs = sheet.panels
    by_row = {row: _by_size(results, row) for row in (*HEADLINE, *_CONTROLS)}
    for row, marks in by_row.items():
        label = title(row).replace(", ", ",\n") + " (control)" * (row in _CONTROLS)
        ours.marks(marks, *panel.STYLE[row], label, light=row in _CONTROLS)
    levels = [score_mark(results, f"{row} {share} facts", 0.0) for row, share, _, _ in _LEVELS]
    for mark, (_, _, label, style) in zip(levels, _LEVELS, strict=True):
        if mark.by_seed and mark.low is not None and mark.high is not None:
            ours.level(mark.mean, f"{label} {mark.mean:.3f}", style, (mark.low, mark.high))
    drawn = [m for marks in by_row.values() for m in marks] + levels
    name = f"OURS: closed-book facts, {model_name(results)}"
    if ours.scores(results, drawn, name, "the full suite's cells tagged figure1", _PERCENT, FACTS_SCORE,
                   bars=f"{ITEM_BARS}, as are bands"):  # fmt: skip
        ours.log_x(_PERCENTS)
    _paper_figure1(theirs, reported)
    return sheet.done()


_PERCENT = "trainable parameters, % of the base model"


def _by_size(results: Results, row: str, task: str = "facts") -> list[Mark]:
    """One mark a size, at its share of the base's parameters."""
    marks = []
    for reference in references(results, [row], task, "figure1", "table1"):
        counts = results.parameters(parse_reference(reference)[:2])
        # Without any record the size is not known; it has no score either.
        x = counts["trainable_percent_of_base"] if counts else float(reference.split()[1].rstrip("%"))
        marks.append(score_mark(results, reference, x))
    return marks


def _paper_figure1(theirs: Panel, reported: dict[str, Any]) -> None:
    for row in HEADLINE:
        label = f"{title(row)} (its Table 1)" if row == "meft" else title(row).replace(" ", "\n")
        theirs.paper(figure1_points(reported, row), *panel.STYLE[row], label)
    for row, share, label, style in _LEVELS:
        if (value := table1_value(reported, row, share, "nq")) is not None:
            theirs.level(value, f"{label} {value:.3f}", style)
    size = reported["figure1"]["base_parameters"] / 1e9
    model = f"{reported['table1']['model']} ({size:.1f} B parameters)"
    theirs.heading(f"PAPER: Figure 1, NQ, {model}", "reported, about 501 items, one run each, no intervals given")
    theirs.log_x(_PERCENTS)
    apart = ["another model, task and scale of scores than on the left; MEFT's only point is from the paper's Table 1"]
    theirs.name_axes(_PERCENT, "NQ accuracy (reported)", apart)
    theirs.grid()


def sizes_by_task(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Table 2: the Parallel Adapter by size on every task, and the paper's two tasks beside it."""
    sheet = Sheet("Which tasks need a large adapter?", 1, 2, 5.4)
    ours, theirs = sheet.panels
    stands_for = {task: paper for paper, task in reported["table1"]["columns"].items()}
    drawn: list[Mark] = []
    counts = {s: results.parameters(("parallel_adapter", s)) for s in _SIZES}
    real = {s: c["trainable_percent_of_base"] if c else float(s.rstrip("%")) for s, c in counts.items()}
    for task, style in TASK_STYLE.items():
        marks = [score_mark(results, f"parallel_adapter {share} {task}", x) for share, x in real.items()]
        ours.marks(marks, *style, f"{task}\n(for {TASK_TITLES[stands_for[task]]})")
        drawn += marks
    name, needs = f"OURS: Parallel Adapter, {model_name(results)}", "parallel_adapter at 0.5 to 40 % on four tasks"
    if ours.scores(results, drawn, name, needs, _PERCENT, "test score (each task's own measure)", bars=ITEM_BARS):
        ours.log_x((0.5, 2, 10, 40))
        ours.axes.set_ylim(0, 1.05 * ours.axes.get_ylim()[1])
    block, unit = reported["table2"], reported["figure1"]["parallel_adapter"]["parameters_per_unit"]
    percents = [100 * size * unit / reported["figure1"]["base_parameters"] for size in block["size"]]
    for paper, task in (("squad", "cloze"), ("toolbench", "tools")):
        theirs.paper(list(zip(percents, block[paper], strict=True)), *TASK_STYLE[task], TASK_TITLES[paper])
    theirs.heading("PAPER: Table 2, LLaMA-7B", "reported, one run each, no intervals given")
    computed = ["computed from R; the percentages printed there are 0.8 times these"]
    theirs.name_axes(_PERCENT, "score (reported)", computed)
    theirs.log_x((0.5, 1, 2, 5, 10, 20))
    theirs.axes.set_ylim(0, None)
    theirs.grid()
    return sheet.done()


def pareto(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Facts against what a method holds on the device, and against what it trains."""
    sheet = Sheet("Which method scores best for its device memory and its size?", 2, 1, 9.6)
    rows = [row for row in (*TABLE_ROWS, *PEERS) if row != "base"]
    base = score_mark(results, "base 0% facts", 0.0)
    bytes_held = ("bytes held on the device for training beside the base, MiB (accounted: parameters, gradients, "
                  "moments; for methods on the host the neurons in flight)")  # fmt: skip
    for own, name, x, xs_of, ticks in (
        (sheet.panels[0], f"Against device memory, {model_name(results)}", bytes_held, _device_mib, _MIBS),
        (sheet.panels[1], "The same scores against trainable parameters", "trainable parameters", _trainable, _COUNTS),
    ):
        drawn: list[Mark] = []
        shown: list[Mark] = []
        for row in rows:
            found = references(results, [row], "facts", "figure1", "table1")
            marks = [score_mark(results, r, at) for r, at in zip(found, xs_of(results, found), strict=True)]
            # A point without its place on the x axis is left out of the panel, not of the count of gaps.
            placed = sorted((m for m in marks if m.x == m.x and m.x > 0), key=lambda m: m.x)
            if row in _NAMED:
                own.marks(placed, *panel.STYLE[row], title(row), light=row not in (*HEADLINE, "full"))
            else:
                own.marks(placed, "#AAAAAA", panel.STYLE[row][1], connect=False, light=True)
            drawn += marks
            shown += placed
        others = ", ".join(title(row).replace(", ", " ") for row in rows if row not in _NAMED)
        notes = [f"grey points: {others}", "broad grey line: Pareto front (no smaller one beats it)"]
        if own.scores(results, drawn, name, "the full suite's Table 1 on facts", x, FACTS_SCORE, bars=ITEM_BARS,
                      notes=notes, grid="both"):  # fmt: skip
            own.log_x(ticks)
            front = pareto_front(shown)
            own.axes.step([m.x for m in front], [m.mean for m in front], where="post", color=panel.GREY, linewidth=5,
                          alpha=0.3, zorder=0, label="Pareto front")  # fmt: skip
        if base.by_seed:
            own.level(base.mean, f"base model {base.mean:.3f}")
    return sheet.done()


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
    sheet = Sheet("How many facts does an adapter hold?", 1, 2, 5.4)
    per_bit, recall = [], []
    for row, share in CAPACITY_ROWS:
        places = sorted([(taught, f" / {taught} facts") for taught in CAPACITY] + [(900, "")])
        bits = [measure_mark(results, "bits_per_parameter", f"{row} {share} facts{v}", n // 6 * 6) for n, v in places]
        held = [score_mark(results, f"{row} {share} facts{v}", n // 6 * 6, "recall", "contains") for n, v in places]
        light = (row, share) == ("parallel_adapter", "2%")
        colour, marker = panel.STYLE[row]
        name = f"{title(row)}\n{results.size((row, share))}"
        for own, marks in zip(sheet.panels, (bits, held), strict=True):
            own.marks(marks, colour, "v" if light else marker, name, light=light)
        per_bit += bits
        recall += held
    x, needs = "facts taught (each seen equally often)", "the full suite's cells tagged capacity"
    for own, marks, name, y in (
        (sheet.panels[0], per_bit, f"Bits recalled, 10 a fact, {model_name(results)}", "bits per trainable parameter"),
        (sheet.panels[1], recall, "Recall of the facts taught", "share of training questions answered"),
    ):
        if own.scores(results, marks, name, needs, x, y, bars=ITEM_BARS):
            own.log_x((300, 900, 1800))
            own.axes.set_ylim(0, None)
    return sheet.done()
