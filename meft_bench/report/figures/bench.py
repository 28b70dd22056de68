"""Figures of the host engine's benchmarks (make bench): kernels against memory bandwidth, retrieval against R."""

from collections.abc import Sequence
from typing import Any

from meft_bench.report.figures import panel
from meft_bench.report.figures.panel import Panel, Sheet
from meft_bench.report.records.results import Results

_KERNELS = (
    ("gather_bf16", "Gather rows, to bf16"),
    ("accumulate", "Add up bf16 gradients"),
    ("advance_fp32", "AdamW, fp32 moments"),
    ("advance_bf16", "AdamW, bf16 moments"),
    ("search_experts", "Search of the probed experts"),
)
_RIVALS = (
    ("plain torch (the same steps)", "plain torch", panel.BLUE, "o"),
    ("torch's products, expert by expert", "torch's products,\nexpert by expert", panel.GREEN, "^"),
    ("torch's bf16 products, expert by expert", "torch's bf16 products,\nexpert by expert", panel.PURPLE, "P"),
    ("rows.py with bf16 keys", "ours, bf16 keys", panel.ORANGE, "v"),
    ("indexed torch", "indexed torch", panel.SKY, "s"),
    ("fused AdamW on gathered rows", "fused AdamW,\ngathered", panel.GREEN, "^"),
    ("torch.optim.SparseAdam", "SparseAdam", panel.ORANGE, "v"),
    ("DeepSpeedCPUAdam on gathered rows", "DeepSpeed,\ngathered", panel.PURPLE, "P"),
)
_OURS = "rows.py"
_BANDWIDTH = "memory\nbandwidth"
_WAYS = (("without", "all keys", panel.BLUE, "o"), ("with", "Key-Experts", panel.RED, "D"))
_BARS = "bars: lowest to highest round"


def kernels(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Milliseconds of every kernel, its peers and the triad of as many bytes, against R."""
    sheet = Sheet("Are the host's kernels as fast as its memory?", 3, 2, 11.0)
    found = bench.get("kernels")
    rows = [r for r in found["rows"] if r["kernel"]] if found else []
    for own, (kernel, name) in zip(sheet.panels, _KERNELS, strict=False):
        _kernel_panel(own, name, found, sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: r["neurons"]))
    words = sheet.panels[len(_KERNELS)].axes
    words.axis("off")
    if found and rows:
        words.text(0.05, 0.6, _machine(found), transform=words.transAxes, va="center", fontsize=9, color="#333333")
    return sheet.done()


def _kernel_panel(own: Panel, name: str, found: dict[str, Any] | None, rows: Sequence[dict[str, Any]]) -> None:
    own.heading(name, _made(found))
    own.name_axes("R, neurons of the layer", "ms a call (log)")
    if not rows:
        own.not_run("results/bench/kernels.json", "make bench")
        return
    neurons = [r["neurons"] for r in rows]
    own.line(neurons, [1000 * r["predicted_s"] for r in rows], panel.GREY, _BANDWIDTH, linestyle=":")
    for rival, label, colour, marker in (*_RIVALS, (_OURS, "ours", panel.RED, "D")):
        _times(own, [(r["neurons"], r["rounds_s"].get(rival, ())) for r in rows], label, colour, marker)
    _log_log(own, neurons)


def retrieval(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Milliseconds of the whole search with and without Key-Experts against R, with their exponents."""
    sheet = Sheet("How does the time to find a token's neurons grow with their number?", 2, 1, 8.4)
    found = bench.get("retrieval")
    parts = [(found["settings"]["hidden"], found)] if found else [(None, None)]
    parts.append((found["wide"]["hidden"], found["wide"]) if found and "wide" in found else (None, None))
    for own, (hidden, part) in zip(sheet.panels, parts, strict=True):
        if part is None or not part["rows"]:
            own.not_run("results/bench/retrieval.json", "make bench")
            continue
        own.heading(f"Hidden size D = {hidden}", _made(found))
        own.name_axes("R, neurons of the layer", "ms for all tokens of a micro-batch (log)")
        for way, label, colour, marker in _WAYS:
            power, count = part[f"exponent_{way}_ke"], part[f"count_exponent_{way}_ke"]
            name = f"{label}: R^{power:.2f} (dot products: R^{count:.2f})".replace(": ", ":\n", 1)
            _times(own, [(r["neurons"], r[f"{way}_ke_times_s"]) for r in part["rows"]], name, colour, marker)
        _log_log(own, [r["neurons"] for r in part["rows"]])
    return sheet.done()


def _times(
    own: Panel, series: Sequence[tuple[int, Sequence[float | None]]], label: str, colour: str, marker: str
) -> None:
    """Medians in milliseconds, with bars from the fastest to the slowest round; nothing where no round ran."""
    points = [(x, sorted(1000 * t for t in times if t is not None)) for x, times in series]
    points = [(x, t) for x, t in points if t]
    middle = [(t[(len(t) - 1) // 2] + t[len(t) // 2]) / 2 for _, t in points]
    bars = [[m - t[0] for m, (_, t) in zip(middle, points, strict=True)],
            [t[-1] - m for m, (_, t) in zip(middle, points, strict=True)]]  # fmt: skip
    own.line([x for x, _ in points], middle, colour, label, marker=marker, markersize=6, spread=bars)


def _log_log(own: Panel, neurons: Sequence[int]) -> None:
    own.log_x(neurons, 2)
    own.log_plain("y")
    own.grid()


def _made(found: dict[str, Any] | None) -> str:
    if not found:
        return "not run"
    stale = f"; stale ({found['why_not']})" if found.get("why_not") else ""
    return f"{found['evidence']}, n = {found['settings']['repeats']}, medians; {_BARS}{stale}"


def _machine(found: dict[str, Any]) -> str:
    s = found["settings"]
    return (
        f"hidden size D = {s['hidden']}, tokens T = {s['tokens']},\nprobed experts P = {s['probed']}, kept K = "
        f"{s['kept']},\nat most {s['touched']} rows touched\n\n{found['cpu']}, {s['threads']} threads\n"
        + s["kernels"].replace(", cc", ",\ncc")
        + "\n\ndotted: as many bytes at the rate of\na plain addition in the same rounds"
    )
