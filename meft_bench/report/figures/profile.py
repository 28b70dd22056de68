"""Figures of `meft-bench profile`: what fits (memory, largest size, size against speed). Equal profiles, equal bytes.

Simulated bars are hatched and simulated lines dashed; what a GPU measured is solid and filled.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from meft_bench.profile import best
from meft_bench.report.figures import output, panel, profile_frontier, profile_time
from meft_bench.report.figures.lanes import stack
from meft_bench.report.figures.panel import Panel, Sheet, hatch, line_style
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.profiles import COMMAND, Profile, Row, by_model, ran, series_of, step_of, title_of

GIB, MILLION = 2**30, 1e6
_SIMULATED = (
    "Hatched or dashed is simulated, plain and solid is measured on a GPU; the title of a panel says which it shows."
)
FIGURES: dict[str, tuple[str, str]] = {
    "profile_frontier": (
        "What to train with: size against speed, of what fits the card",
        "Every method and size that fits card and host, with or without activation checkpointing: trainable parameters "
        "against tokens a second. A method is named and coloured where no other trains as much as fast; the grey ones "
        f"are beaten in both. Where U was logged, the assumed U is left out. {_SIMULATED} Up and to the right is "
        "better: pick the size, then the highest line there.",
    ),
    "profile_memory": (
        "Device memory of a training step, by category",
        "Peak of a step of the fewest micro-batches at one size, for each method, stacked by what holds the bytes at "
        "that moment, against what each card reports as usable; the CUDA context is counted. Methods that keep "
        "gradients take more in steps of several micro-batches, as the tables say. Upper, wide bar of a pair: without "
        "activation checkpointing; lower, narrow bar: with it. The number is the peak and, after it, the host memory "
        f"that the method needs. {_SIMULATED} A black diamond is what a GPU held in the same step. A bar left of a "
        "card's line fits that card.",
    ),
    "profile_largest": (
        "Largest size that fits, by method and card",
        "Trainable parameters of the largest R that fits each card, found by search, in steps of as many "
        "micro-batches as the table of the largest sizes says. Round marker without, diamond with activation "
        "checkpointing, a line between them. Variants of a method that end within 5 % of one another are one line. "
        f"{_SIMULATED} A method without a marker does not fit that card at any size, or was not run; that table says "
        "which.",
    ),
    "profile_traffic": (
        "Bytes over the link per trained token, against accumulation",
        "Above: bytes that cross the link both ways per trained token of an optimizer step, update included, against "
        "the micro-batches it accumulates. Methods that move whole tensors once a step fall; what every micro-batch "
        "moves again stays. Below: the same bytes of MEFT per step in units of M, the trainable keys and values in 16 "
        "bits, by R, with the paper's 0.56 M a micro-batch (reported, open) and the 2 M of moving all weights down and "
        f"gradients up once, which its 3.57 times refers to. {_SIMULATED} Where a line crosses the dotted one, the "
        "saving has turned into a loss.",
    ),
    "profile_latency": (
        "Figure 5: latency of a training step, by variant, on the profiled card",
        "Busy seconds of device, link and host in one step (accumulation 1) of the resident Parallel Adapter, MEFT, "
        "and MEFT without Key-Experts, without sparse transfer and without both; the black mark is the step itself, "
        f"shorter than the stack where work overlaps. {_SIMULATED} Compare the order with the paper's, which prints "
        "no values.",
    ),
    "profile_timeline": (
        "Figure 9: timeline of one MEFT step on the profiled card",
        "What GPU, link (each way), host and its workers (threads that run beside it) do during one step of the whole "
        "model, with the U that is assumed from the paper. Bars in two lanes at the same time are work that is hidden, "
        f"a gap in a lane is waiting. The host's last updates run beside the next step. {_SIMULATED}",
    ),
}
"""Name -> (title, caption), in the order of the report."""
_COLOURS = {
    "base weights": panel.GREY,
    "adapter parameters": panel.GREEN,
    "gradients": panel.ORANGE,
    "moments": panel.RED,
    "activations": panel.SKY,
    "transferred rows": panel.PURPLE,
    "backward temporaries": panel.BLUE,
    "optimizer temporaries": "#882255",
    "kernel workspace": "#DDCC77",
}
_OTHERS = ("#44AA99", "#999933", "#AA4499", "#332288")
"""For categories that have no colour of their own."""
_CONTEXT = ("CUDA context", "#222222")
_LINES = (":", "--", "-.", (0, (1, 3)), (0, (5, 1)))
_CARD_COLOURS = (panel.BLUE, panel.RED, panel.GREEN, panel.ORANGE, panel.PURPLE)
_ALIKE = 0.05
"""Largest sizes that differ by no more than this share are drawn as one."""
_VARIANTS = "meft_union"
"""How the variants of MEFT start that read the batch's union: they hold what MEFT holds, and the tables list them."""
_UNION = "U: the neurons that a micro-batch needs, as logged in a run or as assumed from the paper."
_ELSEWHERE = f"{_UNION} Variants in which a token reads the whole batch's neurons stand in the tables."


def draw(profiles: Sequence[Profile], reported: dict[str, Any], formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content of every figure in these formats (png, svg); empty without profiles."""
    files: dict[str, bytes] = {}
    with output.settings():
        for name, make in _DRAWN.items() if profiles else ():
            files |= output.save(name, make(profiles, reported), formats)
    return files


def _by_method(profiles: Sequence[Profile], question: str, lines: float, **grid: Any) -> tuple[Sheet, Any]:
    """A sheet with a panel a model, so high that each of so many lines is read; (panel, model, its profiles)."""
    models = by_model(profiles)
    sheet = Sheet(question, 1, len(models), max(4.0, 0.38 * lines + 2.6), **grid)
    return sheet, zip(sheet.panels, models.items(), strict=True)


def memory(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """A panel a model: a pair of stacked bars a method."""
    shown = {model: _pairs(found[0]) for model, found in by_model(profiles).items()}
    rows = [r for pairs in shown.values() for _, of_method in pairs for r in of_method]
    categories = _categories(rows)
    lines = max(map(len, shown.values()))
    sheet, panels = _by_method(profiles, "What fills the device's memory, and which card is it too much for?", lines)
    for own, (model, found) in panels:
        _memory_panel(own, model, found, shown[model], categories)
    first = [title for title, _ in next(iter(shown.values()))]
    for own, pairs in list(zip(sheet.panels, shown.values(), strict=True))[1:]:
        if pairs and [title for title, _ in pairs] == first:  # the same lines: named once
            own.axes.tick_params(labelleft=False)
    sheet.key({**categories, _CONTEXT[0]: _CONTEXT[1]}, note=_ELSEWHERE)
    return sheet.done()


def _memory_panel(
    own: Panel, model: str, found: Sequence[Profile], pairs: Sequence[tuple[str, list[Row]]], categories: dict[str, str]
) -> None:
    profile, axes = found[0], own.axes
    own.chars = 30  # the names beside it take the rest
    s, evidence = profile.settings, listed(r["evidence"] for _, rows in pairs for r in rows)
    own.heading(f"{model}, R = {profile.stated}, micro-batch {s['batch']} x {s['seq']}", evidence or "not run")
    if not pairs:
        own.not_run("rows that ran", COMMAND)
        return
    far = max(r["memory"]["device_total_bytes"] for _, rows in pairs for r in rows) / GIB
    cards = [p for p in found if p.evidence == profile.evidence]
    for i, (_, rows) in enumerate(pairs):
        for row in rows:
            _memory_bar(axes, row, -i, s["context_bytes"], categories, far)
    _measured_points(axes, found, {step_of(profile, r): -i for i, (_, rows) in enumerate(pairs) for r in rows})
    for style, p in zip(_LINES, cards, strict=False):
        usable = p.settings["usable_bytes"] / GIB
        axes.axvline(usable, color=panel.BLACK, linewidth=1.3, linestyle=style, zorder=1)
        axes.text(usable, 0.65, f"{p.card} ", ha="right", va="bottom", fontsize=9)
    axes.set_yticks([-i for i in range(len(pairs))], labels=[_wrapped(t) for t, _ in pairs], fontsize=9)
    axes.set_ylim(-len(pairs) + 0.4, 1.4)
    axes.set_xlim(0, 1.3 * max(far, *(p.settings["usable_bytes"] / GIB for p in cards)))
    own.name_axes("GiB on the device at the peak\n(+ GiB on the host)")
    own.grid("x")


def _memory_bar(axes: Any, row: Row, y: float, context: int, categories: dict[str, str], far: float) -> None:
    """One bar: wide and above without checkpointing, narrow and below with it."""
    saved, held = row["checkpointing"], row["memory"]
    place, height = (y - 0.24, 0.26) if saved else (y + 0.14, 0.44)
    parts = [(held["by_category"].get(c, 0) / GIB, colour) for c, colour in categories.items()]
    end = stack(axes, place, [*parts, (context / GIB, _CONTEXT[1])], height, hatch(row["evidence"]),
                edgecolor="white", linewidth=0.4, zorder=2)  # fmt: skip
    host = held["host_peak_bytes"]
    text = f"{held['device_total_bytes'] / GIB:.1f}" + (f" (+{host / GIB:.0f})" if host and host >= GIB else "")
    axes.text(end + 0.008 * far, place, text, va="center", fontsize=7 if saved else 8, zorder=4,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85})  # fmt: skip


def _measured_points(axes: Any, found: Sequence[Profile], places: dict[tuple[Any, ...], int]) -> None:
    """What a GPU held in the same steps: filled diamonds over the bars. places: step -> where its pair of bars is."""
    for p in (p for p in found if p.evidence in ("measured", "capped") and p is not found[0]):
        seen = (r for r in p.rows if ran(r) and r["memory"]["device_total_bytes"])
        for row in (r for r in seen if step_of(p, r) in places):
            y = places[step_of(p, row)] + (-0.24 if row["checkpointing"] else 0.14)
            axes.plot([row["memory"]["device_total_bytes"] / GIB], [y], color=panel.BLACK, marker="D", markersize=5,
                      zorder=6)  # fmt: skip


def _pairs(profile: Profile) -> list[tuple[str, list[Row]]]:
    """(title, its rows at the stated R without and with checkpointing), in the file's order."""
    rows = [r for r in profile.at(profile.stated) if ran(r) and r["memory"]["by_category"] and not _is_variant(r)]
    names = {series_of(r): title_of(r) for r in rows}
    return [(t, sorted((r for r in rows if series_of(r) == s), key=lambda r: r["checkpointing"]))
            for s, t in names.items()]  # fmt: skip


def _categories(rows: Sequence[Row]) -> dict[str, str]:
    """Category -> colour: ours in their order, then any other."""
    found = {c for r in rows for c, n in r["memory"]["by_category"].items() if n}
    others = dict(zip(sorted(found - set(_COLOURS)), _OTHERS * 3, strict=False))
    return {c: colour for c, colour in (_COLOURS | others).items() if c in found}


def _wrapped(title: str) -> str:
    return textwrap.fill(title.replace("(U ", "(U_"), 28).replace("(U_", "(U ")


def _is_variant(row: Row) -> bool:
    return str(row["variant"]).startswith(_VARIANTS)


def largest(profiles: Sequence[Profile], reported: dict[str, Any]) -> Any:
    """A panel a model: the largest trainable size of every method, a colour a card. Variants of a family that end at
    the same sizes on every card are one line."""
    titles = _alike(profiles)
    question = "How large an adapter can each method train on a card?"
    sheet, panels = _by_method(profiles, question, 1.1 * len(titles), sharey=True)
    places = {series: -i for i, series in enumerate(titles)}
    searched = [p for p in profiles if p.largest] or profiles  # a measured profile searches none
    cards = dict(zip(dict.fromkeys(p.card for p in searched), _CARD_COLOURS * 3, strict=False))
    for own, (model, found) in panels:
        for p in (p for p in found if p.card in cards):
            shift = 0.18 * (list(cards).index(p.card) - (len(cards) - 1) / 2)
            _largest_of(own, p, {s: y - shift for s, y in places.items()}, cards[p.card])
        own.heading(model, listed(e["evidence"] for p in found for e in p.largest if ran(e)) or "not run")
        own.log_plain("x")
        own.name_axes("trainable parameters, millions (log)")
        own.grid("both")
    axes = sheet.panels[0].axes
    axes.set_yticks(list(places.values()), labels=[_wrapped(t) for t in titles.values()], fontsize=9)
    axes.set_ylim(-len(titles) + 0.4, 0.6)
    sheet.key(cards, _checkpointing_key(), _UNION)
    return sheet.done()


def _alike(profiles: Sequence[Profile]) -> dict[tuple[str, str], str]:
    """Series -> its name in the figure. Of the series of one family whose sizes are alike, the first stands for all."""
    sizes: dict[tuple[str, str], dict[tuple[int, bool], float]] = {}
    about: dict[tuple[str, str], tuple[str, str]] = {}
    for i, p in enumerate(profiles):
        families = {r["variant"]: r["family"] for r in p.rows}
        for e in p.largest:
            sizes.setdefault(series_of(e), {})[i, e["checkpointing"]] = e["trainable"] if ran(e) else 0
            about.setdefault(series_of(e), (str(families.get(e["variant"], "")), title_of(e)))
    groups: list[list[tuple[str, str]]] = []
    for series, own in sizes.items():
        family = about[series][0]
        alike = (g for g in groups if about[g[0]][0] == family and _same(sizes[g[0]], own, family == best.OURS))
        group = next(alike, None)
        if group is None:
            groups.append([series])
        else:
            group.append(series)
    return {g[0]: _name_of([about[s][1] for s in g]) for g in groups}


def _name_of(titles: list[str]) -> str:
    without = {title.partition(" (U ")[0] for title in titles}
    if len(titles) == 2 and len(without) == 1:
        return f"{without.pop()} (either U)"
    return "; ".join(titles) if len(titles) < 3 else f"{titles[0]} and {len(titles) - 1} variants that end there too"


def _same(one: dict[tuple[int, bool], float], two: dict[tuple[int, bool], float], ours: bool) -> bool:
    if ours:  # with checkpointing they end at the host's memory, without it some a little before
        one, two = ({k: max(v for (i, _), v in own.items() if i == k[0]) for k in own} for own in (one, two))
    return one.keys() == two.keys() and all(abs(one[k] - two[k]) <= _ALIKE * one[k] for k in one)


def _largest_of(own: Panel, profile: Profile, places: dict[tuple[str, str], float], colour: str) -> None:
    for series, y in places.items():
        fits = (e for e in profile.largest if ran(e) and series_of(e) == series)
        found = sorted(fits, key=lambda e: e["checkpointing"])
        sizes = [e["trainable"] / MILLION for e in found]
        if found:
            own.line(sizes, [y] * len(found), colour, linestyle=line_style(found[0]["evidence"]), linewidth=1)
        for e, size in zip(found, sizes, strict=True):
            own.line([size], [y], colour, marker="D" if e["checkpointing"] else "o", markersize=5.5)


def _checkpointing_key() -> list[Any]:
    from matplotlib.lines import Line2D

    words = {"o": "without checkpointing", "D": "with checkpointing"}
    return [Line2D([], [], color="#555555", marker=m, linestyle="none", label=label) for m, label in words.items()]


_DRAWN: dict[str, Callable[[Sequence[Profile], dict[str, Any]], Any]] = {
    "profile_frontier": profile_frontier.frontier,
    "profile_memory": memory,
    "profile_largest": largest,
    "profile_traffic": profile_time.traffic,
    "profile_latency": profile_time.latency,
    "profile_timeline": profile_time.timeline,
}
