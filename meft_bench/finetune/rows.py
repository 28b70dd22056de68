"""Rows of a user's file or hub data set, one at a time, each with where it stands and what it asks to learn."""

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYOUTS: tuple[dict[str, str], ...] = (
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "question", "completion": "answer"},
    {"messages": "messages"},
    {"text": "text"},
)
"""Columns that are known by name, as role to column."""
ACCEPTED = "prompt with completion, question with answer, messages, or text"
_HINT = f"accepted are {ACCEPTED}; name others with --columns prompt=NAME,completion=NAME (or text=, messages=)"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training text. line counts from 1: the line where it ends in a text file, else its number."""

    line: int
    prompt: str = ""
    """What is given and not learned; empty for `text` rows."""
    completion: str = ""
    answers: list[str] = field(default_factory=list)
    """Every answer that counts as right; the first is the completion."""
    messages: list[dict[str, str]] | None = None

    @property
    def empty(self) -> bool:
        if self.messages is not None:
            return not all(m["content"].strip() for m in self.messages)
        return not self.completion.strip() or (bool(self.answers) and not self.prompt.strip())


class BrokenRow(ValueError):
    """A row that cannot be read or is no training row; the message names the file and the line."""


def read_rows(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    """Rows of a .jsonl[.gz], .json (one object a line), .csv or .parquet file, in order and never all at once.

    columns: role to column, or empty to find them by name in the first row. Raises BrokenRow naming file and line.
    """
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv_lines, ".parquet": _parquet_rows}
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in readers or (path.suffix == ".gz" and readers[suffix] is not _json_lines):
        raise ValueError(f"{path.name}: the data must be .jsonl, .jsonl.gz, .csv or .parquet, or a hub id (owner/name)")
    try:
        yield from typed_rows(readers[suffix](path), path.name, "row" if suffix == ".parquet" else "line", columns)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise BrokenRow(f"cannot read {path.name}: {error}") from None


def typed_rows(numbered: Iterator[tuple[int, Any]], name: str, unit: str, columns: dict[str, str]) -> Iterator[Row]:
    """Turn (number, mapping) pairs into Rows. Raises BrokenRow for the first one that does not fit the columns."""
    layout = dict(columns)
    for number, values in numbered:
        where = f"{name}, {unit} {number}"
        if not isinstance(values, dict):
            raise BrokenRow(f"{where} is no object with columns: {_HINT}")
        if not layout:
            layout = _find_layout(values, where)
        missing = [column for column in layout.values() if values.get(column) is None]
        if missing:
            raise BrokenRow(
                f"{where} lacks {' and '.join(missing)}: it has {_names(values)}, while "
                f"{'--columns names' if columns else 'the first row has'} {' and '.join(layout.values())}; {_HINT}"
            )
        yield _row(number, {role: values[column] for role, column in layout.items()}, layout, where)


def _find_layout(values: dict[str, Any], where: str) -> dict[str, str]:
    found = [layout for layout in LAYOUTS if set(layout.values()) <= set(values)]
    if not found:
        raise BrokenRow(f"{where} has the columns {_names(values)}: {_HINT}")
    if len(found) > 1:
        both = " and ".join(" with ".join(layout.values()) for layout in found)
        raise BrokenRow(f"{where} has both {both}: say which with --columns; {_HINT}")
    return found[0]


def _names(values: dict[Any, Any]) -> str:
    return ", ".join(str(name) for name, value in values.items() if value is not None) or "none"


def _row(number: int, values: dict[str, Any], layout: dict[str, str], where: str) -> Row:
    if "messages" in values:
        return Row(line=number, messages=_messages(values["messages"], where))
    if "text" in values:
        return Row(line=number, completion=_text(values["text"], layout["text"], where))
    answers = values["completion"]
    answers = list(answers) if isinstance(answers, list) else [answers]
    if not answers:
        raise BrokenRow(f"{where}: {layout['completion']} is an empty list")
    answers = [_text(answer, layout["completion"], where) for answer in answers]
    prompt = _text(values["prompt"], layout["prompt"], where)
    return Row(line=number, prompt=prompt, completion=answers[0], answers=answers)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BrokenRow(f"{where}: {column} is {type(value).__name__} ({str(value)[:40]}), and must be text")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    shape = 'a list of {"role": ..., "content": ...} that ends with the assistant\'s answer'
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            raise BrokenRow(f"{where}: messages is text that is not JSON, and must be {shape}") from None
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good or len(value) < 2 or value[-1]["role"] != "assistant":
        raise BrokenRow(f"{where}: messages must be {shape}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # UnicodeDecodeError is one
                array = "; write one JSON object a line, not one array" if line.lstrip().startswith(b"[") else ""
                raise BrokenRow(f"{path.name}, line {number} is not JSON in UTF-8: {error}{array}") from None


def _csv_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if not reader.fieldnames or len(set(reader.fieldnames)) != len(reader.fieldnames):
            raise BrokenRow(f"{path.name}, line 1 must name each column once: it has {reader.fieldnames or 'nothing'}")
        for values in reader:
            if None in values:
                raise BrokenRow(f"{path.name}, line {reader.line_num} has more cells than line 1 names columns")
            yield reader.line_num, values


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except pyarrow.ArrowException as error:
        raise BrokenRow(f"{path.name} is no whole Parquet file: {str(error).splitlines()[0]}") from None
