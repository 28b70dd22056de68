"""Knowledge gained against what was forgotten: a curve for each method over its learning rates."""

from collections.abc import Sequence
from typing import Any

from meft_bench.harness import frontier as suite
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, model_name
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.records.frontier import Point, made, sentence
from meft_bench.report.records.results import Results, title

_HEADINGS = {
    "parameters": "Equal trainable parameters (10 % of the base)",
    "bytes": "Equal bytes on the device (MEFT at 10 %, others at 4 %)",
    "sizes": "MEFT at growing sizes, its rows on the host",
    "peers": "Peers: sparse ones at 10 %, and the whole base in little memory",
}
_UPDATED = (
    "Half (quarter) updated: MEFT that updates at most half (a quarter) of a layer's neurons, the most distinctive."
)
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SIZE_STYLE = {"10%": "o", "40%": "s", "150%": "D"}


def frontier(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """A panel for each group of curves; up and to the left is better."""
    points = made(results)
    sheet = Sheet(_question(results, points), len(suite.GROUPS), 1, 0.9 + 4.2 * len(suite.GROUPS))
    for own, (name, curves) in zip(sheet.panels, suite.GROUPS.items(), strict=True):
        _panel(own, results, points, name, curves)
    if points:
        sheet.note(f"{sentence(results)}\n{_UPDATED}")
    return sheet.done()


def _question(results: Results, points: Sequence[Point]) -> str:
    return f"Who learns the facts and forgets least? On the {model_name(results)}" if points else "Who forgets least?"


def _panel(own: Panel, results: Results, points: Sequence[Point], name: str, curves: Sequence[suite.Curve]) -> None:
    drawn: list[Mark] = []
    for curve in (*curves, suite.FULL):
        of_curve = sorted((p for p in points if p.line == (curve.row, curve.share)), key=lambda p: p.lost)
        marks = [_mark(p) for p in of_curve if p.lost > 0]
        colour, marker = panel.STYLE[curve.row]
        if name == "sizes" and curve.row != "full":
            marker = _SIZE_STYLE[curve.share]
        own.marks(marks, colour, marker, _label(curve, name), light=curve.row == "full")
        drawn += marks
    if own.scores(results, drawn, _HEADINGS[name], "the suite frontier", "forgotten: loss on the base's own text above "
                  "the base's, nats a token (log; left is better)", "share of answers right (facts, test)", grid="both",
                  command="make replicate SUITE=frontier"):  # fmt: skip
        own.log_x(_TICKS)
        own.axes.set_ylim(0, 1.03)


def _label(curve: suite.Curve, name: str) -> str:
    short = {"meft_distinctive": "quarter updated", "meft_distinctive_half": "half updated"}
    words = f"MEFT, {short[curve.row]}" if curve.row in short else title(curve.row)
    return f"{words},\n{curve.share}" if name != "parameters" and curve.row != "full" else words.replace(", ", ",\n")


def _mark(point: Point) -> Mark:
    """What was forgotten is the place, the score the value; bars would hide the curves, so seeds are dots alone."""
    return Mark(
        x=point.lost, by_seed=point.score.by_seed, reference=f"{' '.join(point.line)} {suite.TASK} / {point.rate}",
        evidence=point.score.evidence, stale=point.score.stale or point.forgotten.stale,
    )  # fmt: skip
