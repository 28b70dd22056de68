"""Markdown and CSV tables as text: fixed order and digits, so that equal results give equal bytes.

Names and reasons come from records, folders and other people's programs. Here, and nowhere else, they are made safe:
a body cell shows its text as it is, whatever stands in it; a caption or list passes what is foreign through plain().
"""

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_HIDDEN = {"Cc", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that cannot be seen or written: control characters, lone surrogates, private use, line ends."""
_MOVING = set("\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
"""Marks that turn the direction of what stands beside them, or have no width."""
# What Markdown, on GitHub, reads as markup; "_" and "<" only where they are, since names and p-values are full of them.
_MARKUP = re.compile(r"[\\`*$]|~(?=~)|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(|(?<=\])\[|(?<=\]):")
_TAG = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_SIGNED = re.compile(r"[+-][\d.,]+(?:e[+-]?\d+)?(?: †)?(?: ±[\d.,]+)?(?: \[[-+\d.,e ]+\])?(?: [A-Za-z]+)?(?: †)?")
"""A number of ours with its interval, unit and mark."""
_FORMULA = ("=", "+", "-", "@")


@dataclass(frozen=True)
class Table:
    """One table in its two forms; name is its file name without the suffix."""

    name: str
    markdown: str
    csv: str

    def files(self) -> dict[str, str]:
        """File name -> content."""
        return {f"{self.name}.md": self.markdown, f"{self.name}.csv": self.csv}


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A GitHub table, the first left columns flush left, the others right. Empty cells are a bug and refused.

    Cells of the body are text and shown as it is; the header may hold **bold**.
    """
    assert all(len(line) == len(header) and all(line) for line in lines), "a table has no empty cell"
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    whole = ([_bare_pipes(one_line(c)) for c in header], rule, *([_cell(c) for c in line] for line in lines))
    return "".join(f"| {' | '.join(line)} |\n" for line in whole)


def csv_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """The same as CSV, LF line ends. Text that a spreadsheet would run as a formula begins with an apostrophe."""
    assert all(len(line) == len(header) and all(str(c) != "" for c in line) for line in lines), "no empty cell"
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_csv_cell(c) for c in line] for line in (header, *lines))
    return out.getvalue()


def paragraphs(*parts: str) -> str:
    """The non-empty parts, one blank line between them, a newline at the end."""
    return "\n\n".join(p.strip("\n") for p in parts if p) + "\n"


def one_line(text: object) -> str:
    """Any text as one line of characters that can be seen and written as UTF-8; a space or ? stands for the others."""
    kept = (c if c.isspace() or not _is_hidden(c) else "?" for c in str(text))
    return " ".join("".join(kept).split())


def visible(value: Any) -> Any:
    """A file's content with one_line() of every text in it, keys included."""
    if isinstance(value, dict):
        return {visible(k): visible(v) for k, v in value.items()}
    if isinstance(value, list):
        return [visible(v) for v in value]
    return one_line(value) if isinstance(value, str) else value


def plain(text: object) -> str:
    """Foreign text for a line of Markdown that shows it as it is: markup escaped, tags as entities."""
    escaped = _MARKUP.sub(r"\\\g<0>", one_line(text))
    # Not a backslash: README blocks are found by their comment marks, which must not stand in one.
    return _TAG.sub(lambda found: "&lt;" if found[0] == "<" else "&amp;", escaped)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN or character in _MOVING


def _cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def _bare_pipes(cell: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def _csv_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    return f"'{text}" if text.startswith(_FORMULA) and not _SIGNED.fullmatch(text) else text
