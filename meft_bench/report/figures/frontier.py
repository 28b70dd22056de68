"""Knowledge gained against what was forgotten: a curve for each method over its learning rates."""

from collections.abc import Sequence
from typing import Any

from meft_bench.harness import frontier as suite
from meft_bench.harness import smollm2
from meft_bench.report.figures import output, panel
from meft_bench.report.figures.marks import Mark, model_name
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.records import real
from meft_bench.report.records.frontier import Point, made, sentence
from meft_bench.report.records.results import Results, title

NAME = "frontier_smollm2"
TITLE = "Who learns the facts and forgets least"
CAPTION = (
    "SmolLM2-135M, taught invented people: the share of answers right in wordings that were not trained, against the "
    "loss on text that the base writes by itself, above the base's. One curve a method, a point for each learning "
    "rate, of which the highest is the one that its sweep chose for the score; updates of distinctive neurons alone "
    "were not swept and begin at MEFT's (mean over seeds, a small dot one seed); further left is less forgotten, "
    "higher more learnt. The sentence at the foot is computed from the records."
)
_HEADINGS = {
    "parameters": "Equal trainable parameters (10 % of the base); beside them full fine-tuning (100 %)",
    "bytes": "Equal bytes on the device (MEFT at 10 %, others at 4 %); beside them full fine-tuning, with far more",
    "sizes": "MEFT at growing sizes, its rows on the host",
    "peers": "Peers: sparse ones at 10 %, and the whole base in little memory",
}
_ON_REAL = "Adapters of 10 % of the base, MEFT at 34 % (square), and the whole base"
_UPDATED = (
    "Half (quarter) updated: MEFT that updates at most half (a quarter) of a layer's neurons, the most distinctive."
)
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZE_STYLE = {"10%": "o", "34%": "s", "40%": "s", "150%": "D"}


def frontier(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """A panel for each group of curves; up and to the left is better."""
    points = made(results)
    question = f"Who learns the facts and forgets least? On the {model_name(results)}"
    sheet = Sheet(question if points else "Who forgets least?", len(suite.GROUPS), 1, 0.9 + 4.2 * len(suite.GROUPS))
    for own, (name, curves) in zip(sheet.panels, suite.GROUPS.items(), strict=True):
        drawn = _curves(own, points, (*curves, suite.FULL), suite.TASK, name)
        if own.scores(results, drawn, _HEADINGS[name], "the suite frontier", "forgotten: loss on the base's own text "
                      "above the base's, nats a token (log; left is better)", "share of answers right (facts, test)",
                      grid="both", command="make replicate SUITE=frontier"):  # fmt: skip
            _axes(own)
    if points:
        sheet.note(f"{sentence(results)}\n{_UPDATED}")
    return sheet.done()


def draw(results: Results | None, formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content of the figure of the real model in these formats; empty while nothing of it was run."""
    if results is None or not made(results, suite.REAL_TASK):
        return {}
    with output.settings():
        return output.save(NAME, on_real(results), formats)


def on_real(results: Results) -> Any:
    """One panel of SmolLM2-135M."""
    points = made(results, suite.REAL_TASK)
    sheet = Sheet(f"Who learns the facts and forgets least? On {real.NAME}", 1, 1, 5.8)
    (own,) = sheet.panels
    drawn = _curves(own, points, suite.REAL_CURVES, suite.REAL_TASK, "real")
    command = f"make replicate SUITE=frontier MODEL={smollm2.NAME}"
    if own.scores(results, drawn, _ON_REAL, "the suite frontier", "forgotten: loss on text that the base writes, above "
                  "the base's, nats a token (log; left is better)", "share of answers right (people, test)",
                  grid="both", command=command):  # fmt: skip
        _axes(own)
    sheet.note(f"{sentence(results, suite.REAL_TASK)}\n{_UPDATED}")
    return sheet.done()


def _curves(own: Panel, points: Sequence[Point], curves: Sequence[suite.Curve], task: str, group: str) -> list[Mark]:
    """Draw them; returns the marks."""
    drawn: list[Mark] = []
    for curve in curves:
        of_curve = sorted((p for p in points if p.line == (curve.row, curve.share)), key=lambda p: p.lost)
        marks = [_mark(p, task) for p in of_curve if p.lost > 0]
        colour, marker = panel.STYLE[curve.row]
        if (group == "sizes" and curve.row != "full") or (group == "real" and curve.share == "34%"):
            marker = _SIZE_STYLE[curve.share]
        own.marks(marks, colour, marker, _label(curve, group), light=curve.row == "full")
        drawn += marks
    return drawn


def _axes(own: Panel) -> None:
    own.log_x(_TICKS)
    own.axes.set_ylim(-0.03 if own.axes.get_ylim()[0] < 0 else 0, 1.03)


def _label(curve: suite.Curve, group: str) -> str:
    short = {"meft_distinctive": "quarter updated", "meft_distinctive_half": "half updated"}
    words = f"MEFT, {short[curve.row]}" if curve.row in short else title(curve.row)
    if group == "real":
        return f"{words}, {curve.share}" if curve.share == "34%" else words.replace(", ", ",\n")
    return f"{words},\n{curve.share}" if group != "parameters" and curve.row != "full" else words.replace(", ", ",\n")


def _mark(point: Point, task: str) -> Mark:
    """What was forgotten is the place, the score the value; bars would hide the curves, so seeds are dots alone."""
    return Mark(
        x=point.lost, by_seed=point.score.by_seed, reference=f"{' '.join(point.line)} {task} / {point.rate}",
        evidence=point.score.evidence, stale=point.score.stale or point.forgotten.stale,
    )  # fmt: skip
