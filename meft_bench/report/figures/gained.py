"""The real model: what each method and size learnt, against what it made the model forget."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from meft_bench.report.figures import output, panel
from meft_bench.report.figures.marks import Mark, score_mark, title
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.records import real as on_real
from meft_bench.report.records.results import Line, Results

NAME = "gained_lost"
TITLE = "What was learnt, and what was forgotten"
CAPTION = (
    "SmolLM2-135M after it was taught. Higher: more learnt, the mean over seeds with the 95 % interval over "
    "questions; a small dot is one seed. Further left: less forgotten, that is, how far the predictions on a text "
    "that nobody trained on moved from the base's (Kullback-Leibler divergence, mean over seeds). A line joins the "
    "sizes of a method: the pale small marker is 2 % of the base's parameters, the others are 10 % and more; full "
    "fine-tuning trains all. Only places that have all their seeds are drawn. Learning rates were chosen for what is "
    "learnt, not for what stays."
)
_NAMED = ("lora", "lora_ffn", "lora_all", "adapter_h", "parallel_adapter", "meft", "full")
_VARIANTS = {"meft_no_ke": "d", "meft_union": "v", "adapter_h_spread": "p"}
"""Of MEFT and AdapterH, drawn pale and told below the axes."""
_PANELS = {
    "people": ("test", "invented people, asked in another wording"),
    "nq": ("recall", "NQ, asked again as taught"),
}
_SMALL = "2%"
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


def draw(results: Results | None, formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content of the figure in these formats; empty while no real model leads."""
    if results is None or not on_real.leads(results):
        return {}
    with output.settings():
        return output.save(NAME, gained(results), formats)


def gained(results: Results) -> Any:
    """A panel for each main task that has a place with all its seeds."""
    tasks = [t for t in _PANELS if any(on_real.whole(results, line, t) for line in results.lines("smollm2"))]
    sheet = Sheet("What does each method learn, and what does it make the model forget?", len(tasks), 1,
                  0.9 + 4.6 * len(tasks))  # fmt: skip
    for own, task in zip(sheet.panels, tasks, strict=True):
        _panel(own, results, task)
    return sheet.done()


def _panel(own: Panel, results: Results, task: str) -> None:
    split, asked = _PANELS[task]
    drawn: list[Mark] = []
    small = False
    for row in (*_NAMED, *_VARIANTS):
        points = _points(results, row, task, split)
        colour, marker = panel.STYLE.get(row, (panel.RED, ""))
        if row in _VARIANTS:
            own.marks([m for _, m in points], colour, _VARIANTS[row], light=True, connect=False)
        else:
            _curve(own, points, colour, marker, title(row))
            small |= any(share == _SMALL for (_, share), _ in points)
        drawn += [m for _, m in points]
    needs = "the suite smollm2"
    notes = [f"a line joins the sizes of a method, of which {_SMALL} is drawn small"] * small
    if any(_points(results, row, task, split) for row in _VARIANTS):
        notes.append(
            "pale: MEFT without Key-Experts (thin diamond), and where a token uses the whole batch's neurons "
            "(triangle); AdapterH from a start as wide as MEFT's (pentagon)"
        )
    if own.scores(results, drawn, f"{on_real.NAME}: {asked}", needs,
                  "forgotten: divergence from the base on other text, nats a token (log; left is better)",
                  "share of answers right", bars="bars: 95 % over questions", notes=notes, grid="both"):  # fmt: skip
        own.log_x(_TICKS)
        own.axes.set_ylim(min(0.0, own.axes.get_ylim()[0]), 1.03)


def _points(results: Results, row: str, task: str, split: str) -> list[tuple[Line, Mark]]:
    """Every size of a row that has all its seeds and was asked what it forgot, small first."""
    found = []
    for line in (x for x in results.lines("smollm2") if x[0] == row and on_real.whole(results, x, task)):
        lost = on_real.divergence(results, line, task).by_seed.values()
        mark = score_mark(results, " ".join((*line, task)), 0.0, split)
        if sum(lost) > 0 and mark.by_seed:  # what changed nothing has no place on a logarithmic axis
            found.append((line, replace(mark, x=sum(lost) / len(lost))))
    return found


def _curve(own: Panel, points: Sequence[tuple[Line, Mark]], colour: str, marker: str, name: str) -> None:
    """The sizes joined by a line, 2 % pale and small, the name at the point furthest right."""
    if not points:
        return
    marks = [m for _, m in points]
    own.line([m.x for m in marks], [m.mean for m in marks], colour, name, linewidth=1.2, alpha=0.7)
    for (_, share), mark in points:
        own.marks([mark], colour, marker, light=share == _SMALL)
