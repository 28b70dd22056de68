"""Records of a user's file, one at a time and never more than a line of it in memory.

A file may be a stranger's or a slip of the hand: what is no regular file, lines without end, holes, damaged archives
and values nested without end are named in one line before memory is taken.
"""

import csv
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from meft_bench import reading
from meft_bench.text import cut

LARGEST_LINE = 16 * 2**20
"""Bytes of a line or characters of a cell; a training row has thousands."""


TABLES = (".jsonl", ".json", ".csv", ".parquet")
"""How files of rows end; JSON lines may have .gz behind."""
_NO_DATA_SETS = (*TABLES, ".gz", ".txt", ".tsv")
"""How no hub data set's name ends: who gives one means a file."""
EXAMPLE = Path(__file__).parent / "example.jsonl"


class BrokenRow(ValueError):
    """A row that cannot be read or is no training row; the message names the file and the line."""


def source_name(data: str) -> Path | str:
    """The data's file, or its hub id. Raises ValueError for a file that is not there or no whole regular one."""
    path = Path(data)
    if data == "example" and not os.path.isfile(path):
        return EXAMPLE
    if os.path.isdir(path):
        raise ValueError(f"{data} is a folder: give one .jsonl, .csv or .parquet file")
    if os.path.exists(path):
        reading.check_regular(path, "data")
        return path
    if suffix_of(path) in _NO_DATA_SETS or data.startswith((".", "/", "~")) or data.count("/") != 1:
        raise ValueError(f"no data file {data}, and it is no hub id (owner/name)")
    return data


def suffix_of(path: Path) -> str:
    """What a file's name ends with, in small letters: FACTS.JSONL is as good a name."""
    return path.suffix.lower()


def is_packed(path: Path) -> bool:
    return suffix_of(path) == ".gz"


def table_of(path: Path) -> str | None:
    """Which of TABLES a file's name says that it is, packed or not; None for another."""
    suffix = suffix_of(path.with_suffix("") if is_packed(path) else path)
    return suffix if suffix in TABLES else None


def file_digest(path: Path) -> str:
    """First 12 hex digits of a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, values) of a .jsonl[.gz], .json (one object a line), .csv or .parquet file. Raises ValueError."""
    reader = {".csv": csv_rows, ".parquet": parquet_rows}.get(table := table_of(path) or "", json_lines)
    if not table or (is_packed(path) and reader is not json_lines):
        raise ValueError(f"{path.name}: the data must be .jsonl, .jsonl.gz, .csv or .parquet, or a hub id (owner/name)")
    with _damage_said(path):
        reading.check_regular(path, "data")
        yield from reader(path)


@contextmanager
def _damage_said(path: Path) -> Iterator[None]:
    """Turn what readers raise for a file that is damaged, or not to be opened, into a BrokenRow."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BrokenRow(f"cannot read {path.name}: it is not UTF-8 ({error}): save it as UTF-8") from None
    except (OSError, EOFError, csv.Error, zlib.error) as error:
        raise BrokenRow(f"cannot read {path.name}: {error}") from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a text file, gzipped or not, parted at line feeds alone. Raises BrokenRow for one too long."""
    with _damage_said(path), gzip.open(path) if is_packed(path) else open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE + 1), b""), 1):
            if len(line) > LARGEST_LINE:
                raise BrokenRow(f"{path.name}, line {number} has more than {LARGEST_LINE:,} bytes: no row is that long")
            yield number, line


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line that is not blank."""
    for number, line in lines(path):
        if line.strip():
            yield number, parse_json(line, f"{path.name}, line {number}")


def parse_json(line: bytes, where: str) -> Any:
    """The value of one line. Raises BrokenRow, naming the line, for what is not JSON or names a column twice."""
    try:
        # Python writes NaN for a number that is missing; conversations are looked at for their depth later.
        return reading.parse_json(line.decode("utf-8-sig"), where, depth=None, finite=False, once=True)
    except UnicodeDecodeError as error:
        raise BrokenRow(f"{where} is not JSON in UTF-8: {error}; save the file as UTF-8") from None
    except ValueError as error:
        array = "; write one JSON object a line, not one array" if line.lstrip().startswith(b"[") else ""
        raise BrokenRow(f"{error}{array}") from None


def csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line where it ends, cells by column) of each row."""
    csv.field_size_limit(LARGEST_LINE)  # the module's own is 131,072, and there is no other way to say it
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_text_lines(file, path.name), strict=True)
        if not reader.fieldnames or len(set(reader.fieldnames)) != len(reader.fieldnames):
            raise BrokenRow(f"{path.name}, line 1 must name each column once: it has {listed(reader.fieldnames or [])}")
        for values in reader:
            if None in values:
                raise BrokenRow(f"{path.name}, line {reader.line_num} has more cells than line 1 names columns")
            yield reader.line_num, values


def _text_lines(file: IO[str], name: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE + 1), ""), 1):
        if len(line) > LARGEST_LINE:
            raise BrokenRow(f"{name}, line {number} has more than {LARGEST_LINE:,} characters: no row is that long")
        yield line


def parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, values) of each row; dates and times as numbers, since Python's do not reach as far as Arrow's."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if len(set(columns)) != len(columns):
                raise BrokenRow(f"{path.name} must name each column once: it has {listed(columns)}")
            # Few at a time: a small file can hold one long value a thousand times.
            for batch in file.iter_batches(batch_size=32):
                for values in pyarrow.table([_numbers(c) for c in batch.columns], names=columns).to_pylist():
                    number += 1
                    yield number, values
    except (OverflowError, LookupError) as error:  # a year beyond 9999, or an unknown time zone
        raise BrokenRow(
            f"{path.name}, row {number + 1} or soon after: a list or object holds a date or time that cannot be read "
            f"({cut(error)}): leave that column out"
        ) from None
    except pyarrow.ArrowException as error:
        raise BrokenRow(f"{path.name} is no whole Parquet file: {cut(error, 200)}") from None


def _numbers(column: Any) -> Any:
    """An Arrow array of dates or times as their numbers; any other as it is."""
    import pyarrow

    if not pyarrow.types.is_temporal(column.type) or column.type.bit_width > 64:
        return column
    return column.view(pyarrow.int32() if column.type.bit_width == 32 else pyarrow.int64())


def listed(columns: Any) -> str:
    """Column names for a message: the first of them, each short and without line breaks."""
    shown = [cut(column) for column in list(columns)[:12]]
    return ", ".join([*shown, *(["..."] if len(columns) > 12 else [])]) or "nothing"
