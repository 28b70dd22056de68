"""What every figure is made of: a sheet with one question and its panels, and lines named at their ends.

Ours are filled markers, the paper's open ones; simulated numbers are dashed or hatched. Colours are Okabe and Ito's,
which colour-blind readers can tell apart; every method also has its own marker. Equal points, equal bytes: the user's
matplotlibrc, the locale and the date play no part.
"""

import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from meft_bench.report.figures.marks import Mark, gaps, how
from meft_bench.report.records.results import Results

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
BROWN = "#7F4A1E"
"""Of one more method than the eight colours name; darker than orange and red to any eye."""
STYLE: dict[str, tuple[str, str]] = defaultdict(lambda: (GREY, "o"))
"""Colour and mark of a row; those of a row that has none of its own are grey circles."""
STYLE |= {
    "lora": (BLUE, "o"),
    "lora_alpha_rank": (BLUE, "v"),
    "lora_ffn": (PURPLE, "P"),
    "lora_all": (SKY, "X"),
    "adapter_h": (ORANGE, "s"),
    "adapter_h_identity": (ORANGE, "h"),
    "adapter_h_spread": (ORANGE, "p"),
    "parallel_adapter": (GREEN, "^"),
    "parallel_adapter_silu": (GREEN, "<"),
    "parallel_adapter_offload": (GREEN, ">"),
    "meft": (RED, "D"),
    "meft_no_ke": (RED, "d"),
    "meft_distinctive": (SKY, "v"),
    "meft_distinctive_half": (BROWN, "d"),
    "product_keys": (SKY, "p"),
    "galore": (BLUE, "H"),
    "shira": (ORANGE, "P"),
    "lsp_offload": (GREY, "D"),
    "adalomo": (PURPLE, "8"),
    "full": (BLACK, "*"),
    "base": (GREY, "x"),
}
SERIES = ((SKY, "o"), (BLUE, "s"), (RED, "D"), (BLACK, "^"), (PURPLE, "v"), (ORANGE, "P"))
"""For what is no method: sizes, layers, lengths."""
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BLACK, GREY)
WIDTH = 10.0
"""Inches of a sheet: its smallest words are still read when a page shows it 900 pixels wide."""
LABEL_POINTS = 9.0
"""Size of the words beside lines and below panels."""


@dataclass(frozen=True)
class _End:
    """A name to be set beside the axes, and the point that it names."""

    text: str
    x: float
    y: float
    colour: str


@dataclass
class Panel:
    """Axes with a heading, points with their seeds and intervals, and names at the ends of lines."""

    axes: Any
    chars: int
    """About how many characters a line below or above the axes holds."""
    _ends: list[_End] = field(default_factory=list)

    def marks(
        self, marks: Sequence[Mark], colour: str, marker: str, label: str = "", *, connect: bool = True,
        light: bool = False, flip: bool = False, inline: int | None = None,
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
        barred = any(m.low is not None for m in made)
        look = {"color": colour, "marker": marker, "markersize": 5.0 if light else 6.5, "alpha": 0.6 if light else 1.0}
        self.axes.errorbar(
            *((means, places) if flip else (places, means)), **({"xerr" if flip else "yerr": bars} if barred else {}),
            linewidth=1.0 if light else 1.6, linestyle="-" if connect and len(made) > 1 else "none", elinewidth=1.2,
            label=label or None, zorder=3, **look,
        )  # fmt: skip
        dots = [(m.x, v) for m in made if len(m.by_seed) > 1 for v in m.by_seed.values()]
        at, values = [x for x, _ in dots], [v for _, v in dots]
        self.axes.plot(
            *((values, at) if flip else (at, values)), linestyle="none", marker="o", markersize=3.6,
            markerfacecolor=colour, markeredgecolor="white", markeredgewidth=0.5, zorder=4,
        )  # fmt: skip
        # Again above the dots: a filled marker must not look open.
        self.axes.plot(*((means, places) if flip else (places, means)), linestyle="none", zorder=5, **look)
        self._name(label, places, means, colour, inline)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], colour: str, label: str = "", *, inline: int | None = None,
        spread: Any = None, **look: Any,
    ) -> None:  # fmt: skip
        """A plain line with its name; spread: (below, above) of every point; look: as matplotlib's plot takes it."""
        if not xs:
            return
        self.axes.plot(xs, ys, color=colour, label=label or None, **{"linewidth": 1.5, "zorder": 3, **look})
        if spread is not None:
            self.axes.errorbar(xs, ys, yerr=spread, fmt="none", ecolor=colour, elinewidth=1.1, zorder=2)
        self._name(label, xs, ys, colour, inline)

    def paper(self, points: Sequence[tuple[float, float]], colour: str, marker: str, label: str) -> None:
        """The paper's points: open markers, no bars, since it gives none."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.line(xs, ys, colour, label, marker=marker, markerfacecolor="white", markeredgewidth=1.6, markersize=6.5,
                  linewidth=1.2)  # fmt: skip

    def level(self, value: float, label: str, style: str = ":", band: tuple[float, float] | None = None) -> None:
        """A horizontal line with its name; band is its interval."""
        if band is not None:
            self.axes.axhspan(*band, color=GREY, alpha=0.12, linewidth=0)
        self.axes.axhline(value, color=GREY, linestyle=style, linewidth=1.3, zorder=1, label=label)
        self._ends.append(_End(label, math.inf, value, GREY))

    def _name(self, label: str, xs: Sequence[float], ys: Sequence[float], colour: str, inline: int | None) -> None:
        if label and inline is not None:
            from matplotlib.patheffects import withStroke

            i = min(inline, len(xs) - 1)
            self.axes.annotate(label, (xs[i], ys[i]), (6, -2), textcoords="offset points", ha="left", va="top",
                               fontsize=LABEL_POINTS - 0.5, color=_ink(colour), zorder=6,
                               path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip
        elif label:
            i = max(range(len(xs)), key=lambda i: xs[i])
            self._ends.append(_End(label, xs[i], ys[i], colour))

    def place_names(self) -> None:
        """Set the names of lines beside the axes, as near to their ends as they go without touching. Of ends at about
        one height the one further right has its name on top, so that leaders do not cross."""
        axes = self.axes
        if not self._ends:
            return
        data, height = axes.transData + axes.transAxes.inverted(), axes.get_window_extent().height
        one = 1.28 * LABEL_POINTS / 72 * axes.figure.dpi / height
        right = axes.get_xlim()[1]
        placed = [(end, *data.transform((min(end.x, right), end.y))) for end in self._ends]
        placed.sort(key=lambda named: (-round(named[2] / one), -named[1], -named[2]))
        heights = [one * (1.12 + end.text.count("\n")) for end, *_ in placed]
        wanted = [one * round(y / one) for *_, y in placed]
        for (end, x, y), at in zip(placed, spread(wanted, heights), strict=True):
            leader = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.9, "linestyle": ":", "shrinkA": 1,
                      "relpos": (0, 0.5), "shrinkB": 0 if end.x == math.inf else 4}  # fmt: skip
            axes.annotate(end.text, (x, y), (1.03, at), xycoords="axes fraction", textcoords="axes fraction",
                          va="center", fontsize=LABEL_POINTS, color=_ink(end.colour), linespacing=1.1,
                          arrowprops=leader, annotation_clip=False)  # fmt: skip

    def heading(self, name: str, how_made: str = "") -> None:
        """What the panel shows, then how its points were made; lines end at a comma or semicolon."""
        lines = [line for text in (name, how_made) if text for line in clauses(text, self.chars)]
        self.axes.set_title("\n".join(lines), loc="left")

    def name_axes(self, x: str = "", y: str = "", notes: Sequence[str] = ()) -> None:
        """Names of the axes; notes stand below the x axis."""
        told = [line for text in (*x.splitlines(), *notes) for line in textwrap.wrap(text, self.chars)]
        self.axes.set_xlabel("\n".join(told))
        self.axes.set_ylabel(y)

    def scores(
        self, results: Results, drawn: Sequence[Mark], name: str, needs: str, x: str, y: str, *, bars: str = "",
        notes: Sequence[str] = (), grid: str = "y", command: str = "make replicate",
    ) -> bool:  # fmt: skip
        """Heading with evidence, items and seeds, axes, what is missing; without marks it says so and returns False."""
        self.heading(name, how(drawn, bars))
        self.name_axes(x, y, [*gaps(results, drawn, self.chars), *notes])
        made = any(m.by_seed for m in drawn)
        if made:
            self.grid(grid)
        else:
            self.not_run(needs, command)
        return made

    def not_run(self, needs: str, command: str = "make replicate") -> None:
        """An empty panel that says what would fill it."""
        text = "\n".join(["not run", *textwrap.wrap(f"needs {needs}", 40), f"({command})"])
        self.axes.text(0.5, 0.5, text, ha="center", va="center", transform=self.axes.transAxes, color="#333333")
        # Not set_xticks([]): that would empty the panels that share this one's scale.
        self.axes.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
        self.axes.grid(visible=False)

    def rows(self, titles: Sequence[str], at: Sequence[float], values: Sequence[str]) -> None:
        """Names on the left and values on the right of marks that lie one below the other."""
        self.axes.set_yticks(list(at), labels=list(titles))
        self.axes.set_ylim(min(at) - 0.6, max(at) + 0.6)
        for y, value in zip(at, values, strict=True):
            self.axes.text(1.01, y, value, transform=self.axes.get_yaxis_transform(), va="center",
                           fontsize=LABEL_POINTS)  # fmt: skip

    def log_x(self, ticks: Sequence[float], base: int = 10) -> None:
        """A logarithmic x axis with plain numbers at those of the ticks that lie inside."""
        from matplotlib.ticker import NullFormatter, NullLocator

        self.axes.set_xscale("log", base=base)
        low, high = self.axes.get_xlim()
        shown = [t for t in ticks if low <= t <= high]
        self.axes.set_xticks(shown, labels=[f"{t:,}" if t >= 1000 else f"{t:g}" for t in shown])
        self.axes.xaxis.set_minor_locator(NullLocator())
        self.axes.xaxis.set_minor_formatter(NullFormatter())

    def log_plain(self, *which: str) -> None:
        """Logarithmic axes ("x", "y") with plain numbers at 1, 2 and 5 of every decade, at more where there is but part
        of one."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        for name in which:
            getattr(self.axes, f"set_{name}scale")("log")
            axis = getattr(self.axes, f"{name}axis")
            low, high = axis.get_view_interval()
            subs = (1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
            axis.set_major_locator(LogLocator(subs=subs, numticks=20))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())

    def whole_x(self) -> None:
        """Only whole numbers on the x axis: layers."""
        from matplotlib.ticker import MaxNLocator

        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def grid(self, axis: str = "y") -> None:
        """Light lines behind the points."""
        self.axes.grid(axis=axis, color="#DDDDDD", linewidth=0.8)
        self.axes.set_axisbelow(True)


class Sheet:
    """One figure: its question, its panels row by row, a note below, and a key for bars."""

    def __init__(self, question: str, rows: int = 1, columns: int = 1, height: float = 5.0, *, width: float = WIDTH,
                 **grid: Any) -> None:  # fmt: skip
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot: no window system, no global state
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        self.figure: Any = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07, hspace=0.04))
        FigureCanvasAgg(self.figure)
        self.figure.suptitle("\n".join(textwrap.wrap(question, round(9.0 * width))))
        axes = self.figure.subplots(rows, columns, squeeze=False, **grid).ravel()
        self.panels = [Panel(a, round(9.6 * width) if columns == 1 else round(11.2 * width / columns)) for a in axes]

    def note(self, text: str) -> None:
        """Small words below all panels."""
        width = round(12.5 * self.figure.get_figwidth())
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width)]
        self.figure.supxlabel("\n".join(lines), fontsize=LABEL_POINTS, color="#333333")

    def key(self, colours: dict[str, str], extra: Sequence[Any] = (), note: str = "") -> None:
        """Which colour means what, in the order of the bars, below a note."""
        from matplotlib.patches import Patch

        boxes = [Patch(facecolor=c, label=name) for name, c in colours.items()]
        lines = [line for part in note.splitlines() for line in textwrap.wrap(part, round(12.5 * WIDTH))]
        self.figure.legend(handles=[*boxes, *extra], loc="outside lower center", ncols=5, columnspacing=1.4,
                           title="\n".join(lines) or None, title_fontsize=LABEL_POINTS)  # fmt: skip

    def done(self) -> Any:
        """The figure, once every name has its place."""
        self.figure.get_layout_engine().execute(self.figure)
        for panel in self.panels:
            panel.place_names()
        return self.figure


def spread(wanted: Sequence[float], heights: Sequence[float], top: float = 1.02) -> list[float]:
    """Centres as near to those wanted as boxes of these heights can lie below the top without touching, in order."""
    groups: list[tuple[float, float, list[int]]] = []  # centre, height, members from low to high
    for i in sorted(range(len(wanted)), key=lambda i: (wanted[i], -i)):
        centre, height, members = wanted[i], heights[i], [i]
        while groups and centre - height / 2 < groups[-1][0] + groups[-1][1] / 2:
            below, tall, own = groups.pop()
            members = own + members
            centre = (below * len(own) + centre * (len(members) - len(own))) / len(members)
            height += tall
        groups.append((centre, height, members))
    placed, limit = [0.0] * len(wanted), top
    for centre, height, members in groups:
        edge = centre - height / 2
        for i in members:
            placed[i] = edge + heights[i] / 2
            edge += heights[i]
    for i in sorted(range(len(placed)), key=lambda i: -placed[i]):
        placed[i] = min(placed[i], limit - heights[i] / 2)
        limit = placed[i] - heights[i] / 2
    return placed


def clauses(text: str, width: int) -> list[str]:
    """The text in lines that end at a comma or semicolon."""
    lines = [""]
    for clause in re.split(r"(?<=[,;]) ", text):
        if lines[-1] and len(f"{lines[-1]} {clause}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {clause}".strip()
    return lines


def hatch(evidence: str) -> str:
    """Of a bar: simulated ones are hatched."""
    return "////" if evidence == "simulated" else ""


def line_style(evidence: str) -> str:
    """Of a line: simulated ones are dashed."""
    return "--" if evidence == "simulated" else "-"


def _ink(colour: str) -> str:
    """The colour dark enough for small words on white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.72 * p):02x}" for p in parts)
