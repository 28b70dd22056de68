"""Markdown to HTML, for exactly what our tables are written in: pipe tables, paragraphs, - lists, `code`, **bold** and
*emphasis*.

Everything else in a line is text and is escaped, a character behind a backslash too; a block of another kind (a
heading, a fence, an image, a link) is a mistake in the table that made it and is refused rather than shown as something
else.
"""

import re
from collections.abc import Sequence
from html import escape

_CODE = re.compile(r"(`[^`]+`)")
_BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=[^\s*])\*(?![\w*])")
_INTERVAL = re.compile(r"\[[-+\d.,e ]+\]")
_CELL = re.compile(r"(?<!\\)\|")
_ESCAPED = re.compile(r"\\[!-/:-@\[-`{-~]|&(?:lt|amp);")
_HELD = "\x00"
"""Stands for an escaped character while the marks around it are read."""
_RULE = re.compile(r"-{3,}:?$")
_UNKNOWN = re.compile(r"#{1,6} |```|~~~|> |!\[|\d+\. |[*+] |<!--|---$")


def to_html(markdown: str) -> str:
    """HTML of a table's Markdown. Raises ValueError for a block of a kind that our tables do not use."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", markdown.strip("\n"))
    return "".join(_block(block.split("\n")) for block in blocks if block.strip())


def inline(text: str) -> str:
    """One line of text, escaped, with `code`, **bold** and *emphasis*; what Markdown escapes stays as it is."""
    held: list[str] = []

    def hold(found: re.Match[str]) -> str:
        held.append({"&lt;": "<", "&amp;": "&"}.get(found[0], found[0][-1]))
        return _HELD

    parts = _CODE.split(_ESCAPED.sub(hold, text.replace(_HELD, "")))
    # Odd places are the code spans: nothing is marked inside them.
    html = "".join(f"<code>{escape(p[1:-1])}</code>" if i % 2 else _marked(escape(p)) for i, p in enumerate(parts))
    back = iter(held)
    return re.sub(_HELD, lambda _: escape(next(back)), html)


def _marked(text: str) -> str:
    return _EMPHASIS.sub(r"<em>\1</em>", _BOLD.sub(r"<strong>\1</strong>", text))


def html_table(
    header: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[bool], label: str = "table"
) -> str:
    """A table in a box of its own that scrolls when the table is wider than the page. Cells are HTML already."""
    head = "".join(f'<th scope="col"{_class(r)}>{cell}</th>' for cell, r in zip(header, right, strict=True))
    lines = ("".join(f"<td{_class(r)}>{cell}</td>" for cell, r in zip(line, right, strict=True)) for line in body)
    rows = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return scroll_box(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>", label)


def scroll_box(inside: str, label: str) -> str:
    """A box that scrolls sideways, reachable by keyboard."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n{inside}\n</div>\n'


def _block(lines: list[str]) -> str:
    if any(_UNKNOWN.match(line.lstrip()) for line in lines) or any("](" in line for line in lines):
        raise ValueError(f"Markdown that the page does not know: {lines[0]!r}")
    kinds = {_kind(line) for line in lines}
    if len(kinds) > 1:
        raise ValueError(f"a block of Markdown mixes {' and '.join(sorted(kinds))}: {lines[0]!r}")
    kind = kinds.pop()
    if kind == "table":
        return _table(lines)
    if kind == "list":
        return "<ul>\n" + "".join(f"<li>{inline(line[2:])}</li>\n" for line in lines) + "</ul>\n"
    return f"<p>{inline(' '.join(line.strip() for line in lines))}</p>\n"


def _kind(line: str) -> str:
    if line.startswith("|"):
        return "table"
    return "list" if line.startswith("- ") else "text"


def _table(lines: list[str]) -> str:
    cells = [_cells(line) for line in lines]
    if len(cells) < 2 or not all(_RULE.match(c) for c in cells[1]) or len({len(line) for line in cells}) > 1:
        raise ValueError(f"a broken Markdown table: {lines[0]!r}")
    header, rule, *body = cells
    right = [c.endswith(":") for c in rule]
    return html_table([inline(c) for c in header], [[_cell(c) for c in line] for line in body], right)


def _cell(text: str) -> str:
    return _INTERVAL.sub(r'<span class="nowrap">\g<0></span>', inline(text))


def _cells(line: str) -> list[str]:
    if not line.rstrip().endswith("|"):
        raise ValueError(f"a broken Markdown table: {line!r}")
    return [c.strip().replace("\\|", "|") for c in _CELL.split(line.strip()[1:-1])]


def _class(right: bool) -> str:
    return ' class="num"' if right else ""
