"""Figures of which neurons are used: concentration, the union U against the micro-batch, experts, pre-retrieval.

Symbols: R neurons, N experts, K kept a token, U the union of a micro-batch.
"""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from meft_bench.harness.suites import FIGURE7_EXPERTS
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, layer_marks, layer_means, model_name, names, references
from meft_bench.report.figures.panel import SERIES, draw_marks, grid
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import Record, Results
from meft_bench.report.records.traffic import kept_share, neuron_shares

_MEFT_SIZES = ("10%", "40%", "150%")
_BY_LAYER_LENGTH = 16
"""Tokens a sequence in Figure 8's panel by layer."""


def figure2(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Cumulative share of the Parallel Adapter's mean activation, by layer."""
    figure = panel.new_figure(12.5, 5.8)
    for axes, share in zip(figure.subplots(1, 2), ("10%", "40%"), strict=True):
        reference = f"parallel_adapter {share} facts"
        curves = layer_means(results, reference, lambda r: _flat(r["probes"]["activation"]["cumulative_by_layer"]))
        record = _first(results, reference)
        size = results.size(("parallel_adapter", share))
        axes.set_title(f"OURS: Parallel Adapter {size}, facts\n{_how(results, reference, curves)}")
        axes.set_xlabel("most active neurons of the layer, % of R")
        axes.set_ylabel("share of the mean activation, %")
        if record is None or not curves:
            panel.not_run(axes, f"parallel_adapter {share} on facts")
            continue
        axes.plot([0, 100], [0, 100], color=panel.GREY, linestyle=":", linewidth=1.3, label="uniform")
        _concentration(axes, record, curves)
        told = [
            _by_layer_text(results, reference, "active_share", "active (above 0) for a token"),
            _by_layer_text(results, reference, "top5_share_of_token", "of a token's activation\nin its own top 5 %"),
        ]
        axes.text(0.98, 0.04, "\n".join(told), transform=axes.transAxes, ha="right", va="bottom", fontsize=9)
        axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.55))
        grid(axes, "both")
    figure.supxlabel(
        f"the paper (reported, no numbers printed): {reported['no_numbers_printed']['figure2']}", fontsize=9.5
    )
    return figure


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [v for row in rows for v in row]


def _concentration(axes: Any, record: Record, curves: dict[int, list[float]]) -> None:
    layers = len(record["probes"]["activation"]["cumulative_by_layer"])
    points = len(next(iter(curves.values()))) // layers
    neurons = record["spec"]["options"]["neurons"]
    # The probe rounds each place to whole neurons.
    xs = [100 * round(i * neurons / (points - 1)) / neurons for i in range(points)]
    for layer in range(layers):
        own = [v[layer * points : (layer + 1) * points] for v in curves.values()]
        means = [100 * statistics.fmean(at) for at in zip(*own, strict=True)]
        colour, marker = SERIES[layer % len(SERIES)]
        axes.plot(xs, means, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=f"layer {layer + 1}")


def _by_layer_text(results: Results, reference: str, name: str, words: str) -> str:
    by_seed = layer_means(results, reference, lambda r: r["probes"]["activation"][name])
    means = [statistics.fmean(at) for at in zip(*by_seed.values(), strict=True)]
    return f"{words}, by layer:\n" + " / ".join(f"{100 * m:.0f} %" for m in means)


def figure8(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """U/R against the micro-batch by length for three sizes, and by layer."""
    figure = panel.new_figure(13, 9.6)
    panels = figure.subplots(2, 2, sharey=True).flatten()
    for axes, share in zip(panels, _MEFT_SIZES, strict=False):
        reference = f"meft {share} facts"
        record = _first(results, reference)
        axes.set_title(
            f"MEFT {results.size(('meft', share))}, mean over layers\n{_grid_how(results, reference, record)}"
        )
        if record is None or not (record["probes"] or {}).get("union_grid"):
            panel.not_run(axes, f"meft {share} on facts")
            continue
        lengths = sorted({p["length"] for p in record["probes"]["union_grid"]})
        for length, (colour, marker) in zip(lengths, SERIES, strict=False):
            marks = _grid_marks(results, reference, length, None)
            draw_marks(axes, marks, colour, marker, f"{length} tokens a sequence", size=6)
        _grid_axes(axes, record)
    axes, reference = panels[3], f"meft {_MEFT_SIZES[-1]} facts"
    record = _first(results, reference)
    axes.set_title(
        f"MEFT {results.size(('meft', _MEFT_SIZES[-1]))} by layer, {_BY_LAYER_LENGTH} tokens a sequence\n"
        f"{_grid_how(results, reference, record)}"
    )
    if record is None or not record["probes"].get("union_grid"):
        panel.not_run(axes, f"{reference}")
    else:
        for layer in range(len(record["probes"]["union_grid"][0]["share_by_layer"])):
            marks = _grid_marks(results, reference, _BY_LAYER_LENGTH, layer)
            draw_marks(axes, marks, *SERIES[layer % len(SERIES)], f"layer {layer + 1}", size=6)
        _grid_axes(axes, record)
    figure.supylabel("U/R: share of the layer's neurons that the micro-batch moves")
    figure.supxlabel("micro-batch, sequences (joined end to end, no padding)")
    return figure


def _grid_marks(results: Results, reference: str, length: int, layer: int | None) -> list[Mark]:
    def read(record: Record) -> list[float]:
        points = sorted(
            (p["batch"], p["share_by_layer"]) for p in record["probes"]["union_grid"] if p["length"] == length
        )
        return [statistics.fmean(shares) if layer is None else shares[layer] for _, shares in points]

    record = _first(results, reference)
    assert record is not None
    batches = sorted(p["batch"] for p in record["probes"]["union_grid"] if p["length"] == length)
    marks = layer_marks(reference, layer_means(results, reference, read))
    return [Mark(x=b, by_seed=m.by_seed, reference=reference) for b, m in zip(batches, marks, strict=False)]


def _grid_axes(axes: Any, record: Record) -> None:
    kept = kept_share(record)
    axes.axhline(kept, color=panel.GREY, linestyle=":", linewidth=1.3, label=f"K/R = {kept:.3f}")
    panel.log_axis(axes, (1, 2, 4, 8, 16, 32, 64, 128), 2)
    axes.set_ylim(0, 1.05)
    panel.legend(axes, loc="lower right")
    grid(axes)


def _grid_how(results: Results, reference: str, record: Record | None) -> str:
    by_seed = layer_means(results, reference, lambda r: [r["probes"]["union_grid"][0]["batch"]])
    if record is None:
        return "not run"
    options = record["spec"]["options"]
    dots = " (small dots)" if len(by_seed) > 1 else ""
    return f"R = {options['neurons']}, K = {options['kept']}; {_how(results, reference, by_seed, dots)}"


def experts(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Entropy over experts and dead neurons by layer: sizes, router starts, N."""
    figure = panel.new_figure(14, 8.4)
    panels = figure.subplots(2, 3, sharey="row", sharex=True)
    groups = (
        ("by size", [(f"meft {s} facts", f"MEFT {results.size(('meft', s))}") for s in _MEFT_SIZES]),
        ("by start of the router, 10 %", [("meft 10% facts", "mean key"), ("meft_init_x50 10% facts", "mean key x50"),
                                         ("meft_init_normal 10% facts", "normal")]),
        ("by N, 10 %", [("meft 10% facts" if n == 16 else f"meft_n{n} 10% facts", f"N = {n}")
                        for n in sorted((16, *FIGURE7_EXPERTS))]),
    )  # fmt: skip
    for column, (words, members) in enumerate(groups):
        for row, name in enumerate(("expert_entropy", "dead_share")):
            axes = panels[row][column]
            missing, found = _layer_lines(axes, results, members, name)
            axes.set_title(f"{('Expert entropy', 'Dead neurons')[row]} {words}\n{_seeds(results, found)}")
            axes.set_xlabel("\n".join([*["layer"] * row, *([f"not run: {missing}"] if missing and found else [])]))
            if not found:
                panel.not_run(axes, f"{names(results, [m for m, _ in members])}")
                continue
            axes.legend(loc="best", fontsize=9)
            grid(axes)
    panels[0][0].set_ylabel("entropy over experts (1 is uniform)")
    panels[1][0].set_ylabel("share of neurons that no token kept")
    figure.supxlabel(f"facts, {model_name(results)}; training rows, measured after training", fontsize=10)
    return figure


def _layer_lines(
    axes: Any, results: Results, members: Sequence[tuple[str, str]], name: str
) -> tuple[str, dict[str, dict[int, list[float]]]]:
    """Draw one line a member; returns what is missing in words, and what was found."""
    found = {ref: layer_means(results, ref, lambda r: r["probes"]["neurons"][name]) for ref, _ in members}
    for (reference, label), (colour, marker) in zip(members, SERIES, strict=False):
        draw_marks(axes, layer_marks(reference, found[reference]), colour, marker, label, size=6)
    if any(found.values()):
        axes.xaxis.set_major_locator(_whole_numbers())
    return ", ".join(label for ref, label in members if not found[ref]), {k: v for k, v in found.items() if v}


def lookahead(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Recall of selecting a layer's neurons from the layer before."""
    figure = panel.new_figure(8.6, 5.2)
    axes = figure.subplots()
    found = {}
    for share, (colour, marker) in zip(("10%", "40%"), ((panel.BLUE, "o"), (panel.RED, "D")), strict=True):
        reference = f"meft {share} facts"
        by_seed = layer_means(results, reference, lambda r: r["probes"]["lookahead"]["recall_per_token"])
        record = _first(results, reference)
        if not by_seed or record is None:
            continue
        found[reference] = by_seed
        draw_marks(
            axes, layer_marks(reference, by_seed, first=2), colour, marker, f"MEFT {results.size(('meft', share))}"
        )
        kept = kept_share(record)
        axes.axhline(kept, color=colour, linestyle=":", linewidth=1.3, label=f"chance for {share}: K/R = {kept:.3f}")
    axes.set_title(
        "Pre-retrieval: kept neurons found from the layer before\n"
        f"facts, {model_name(results)}; {_seeds(results, found)}"
    )
    axes.set_ylabel("recall per token")
    axes.set_xlabel("layer whose neurons are selected early (the first has none before it)")
    if not found:
        panel.not_run(axes, "meft 10% and 40% on facts")
        return figure
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(_whole_numbers())
    panel.beside(axes)
    grid(axes)
    return figure


def rows_moved(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """U/R by layer while training, for every size of MEFT on facts, K/R beside it."""
    figure = panel.new_figure(9.6, 5.4)
    axes = figure.subplots()
    wanted = references(results, ["meft"], "facts", "figure1", "table1", "ablations")
    found = {}
    for reference, (colour, marker) in zip(wanted, SERIES, strict=False):
        by_seed, record = layer_means(results, reference, neuron_shares), _first(results, reference)
        if not by_seed or record is None:
            continue
        found[reference] = by_seed
        kept, neurons = kept_share(record), record["spec"]["options"]["neurons"]
        label = f"MEFT {results.size(('meft', reference.split()[1]))}, R = {neurons}\n(dotted: K/R = {kept:.3f})"
        draw_marks(axes, layer_marks(reference, by_seed), colour, marker, label)
        layers = len(next(iter(by_seed.values())))
        axes.plot([1, layers], [kept, kept], color=colour, linestyle=":")
    axes.set_title(
        "Rows moved per micro-batch (U/R) and kept per token (K/R)\n"
        f"facts, {model_name(results)}; {_seeds(results, found, 'traffic')}"
    )
    missing = [ref for ref in wanted if ref not in found]
    axes.set_xlabel("\n".join(["layer", *([f"not run: {names(results, missing)}"] if missing and found else [])]))
    axes.set_ylabel("share of the layer's R neurons")
    if not found:
        panel.not_run(axes, "MEFT on facts")
        return figure
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    grid(axes)
    return figure


def _first(results: Results, reference: str) -> Record | None:
    """The first seed's finished record: sizes and layers, which no seed changes."""
    return next(iter(_finished(results, reference)), None)


def _finished(results: Results, reference: str) -> list[Record]:
    row, share, task, variant = parse_reference(reference)
    return [r for r in results.records_of((row, share), task, variant).values() if r["state"] == "ok"]


def _how(results: Results, reference: str, by_seed: dict[int, list[float]], dots: str = "") -> str:
    records = _finished(results, reference)
    if not records or not by_seed:
        return "not run"
    # On a line of its own: the titles of panels that stand side by side would meet.
    stale = "\nstale (made by other code)" if any(results.stale(r) for r in records) else ""
    mean = "mean of " if len(by_seed) > 1 else ""
    made = listed(r["probes"]["evidence"] for r in records if r["probes"])
    return f"{made}, {mean}{_count(len(by_seed))}{dots}{stale}"


def _seeds(results: Results, found: dict[str, dict[int, list[float]]], block: str = "probes") -> str:
    """Evidence, seeds and staleness of the lines of a panel."""
    records = {ref: _finished(results, ref) for ref in found}
    counts = sorted({len(v) for v in found.values()})
    if not counts:
        return "not run"
    words = listed(r[block]["evidence"] for own in records.values() for r in own if r[block])
    words += ", " + (_count(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds")
    stale = [ref for ref, own in records.items() if any(results.stale(r) for r in own)]
    which = "all lines" if len(stale) == len(records) else names(results, stale, 2)
    told = "\n".join(["", *textwrap.wrap(f"stale (made by other code): {which}", 48)]) if stale else ""
    return words + " (small dots)" * (counts[-1] > 1) + told


def _count(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds != 1)}"


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
