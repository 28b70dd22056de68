"""Rows of a user's file or hub data set, one at a time, each with where it stands and what it asks to learn."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meft_bench.finetune.row_files import BrokenRow, lines, listed, parse_json, records, suffix_of, table_of
from meft_bench.reading import check_regular
from meft_bench.text import cut

LAYOUTS: tuple[dict[str, str], ...] = (
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "question", "completion": "answer"},
    {"messages": "messages"},
    {"text": "text"},
)
"""Columns that are known by name, as role to column."""
ACCEPTED = "prompt with completion, question with answer, messages, or text"
_HINT = f"accepted are {ACCEPTED}; name others with --columns prompt=NAME,completion=NAME (or text=, messages=)"
_SHAPE = 'a list of {"role": ..., "content": ...} that ends with the assistant\'s answer'
_CALLS = ("tool_calls", "function_call")
"""Keys of a message that stand for its content."""
_DEEPEST = 100
"""Levels of a message's parts; the schema of a function has some ten."""
_READ_BESIDE = ("tools", "weight")
"""Columns that are read whatever the layout."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training text. line counts from 1: the line where it ends in a text file, else its number."""

    line: int
    prompt: str = ""
    """What is given and not learned; empty for `text` rows."""
    completion: str = ""
    answers: list[str] = field(default_factory=list)
    """Every answer that counts as right; the first is the completion."""
    messages: list[dict[str, Any]] | None = None
    """With every key that they have, for the chat template."""
    tools: list[Any] | None = None
    """Descriptions of functions beside messages, for the chat template."""
    unused: tuple[str, ...] = ()
    """Columns that hold something and are not read."""

    @property
    def empty(self) -> bool:
        if self.messages is not None:
            *before, last = self.messages
            answered = (last.get("content") or "").strip() or any(last.get(key) for key in _CALLS)
            return not answered or not any((m.get("content") or "").strip() for m in before)
        return not self.completion.strip() or (bool(self.answers) and not self.prompt.strip())


def read_rows(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    """Rows of a .jsonl[.gz], .json (one object a line), .csv or .parquet file, in order and never all at once.

    columns: role to column, or empty to find them by name in the first row. Raises BrokenRow naming file and line.
    """
    return typed_rows(records(path), path.name, unit_of(path), columns)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line, or of a file of rows' prompt (or question) column. Raises ValueError."""
    check_regular(path)
    prompts = list(_prompt_cells(path) if table_of(path) else _prompt_lines(path))
    if not prompts:
        raise ValueError(f"{path.name} holds no prompts")
    return prompts


def _prompt_cells(path: Path) -> Iterator[str]:
    for number, values in records(path):
        where = f"{path.name}, {unit_of(path)} {number}"
        if not isinstance(values, dict):
            raise BrokenRow(f"{where} is no object with a prompt or question")
        column = next((c for c in ("prompt", "question") if values.get(c) is not None), None)
        if column is None:
            raise BrokenRow(f"{where} lacks prompt or question: it has {_filled(values)}")
        yield _text(values[column], column, where)


def _prompt_lines(path: Path) -> Iterator[str]:
    """Lines with text, parted where train parts rows: at line feeds alone."""
    for number, line in lines(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is not text in UTF-8: {error}") from None
        if text.strip():
            yield text


def unit_of(path: Path) -> str:
    """What a row's number counts."""
    return "row" if suffix_of(path) == ".parquet" else "line"


def typed_rows(numbered: Iterable[tuple[int, Any]], name: str, unit: str, columns: dict[str, str]) -> Iterator[Row]:
    """Turn (number, mapping) pairs into Rows. Raises BrokenRow for the first one that does not fit the columns."""
    for role, column in columns.items():
        if not isinstance(column, str):
            raise ValueError(f"columns: {role} is {column!r}, and must be text: put it in quotes")
    layout = dict(columns)
    for number, values in numbered:
        where = f"{name}, {unit} {number}"
        if not isinstance(values, dict):
            array = "an array: write one JSON object a line, not one array" if isinstance(values, list) else ""
            raise BrokenRow(f"{where} is {array or f'no object with columns: {_HINT}'}")
        if not layout:
            layout = _find_layout(values, where)
        missing = [column for column in layout.values() if values.get(column) is None]
        if missing:
            raise BrokenRow(
                f"{where} lacks {' and '.join(missing)}: it has {_filled(values)}, while "
                f"{'--columns names' if columns else 'the first row has'} {' and '.join(layout.values())}; {_HINT}"
            )
        yield _row(number, values, layout, where)


def _find_layout(values: dict[str, Any], where: str) -> dict[str, str]:
    found = [layout for layout in LAYOUTS if set(layout.values()) <= set(values)]
    if not found:
        raise BrokenRow(f"{where} has the columns {_filled(values)}: {_HINT}")
    if len(found) > 1:
        both = " and ".join(" with ".join(layout.values()) for layout in found)
        raise BrokenRow(f"{where} has both {both}: say which with --columns; {_HINT}")
    return found[0]


def _filled(values: dict[Any, Any]) -> str:
    return listed([name for name, value in values.items() if value is not None] or ["none"])


def _row(number: int, values: dict[str, Any], layout: dict[str, str], where: str) -> Row:
    roles = {role: values[column] for role, column in layout.items()}
    _check_weight(values.get("weight"), where)
    beside = {c: v for c, v in values.items() if c not in layout.values() and v not in (None, "", [], {})}
    unused = tuple(cut(c) for c in beside if str(c) not in _READ_BESIDE and not str(c).startswith("__"))
    if "messages" in roles:
        tools = _tools(beside["tools"], where) if "tools" in beside else None
        return Row(line=number, messages=_messages(roles["messages"], where), tools=tools, unused=unused)
    unused = (*unused, *(["tools"] if "tools" in beside else []))
    if "text" in roles:
        return Row(line=number, completion=_text(roles["text"], layout["text"], where), unused=unused)
    answers = roles["completion"]
    answers = list(answers) if isinstance(answers, list) else [answers]
    if not answers:
        raise BrokenRow(f"{where}: {layout['completion']} is an empty list")
    answers = [_text(answer, layout["completion"], where) for answer in answers]
    prompt = _text(roles["prompt"], layout["prompt"], where)
    if layout["prompt"] == "instruction" and "input" in beside:  # Alpaca's rows: the instruction is about the input
        prompt = f"{prompt}\n{_text(beside['input'], 'input', where)}"
        unused = tuple(c for c in unused if c != "input")
    return Row(line=number, prompt=prompt, completion=answers[0], answers=answers, unused=unused)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        shown = "" if isinstance(value, list | dict) else f" ({cut(value, 40)})"
        raise BrokenRow(f"{where}: {cut(column)} is {type(value).__name__}{shown}, and must be text")
    check_characters(value, f"{where}: {cut(column)}")
    return value


def check_characters(text: str, what: str) -> None:
    """Raises BrokenRow for text that is no Unicode: half of a surrogate pair has no bytes in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenRow(
            f"{what} holds \\u{ord(text[error.start]):04x} at character {error.start + 1}, half of a surrogate pair, "
            "which is no character: write the whole pair, or leave it out"
        ) from None


def _check_weight(weight: Any, where: str) -> None:
    if weight not in (None, "", 1, "1", "1.0"):
        raise BrokenRow(f"{where}: weight is {cut(weight, 40)}, and rows are learned alike: leave it out")


# ---- conversations ----


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages as they are, without keys that hold nothing; weights are checked and left out."""
    if isinstance(value, str):  # a CSV cell
        value = _json_cell(value, "messages", where)
    good = isinstance(value, list) and all(_is_message(m) for m in value)
    if not good or len(value) < 2 or value[-1]["role"] != "assistant":
        raise BrokenRow(f"{where}: messages must be {_SHAPE}")
    for i, message in enumerate(value):
        weight, last = message.get("weight"), i == len(value) - 1
        if weight is None:
            continue
        if weight not in (0, 1):
            raise BrokenRow(f"{where}: a weight is {cut(weight, 40)}, and must be 0 or 1")
        if last and weight == 0:
            raise BrokenRow(f"{where}: its last answer has weight 0, so nothing of it is to be learned: leave it out")
        if not last and weight == 1 and message["role"] == "assistant":
            raise BrokenRow(
                f"{where}: answer {i + 1} of {len(value)} messages has weight 1, and only the last one is learned: "
                "end a row with each answer that is to be learned"
            )
    kept = [{k: v for k, v in m.items() if v is not None and k != "weight"} for m in value]
    _check_nested(kept, f"{where}: messages")
    return kept


def _is_message(m: Any) -> bool:
    if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not all(isinstance(key, str) for key in m):
        return False
    return isinstance(m.get("content"), str) or (m.get("content") is None and any(m.get(key) for key in _CALLS))


def _tools(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _json_cell(value, "tools", where)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BrokenRow(f"{where}: tools must be a list of objects, one a function")
    _check_nested(value, f"{where}: tools")
    return value


def _json_cell(text: str, column: str, where: str) -> Any:
    check_characters(text, f"{where}: {column}")
    try:
        return parse_json(text.encode(), where)
    except BrokenRow:
        shape = f", and must be {_SHAPE}" if column == "messages" else ""
        raise BrokenRow(f"{where}: {column} is text that is not JSON{shape}") from None


def _check_nested(value: Any, what: str) -> None:
    """Raises BrokenRow unless every text in value is Unicode, the rest is what JSON holds, and no depth is absurd."""
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inner(outer)]:
        depth += 1
        if depth > _DEEPEST:
            raise BrokenRow(f"{what} are nested more than {_DEEPEST} deep")
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BrokenRow(f"{what} must hold what JSON can: {cut(error, 80)}") from None
    check_characters(text, what)


def _inner(value: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
