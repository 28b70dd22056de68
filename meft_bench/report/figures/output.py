"""A figure as a file: the settings it is drawn with, and its bytes. Equal figures, equal bytes."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from meft_bench.report.figures.panel import LABEL_POINTS

DPI = 120
_COLOURS = 48
"""Of a PNG's palette, with which a file is far shorter and no eye tells."""
_SETTINGS: Any = {
    "svg.hashsalt": "meft-bench",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 3,
    "hatch.linewidth": 0.45,
    "legend.fontsize": LABEL_POINTS,
    "legend.frameon": False,
}


@contextmanager
def settings() -> Iterator[None]:
    """Our settings and none of the user's."""
    import matplotlib  # a second of import, so only where a figure is drawn

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(_SETTINGS)
        yield


def save(name: str, figure: Any, formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content in these formats (png, svg), without dates and versions."""
    files = {}
    for suffix in formats:
        out = io.BytesIO()
        if suffix == "svg":
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        else:
            _png(figure, out)
        files[f"{name}.{suffix}"] = out.getvalue()
    return files


def _png(figure: Any, out: io.BytesIO) -> None:
    """With a palette: next comes the colour that is worst stood for, by its pixels; the others take the nearest."""
    import numpy as np
    from PIL import Image

    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(io.BytesIO(out.getvalue())) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int32)
    found, at, counts = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_inverse=True, return_counts=True)
    colours = found[:, None] >> [16, 8, 0] & 255
    palette: list[Any] = []
    nearest, error = np.zeros(len(found), np.uint8), np.full(len(found), 1 << 20)
    while len(palette) < _COLOURS and error.any():
        chosen = colours[np.argmax(error * counts)]
        distance = ((colours - chosen) ** 2).sum(-1)
        nearest[distance < error] = len(palette)
        error = np.minimum(error, distance)
        palette.append(chosen)
    flat = Image.fromarray(nearest[at].reshape(pixels.shape[:2]), mode="P")
    flat.putpalette(np.array(palette, np.uint8).tobytes())
    out.seek(0)
    out.truncate()
    flat.save(out, format="PNG", optimize=True)
