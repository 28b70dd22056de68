"""Figures of what one choice changes: Key-Experts and gate, K, N, the ablations, and what training forgets."""

import textwrap
from collections.abc import Sequence
from typing import Any

from meft_bench.harness.suites import ROWS
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, gaps, how, model_name, references, score_mark, title, values_mark
from meft_bench.report.figures.panel import draw_marks, draw_paper, grid, log_axis
from meft_bench.report.figures.size import TASK_STYLE
from meft_bench.report.records.quantities import Values, difference, measure, parse_reference
from meft_bench.report.records.results import Results

_ITEM_BARS = "bars: 95 % over items"
_KE = (("meft", "with Key-Experts", panel.RED, "D", -0.1), ("meft_no_ke", "without Key-Experts", panel.BLUE, "o", 0.1))
_GATES = (
    ("gate: router score", panel.RED, "D", ("meft_gate_no_search", "meft")),
    ("no gate", panel.BLUE, "o", ("meft_no_ke", "meft_gate_none")),
)
"""Series, then its rows without and with search."""
_KEPT = ((2, 4, 8, 16, 32, 104), (4, 12, 16, 64, 416))


def figure4(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """MEFT with and without Key-Experts on four tasks; the search and the gate apart."""
    figure = panel.new_figure(13, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    by_task = []
    for row, label, colour, marker, offset in _KE:
        marks = [score_mark(results, f"{row} 10% {task}", i + offset) for i, task in enumerate(TASK_STYLE)]
        draw_marks(left, marks, colour, marker, label, connect=False)
        by_task += marks
    apart = []
    for (label, colour, marker, rows), offset in zip(_GATES, (-0.03, 0.03), strict=True):
        marks = [score_mark(results, f"{row} 10% facts", i + offset) for i, row in enumerate(rows)]
        draw_marks(right, marks, colour, marker, label)
        apart += marks
    _categories(left, list(TASK_STYLE), by_task, "meft and meft_no_ke at 10 % on four tasks")
    sides = ["all neurons searched", "Key-Experts search\n(4 of 16 experts)"]
    _categories(right, sides, apart, "the rows meft, meft_no_ke, meft_gate_none, meft_gate_no_search")
    panel.heading(left, f"OURS: MEFT at 10 %, {model_name(results)}", how(by_task, _ITEM_BARS), 72)
    paper = f"the paper (reported, no numbers printed): {reported['no_numbers_printed']['figure4']}"
    left.set_xlabel("\n".join([*gaps(results, by_task), *_wrapped(paper)]))
    left.set_ylabel("test score (headline metric of the task)")
    panel.heading(right, "OURS: search and gate apart, facts", how(apart, _ITEM_BARS), 54)
    right.set_xlabel("\n".join(gaps(results, apart, 60)) or "which neurons a token may keep")
    right.set_ylabel("facts test: answer contained in output")
    return figure


def figure6(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Score against K without Key-Experts."""
    figure = panel.new_figure(13, 5.4)
    ours, theirs = figure.subplots(1, 2)
    drawn: list[Mark] = []
    for share, kept, own, colour, marker in (
        ("10%", _KEPT[0], 8, panel.BLUE, "o"),
        ("40%", _KEPT[1], 16, panel.RED, "D"),
    ):
        rows = ["meft_no_ke" if k == own else f"meft_no_ke_k{k}" for k in kept]
        marks = [score_mark(results, f"{row} {share} facts", k) for row, k in zip(rows, kept, strict=True)]
        draw_marks(ours, marks, colour, marker, f"R = {kept[-1]} ({results.size(('meft_no_ke', share))})")
        drawn += marks
    _sweep_panel(ours, drawn, (2, 4, 8, 16, 32, 64, 104, 416), "the full suite's cells tagged figure6")
    panel.heading(ours, f"OURS: facts, without Key-Experts, {model_name(results)}", how(drawn, _ITEM_BARS))
    ours.set_xlabel("\n".join(["K, neurons kept a token (the last is R: dense)", *gaps(results, drawn)]))
    ours.set_ylabel("facts test: answer contained in output")
    for (neurons, curve), colour, marker in zip(
        reported["figure6"].items(), (panel.BLUE, panel.RED), "oD", strict=True
    ):
        points = list(zip(curve["kept"], curve["accuracy"], strict=True))
        draw_paper(theirs, points, colour, marker, f"R = {neurons}")
    _paper_panel(theirs, "Figure 6", "K, neurons kept a token (the last is R: dense)", (4, 16, 64, 256, 1024, 4096))
    return figure


def figure7(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Score against N at equal candidates."""
    figure = panel.new_figure(13, 5.4)
    ours, theirs = figure.subplots(1, 2)
    experts = sorted([16, *(int(row.removeprefix("meft_n")) for row in ROWS if row.removeprefix("meft_n").isdigit())])
    rows = ["meft" if n == 16 else f"meft_n{n}" for n in experts]
    drawn = [score_mark(results, f"{row} 10% facts", n) for row, n in zip(rows, experts, strict=True)]
    draw_marks(ours, drawn, *panel.STYLE["meft"], "MEFT, R = 96 (10%)")
    _sweep_panel(ours, drawn, experts, "the full suite's cells tagged figure7")
    panel.heading(ours, f"OURS: facts, {model_name(results)}", how(drawn, _ITEM_BARS))
    ours.set_xlabel("\n".join(["N, experts (24 candidates a token throughout: P = N / 4)", *gaps(results, drawn)]))
    ours.set_ylabel("facts test: answer contained in output")
    for (neurons, curve), colour, marker in zip(
        reported["figure7"].items(), (panel.BLUE, panel.RED), "oD", strict=True
    ):
        points = sorted(zip(curve["experts"], curve["accuracy"], strict=True))
        draw_paper(theirs, points, colour, marker, f"R = {neurons}")
    label = "N, experts (the two largest were probably run with N / 10 and P = 20)"
    _paper_panel(theirs, "Figure 7", label, (6, 15, 30, 60, 120, 240, 800), "lower right")
    return figure


def _sweep_panel(axes: Any, drawn: Sequence[Mark], ticks: Sequence[float], needs: str) -> None:
    grid(axes)
    if not any(m.by_seed for m in drawn):
        panel.not_run(axes, needs)
        return
    log_axis(axes, ticks, 2)
    axes.legend(loc="best")


def _paper_panel(axes: Any, name: str, label: str, ticks: Sequence[float], place: str = "best") -> None:
    axes.set_title(f"PAPER: {name}, NQ, LLaMA-7B\nreported, about 501 items (standard error 0.022), one run each")
    axes.set_xlabel(label)
    axes.set_ylabel("NQ accuracy (reported)")
    log_axis(axes, ticks, 2)
    axes.legend(loc=place)
    grid(axes)


def ablations(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Every ablation minus what it changes, seed by seed."""
    figure = panel.new_figure(10.5, 6.4)
    axes = figure.subplots()
    pairs = [(ref, f"meft 10% {ref.split()[2]}") for ref in _ablated(results, "facts") + _ablated(results, "cloze")]
    pairs = [(ref, base.replace("10%", ref.split()[1])) for ref, base in pairs]
    marks = [
        values_mark(results, difference(results, ref, base), ref, -float(i), interval=True)
        for i, (ref, base) in enumerate(pairs)
    ]
    draw_marks(axes, marks, *panel.STYLE["meft"], connect=False, flip=True)
    axes.axvline(0, color=panel.GREY, linewidth=1.2)
    _dot_rows(axes, [_ablation_name(results, ref) for ref, _ in pairs], marks, "the cells tagged ablations", "{:+.3f}")
    axes.set_title(
        f"Ablations minus MEFT of the same size and task, {model_name(results)}\n"
        f"{how(marks, 'bars: 95 % t-interval over seeds')}"
    )
    axes.set_xlabel("\n".join(["difference of test scores (right of 0: better than MEFT)", *gaps(results, marks, 90)]))
    return figure


def _ablated(results: Results, task: str) -> list[str]:
    return references(results, [r for r in ROWS if r.startswith("meft_")], task, "ablations")


def _ablation_name(results: Results, reference: str) -> str:
    row, share, task = reference.split()
    extra = ", ".join([results.size((row, share))] * (share != "10%") + [task] * (task != "facts"))
    return title(row).removeprefix("MEFT, ") + (f" ({extra})" if extra else "")


def forgetting(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """How much worse a run is on the base's own text than the base."""
    rows = [row for row in ROWS if row != "base"]
    found = references(results, rows, "facts", "table1")
    figure = panel.new_figure(10.5, 2.2 + 0.27 * max(10, len(found)))
    axes = figure.subplots()
    base = measure(results, "base_nats", "base 0% facts")
    marks = [_forgotten(results, base, ref, -float(i)) for i, ref in enumerate(found)]
    for row in dict.fromkeys(ref.split()[0] for ref in found):
        own = [m for m in marks if m.reference.split()[0] == row]
        draw_marks(axes, own, *panel.STYLE[row], connect=False, flip=True)
    axes.axvline(0, color=panel.GREY, linewidth=1.2)
    lines = [parse_reference(ref)[:2] for ref in found]
    titles = [f"{title(row)} {results.size((row, share))}" for row, share in lines]
    _dot_rows(axes, titles, marks, "Table 1 on facts with its base", "{:.2f}")
    axes.set_title(
        f"Forgetting: loss on the base's own text after training on facts\n{model_name(results)}; {how(marks)}"
    )
    level = f"base: {sum(base.by_seed.values()) / len(base.by_seed):.3f} nats" if base.by_seed else "base not run"
    axes.set_xlabel("\n".join([f"nats per token above the base ({level})", *gaps(results, marks, 90)]))
    return figure


def _forgotten(results: Results, base: Values, reference: str, x: float) -> Mark:
    """The base and its texts are the same for every seed, so its mean serves those seeds it was not run with."""
    own = measure(results, "base_nats", reference)
    if not base.by_seed:
        return values_mark(results, Values({}), reference, x)
    level = sum(base.by_seed.values()) / len(base.by_seed)
    above = Values({s: v - level for s, v in own.by_seed.items()}, stale=own.stale or base.stale, evidence=own.evidence)
    return values_mark(results, above, reference, x)


def _dot_rows(axes: Any, titles: Sequence[str], marks: Sequence[Mark], needs: str, form: str) -> None:
    """Names on the left, means on the right, one row a mark at y = 0, -1, -2 ..."""
    if not any(m.by_seed for m in marks):
        panel.not_run(axes, needs)
        return
    axes.set_yticks([m.x for m in marks], labels=titles)
    axes.set_ylim(-len(marks) + 0.4, 0.6)
    for mark in marks:
        text = form.format(mark.mean) if mark.by_seed else mark.state
        axes.text(1.01, mark.x, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    grid(axes, "both")


def _categories(axes: Any, titles: Sequence[str], marks: Sequence[Mark], needs: str) -> None:
    grid(axes)
    if not any(m.by_seed for m in marks):
        panel.not_run(axes, needs)
        return
    axes.set_xticks(range(len(titles)), labels=titles)
    axes.set_xlim(-0.5, len(titles) - 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), high + 0.15 * (high - min(0.0, low)))
    axes.legend(loc="upper left", ncols=2)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 78)
