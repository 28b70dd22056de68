"""Markdown to HTML by markdown-it, for what our tables are written in: pipe tables, paragraphs, lists, `code`, **bold**
and *emphasis*.

HTML in a text is text. A block of another kind (a heading, a fence, an image, a link) is a mistake in the table that
made it and is refused rather than shown as something else.
"""

import re
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import escape

_KINDS = {"paragraph", "bullet_list", "ordered_list", "list_item", "table", "thead", "tbody", "tr", "th", "td",
          "inline", "text", "code_inline", "strong", "em", "softbreak", "text_special"}  # fmt: skip
_INTERVAL = re.compile(r"\[[-+\d.,e ]+\]")
_PIPE = re.compile(r"(?<!\\)\|")
_NUMBERED = re.compile(r"\d+\. ")


def to_html(markdown: str) -> str:
    """HTML of a table's Markdown. Raises ValueError for a block of a kind that our tables do not use."""
    for block in re.split(r"\n(?:[ \t]*\n)+", markdown.strip("\n")):
        _check_block(block.split("\n"))
    tokens = _READER.parse(markdown)
    for token in (t for outer in tokens for t in (outer, *(outer.children or ()))):
        if re.sub("_(open|close)$", "", token.type) not in _KINDS:
            raise ValueError(f"Markdown that the page does not know ({token.type}): {token.content[:40]!r}")
    return str(_READER.renderer.render(tokens, _READER.options, {}))


def inline(text: str) -> str:
    """One line of text as HTML, with `code`, **bold** and *emphasis*; what Markdown escapes stays as it is."""
    return str(_READER.renderInline(text))


def _check_block(lines: list[str]) -> None:
    """A library shows half a table as text and drops the cells that a line has too many; here both are mistakes."""
    kinds = {_kind(line) for line in lines}
    if len(kinds) > 1:
        raise ValueError(f"a block of Markdown mixes {' and '.join(sorted(kinds))}: {lines[0]!r}")
    rule = lines[1].replace(" ", "") if len(lines) > 1 else ""
    if kinds == {"table"} and (len({len(_PIPE.findall(x)) for x in lines}) > 1 or not re.fullmatch(r"[|:-]+", rule)):
        raise ValueError(f"a broken Markdown table: {lines[0]!r}")


def _kind(line: str) -> str:
    if line.startswith("|"):
        return "table"
    return "list" if line.startswith("- ") else "numbered list" if _NUMBERED.match(line) else "text"


def _cell(tag: str) -> Any:
    def made(_: Any, tokens: Sequence[Token], at: int, *rest: Any) -> str:
        numeric = ' class="num"' if "right" in str(tokens[at].attrGet("style")) else ""
        return f"<{tag}{numeric}>"

    return made


def _text(_: Any, tokens: Sequence[Token], at: int, *rest: Any) -> str:
    return _INTERVAL.sub(r'<span class="nowrap">\g<0></span>', str(escape(tokens[at].content)))


def _reader() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    box = '<div class="scroll" role="region" aria-label="table" tabindex="0">\n<table>\n'
    reader.add_render_rule("table_open", lambda *_: box)
    reader.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    reader.add_render_rule("th_open", _cell('th scope="col"'))
    reader.add_render_rule("td_open", _cell("td"))
    for tag in ("tr", "/th", "/td"):  # on one line: a page has thousands of cells
        kind = f"{tag[1:]}_close" if tag.startswith("/") else f"{tag}_open"
        reader.add_render_rule(kind, lambda *_, tag=tag: f"<{tag}>")
    reader.add_render_rule("text", _text)
    return reader


_READER = _reader()
