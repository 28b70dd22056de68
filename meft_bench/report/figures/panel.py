"""What every figure is made of: settings, colours, points with their seeds, panels and files.

Ours are filled markers, the paper's open ones; simulated numbers would be dashed. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; every method also has its own marker. Equal points, equal bytes: the user's
matplotlibrc, the locale and the date play no part.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from meft_bench.report.figures.marks import Mark

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
STYLE = {
    "lora": (BLUE, "o"),
    "lora_alpha_rank": (BLUE, "v"),
    "lora_ffn": (PURPLE, "P"),
    "lora_all": (SKY, "X"),
    "adapter_h": (ORANGE, "s"),
    "adapter_h_identity": (ORANGE, "h"),
    "parallel_adapter": (GREEN, "^"),
    "parallel_adapter_silu": (GREEN, "<"),
    "parallel_adapter_offload": (GREEN, ">"),
    "meft": (RED, "D"),
    "meft_no_ke": (RED, "d"),
    "full": (BLACK, "*"),
    "base": (GREY, "x"),
}
SERIES = ((SKY, "o"), (BLUE, "s"), (RED, "D"), (BLACK, "^"), (PURPLE, "v"), (ORANGE, "P"))
"""For what is no method: sizes, layers, lengths."""
_SETTINGS: Any = {
    "svg.hashsalt": "meft-bench",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 3,
    "legend.fontsize": 9.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
}


def draw_marks(
    axes: Any, marks: Sequence[Mark], colour: str, marker: str, label: str = "", *, connect: bool = True,
    light: bool = False, flip: bool = False, size: float = 7, style: str = "-",
) -> None:  # fmt: skip
    """Means as filled markers with their bars, every seed as a small dot; flip puts the values on the x axis."""
    made = [m for m in marks if m.by_seed]
    if not made:
        return
    places, means = [m.x for m in made], [m.mean for m in made]
    # Rounding may put a mean a hair outside its interval.
    bars = [
        [max(0.0, m.mean - (m.mean if m.low is None else m.low)) for m in made],
        [max(0.0, (m.mean if m.high is None else m.high) - m.mean) for m in made],
    ]
    line = (style if connect else "none") if len(made) > 1 else "none"
    alpha, width = (0.55, 1.0) if light else (1.0, 1.6)
    barred = any(m.low is not None for m in made)
    axes.errorbar(
        *((means, places) if flip else (places, means)), **({"xerr" if flip else "yerr": bars} if barred else {}),
        color=colour, marker=marker, markersize=size * (0.8 if light else 1), linewidth=width, linestyle=line,
        elinewidth=1.2, alpha=alpha, label=label or None, zorder=3,
    )  # fmt: skip
    dots = [(m.x, v) for m in made if len(m.by_seed) > 1 for v in m.by_seed.values()]
    at, values = [x for x, _ in dots], [v for _, v in dots]
    axes.plot(
        *((values, at) if flip else (at, values)), linestyle="none", marker="o", markersize=3.8,
        markerfacecolor=colour, markeredgecolor="white", markeredgewidth=0.5, zorder=4,
    )  # fmt: skip
    # Again above the dots: a filled marker must not look open.
    axes.plot(
        *((means, places) if flip else (places, means)), linestyle="none", marker=marker, color=colour, zorder=5,
        markersize=size * (0.8 if light else 1), alpha=alpha,
    )  # fmt: skip


def draw_paper(axes: Any, points: Sequence[tuple[float, float]], colour: str, marker: str, label: str) -> None:
    """The paper's points: open markers, no bars, since it gives none."""
    axes.plot(
        [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markerfacecolor="white",
        markeredgewidth=1.6, markersize=7, linewidth=1.2, label=label,
    )  # fmt: skip


def level(
    axes: Any, value: float, label: str, style: str = ":", band: tuple[float, float] | None = None, va: str = "center"
) -> None:
    """A horizontal line with its name beside the axes; band is its interval."""
    if band is not None:
        axes.axhspan(*band, color=GREY, alpha=0.12, linewidth=0)
    axes.axhline(value, color=GREY, linestyle=style, linewidth=1.3, zorder=1)
    axes.text(1.01, value, label, transform=axes.get_yaxis_transform(), va=va, fontsize=9, color="#333333")


def not_run(axes: Any, needs: str, command: str = "make replicate") -> None:
    """An empty panel that says what would fill it."""
    text = "\n".join(["not run", *textwrap.wrap(f"needs {needs}", 48), f"({command})"])
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#333333")
    # Not set_xticks([]): that would empty the panels that share this one's scale.
    axes.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
    axes.grid(visible=False)


def heading(axes: Any, name: str, how_made: str, width: int = 66) -> None:
    """Title of a panel: what it is, then how its points were made; lines end at a comma or semicolon."""
    lines: list[str] = []
    for text in (name, how_made):
        lines.append("")
        for clause in re.split(r"(?<=[,;]) ", text):
            if lines[-1] and len(f"{lines[-1]} {clause}") > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {clause}".strip()
    axes.set_title("\n".join(lines))


def legend(axes: Any, **place: Any) -> None:
    """The series first, in the order drawn, reference lines last (matplotlib would put them first)."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (not hasattr(handles[i], "has_yerr"), i))
    axes.legend([handles[i] for i in order], [labels[i] for i in order], **place)


def beside(axes: Any) -> None:
    """The legend to the right of the axes, where it hides no point."""
    legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def log_axis(axes: Any, ticks: Sequence[float], base: int = 10) -> None:
    """A logarithmic x axis with plain numbers at those of the ticks that lie inside."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log", base=base)
    low, high = axes.get_xlim()
    shown = [t for t in ticks if low <= t <= high]
    axes.set_xticks(shown, labels=[f"{t:,}" if t >= 10_000 else f"{t:g}" for t in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def grid(axes: Any, axis: str = "y") -> None:
    """Light lines behind the points."""
    if not axes.has_data():
        return
    axes.grid(axis=axis, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def settings() -> Iterator[None]:
    """Our settings and none of the user's."""
    import matplotlib  # a second of import, so only where a figure is drawn

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(_SETTINGS)
        yield


def save(name: str, figure: Any) -> dict[str, bytes]:
    """File name -> content, SVG and PNG, without dates and versions."""
    files = {}
    for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        out = io.BytesIO()
        figure.savefig(out, format=suffix, dpi=110, metadata=metadata)
        files[f"{name}.{suffix}"] = out.getvalue()
    return files
