"""Figures of the host engine's benchmarks (make bench): kernels against memory bandwidth, retrieval against R."""

from collections.abc import Sequence
from typing import Any

from meft_bench.report.figures import panel
from meft_bench.report.records.results import Results

_KERNELS = (
    ("gather_bf16", "gather, to bf16"),
    ("accumulate", "accumulate bf16 gradients"),
    ("advance_fp32", "AdamW, fp32 moments"),
    ("advance_bf16", "AdamW, bf16 moments"),
    ("search_experts", "search of the probed experts"),
)
_RIVALS = (
    ("plain torch (the same steps)", "plain torch", panel.BLUE, "o"),
    ("indexed torch", "indexed torch", panel.SKY, "s"),
    ("fused AdamW on gathered rows", "fused AdamW, gathered", panel.GREEN, "^"),
    ("torch.optim.SparseAdam", "SparseAdam", panel.ORANGE, "v"),
    ("DeepSpeedCPUAdam on gathered rows", "DeepSpeed, gathered", panel.PURPLE, "P"),
)
_OURS, _TRIAD = "rows.py", "triad"
_NOT_RUN = "results/bench/{}.json"


def kernels(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Milliseconds of every kernel, its peers and the triad of as many bytes, against R."""
    figure = panel.new_figure(13, 8)
    panels = figure.subplots(2, 3).ravel()
    found = bench.get("kernels")
    rows = [r for r in found["rows"] if r["kernel"]] if found else []
    for axes, (kernel, name) in zip(panels, _KERNELS, strict=False):
        own = sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: r["neurons"])
        axes.set_title(name)
        _kernel_panel(axes, own)
    words = panels[len(_KERNELS)]
    words.axis("off")
    if found and rows:
        handles = {h.get_label(): h for axes in panels[:-1] for h in axes.lines if h.get_label()[0] != "_"}
        words.legend(list(handles.values()), list(handles), loc="upper left")
        words.text(0, 0.02, _machine(found), transform=words.transAxes, va="bottom", fontsize=9, color="#333333")
    figure.suptitle(f"Kernels of the host against R: {_made(found, 'medians, bars: lowest to highest round')}")
    return figure


def _kernel_panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        panel.not_run(axes, _NOT_RUN.format("kernels"), "make bench")
        return
    neurons = [r["neurons"] for r in rows]
    floor = [1000 * r["predicted_s"] for r in rows]
    axes.plot(neurons, floor, color=panel.GREY, linestyle=":", linewidth=1.6, label="as many bytes at triad's rate")
    for rival, label, colour, marker in _RIVALS:
        _line(axes, [(r["neurons"], r["rounds_s"].get(rival, ())) for r in rows], label, colour, marker)
    _line(axes, [(r["neurons"], r["rounds_s"][_OURS]) for r in rows], "ours", panel.RED, "D")
    _log_log(axes, neurons)
    axes.set_xlabel("R, neurons of the layer")
    axes.set_ylabel("ms a call")


def retrieval(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Milliseconds of the whole search with and without Key-Experts against R, with their exponents."""
    figure = panel.new_figure(13, 5.4)
    panels = figure.subplots(1, 2)
    found = bench.get("retrieval")
    parts = [(found["settings"]["hidden"], found)] if found else [(None, None)]
    parts.append((found["wide"]["hidden"], found["wide"]) if found and "wide" in found else (None, None))
    for axes, (hidden, part) in zip(panels, parts, strict=True):
        if part is None or not part["rows"]:
            panel.not_run(axes, _NOT_RUN.format("retrieval"), "make bench")
            continue
        neurons = [r["neurons"] for r in part["rows"]]
        for way, label, colour, marker in (("without", "all keys", panel.BLUE, "o"),
                                           ("with", "Key-Experts", panel.RED, "D")):  # fmt: skip
            power, count = part[f"exponent_{way}_ke"], part[f"count_exponent_{way}_ke"]
            name = f"{label}: R^{power:.2f} (dot products: R^{count:.2f})"
            _line(axes, [(r["neurons"], r[f"{way}_ke_times_s"]) for r in part["rows"]], name, colour, marker)
        _log_log(axes, neurons)
        axes.set_title(f"D = {hidden}")
        axes.set_xlabel("R, neurons of the layer")
        axes.set_ylabel("ms for all tokens of a micro-batch")
        axes.legend(loc="upper left")
    figure.suptitle(f"Finding a token's neurons: {_made(found, 'medians, bars: lowest to highest round')}")
    return figure


def _line(
    axes: Any, series: Sequence[tuple[int, Sequence[float | None]]], label: str, colour: str, marker: str
) -> None:
    """Medians in milliseconds, with bars from the fastest to the slowest round; nothing where no round ran."""
    points = [(x, sorted(1000 * t for t in times if t is not None)) for x, times in series]
    points = [(x, t) for x, t in points if t]
    if not points:
        return
    middle = [(t[(len(t) - 1) // 2] + t[len(t) // 2]) / 2 for _, t in points]
    low = [m - t[0] for m, (_, t) in zip(middle, points, strict=True)]
    high = [t[-1] - m for m, (_, t) in zip(middle, points, strict=True)]
    places = [x for x, _ in points]
    axes.plot(places, middle, color=colour, marker=marker, markersize=6, linewidth=1.5, label=label, zorder=3)
    axes.errorbar(places, middle, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1.1, zorder=2)


def _log_log(axes: Any, neurons: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panel.log_axis(axes, neurons, 2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(axes)


def _made(found: dict[str, Any] | None, bars: str) -> str:
    if not found:
        return "not run"
    stale = f"; stale ({found['why_not']})" if found.get("why_not") else ""
    return f"{found['evidence']}, n = {found['settings']['repeats']}, {bars}{stale}"


def _machine(found: dict[str, Any]) -> str:
    s = found["settings"]
    return (
        f"D = {s['hidden']}, T = {s['tokens']}, P = {s['probed']}, K = {s['kept']},\n"
        f"at most {s['touched']} rows touched\n"
        f"{found['cpu']}, {s['threads']} threads\n{s['kernels']}"
    )
