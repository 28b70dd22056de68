"""Figures of `meft-bench profile`: what crosses the link and how long a step takes."""

import textwrap
from collections.abc import Sequence
from typing import Any

from meft_bench.report.figures import panel
from meft_bench.report.figures.lanes import draw_lanes, stack
from meft_bench.report.figures.panel import Panel, Sheet, hatch, line_style
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.profiles import COMMAND, Profile, Row, per_step, step_s, title_of, union_of
from meft_bench.report.tables.profile_findings import LATENCY_FIVE

KIB = 2**10
_LINKED = {
    "meft": (panel.RED, "D"),
    "meft_no_sparse": (panel.PURPLE, "v"),
    "parallel_adapter_streamed": (panel.GREEN, ">"),
    "parallel_adapter_host_optimizer": (panel.ORANGE, "s"),
    "parallel_adapter_host_optimizer_gradients": (panel.SKY, "o"),
    "parallel_adapter_zero2": (panel.BLUE, "^"),
    "parallel_adapter_zero3": (panel.BLACK, "X"),
}
"""Methods that move bytes in every step."""
_SIZES = (1024, 3072, 6144, 8464, 32768)
"""R of the panel in units of M, with U as it was logged; with an assumed U only the paper's own R."""
_PARTS = {
    "gpu": ("device compute", panel.GREEN),
    "retrieval": ("retrieval on the host", panel.BLUE),
    "gather": ("gather of rows", panel.SKY),
    "h2d": ("transfer to the device", panel.ORANGE),
    "d2h": ("transfer to the host", "#DDCC77"),
    "gradients": ("gradients into place", panel.PURPLE),
    "adam": ("Adam on the host", panel.RED),
}
_LANES = {"gpu": "GPU", "h2d": "to the\ndevice", "d2h": "to the\nhost", "host": "host", "workers": "host's\nworkers"}
"""Lane -> its name; a lane without any event is left out."""


def traffic(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """Bytes a token by method, and MEFT's bytes a step in units of M by R."""
    profile, claim = profiles[0], reported["traffic"]
    sheet = Sheet("Which method moves the fewest bytes, and when does accumulation undo the saving?", 2, 1, 9.8)
    by_method, by_size = sheet.panels
    counts = profile.settings["accumulations"]
    rows = [(v, r) for v in _LINKED for r in profile.found(v, profile.stated, False)]
    for variant, row in rows:
        label = title_of(row).replace(", ", ",\n")
        _line(by_method, counts, "bytes_per_token", 1 / KIB, row, *_LINKED[variant], label)
    found = [(n, c, r) for n, c in zip(_SIZES, panel.SERIES, strict=False) for r in profile.found("meft", n, False)]
    sizes = [x for x in found if union_of(x[2]) != "assumed" or x[0] == claim["neurons"]]
    for neurons, (colour, marker), row in sizes:
        share = f"U/R {row['union']['union_share']:.2f} {union_of(row)}"
        _line(by_size, counts, "in_m", 1.0, row, colour, marker, f"MEFT, R = {neurons:,}, {share}")
    if sizes:
        words = f"paper: {claim['in_m']} M a micro-batch,\nR = {claim['neurons']:,} (reported)"
        by_size.paper([(c, claim["in_m"] * c) for c in counts], panel.GREY, "o", words)
        whole = f"{claim['offload_in_m']:g} M: weights down and\ngradients up once"
        by_size.line(counts, [claim["offload_in_m"]] * len(counts), panel.GREY, whole, linestyle=":")
    name = f"Every method, {profile.model}, R = {profile.stated}, {_batch(profile)}"
    _finish(by_method, name, [r for _, r in rows], counts, "KiB over the link per trained token (log)")
    name = f"MEFT by size, {profile.model}, {_batch(profile)}"
    _finish(by_size, name, [r for _, _, r in sizes], counts, "bytes a step, in units of M in 16 bits (log)")
    return sheet.done()


def _line(
    own: Panel, counts: Sequence[int], field: str, scale: float, row: Row, colour: str, marker: str, label: str
) -> None:
    points = [(c, scale * value) for c in counts if (value := per_step(row, c, field)) is not None]
    own.line([c for c, _ in points], [v for _, v in points], colour, label, marker=marker, markersize=6,
             linestyle=line_style(row["evidence"]), alpha=0.55 if union_of(row) == "assumed" else 1.0)  # fmt: skip


def _finish(own: Panel, name: str, rows: Sequence[Row], counts: Sequence[int], y: str) -> None:
    own.heading(name, listed(r["evidence"] for r in rows) or "not run")
    own.name_axes("micro-batches accumulated in a step", y)
    if not rows:
        own.not_run("rows of MEFT and its peers without checkpointing", COMMAND)
        return
    own.log_plain("y")
    own.log_x(list(counts), 2)
    own.grid()


def latency(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """Stacked busy seconds of the five variants, a panel for every source of U there is."""
    profile = profiles[0]
    five = [r for v in LATENCY_FIVE for r in profile.found(v, profile.stated, False)]
    sources = [s for s in ("logged", "assumed") if s in map(union_of, five)] or ["logged"]
    sheet = Sheet(
        "What takes the time of a training step on this card?", 1, len(sources), 5.4, sharex=True, sharey=True
    )
    shown: dict[str, str] = {}
    for own, source in zip(sheet.panels, sources, strict=True):
        rows = [r for r in five if union_of(r) in ("", source)]
        shares = {r["union"]["union_share"] for r in rows if union_of(r)}
        made = listed(r["time"].get("evidence", r["evidence"]) for r in rows) or "not run"
        told = f"U/R {', '.join(f'{s:.2f}' for s in sorted(shares))} {source}" if shares else f"U {source}: not run"
        own.heading(f"R = {profile.stated}, {told}", made)
        if not shares:
            own.not_run(f"rows of MEFT with U {source}", COMMAND)
            continue
        for i, row in enumerate(rows):
            shown |= _latency_bar(own.axes, row, -i)
        own.axes.set_yticks(
            [-i for i in range(len(rows))], labels=[textwrap.fill(r["title"], 18, break_on_hyphens=False) for r in rows]
        )
        own.name_axes("busy seconds in one step, accumulation 1")
        own.grid("x")
    sheet.panels[0].axes.set_xlim(0, 1.2 * sheet.panels[0].axes.get_xlim()[1])
    paper = reported["no_numbers_printed"]["figure5"]
    told = f"{_about(profile)}\nThe paper (reported, no numbers printed): {paper}"
    sheet.key(shown, [_step_mark()] if shown else [], told)
    return sheet.done()


def _latency_bar(axes: Any, row: Row, y: float) -> dict[str, str]:
    """Draw it; returns name -> colour of its parts."""
    parts = {n: s for n, s in row["time"]["components_s"].items() if isinstance(s, (int, float))}
    styles = _PARTS | {n: (n.replace("_", " "), panel.GREY) for n in sorted(set(parts) - set(_PARTS))}
    evidence = row["time"].get("evidence", row["evidence"])
    widths = [(parts[n], colour) for n, (_, colour) in styles.items() if n in parts]
    end = stack(axes, y, widths, hatch=hatch(evidence), edgecolor="white", linewidth=0.4)
    step = step_s(row)
    axes.plot([step], [y], color=panel.BLACK, marker="|", markersize=22, markeredgewidth=2.4, linestyle="none")
    axes.text(max(end, step), y, f"  {step:.2f} s", va="center", fontsize=9)
    return {words: colour for n, (words, colour) in styles.items() if n in parts}


def _step_mark() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=panel.BLACK, marker="|", markersize=10, markeredgewidth=2.4, linestyle="none",
                  label="the step itself")  # fmt: skip


def timeline(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """Lanes of one step."""
    profile = profiles[0]
    sheet = Sheet("When do GPU, link and host work in one step on this card?", height=6.2)
    (own,) = sheet.panels
    told = profile.timeline
    if not told.get("events"):
        own.heading("Timeline of one training step", "not run")
        own.not_run("the timeline of a profile", COMMAND)
        return sheet.done()
    events = told["events"]
    draw_lanes(own, events, {lane: name for lane, name in _LANES.items() if any(e["lane"] == lane for e in events)})
    size = f", R = {told['neurons']:,}" if told.get("neurons") else ""
    names = {r["variant"]: r["title"] for r in profile.rows}
    variant = told.get("variant", "meft")
    rows = profile.found(variant, told.get("neurons"), False)
    drawn = next((r for r in rows if union_of(r) == "assumed"), None)  # whose step profile/jobs.py keeps
    if drawn is not None:
        size += f", U/R {drawn['union']['union_share']:.2f} assumed"
    own.heading(f"One training step of {names.get(variant, variant)}{size}", told.get("evidence", profile.evidence))
    sheet.note("\n".join(filter(None, (_about(profile), _overlap(events, drawn)))))
    return sheet.done()


def _overlap(events: Sequence[dict[str, Any]], row: Row | None) -> str:
    """That the next step begins before the last event ends, where it does: the axis is longer than a step takes."""
    if row is None or max(e["end_s"] for e in events) <= 1.01 * step_s(row):
        return ""
    return (
        f"A step takes {step_s(row):.2f} s: what is later here runs beside the next step, and at the left stands what "
        "the step before left over."
    )


def _batch(profile: Profile) -> str:
    return f"micro-batch {profile.settings['batch']} x {profile.settings['seq']}"


def _about(profile: Profile) -> str:
    s = profile.settings
    return f"{profile.model}, {s['card_title']}, host: {s['host_title']}; {_batch(profile)}"
