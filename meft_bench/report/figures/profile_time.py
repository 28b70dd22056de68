"""Figures of `meft-bench profile`: what crosses the link and how long a step takes."""

from collections.abc import Sequence
from typing import Any

from meft_bench.report.figures import panel
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
"""R of the panel in units of M."""
_PARTS = {
    "gpu": ("device compute", panel.GREEN),
    "retrieval": ("retrieval on the host", panel.BLUE),
    "gather": ("gather of rows", panel.SKY),
    "h2d": ("transfer to the device", panel.ORANGE),
    "d2h": ("transfer to the host", "#DDCC77"),
    "gradients": ("gradients into place", panel.PURPLE),
    "adam": ("Adam on the host", panel.RED),
}
_LANES = {"gpu": "GPU", "h2d": "H2D", "d2h": "D2H", "host": "host"}
_PALETTE = (panel.BLUE, panel.ORANGE, panel.GREEN, panel.PURPLE, panel.RED, panel.SKY, panel.BLACK, panel.GREY)


def traffic(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """Bytes a token by method, and MEFT's bytes a step in units of M by R."""
    profile = profiles[0]
    figure = panel.new_figure(15, 6.2)
    left, right = figure.subplots(1, 2)
    counts = profile.settings["accumulations"]
    rows = [(v, r) for v in _LINKED for r in profile.found(v, profile.stated, False)]
    for variant, row in rows:
        _line(left, counts, "bytes_per_token", 1 / KIB, row, *_LINKED[variant], title_of(row))
    _finish(left, f"{profile.model}, R = {profile.stated}, {_batch(profile)}", [r for _, r in rows], counts)
    left.set_ylabel("KiB over the link per trained token (log)")
    sizes = [(n, c, r) for n, c in zip(_SIZES, panel.SERIES, strict=False) for r in profile.found("meft", n, False)]
    for neurons, (colour, marker), row in sizes:
        share = f", U/R {row['union']['union_share']:.2f} {union_of(row)}"
        _line(right, counts, "in_m", 1.0, row, colour, marker, f"MEFT, R = {neurons:,}{share}")
    claim = reported["traffic"]
    if sizes:
        words = f"the paper's {claim['in_m']} M a micro-batch,\nR = {claim['neurons']:,} (reported)"
        panel.draw_paper(right, [(c, claim["in_m"] * c) for c in counts], panel.GREY, "o", words)
        right.plot(counts, [claim["offload_in_m"]] * len(counts), color=panel.GREY, linestyle=":", linewidth=1.6,
                   label=f"{claim['offload_in_m']:g} M: weights down and gradients up once")  # fmt: skip
    _finish(right, f"MEFT on {profile.model}, {_batch(profile)}", [r for _, _, r in sizes], counts)
    right.set_ylabel("bytes a step, in units of M in 16 bits (log)")
    return figure


def _line(
    axes: Any, counts: Sequence[int], field: str, scale: float, row: Row, colour: str, marker: str, label: str
) -> None:
    points = [(c, scale * value) for c in counts if (value := per_step(row, c, field)) is not None]
    style = "--" if row["evidence"] == "simulated" else "-"
    light = 0.55 if union_of(row) == "assumed" else 1.0
    axes.plot([c for c, _ in points], [v for _, v in points], color=colour, marker=marker, linestyle=style,
              linewidth=1.4, markersize=6.5, label=label, alpha=light)  # fmt: skip


def _finish(axes: Any, name: str, rows: Sequence[Row], counts: Sequence[int]) -> None:
    panel.heading(axes, name, listed(r["evidence"] for r in rows) or "not run")
    axes.set_xlabel("micro-batches accumulated in a step")
    if not rows:
        panel.not_run(axes, "rows of MEFT and its peers without checkpointing", COMMAND)
        return
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    panel.log_axis(axes, list(counts), 2)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2, fontsize=9)
    panel.grid(axes)


def latency(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """Stacked busy seconds of the five variants, a panel for every source of U there is."""
    profile = profiles[0]
    five = [r for v in LATENCY_FIVE for r in profile.found(v, profile.stated, False)]
    sources = [s for s in ("logged", "assumed") if s in map(union_of, five)] or ["logged"]
    figure = panel.new_figure(5.6 * len(sources) + 4.8, 4.8)
    panels = figure.subplots(1, len(sources), squeeze=False, sharex=True, sharey=True)[0]
    for axes, source in zip(panels, sources, strict=True):
        rows = [r for r in five if union_of(r) in ("", source)]
        shares = {r["union"]["union_share"] for r in rows if union_of(r)}
        made = listed(r["time"].get("evidence", r["evidence"]) for r in rows) or "not run"
        told = f"U/R {', '.join(f'{s:.2f}' for s in sorted(shares))} {source}" if shares else f"U {source}: not run"
        panel.heading(axes, f"R = {profile.stated}, {told}", made)
        if not shares:
            panel.not_run(axes, f"rows of MEFT with U {source}", COMMAND)
            continue
        for i, row in enumerate(rows):
            _latency_bar(axes, row, -i)
        axes.set_yticks([-i for i in range(len(rows))], labels=[r["title"] for r in rows])
        axes.set_xlabel("busy seconds in one step, accumulation 1")
        panel.grid(axes, "x")
    panels[0].set_xlim(0, 1.15 * panels[0].get_xlim()[1])
    named = {label: h for a in panels for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    panels[-1].legend(named.values(), named.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0))
    paper = reported["no_numbers_printed"]["figure5"]
    figure.supxlabel(f"{_about(profile)}\nThe paper (reported, no numbers printed):\n{paper}", fontsize=9)
    return figure


def _latency_bar(axes: Any, row: Row, y: float) -> None:
    left, parts = 0.0, {n: s for n, s in row["time"]["components_s"].items() if isinstance(s, (int, float))}
    others = sorted(set(parts) - set(_PARTS))
    known = [(n, words, colour) for n, (words, colour) in _PARTS.items() if n in parts]
    for name, words, colour in [*known, *((n, n.replace("_", " "), panel.GREY) for n in others)]:
        evidence = row["time"].get("evidence", row["evidence"])
        axes.barh(y, parts[name], left=left, color=colour, height=0.6, edgecolor="white", linewidth=0.4,
                  hatch="////" if evidence == "simulated" else "", label=words)  # fmt: skip
        left += parts[name]
    step = step_s(row)
    axes.plot([step], [y], color=panel.BLACK, marker="|", markersize=22, markeredgewidth=2.4, linestyle="none",
              label="the step itself")  # fmt: skip
    axes.text(max(left, step), y, f"  {step:.2f} s", va="center", fontsize=9.5)


def timeline(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """Lanes of one step."""
    profile = profiles[0]
    figure = panel.new_figure(14, 5.2)
    axes = figure.subplots()
    events = profile.timeline.get("events")
    if not events:
        axes.set_title("Timeline of one training step: not run")
        panel.not_run(axes, "the timeline of a profile", COMMAND)
        return figure
    kinds = dict(zip(dict.fromkeys(e["name"] for e in events), _PALETTE * 3, strict=False))
    for y, lane in enumerate(_LANES):
        for kind, colour in kinds.items():
            own = [e for e in events if (e["lane"], e["name"]) == (lane, kind)]
            spans = [(e["start_s"] * 1000, (e["end_s"] - e["start_s"]) * 1000) for e in own]
            # The edge keeps a span of microseconds visible.
            axes.broken_barh(spans, (-y - 0.35, 0.7), color=colour, linewidth=0.4)
    for kind, colour in kinds.items():
        axes.plot([], [], color=colour, linewidth=7, label=kind.replace("_", " "))
    for phase in dict.fromkeys(e["phase"] for e in events):
        own = [e for e in events if e["phase"] == phase]
        start, end = min(e["start_s"] for e in own) * 1000, max(e["end_s"] for e in own) * 1000
        axes.axvline(start, color=panel.GREY, linewidth=1, linestyle=":")
        axes.text((start + end) / 2, 0.45, phase, ha="center", va="bottom", fontsize=10)
    axes.set_yticks([-i for i in range(len(_LANES))], labels=list(_LANES.values()))
    axes.set_ylim(-3.5, 0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"ms from the start of the step\n{_about(profile)}")
    told = profile.timeline
    made = f"{told.get('evidence', profile.evidence)}; {told.get('layers', '?')} decoder layers"
    size = f", R = {told['neurons']:,}" if told.get("neurons") else ""
    names = {r["variant"]: r["title"] for r in profile.rows}
    variant = told.get("variant", "meft")
    panel.heading(axes, f"One training step of {names.get(variant, variant)}{size}", made, 100)
    panel.beside(axes)
    return figure


def _batch(profile: Profile) -> str:
    return f"micro-batch {profile.settings['batch']} x {profile.settings['seq']}"


def _about(profile: Profile) -> str:
    s = profile.settings
    return f"{profile.model}, {s['card_title']}, host: {s['host_title']}; {_batch(profile)}"


def plain_log(axis: Any) -> None:
    """Numbers at 1, 2 and 5 of every decade of a logarithmic axis, none between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
