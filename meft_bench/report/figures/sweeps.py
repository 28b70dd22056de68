"""Figures of what one choice changes: Key-Experts and gate, K, N, the ablations, and what training forgets."""

from typing import Any

from meft_bench.harness.rows import ROWS
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, model_name, references, score_mark, title, values_mark
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.figures.size import FACTS_SCORE, ITEM_BARS, TASK_STYLE
from meft_bench.report.records.quantities import changed_row, difference, forgotten, measure, parse_reference
from meft_bench.report.records.results import Results

_KE = (
    ("meft", "with\nKey-Experts", panel.RED, "D", -0.1),
    ("meft_no_ke", "without\nKey-Experts", panel.BLUE, "o", 0.1),
)
_GATES = (
    ("gated by the\nrouter's score", panel.RED, "D", -0.03, ("meft_gate_no_search", "meft")),
    ("no gate", panel.BLUE, "o", 0.03, ("meft_no_ke", "meft_gate_none")),
)
"""Series, then its rows without and with search."""
_KEPT = ((2, 4, 8, 16, 32, 104), (4, 12, 16, 64, 416))
_SIDES = ("all neurons\nsearched", "Key-Experts search\n(4 of 16 experts)")
_CURVES = ((panel.BLUE, "o"), (panel.RED, "D"))
_PLAIN = {
    "router only selects (no gate)": "router only selects, no gate",
    "gate but no search (P = N)": "gate, but all experts searched",
    "lazy Adam": "Adam only for neurons that were used",
    "router init mean key x50": "router starts at 50 times the mean key",
    "router init normal": "router starts at random",
    "preset released": "settings of the authors' code",
    "preset paper": "settings of the paper's text",
    "union reading": "a token uses the whole batch's neurons",
}
"""What an ablation changes, in words that need no reading of the code."""


def figure4(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """MEFT with and without Key-Experts on four tasks; the search and the gate apart."""
    sheet = Sheet("Does searching only some experts cost accuracy?", 1, 2, 5.4)
    left, right = sheet.panels
    by_task, apart = [], []
    for row, label, colour, marker, offset in _KE:
        marks = [score_mark(results, f"{row} 10% {task}", i + offset) for i, task in enumerate(TASK_STYLE)]
        left.marks(marks, colour, marker, label, connect=False)
        by_task += marks
    for label, colour, marker, offset, rows in _GATES:
        marks = [score_mark(results, f"{row} 10% facts", i + offset) for i, row in enumerate(rows)]
        right.marks(marks, colour, marker, label)
        apart += marks
    paper = [f"the paper (reported, no numbers printed): {reported['no_numbers_printed']['figure4']}"]
    if left.scores(results, by_task, f"OURS: MEFT at 10 %, {model_name(results)}",
                   "MEFT at 10 %, with and without Key-Experts, on four tasks", "",
                   "test score (each task's own measure)", bars=ITEM_BARS, notes=paper):  # fmt: skip
        _categories(left, list(TASK_STYLE))
    if right.scores(results, apart, "OURS: search and gate taken apart, facts",
                    "MEFT at 10 % with and without search and gate", "", FACTS_SCORE, bars=ITEM_BARS):  # fmt: skip
        _categories(right, list(_SIDES))
    return sheet.done()


def _categories(own: Panel, titles: list[str]) -> None:
    own.axes.set_xticks(range(len(titles)), labels=titles)
    own.axes.set_xlim(-0.5, len(titles) - 0.5)
    own.axes.set_ylim(min(0.0, own.axes.get_ylim()[0]), 1.06 * own.axes.get_ylim()[1])


def figure6(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Score against K without Key-Experts."""
    sheet = Sheet("How many neurons must a token keep?", 1, 2, 5.0)
    ours, theirs = sheet.panels
    drawn: list[Mark] = []
    for share, kept, own, style in (("10%", _KEPT[0], 8, _CURVES[0]), ("40%", _KEPT[1], 16, _CURVES[1])):
        rows = ["meft_no_ke" if k == own else f"meft_no_ke_k{k}" for k in kept]
        marks = [score_mark(results, f"{row} {share} facts", k) for row, k in zip(rows, kept, strict=True)]
        ours.marks(marks, *style, f"{kept[-1]} neurons\n({results.size(('meft_no_ke', share))})")
        drawn += marks
    x, needs = "K, neurons kept a token (the last keeps all)", "the full suite's cells tagged figure6"
    name = f"OURS: facts, MEFT without Key-Experts, {model_name(results)}"
    if ours.scores(results, drawn, name, needs, x, FACTS_SCORE, bars=ITEM_BARS):
        ours.log_x((2, 4, 8, 16, 32, 104, 416), 2)
    _paper_curves(theirs, reported["figure6"], "kept", "Figure 6", x, (4, 16, 64, 256, 1024, 4096))
    return sheet.done()


def figure7(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Score against N at equal candidates."""
    sheet = Sheet("Does the number of experts matter?", 1, 2, 5.0)
    ours, theirs = sheet.panels
    experts = sorted([16, *(int(row.removeprefix("meft_n")) for row in ROWS if row.removeprefix("meft_n").isdigit())])
    rows = ["meft" if n == 16 else f"meft_n{n}" for n in experts]
    drawn = [score_mark(results, f"{row} 10% facts", n) for row, n in zip(rows, experts, strict=True)]
    ours.marks(drawn, *panel.STYLE["meft"], "96 neurons\n(10%)")
    x, needs = "N, experts (24 candidates a token throughout: P = N / 4)", "the full suite's cells tagged figure7"
    if ours.scores(results, drawn, f"OURS: facts, MEFT, {model_name(results)}", needs, x, FACTS_SCORE, bars=ITEM_BARS):
        ours.log_x(experts, 2)
    x = "N, experts (the two largest were probably run\nwith N / 10 and P = 20)"
    _paper_curves(theirs, reported["figure7"], "experts", "Figure 7", x, (6, 15, 30, 60, 120, 240, 800))
    return sheet.done()


def _paper_curves(theirs: Panel, curves: dict[Any, Any], of: str, name: str, x: str, ticks: tuple[float, ...]) -> None:
    for (neurons, curve), style in zip(curves.items(), _CURVES, strict=True):
        theirs.paper(sorted(zip(curve[of], curve["accuracy"], strict=True)), *style, f"{int(neurons):,}\nneurons")
    theirs.heading(f"PAPER: {name}, NQ, LLaMA-7B",
                   "reported, about 501 items (standard error 0.022), one run each")  # fmt: skip
    theirs.name_axes(x, "NQ accuracy (reported)")
    theirs.log_x(ticks, 2)
    theirs.grid()


def ablations(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Every ablation minus what it changes, seed by seed."""
    sheet = Sheet("Which parts of MEFT does its score need?", height=6.6)
    (own,) = sheet.panels
    own.chars = 66  # the names beside it take the rest
    changed = [r for r in ROWS if r.startswith("meft_")]
    found = [ref for task in ("facts", "cloze") for ref in references(results, changed, task, "ablations")]
    marks = [
        values_mark(results, difference(results, ref, " ".join([changed_row(row), *place])), ref, -float(i),
                    interval=True)
        for i, ref in enumerate(found)
        for row, *place in [ref.split()]
    ]  # fmt: skip
    own.marks(marks, *panel.STYLE["meft"], connect=False, flip=True)
    if own.scores(results, marks, f"One change, minus MEFT without it (same size and task), {model_name(results)}",
                  "the cells tagged ablations", "difference of test scores (right of 0: better than MEFT)", "",
                  bars="bars: 95 % t-interval over seeds", grid="both"):  # fmt: skip
        own.axes.axvline(0, color=panel.GREY, linewidth=1.2)
        _list(own, [_ablation_name(results, ref) for ref in found], marks, "{:+.3f}")
    return sheet.done()


def _ablation_name(results: Results, reference: str) -> str:
    row, share, task = reference.split()
    name = title(row).removeprefix("MEFT, ")
    extra = [f"at {results.size((row, share))}"] * (share != "10%") + [f"on {task}"] * (task != "facts")
    return ", ".join([_PLAIN.get(name, name), *extra])


def forgetting(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """How much worse a run is on the base's own text than the base."""
    found = references(results, [row for row in ROWS if row != "base"], "facts", "table1")
    sheet = Sheet("How much of its own text does the model forget?", height=2.2 + 0.26 * max(10, len(found)))
    (own,) = sheet.panels
    own.chars = 76  # the names beside it take the rest
    base = measure(results, "base_nats", "base 0% facts")
    marks = [values_mark(results, forgotten(results, ref), ref, -float(i)) for i, ref in enumerate(found)]
    for row in dict.fromkeys(ref.split()[0] for ref in found):
        of_row = [m for m in marks if m.reference.split()[0] == row]
        own.marks(of_row, *panel.STYLE[row], connect=False, flip=True)
    level = f"base: {sum(base.by_seed.values()) / len(base.by_seed):.3f} nats" if base.by_seed else "base not run"
    name = f"Loss on the base model's own text after training on facts, {model_name(results)}"
    if own.scores(results, marks, name, "Table 1 on facts with its base", f"nats per token above the base ({level})",
                  "", grid="both"):  # fmt: skip
        own.axes.axvline(0, color=panel.GREY, linewidth=1.2)
        lines = [parse_reference(ref)[:2] for ref in found]
        _list(own, [f"{title(row)} {results.size((row, share))}" for row, share in lines], marks, "{:.2f}")
    return sheet.done()


def _list(own: Panel, titles: list[str], marks: list[Mark], form: str) -> None:
    values = [form.format(m.mean) if m.by_seed else m.state for m in marks]
    own.rows(titles, [m.x for m in marks], values)
