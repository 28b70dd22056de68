"""Markdown and CSV tables as text: fixed order and digits, so that equal results give equal bytes."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass


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
    """A GitHub table, the first left columns flush left, the others right. Empty cells are a bug and refused."""
    assert all(len(line) == len(header) and all(line) for line in lines), "a table has no empty cell"
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(_one_line(c) for c in line)} |\n" for line in (header, rule, *lines))


def csv_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """The same as CSV, LF line ends."""
    assert all(len(line) == len(header) and all(str(c) != "" for c in line) for line in lines), "no empty cell"
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *lines])
    return out.getvalue()


def paragraphs(*parts: str) -> str:
    """The non-empty parts, one blank line between them, a newline at the end."""
    return "\n\n".join(p.strip("\n") for p in parts if p) + "\n"


def _one_line(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
