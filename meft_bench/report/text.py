"""Markdown and CSV tables as text: fixed order and digits, so that equal results give equal bytes.

Names and reasons come from records, folders and other people's programs. Here, and nowhere else, they are made safe:
a body cell shows its text as it is, whatever stands in it; a caption or list passes what is foreign through plain().
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.text import one_line, plain

if TYPE_CHECKING:
    import pandas

_SIGNED = re.compile(r"[+-][\d.,]+(?:e[+-]?\d+)?(?: †)?(?: ±[\d.,]+)?(?: \[[-+\d.,e ]+\])?(?: (?:[A-Za-z]+|%))?(?: †)?")
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


def table(
    name: str, columns: Sequence[str | tuple[str, str]], rows: Sequence[Sequence[object]], *, left: int = 1,
    before: Sequence[str] = (), after: Sequence[str] = (), instead: str = "",
) -> Table:  # fmt: skip
    """One frame in both forms. A column is named by its title, or by (title in Markdown, name in CSV), "" where the
    form leaves it out. before, after: paragraphs around the Markdown table; instead: what stands there without rows."""
    frame = _frame(range(len(columns)), rows)
    named = [(c, c) if isinstance(c, str) else c for c in columns]
    shown, data = ({i: both[form] for i, both in enumerate(named) if both[form]} for form in (0, 1))
    markdown = _markdown(frame[list(shown)].set_axis(list(shown.values()), axis=1), left) if shown else ""
    csv = _csv(frame[list(data)].set_axis(list(data.values()), axis=1))
    return Table(name, paragraphs(*before, markdown if rows or not instead else instead, *after), csv)


def lowered(titles: Sequence[str]) -> list[tuple[str, str]]:
    """Columns whose names in CSV are their titles in small letters."""
    return [(title, title.lower()) for title in titles]


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A GitHub table, the first left columns flush left, the others right. Empty cells are a bug and refused.

    Cells of the body are text and shown as it is; the header may hold **bold**.
    """
    return _markdown(_frame(header, lines), left)


def csv_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """The same as CSV, LF line ends. Text that a spreadsheet would run as a formula begins with an apostrophe."""
    return _csv(_frame(header, lines))


def _frame(header: Sequence[object], rows: Sequence[Sequence[object]]) -> "pandas.DataFrame":
    import pandas  # half a second, so only where a table is made

    assert all(len(row) == len(header) and all(str(c) != "" for c in row) for row in rows), "a table has no empty cell"
    return pandas.DataFrame([list(row) for row in rows], columns=list(header), dtype=object)


def _markdown(frame: "pandas.DataFrame", left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(frame.shape[1])]
    lines = frame.map(_cell).to_numpy().tolist()
    whole = ([_bare_pipes(one_line(c)) for c in frame.columns], rule, *lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in whole)


def _csv(frame: "pandas.DataFrame") -> str:
    safe = frame.map(_csv_cell).set_axis([_csv_cell(c) for c in frame.columns], axis=1)
    return str(safe.to_csv(index=False, lineterminator="\n"))


def paragraphs(*parts: str) -> str:
    """The non-empty parts, one blank line between them, a newline at the end."""
    return "\n\n".join(p.strip("\n") for p in parts if p) + "\n"


def visible(value: Any) -> Any:
    """A file's content with one_line() of every text in it, keys included."""
    if isinstance(value, dict):
        return {visible(k): visible(v) for k, v in value.items()}
    if isinstance(value, list):
        return [visible(v) for v in value]
    return one_line(value) if isinstance(value, str) else value


def _cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def _bare_pipes(cell: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def _csv_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    return f"'{text}" if text.startswith(_FORMULA) and not _SIGNED.fullmatch(text) else text
