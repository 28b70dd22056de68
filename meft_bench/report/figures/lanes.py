"""Bars of time: what lasts how long in one step, stacked by part or laid out in lanes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meft_bench.report.figures import panel
from meft_bench.report.figures.panel import Panel

_GROUPS = {
    "retrieval": "find neurons", "launch": "kernel launches",
    "select": "find neurons", "gather": "gather rows", "add_gradients": "add up gradients",
    "add_router_gradient": "add up gradients", "adam": "Adam", "zero_grad": "Adam", "model": "model",
    "layer": "model", "adapter": "adapter",
}  # fmt: skip


_DEVICES = ("gpu", "device")
"""Lanes of what computes the model."""
_LAST = "update"


def group(name: str) -> str:
    """What an event of a step is called: copies by their way, the rest by what is done."""
    ways = {"d2h": "to the host", "h2d": "to the device"}
    return ways.get(name[-3:]) or _GROUPS.get(name.replace(" ", "_"), name.replace("_", " "))


def time_unit(longest_s: float) -> tuple[str, float]:
    """Seconds or milliseconds, and how many of them a second has."""
    return ("s", 1.0) if longest_s >= 1 else ("ms", 1000.0)


def stack(
    axes: Any, y: float, parts: Iterable[tuple[float, str]], height: float = 0.6, hatch: str = "", **look: Any
) -> float:
    """One bar of (width, colour) from left to right; returns where it ends."""
    left = 0.0
    for width, colour in parts:
        if width:
            axes.barh(y, width, left=left, height=height, color=colour, hatch=hatch, **look)
            left += width
    return left


def draw_lanes(own: Panel, events: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> None:
    """Spans of every lane, what they are beside it, and the phases above; titles: lane -> its name, top to bottom."""
    axes, (unit, scale) = own.axes, time_unit(max(e["end_s"] for e in events))
    kinds = list(dict.fromkeys(group(e["name"]) for e in events))
    for y, lane in enumerate(titles):
        in_lane = [(group(e["name"]), e["start_s"] * scale, e["end_s"] * scale) for e in events if e["lane"] == lane]
        here = [k for k in kinds if any(k == kind for kind, _, _ in in_lane)]
        for i, kind in enumerate(here):
            colour = panel.PALETTE[kinds.index(kind) % len(panel.PALETTE)]
            spans = [(start, end - start) for k, start, end in in_lane if k == kind]
            # The edge keeps a span of microseconds visible.
            axes.broken_barh(spans, (-y - 0.35, 0.7), color=colour, linewidth=0.5)
            at = -y + min(0.19, 0.96 / len(here)) * ((len(here) - 1) / 2 - i)
            axes.text(1.01, at, f"■ {kind}", color=colour, fontsize=9, va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    for phase, start, end in _phases(events):
        axes.axvline(start * scale, color=panel.GREY, linewidth=1, linestyle=":")
        axes.text((start + end) / 2 * scale, 0.45, phase, ha="center", va="bottom")
    axes.set_yticks([-i for i in range(len(titles))], labels=list(titles.values()))
    axes.set_ylim(0.5 - len(titles), 0.8)
    axes.set_xlim(left=0)
    own.name_axes(f"{unit} from the start of the step")


def _phases(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(phase, start, end) in seconds, one behind the other. The device says when forward and backward begin and when
    backward ends; host threads work on the last and the next phase beside it."""
    by_device = [e for e in events if e["lane"] in _DEVICES] or list(events)
    names = [n for n in dict.fromkeys(e["phase"] for e in events) if n != _LAST]
    starts = {n: min((e["start_s"] for e in by_device if e["phase"] == n), default=None) for n in names}
    marks = sorted((at, n) for n, at in starts.items() if at is not None)
    end = max(e["end_s"] for e in events)
    if any(e["phase"] == _LAST for e in events):
        marks.append((max((e["end_s"] for e in by_device if e["phase"] in names), default=0.0), _LAST))
    return [(n, at, marks[i + 1][0] if i + 1 < len(marks) else end) for i, (at, n) in enumerate(marks)]
