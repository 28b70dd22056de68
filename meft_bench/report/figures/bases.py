"""Each claim's effect against the size of the base that it was tested on."""

from collections.abc import Mapping, Sequence
from typing import Any

from meft_bench.report.claims.entries import Claim, Finding, Ledger, Part
from meft_bench.report.claims.words import SCALE_TITLES, SHORT, seeds_text
from meft_bench.report.figures import output, panel
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.records.results import Results

NAME = "base_sizes"
TITLE = "Each claim's effect against the size of the base"
CAPTION = (
    "One panel for each claim that has a test on SmolLM2-135M. The large marker is the part of the claim that decides "
    "its verdict on that base, mean over seeds with the 95 % t-interval; light markers are its other parts. Open: what "
    "the paper reports with LLaMA-7B. Dashed: the bound that was fixed before the runs. Tasks and tokenisers "
    "differ between bases, so compare signs and sides of the bound, not heights. The smallest base, stories260K "
    "(0.26 M), was run with one seed and so has no verdict; its scores stand in a table."
)
PAPER_PARAMETERS = 6.74e9
"""Of LLaMA-7B."""
_LOOKS = {"small": (panel.BLUE, "o"), "pretrained": (panel.RED, "D"), "scale": (panel.GREEN, "^")}
_COLUMNS = 3
_BASES = {1.07e6: "embedded\n1 M", 1.35e8: "SmolLM2\n135 M", PAPER_PARAMETERS: "LLaMA\n7 B"}
"""Parameters of a base -> its name on the axis."""


def draw(ledger: Ledger, parameters: Mapping[str, float], formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content of the figure in these formats."""
    with output.settings():
        return output.save(NAME, base_sizes(ledger, parameters), formats)


def base_sizes(ledger: Ledger, parameters: Mapping[str, float]) -> Any:
    """The figure; parameters: scale -> number of the base's parameters."""
    claims = [c for c in ledger.claims if c.pretrained is not None]
    rows = -(-len(claims) // _COLUMNS)
    sheet = Sheet("Does a larger base change what holds?", rows, _COLUMNS, 1.2 + 2.7 * rows)
    for own, claim in zip(sheet.panels, claims, strict=False):
        _panel(own, claim, parameters)
    for own in sheet.panels[len(claims) :]:
        own.axes.set_visible(False)
    sheet.note(
        f"Blue circle: {SCALE_TITLES['small']}; orange diamond: {SCALE_TITLES['pretrained']}; green triangle: at the "
        "paper's scale, ours; open square: reported by the paper. Small pale marker: another part of the same claim. "
        "Dashed: a bound fixed beforehand. Up: the claim's own quantity (difference of scores, share, ratio or bytes); "
        "right: the base and its parameters."
    )
    return sheet.done()


def base_parameters(small: Results, pretrained: Results | None, scale: Results) -> dict[str, float]:
    """scale -> parameters of the base, from the records; those of LLaMA-7B where the paper's suite has none."""
    found = {"scale": PAPER_PARAMETERS}
    for name, results in (("small", small), ("pretrained", pretrained), ("scale", scale)):
        made = [r["parameters"]["base"] for r in (results.records() if results else ()) if r["parameters"]]
        if made:
            found[name] = float(made[0])
    return found


def _panel(own: Panel, claim: Claim, parameters: Mapping[str, float]) -> None:
    findings = {w: getattr(claim, w) for w in _LOOKS if w in parameters}
    drawn = [w for w, f in findings.items() if f is not None and _decisive(f) is not None]
    for where in drawn:
        _effects(own, findings[where], parameters[where], *_LOOKS[where])
    if claim.paper is not None:
        own.axes.plot([PAPER_PARAMETERS], [claim.paper], marker="s", markersize=6.5, markerfacecolor="white",
                      markeredgecolor=panel.BLACK, markeredgewidth=1.4, linestyle="none", zorder=3)  # fmt: skip
    bounds = [_decisive(findings[w]) for w in drawn]
    for limit in sorted({x for part in bounds if part is not None for x in part.limits}):
        own.axes.axhline(limit, color=panel.GREY, linestyle="--", linewidth=1.1, zorder=1)
    said = [_said(name, found) for w, name in _SHORT.items() if (found := getattr(claim, w)) is not None]
    own.chars = 34
    own.heading(SHORT.get(claim.id, claim.where), ", ".join(said))
    own.axes.set_xscale("log")
    own.axes.set_xlim(3e5, 3e10)
    own.axes.set_xticks(list(_BASES), labels=list(_BASES.values()))
    own.axes.minorticks_off()
    own.grid()
    if not drawn:
        own.axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=own.axes.transAxes)


_SHORT = {"small": "embedded", "pretrained": "SmolLM2"}


def _said(name: str, finding: Finding) -> str:
    """The verdict, and how many seeds the large marker and its interval are over."""
    return f"{name}: {finding.verdict}" + (f" ({seeds_text(finding)})" if _decisive(finding) is not None else "")


def _decisive(finding: Finding) -> Part | None:
    return finding.decisive if finding.decisive is not None and finding.decisive.mean is not None else None


def _effects(own: Panel, finding: Finding, at: float, colour: str, marker: str) -> None:
    """The part that decides, with its interval, and the others beside it."""
    chosen = _decisive(finding)
    assert chosen is not None and chosen.mean is not None
    others = [p.mean for p in finding.parts if p is not chosen and p.mean is not None]
    own.axes.plot([1.35 * at] * len(others), others, linestyle="none", marker=marker, markersize=4.5, color=colour,
                  alpha=0.35)  # fmt: skip
    low, high = chosen.interval or (chosen.mean, chosen.mean)
    bars = [[max(0.0, chosen.mean - low)], [max(0.0, high - chosen.mean)]]
    own.axes.errorbar([at], [chosen.mean], yerr=bars, color=colour, marker=marker, markersize=7, zorder=4)
