"""Figures as part of the page: few colours, one lossless WebP each, so that the page is light and stands alone."""

import base64
import io

COLOURS = 24
"""Of a drawing, shades of its letters' edges counted."""


def embedded(name: str, png: bytes) -> str:
    """A drawing (PNG) as a data URI. Raises ValueError when it is none."""
    from PIL import Image, UnidentifiedImageError  # comes with matplotlib; only where a page is made

    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            drawn = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"figure {name} is no PNG ({error})") from None
    if not drawn.getcolors(COLOURS):
        # Max coverage: a colour of few pixels, a small marker's, keeps its own.
        few = drawn.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        drawn = few.convert("RGB")
    out = io.BytesIO()
    drawn.save(out, "WEBP", lossless=True, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
