"""Figure 1 (score against size, ours and the paper's, on separate axes) and the rows moved by layer. Byte-stable.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every method also has its own marker.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meft_bench.harness.suites import HEADLINE, ROWS
from meft_bench.report.cells import Line, Record, Results, Score, headline
from meft_bench.report.paper import figure1_points, table1_value
from meft_bench.report.traffic import has_traffic, kept_share, neuron_shares

TASK = "facts"
STYLE = {
    "lora": ("#0072B2", "o"),
    "adapter_h": ("#E69F00", "s"),
    "parallel_adapter": ("#009E73", "^"),
    "meft": ("#D55E00", "D"),
}
_GREY = "#555555"
_LEVELS = (("base", "0%", "base model", ":"), ("full", "100%", "full fine-tuning", "--"))
_SIZE_COLOURS = ("#56B4E9", "#0072B2", "#D55E00", "#000000")
_OUR_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 100)
_THEIR_TICKS = (0.03, 0.1, 0.3, 1, 3, 10, 30)
_SETTINGS: Any = {
    "svg.hashsalt": "meft-bench",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 3,
}


def draw(results: Results, reported: dict[str, Any]) -> dict[str, bytes]:
    """File name -> content of figure1 and rows_moved, each as SVG and PNG."""
    files = {}
    with _settings():
        for name, figure in (("figure1", _figure1(results, reported)), ("rows_moved", _rows_moved(results))):
            for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
                out = io.BytesIO()
                figure.savefig(out, format=suffix, dpi=110, metadata=metadata)
                files[f"{name}.{suffix}"] = out.getvalue()
    return files


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib  # a second of import, so only where a figure is drawn

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _figure1(results: Results, reported: dict[str, Any]) -> Any:
    figure = _figure(12.5, 5.6)
    ours, theirs = figure.subplots(1, 2)
    _draw_ours(ours, results)
    _draw_theirs(theirs, reported)
    for axes, ticks in ((ours, _OUR_TICKS), (theirs, _THEIR_TICKS)):
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([t for t in ticks if low <= t <= high], labels=[f"{t:g}" for t in ticks if low <= t <= high])
        axes.xaxis.set_minor_formatter(_no_labels())
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _draw_ours(axes: Any, results: Results) -> None:
    column = headline(TASK)
    lines = results.lines("figure1", "table1")
    places = {line: results.score(line, column) for line in lines if (*line, TASK) in results.places}
    for row in HEADLINE:
        points = [(results.parameters(line), s) for line, s in places.items() if line[0] == row and s.value is not None]
        _errorbars(axes, row, [(p["trainable_percent_of_base"], s) for p, s in points if p is not None])
    for row, share, label, style in _LEVELS:
        score = places.get((row, share))
        if score is not None and score.value is not None:
            # The band is the level's own interval.
            axes.axhspan(score.low, score.high, color=_GREY, alpha=0.12, linewidth=0)
            _level(axes, score.value, f"{label}: {score.value:.3f}", style)
    shown = [s for s in places.values() if s.value is not None]
    axes.set_title(f"OURS: closed-book facts, {_model(results)}\n{_how(results, shown)}")
    axes.set_xlabel("\n".join(["trainable parameters, % of base", *_gaps(places)]))
    axes.set_ylabel("facts test: answer contained in output")
    if not shown:
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
        axes.set_xlim(0.3, 50)
        axes.set_ylim(0, 1)
    else:
        _headroom(axes)
        _legend(axes, "upper left", (0.01, 0.9))


def _errorbars(axes: Any, row: str, points: list[tuple[float, Score]]) -> None:
    if not points:
        return
    colour, marker = STYLE[row]
    percents, values = [p for p, _ in points], [s.value for _, s in points]
    # Rounding may put a value a hair outside its interval.
    below = [max(0.0, s.value - s.low) for _, s in points if s.value is not None and s.low is not None]
    above = [max(0.0, s.high - s.value) for _, s in points if s.value is not None and s.high is not None]
    label = _title(row)
    axes.errorbar(
        percents, values, yerr=[below, above], color=colour, marker=marker, markersize=7, linewidth=1.6, label=label
    )


def _draw_theirs(axes: Any, reported: dict[str, Any]) -> None:
    for row in HEADLINE:
        colour, marker = STYLE[row]
        points = figure1_points(reported, row)
        label = f"{_title(row)} (paper's Table 1)" if row == "meft" else _title(row)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            marker=marker,
            markerfacecolor="white",
            markeredgewidth=1.6,
            markersize=7,
            linewidth=1.2,
            label=label,
        )
    for row, share, label, style in _LEVELS:
        if (value := table1_value(reported, row, share, "nq")) is not None:
            _level(axes, value, f"{label}: {value:.3f}", style)
    size = reported["figure1"]["base_parameters"] / 1e9
    axes.set_title(
        f"PAPER: Figure 1, NQ, {reported['table1']['model']} ({size:.1f} B parameters)\n"
        "reported, about 501 items, one run each, no intervals given"
    )
    axes.set_xlabel("trainable parameters, % of base\nanother model, task and scale of scores than on the left")
    axes.set_ylabel("NQ accuracy (reported)")
    _headroom(axes)
    _legend(axes, "lower right", (1.0, 0.07))


def _level(axes: Any, value: float, label: str, style: str) -> None:
    axes.axhline(value, color=_GREY, linestyle=style, linewidth=1.3, label=label, zorder=1)


def _legend(axes: Any, place: str, anchor: tuple[float, float]) -> None:
    """Methods first, in the tables' order, levels last (matplotlib would put error bars last)."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(
        range(len(labels)), key=lambda i: (labels[i].startswith(tuple(name for _, _, name, _ in _LEVELS)), i)
    )
    axes.legend([handles[i] for i in order], [labels[i] for i in order], loc=place, bbox_to_anchor=anchor, fontsize=10)


def _headroom(axes: Any) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.04 * (high - low))


def _how(results: Results, scores: list[Score]) -> str:
    """Evidence, n, seeds and what the bars are."""
    if not scores:
        return "not run"
    evidence = ", ".join(sorted({s.evidence for s in scores}))
    counts = sorted({s.n for s in scores if s.n is not None})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    seeds = len({c.spec.seed for c in results.places.values()})
    return f"{evidence}, {n}, {seeds} seed{'s' * (seeds != 1)}; bars and bands: 95 % intervals"


def _gaps(places: dict[Line, Score]) -> list[str]:
    """What the panel cannot show, in words: missing and failed points, stale ones."""
    wanted = {line: s for line, s in places.items() if line[0] in (*HEADLINE, "base", "full")}
    told = []
    for state in sorted({s.state for s in wanted.values()} - {"ok"}):
        told += textwrap.wrap(f"{state}: {_names([line for line, s in wanted.items() if s.state == state])}", 70)
    made = [line for line, s in wanted.items() if s.value is not None]
    stale = [line for line in made if wanted[line].stale]
    if stale:
        names = "all points" if stale == made else _names(stale)
        told += textwrap.wrap(f"stale (made by other code): {names}", 70)
    return told


def _names(lines: list[Line]) -> str:
    """LoRA 2%, 10%; MEFT 10%."""
    rows = list(dict.fromkeys(row for row, _ in lines))
    return "; ".join(f"{_title(row)} {', '.join(share for r, share in lines if r == row)}" for row in rows)


def _title(row: str) -> str:
    return ROWS[row].title.split(",")[0].split(" (")[0]


def _model(results: Results) -> str:
    names = ", ".join(sorted({c.spec.model.split("@")[0] for c in results.places.values()}))
    sizes = {r["parameters"]["base"] for r in results.records() if r["parameters"] is not None}
    return f"{names} model" + (f" ({max(sizes) / 1e6:.2f} M parameters)" if sizes else "")


def _rows_moved(results: Results) -> Any:
    """U/R by layer for every size of MEFT on facts, K/R beside it."""
    figure = _figure(7.5, 4.8)
    axes = figure.subplots()
    lines = results.lines("figure1", "table1")
    found = [(line, results.record(line, TASK)) for line in lines if line[0] == "meft"]
    records: list[tuple[Line, Record]] = [(line, r) for line, r in found if r is not None and has_traffic(r)]
    missing = [line[1] for line, r in found if not has_traffic(r)]
    for i, (line, record) in enumerate(records):
        _draw_layers(axes, record, f"MEFT {line[1]}", _SIZE_COLOURS[i % 4], "osD^"[i % 4])
    if not records:
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
    else:
        axes.legend(fontsize=9.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_title(_layers_title(results, records))
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_locator(_whole_numbers())
    gaps = [f"not run: MEFT {', '.join(missing)}"] if missing else []
    stale = [line[1] for line, r in records if results.stale(r)]
    gaps += [f"stale (made by other code): MEFT {', '.join(stale)}"] if stale else []
    axes.set_xlabel("\n".join(["layer", *gaps]))
    axes.set_ylabel("share of the layer's R neurons")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    return figure


def _draw_layers(axes: Any, record: Record, name: str, colour: str, marker: str) -> None:
    shares = neuron_shares(record)
    layers = range(1, len(shares) + 1)
    neurons = record["spec"]["options"]["neurons"]
    axes.plot(layers, shares, color=colour, marker=marker, markersize=7, label=f"{name} (R = {neurons}): U/R")
    kept = kept_share(record)
    axes.plot(layers, [kept] * len(shares), color=colour, linestyle=":", label=f"its K/R = {kept:.2f}")


def _layers_title(results: Results, records: list[tuple[Line, Record]]) -> str:
    if not records:
        return "Rows moved by layer: not run"
    evidence = ", ".join(sorted({r["traffic"]["evidence"] for _, r in records}))
    tokens = sorted({round(r["traffic"]["tokens_per_micro_batch"]) for _, r in records})
    steps = sorted({r["spec"]["steps"] * r["spec"]["accumulation"] for _, r in records})
    return (
        f"Rows moved per micro-batch (U/R) and kept per token (K/R)\nfacts, {_model(results)}; {evidence},\n"
        f"mean of {', '.join(map(str, steps))} micro-batches of about {', '.join(map(str, tokens))} tokens"
    )


def _no_labels() -> Any:
    from matplotlib.ticker import NullFormatter

    return NullFormatter()


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
