"""Figures of which neurons are used: concentration, the union U against the micro-batch, experts, pre-retrieval.

Symbols: R neurons, N experts, K kept a token, U the union of a micro-batch.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from meft_bench.harness.rows import FIGURE7_EXPERTS
from meft_bench.report.figures import panel
from meft_bench.report.figures.marks import Mark, layer_marks, layer_means, model_name, names, references
from meft_bench.report.figures.panel import SERIES, Panel, Sheet
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import Record, Results
from meft_bench.report.records.traffic import kept_share, neuron_shares

_MEFT_SIZES = ("10%", "40%", "150%")
_BY_LAYER_LENGTH = 16
"""Tokens a sequence in Figure 8's panel by layer."""
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_Lists = dict[int, list[float]]
"""Seed -> values by layer."""


def figure2(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Cumulative share of the Parallel Adapter's mean activation, by layer."""
    sheet = Sheet("Do few neurons carry most of the activation?", 1, 2, 5.6)
    for own, share in zip(sheet.panels, ("10%", "40%"), strict=True):
        reference = f"parallel_adapter {share} facts"
        curves = layer_means(results, reference, lambda r: _flat(r["probes"]["activation"]["cumulative_by_layer"]))
        record, size = _first(results, reference), results.size(("parallel_adapter", share))
        own.heading(f"OURS: Parallel Adapter {size}, facts", _how(results, {reference: curves}, dots=False))
        own.name_axes("most active neurons of the layer, % of R", "share of the mean activation, %")
        if record is None or not curves:
            own.not_run(f"parallel_adapter {share} on facts")
            continue
        own.line([0, 100], [0, 100], panel.GREY, linestyle=":", linewidth=1.3)
        own.axes.annotate("all neurons alike", (62, 62), (4, -3), textcoords="offset points", color="#555555",
                          fontsize=8.5, va="top")  # fmt: skip
        _concentration(own, record, curves)
        told = [
            _by_layer_text(results, reference, "active_share", "active (above 0) for a token"),
            _by_layer_text(results, reference, "top5_share_of_token", "of a token's activation\nin its own top 5 %"),
        ]
        own.axes.text(0.99, 0.02, "\n".join(told), transform=own.axes.transAxes, ha="right", va="bottom", fontsize=8.5)
        own.grid("both")
    sheet.note(f"the paper (reported, no numbers printed): {reported['no_numbers_printed']['figure2']}")
    return sheet.done()


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [v for row in rows for v in row]


def _concentration(own: Panel, record: Record, curves: _Lists) -> None:
    layers = len(record["probes"]["activation"]["cumulative_by_layer"])
    points = len(next(iter(curves.values()))) // layers
    neurons = record["spec"]["options"]["neurons"]
    # The probe rounds each place to whole neurons.
    xs = [100 * round(i * neurons / (points - 1)) / neurons for i in range(points)]
    ends = []
    for layer in range(layers):
        of_layer = [v[layer * points : (layer + 1) * points] for v in curves.values()]
        means = [100 * statistics.fmean(at) for at in zip(*of_layer, strict=True)]
        colour, marker = SERIES[layer % len(SERIES)]
        own.line(xs, means, colour, marker=marker, markersize=4)
        at = points // 3
        ends.append((means[at], xs[at], colour, f"layer {layer + 1}"))
    # Named from the empty corner above: they all end at 100 %.
    for i, (y, x, colour, name) in enumerate(sorted(ends, reverse=True)):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (1, 0.5), "shrinkB": 3}
        own.axes.annotate(name, (x, y), (0.02, 0.97 - 0.06 * i), textcoords="axes fraction", va="center", color=colour,
                          fontsize=9, arrowprops=leader)  # fmt: skip


def _by_layer_text(results: Results, reference: str, name: str, words: str) -> str:
    by_seed = layer_means(results, reference, lambda r: r["probes"]["activation"][name])
    means = [statistics.fmean(at) for at in zip(*by_seed.values(), strict=True)]
    return f"{words}, by layer:\n" + " / ".join(f"{100 * m:.0f} %" for m in means)


def figure8(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """U/R against the micro-batch by length for three sizes, and by layer."""
    sheet = Sheet("What share of the neurons does one micro-batch need?", 2, 2, 9.0, sharey=True)
    for own, share in zip(sheet.panels, _MEFT_SIZES, strict=False):
        _union_panel(own, results, share, by_layer=False)
    _union_panel(sheet.panels[3], results, _MEFT_SIZES[-1], by_layer=True)
    return sheet.done()


def _union_panel(own: Panel, results: Results, share: str, by_layer: bool) -> None:
    reference, size = f"meft {share} facts", results.size(("meft", share))
    record = _first(results, reference)
    what = f"by layer, {_BY_LAYER_LENGTH} tokens a sequence" if by_layer else "mean over layers"
    own.heading(f"MEFT {size}, {what}", _grid_how(results, reference, record))
    each = "" if by_layer else "; a line for each length"
    own.name_axes(f"sequences in a micro-batch (no padding){each}", "U/R: share of the layer's neurons")
    if record is None or not (record["probes"] or {}).get("union_grid"):
        own.not_run(f"meft {share} on facts")
        return
    points = record["probes"]["union_grid"]
    lengths = sorted({p["length"] for p in points})
    layers = range(len(points[0]["share_by_layer"]))
    lines: list[tuple[str, int, int | None]] = [(f"{n} tokens", n, None) for n in lengths]
    if by_layer:
        lines = [(f"layer {i + 1}", _BY_LAYER_LENGTH, i) for i in layers]
    for i, (label, length, layer) in enumerate(lines):
        marks = _grid_marks(results, reference, length, layer)
        own.marks(marks, *SERIES[i % len(SERIES)], label, inline=None if by_layer else 3 * (share == "150%"))
    kept = kept_share(record)
    own.level(kept, f"one token:\nK/R = {kept:.3f}")
    own.log_x(_BATCHES, 2)
    own.axes.set_ylim(0, 1.05)
    own.grid()


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


def _grid_how(results: Results, reference: str, record: Record | None) -> str:
    by_seed = layer_means(results, reference, lambda r: [r["probes"]["union_grid"][0]["batch"]])
    if record is None:
        return "not run"
    options = record["spec"]["options"]
    return f"R = {options['neurons']}, K = {options['kept']}; {_how(results, {reference: by_seed})}"


def experts(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Entropy over experts and dead neurons by layer: sizes, router starts, N."""
    sheet = Sheet("Are all experts and all neurons in use?", 3, 2, 11.0, sharex=True)
    groups = (
        ("by size", [(f"meft {s} facts", results.size(("meft", s))) for s in _MEFT_SIZES]),
        ("by start of the router", [("meft 10% facts", "mean key"),
                                         ("meft_init_x50 10% facts", "50 times\nthe mean key"),
                                         ("meft_init_normal 10% facts", "random")]),
        ("by number of experts", [("meft 10% facts" if n == 16 else f"meft_n{n} 10% facts", f"N = {n}")
                                         for n in sorted((16, *FIGURE7_EXPERTS))]),
    )  # fmt: skip
    quantities = (("expert_entropy", "Evenness over experts", "entropy (1: all alike)"),
                  ("dead_share", "Unused neurons", "share no token kept"))  # fmt: skip
    for row, (words, members) in enumerate(groups):
        for column, (name, title, y) in enumerate(quantities):
            own = sheet.panels[2 * row + column]
            found = _layer_lines(own, results, members, partial(_of_neurons, name=name))
            missing = ", ".join(label.replace("\n", " ") for ref, label in members if ref not in found)
            own.heading(f"{title} {words}", _how(results, found))
            own.name_axes("layer" * (row == 2), y, [f"not run: {missing}"] * bool(missing and found))
            if found:
                own.whole_x()
                own.grid()
                if column:
                    own.axes.set_ylim(-0.005, max(0.05, own.axes.get_ylim()[1]))
            else:
                own.not_run(f"{names(results, [m for m, _ in members])}")
    sheet.note(f"facts, {model_name(results)}; training rows, measured after training; all but the sizes at 10 %")
    return sheet.done()


def _of_neurons(record: Record, name: str) -> list[float]:
    return list(record["probes"]["neurons"][name])


def _layer_lines(
    own: Panel, results: Results, members: Sequence[tuple[str, str]], read: Callable[[Record], Sequence[float]],
    first: int = 1,
) -> dict[str, _Lists]:  # fmt: skip
    """One line a member that has values by layer; returns those found."""
    found = {ref: layer_means(results, ref, read) for ref, _ in members}
    for (reference, label), (colour, marker) in zip(members, SERIES, strict=False):
        own.marks(layer_marks(reference, found[reference], first), colour, marker, label)
    return {reference: lists for reference, lists in found.items() if lists}


def lookahead(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """Recall of selecting a layer's neurons from the layer before."""
    sheet = Sheet("Can a token's neurons be found one layer early?")
    (own,) = sheet.panels
    members = [(f"meft {share} facts", f"MEFT {results.size(('meft', share))}") for share in ("10%", "40%")]
    found = _layer_lines(own, results, members, lambda r: r["probes"]["lookahead"]["recall_per_token"], 2)
    for reference in found:
        record = _first(results, reference)
        if record is not None:
            own.level(kept := kept_share(record), f"chance, {reference.split()[1]}: K/R = {kept:.3f}")
    own.heading(f"Kept neurons found from the layer before, facts, {model_name(results)}", _how(results, found))
    own.name_axes("layer whose neurons are selected early (the first has none before it)", "recall per token")
    if not found:
        own.not_run("meft 10% and 40% on facts")
        return sheet.done()
    own.axes.set_ylim(0, 1.02)
    own.whole_x()
    own.grid()
    return sheet.done()


def rows_moved(results: Results, reported: dict[str, Any], bench: dict[str, Any]) -> Any:
    """U/R by layer while training, for every size of MEFT on facts, K/R beside it."""
    sheet = Sheet("How many neurons does a layer move while it trains?")
    (own,) = sheet.panels
    wanted = references(results, ["meft"], "facts", "figure1", "table1", "ablations")
    members = []
    for reference in wanted:
        record, size = _first(results, reference), results.size(("meft", reference.split()[1]))
        neurons = f", R = {record['spec']['options']['neurons']}" if record else ""
        dotted = f"\n(dotted: K/R = {kept_share(record):.3f})" if record else ""
        members.append((reference, f"MEFT {size}{neurons}{dotted}"))
    found = _layer_lines(own, results, members, neuron_shares)
    for (reference, _), (colour, _) in zip(members, SERIES, strict=False):
        if reference in found and (record := _first(results, reference)) is not None:
            layers, kept = len(next(iter(found[reference].values()))), kept_share(record)
            own.line([1, layers], [kept, kept], colour, linestyle=":", linewidth=1.2)
    own.heading(f"Moved per micro-batch (U/R) and kept per token (K/R), facts, {model_name(results)}",
                _how(results, found, "traffic"))  # fmt: skip
    missing = names(results, [ref for ref in wanted if ref not in found])
    own.name_axes("layer", "share of the layer's R neurons", [f"not run: {missing}"] * bool(missing and found))
    if not found:
        own.not_run("MEFT on facts")
        return sheet.done()
    own.axes.set_ylim(0, 1.05)
    own.whole_x()
    own.grid()
    return sheet.done()


def _first(results: Results, reference: str) -> Record | None:
    """The first seed's finished record: sizes and layers, which no seed changes."""
    return next(iter(_finished(results, reference)), None)


def _finished(results: Results, reference: str) -> list[Record]:
    row, share, task, variant = parse_reference(reference)
    return [r for r in results.records_of((row, share), task, variant).values() if r["state"] == "ok"]


def _how(results: Results, found: Mapping[str, _Lists], block: str = "probes", dots: bool = True) -> str:
    """Evidence, seeds and staleness of the lines of a panel."""
    records = {ref: _finished(results, ref) for ref, lists in found.items() if lists}
    counts = sorted({len(lists) for lists in found.values() if lists})
    if not records:
        return "not run"
    words = [listed(r[block]["evidence"] for own in records.values() for r in own if r[block])]
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    words.append(f"{'mean of ' * (counts[-1] > 1)}{span} seed{'s' * (counts != [1])}")
    words[-1] += " (small dots)" * (dots and counts[-1] > 1)
    stale = [ref for ref, own in records.items() if any(results.stale(r) for r in own)]
    if stale:
        which = "all lines" if len(stale) == len(records) else names(results, stale, 2)
        words.append("stale (made by other code)" + f": {which}" * (len(records) > 1))
    return ", ".join(words)
