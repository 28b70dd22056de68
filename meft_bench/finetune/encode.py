"""From rows to training sequences: the text of each row, its tokens, and how many of them are given."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from meft_bench.finetune.chat import Renderer, TemplateFault
from meft_bench.finetune.row_files import BrokenRow
from meft_bench.finetune.settings import TrainSettings
from meft_bench.finetune.user_rows import Row
from meft_bench.train import tokens

_SHOWN = 5
_LONG = 200_000
"""Characters from which a text's beginning is tokenised first: it may be too long as it is."""
_LONGEST = 2_000_000
"""Characters that are not tokenised at all."""
_DECIDE = ("tools", "tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(kw_only=True)
class Findings:
    """What was met while reading: counts, and the first line numbers of each kind."""

    rows: int = 0
    """Rows kept."""
    kind: str = ""
    """"prompt", "text" or "messages"."""
    longest: int = 0
    """Tokens of the longest kept row."""
    tokens: int = 0
    overlong: int = 0
    overlong_lines: list[int] = field(default_factory=list)
    empty: int = 0
    empty_lines: list[int] = field(default_factory=list)
    merged: int = 0
    """Rows whose tokenizer merges the prompt's end with the answer: learned from the merged token on."""
    merged_lines: list[int] = field(default_factory=list)
    unknown: int = 0
    """Rows with text that the tokenizer does not know: the base sees its unknown token there, and learns that."""
    unknown_lines: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Tokens that ended a trained answer: what generation stops at."""
    delimiter: str = ""
    """What stood between prompts and answers and was given with the prompt, not learned: empty for white space."""
    unused: list[str] = field(default_factory=list)
    """Columns that hold something in some row and decide nothing."""

    def note(self, kind: str, line: int) -> None:
        """Count one row of a kind ("overlong", "empty", "merged", "unknown")."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(lines := getattr(self, f"{kind}_lines")) < _SHOWN:
            lines.append(line)

    def note_unused(self, columns: tuple[str, ...]) -> None:
        """Remember the columns' names, a few at most."""
        self.unused += [c for c in columns if c not in self.unused][: 12 - len(self.unused)]

    def lines(self, kind: str) -> str:
        """The first line numbers of a kind, in words."""
        shown, count = getattr(self, f"{kind}_lines"), getattr(self, kind)
        return ("line " if count == 1 else "lines ") + ", ".join(map(str, shown)) + (", ..." if count > _SHOWN else "")


class Encoder:
    """Makes training sequences of rows; a context manager, for the process that chat templates run in.

    where: the data's name and unit, as errors begin. limit: tokens a sequence may have. vocabulary: rows of the base's
    embedding, if known.
    """

    def __init__(
        self,
        where: str,
        settings: TrainSettings,
        template: str | None,
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        vocabulary: int | None,
    ) -> None:
        self.where, self.settings, self.template = where, settings, template
        self.tokenizer, self.limit, self.vocabulary = tokenizer, limit, vocabulary
        self.findings = Findings()
        self._unknown = tokens.unknown_id(tokenizer)
        self._renderer: Renderer | None = None

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._renderer is not None:
            self._renderer.__exit__()

    def __call__(self, batch: list[Row]) -> Iterator[dict[str, Any]]:
        """ids, prompt_length, line and answers of each row that has text and is short enough, the others counted.

        Raises BrokenRow naming the row that its chat template does not write, or whose tokens the base does not have.
        """
        rows = [row for row in batch if not row.empty]
        for row in batch:
            self.findings.note_unused(row.unused)
            if row.empty:
                self.findings.note("empty", row.line)
        if not rows:
            return
        kind = "messages" if rows[0].messages is not None else "prompt" if rows[0].answers else "text"
        self.findings.kind = kind
        texts = self._conversations(rows) if kind == "messages" else [self._plain(row) for row in rows]
        short = [(row, text) for row, text in zip(rows, texts, strict=True) if not self._is_overlong(row, text[1])]
        pairs = ([text[0] for _, text in short], [text[1] for _, text in short])
        made = tokens.sequences(self.tokenizer, *pairs, special=kind != "messages")
        for (row, _), (ids, given, merged) in zip(short, made, strict=True):
            yield from self._sequence(row, kind, ids, given, merged)

    def _sequence(self, row: Row, kind: str, ids: list[int], given: int, merged: bool) -> Iterator[dict[str, Any]]:
        findings = self.findings
        if self.vocabulary is not None and (largest := max(ids, default=0)) >= self.vocabulary:
            raise BrokenRow(
                f"{self.where} {row.line} has the token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)}), "
                f"and the base's embedding ends at {self.vocabulary - 1}: the tokenizer is not this base's"
            )
        # The first token has nothing before it to be predicted from.
        given = max(1, given)
        if len(ids) > self.limit:
            findings.note("overlong", row.line)
        elif len(ids) <= given:
            findings.note("empty", row.line)
        else:
            if merged and kind != "text":
                findings.note("merged", row.line)
            if self._unknown is not None and self._unknown in ids:
                findings.note("unknown", row.line)
            end = tokens.written_end(self.tokenizer, ids[-8:])
            if end is not None and end not in findings.ends:
                findings.ends.append(end)
            findings.rows += 1
            findings.longest = max(findings.longest, len(ids))
            findings.tokens += len(ids)
            answers = self._answers(row, ids[given:])
            yield {
                "ids": ids, "prompt_length": given, "line": row.line, "answers": answers, "digest": _digest(ids)
            }  # fmt: skip

    def _answers(self, row: Row, learned: list[int]) -> list[str]:
        if row.messages is None:
            return row.answers
        last = row.messages[-1]
        if last.keys() <= {"role", "content"}:
            return [last["content"]]
        # What else the template writes of an answer, such as a call, is part of it.
        return [tokens.decoded(self.tokenizer, learned)]

    def _is_overlong(self, row: Row, text: str) -> bool:
        """True, and counted, for a text that is surely too long: found without tokenising all of it."""
        if len(text) <= _LONG:
            return False
        begun = len(tokens.text_ids(self.tokenizer, [text[:_LONG]])[0])
        # The last word may be cut: a few tokens less than the beginning has are the whole's too.
        surely = len(text) > _LONGEST or begun > self.limit + 64
        if surely:
            self.findings.note("overlong", row.line)
        return surely

    def _plain(self, row: Row) -> tuple[str, str]:
        """(what is given, that with the answer). White space between them is the answer's: a tokenizer may merge it
        with the first word."""
        between = "" if row.completion[:1].isspace() else after_prompt(row.prompt, self.settings.delimiter)
        if between.strip():
            self.findings.delimiter = between
        given = row.prompt + between if between.strip() else row.prompt
        return given, row.prompt + between + row.completion

    # ---- conversations ----

    def _conversations(self, rows: list[Row]) -> list[tuple[str, str]]:
        """(the conversation up to the last answer, all of it) as the chat template writes them."""
        if self._renderer is None:
            self._renderer = Renderer(self.tokenizer, self.template)
        calls = []
        for row in rows:
            assert row.messages is not None
            calls.append({"conversation": row.messages[:-1], "tools": row.tools, "add_generation_prompt": True})
            calls.append({"conversation": row.messages, "tools": row.tools})
        try:
            written = self._renderer.write(calls)
        except TemplateFault as fault:
            raise BrokenRow(f"{self.where} {rows[fault.number // 2].line}: {fault}") from None
        pairs = list(zip(written[::2], written[1::2], strict=True))
        for row, (prompt, whole) in zip(rows, pairs, strict=True):
            if not whole.startswith(prompt):
                raise BrokenRow(
                    f"{self.where} {row.line}: the chat template does not write the answer after its prompt"
                )
            self._check_written(row, whole)
        return pairs

    def _check_written(self, row: Row, whole: str) -> None:
        """Raises BrokenRow for what decides the answer and leaves no trace in the text; notes other such keys."""
        assert row.messages is not None and self._renderer is not None
        beside = sorted({key for m in row.messages for key in m} - {"role", "content"})
        without = {key: [{k: v for k, v in m.items() if k != key} for m in row.messages] for key in beside}
        calls = [{"conversation": messages, "tools": row.tools} for messages in without.values()]
        if row.tools:
            beside, calls = [*beside, "tools"], [*calls, {"conversation": row.messages, "tools": None}]
        for key, text in zip(beside, self._renderer.attempt(calls), strict=True):
            if text != whole:
                continue
            if key in _DECIDE or (key in _REASONING and row.messages[-1].get(key)):
                raise BrokenRow(
                    f"{self.where} {row.line} has {key}, which the chat template does not write: give a template that "
                    "does with --chat-template, or leave the row out"
                )
            self.findings.note_unused((f"messages' {key}",))


def after_prompt(prompt: str, delimiter: str) -> str:
    """What follows a prompt: the delimiter, and nothing where the prompt is empty or brings its own white space."""
    return "" if not prompt or prompt[-1:].isspace() else delimiter


def _digest(ids: list[int]) -> int:
    """8 bytes by which rows of the same tokens are found."""
    return int.from_bytes(hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest(), "little")
