"""Generated blocks in README.md: what stands between <!-- results:NAME --> and <!-- /results:NAME -->."""

import re
from collections.abc import Mapping
from pathlib import Path

from meft_bench.write import write_if_changed

_MARKER = re.compile(r"<!-- (/?)results:([a-z0-9_]+) -->")


def update_readme(path: Path, blocks: Mapping[str, str]) -> bool:
    """Put every block between its markers; True if the file changed. Raises ValueError for markers that do not fit."""
    return write_if_changed(path, render(_read(path), blocks).encode())


def check_readme(path: Path, blocks: Mapping[str, str]) -> list[str]:
    """Names of the blocks that are not what the records give. Raises ValueError for markers that do not fit."""
    text = _read(path)
    spans = _spans(text, blocks)
    return [name for name, (start, end) in sorted(spans.items()) if text[start:end] != _inside(blocks[name])]


def render(text: str, blocks: Mapping[str, str]) -> str:
    """text with every block between its markers; all else is left as it is."""
    # From the last to the first, so that the positions found stay true.
    for name, (start, end) in sorted(_spans(text, blocks).items(), key=lambda item: -item[1][0]):
        text = text[:start] + _inside(blocks[name]) + text[end:]
    return text


def _inside(block: str) -> str:
    # GitHub needs the blank lines to read a table or list after a comment.
    return "\n\n" + block.strip("\n") + "\n\n"


def _spans(text: str, blocks: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Where each block's inside begins and ends. Raises ValueError, one for all faults."""
    faults, spans = [], {}
    found = [(m.group(1), m.group(2), m) for m in _MARKER.finditer(text)]
    for name in sorted({n for _, n, _ in found} - set(blocks)):
        faults.append(f"{name} is no block of the report (there are: {', '.join(sorted(blocks))})")
    for name in sorted(blocks):
        here = [(slash, m) for slash, n, m in found if n == name]
        if [slash for slash, _ in here] != ["", "/"]:
            faults.append(f"needs <!-- results:{name} --> and <!-- /results:{name} --> once each, in this order")
        else:
            spans[name] = (here[0][1].end(), here[1][1].start())
    ordered = sorted(spans.items(), key=lambda item: item[1])
    for (a, (_, end)), (b, (start, _)) in zip(ordered, ordered[1:], strict=False):
        if start <= end:  # even side by side, a closing marker stands between them
            faults.append(f"the blocks {a} and {b} overlap")
    if faults:
        raise ValueError(f"the README's result markers do not fit: {'; '.join(faults)}")
    return spans


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # bytes: line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path.name}: {error.__class__.__name__}") from None
