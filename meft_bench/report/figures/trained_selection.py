"""The figure of a trained real model's selection: U/R by layer, and how it grows with the tokens of a step."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from meft_bench.report.figures import output
from meft_bench.report.figures.panel import SERIES, Panel, Sheet
from meft_bench.report.tables.trained_selection import NAME, about

FIGURE = (
    "How many neurons a micro-batch of a trained real model needs",
    "Above: U/R of every layer for a micro-batch of 512 tokens, after training (markers) and before (dotted). Below: "
    "U/R after training, mean over the layers, against the tokens of a micro-batch, or of all micro-batches of a step "
    "together. Measured.",
)
_TOKENS = 512


def draw(log: Mapping[str, Any] | None, formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content in these formats; empty without a log."""
    if log is None:
        return {}
    with output.settings():
        return output.save(NAME, _figure(log), formats)


def _figure(log: Mapping[str, Any]) -> Any:
    sheet = Sheet("How many of R neurons does a micro-batch need?", 2, 1, 8.0)
    layers, tokens = sheet.panels
    entries = list(zip(log["entries"], SERIES, strict=False))
    _layers(layers, entries)
    _tokens(tokens, entries)
    sheet.note(f"{about(log)}; measured.")
    return sheet.done()


_Lines = Sequence[tuple[Mapping[str, Any], tuple[str, str]]]


def _layers(own: Panel, entries: _Lines) -> None:
    stated = _nearest(entries[0][0], "after")
    own.heading(f"by layer, {stated} tokens", "after training; dotted: before")
    for entry, (colour, marker) in entries:
        before, after = (_points(entry, when).get(stated, []) for when in ("before", "after"))
        own.line(range(1, len(before) + 1), before, colour, linestyle=":", linewidth=1.1)
        label = f"R = {entry['neurons']:,}"
        own.line(range(1, len(after) + 1), after, colour, label, marker=marker, markersize=5)
    own.whole_x()
    _frame(own, "layer")


def _tokens(own: Panel, entries: _Lines) -> None:
    own.heading("by tokens, mean over the layers", "after training; A micro-batches of T tokens are A T tokens")
    for entry, (colour, marker) in entries:
        found = {t: statistics.fmean(shares) for t, shares in _points(entry, "after").items()}
        own.line(list(found), list(found.values()), colour, f"R = {entry['neurons']:,}, K = {entry['kept']}",
                 marker=marker, markersize=5)  # fmt: skip
    own.log_x(sorted({t for entry, _ in entries for t in _points(entry, "after")}), base=2)
    _frame(own, "tokens (log)")


def _frame(own: Panel, x: str) -> None:
    own.axes.set_ylim(0, 1.05)
    own.name_axes(x, "U/R")
    own.grid("y")


def _points(entry: Mapping[str, Any], when: str) -> dict[int, list[float]]:
    return {p["tokens"]: p["share_by_layer"] for p in (entry.get(when) or {}).get("unions", ())}


def _nearest(entry: Mapping[str, Any], when: str) -> int:
    return min(_points(entry, when), key=lambda t: (abs(t - _TOKENS), t))
