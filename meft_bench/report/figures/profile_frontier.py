"""The figure that a reader decides by: what fits a card, how large and how fast."""

from collections.abc import Sequence
from typing import Any

from meft_bench.profile import best
from meft_bench.report.figures import panel
from meft_bench.report.figures.panel import Panel, Sheet, line_style
from meft_bench.report.records.profiles import COMMAND, Profile

_MILLION = 1e6
_LEVELS = (1, 8, 32)
"""Micro-batches of the panels, where the profile has them."""
_OURS = ((panel.RED, "D"), (panel.PURPLE, "d"), ("#882255", "v"), (panel.BROWN, "<"), ("#AA4499", ">"))
_OTHERS = ((panel.GREEN, "^"), (panel.BLUE, "o"), (panel.ORANGE, "s"), (panel.SKY, "P"), (panel.BLACK, "X"),
           ("#332288", "h"), ("#999933", "*"))  # fmt: skip
_BEATEN = "#BBBBBB"
Series = tuple[str, str, bool]


def frontier(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """A panel for each accumulation, on the first profile."""
    profile = profiles[0]
    counts = profile.settings["accumulations"]
    levels = [a for a in _LEVELS if a in counts] or counts[:1]
    if len(levels) < 2:
        levels = sorted({counts[0], counts[-1]})
    sheet = Sheet("What fits the card: how large, and how fast?", len(levels), 1, 0.8 + 3.9 * len(levels))
    found = [*profile.points(profile.card), *profile.ends()]
    colours = _colours(found, levels)
    for own, accumulation in zip(sheet.panels, levels, strict=True):
        _panel(own, profile, [p for p in found if p.fits(accumulation)], accumulation, colours)
    s = profile.settings
    sheet.note(
        f"{profile.model}, {s['card_title']}, host: {s['host_title']}; micro-batch {s['batch']} x {s['seq']}. "
        "Coloured: at some size no other method that fits is faster. Grey: at every size another is."
    )
    return sheet.done()


def _panel(
    own: Panel, profile: Profile, found: Sequence[best.Point], accumulation: int, colours: dict[Series, tuple[str, str]]
) -> None:
    own.heading(
        f"{accumulation} micro-batch{'es' * (accumulation > 1)} a step", profile.evidence if found else "not run"
    )
    if not found:
        own.not_run("rows that fit", COMMAND)
        return
    leading = {_series(p) for p in best.frontier(found, accumulation)}
    ours = best.frontier((p for p in found if p.family == best.OURS), accumulation)
    named = leading | ({_series(ours[-1])} if ours and not leading & set(map(_series, ours)) else set())
    for series in dict.fromkeys(map(_series, found)):
        of_series = sorted((p for p in found if _series(p) == series), key=lambda p: p.trainable)
        xs, ys = [p.trainable / _MILLION for p in of_series], [p.tokens_per_s[accumulation] for p in of_series]
        look: dict[str, Any] = {"linestyle": line_style(profile.evidence)}
        if series in leading:
            colour, marker = colours[series]
            look |= {"marker": marker, "markersize": 6}
        else:
            colour, width, above = (panel.GREY, 1.5, 2) if series in named else (_BEATEN, 0.8, 1)
            look |= {"linewidth": width, "marker": ".", "markersize": 4, "zorder": above}
        name = of_series[0].name.replace(", ", ",\n", 1) if series in named else ""
        own.line(xs, ys, colour, name, **look)
    own.log_plain("x", "y")
    own.name_axes("trainable parameters, millions (log)", "tokens a second (log)")
    own.grid("both")


def _series(point: best.Point) -> Series:
    return point.variant, point.union, point.checkpointing


def _colours(found: Sequence[best.Point], levels: Sequence[int]) -> dict[Series, tuple[str, str]]:
    """A colour and a marker for every series that leads in some panel."""
    leading = {_series(p): p.family == best.OURS for a in levels for p in best.frontier(found, a)}
    ours, others = ([s for s, own in leading.items() if own is kind] for kind in (True, False))
    return {s: looks[i % len(looks)] for own, looks in ((ours, _OURS), (others, _OTHERS)) for i, s in enumerate(own)}
