"""From a user's rows to training sequences on disk: read once, tokenised once, memory-mapped from then on.

The file is streamed row by row into an Arrow file of token ids beside the run; neither the text nor the ids of all rows
are ever in memory together. What cannot be trained on is counted with its line numbers.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from meft_bench import hub
from meft_bench.finetune.rows import BrokenRow, Row, read_rows, typed_rows
from meft_bench.finetune.settings import TrainSettings
from meft_bench.harness.training import Example

EXAMPLE = Path(__file__).parent / "example.jsonl"
_SHOWN = 5
_BATCH = 1000
_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("line", pa.int64()),
        ("prompt", pa.string()),
        ("answers", pa.list_(pa.string())),
    ]
)


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

    def note(self, kind: str, line: int) -> None:
        """Count one row of a kind ("overlong", "empty", "merged")."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(lines := getattr(self, f"{kind}_lines")) < _SHOWN:
            lines.append(line)

    def lines(self, kind: str) -> str:
        """The first line numbers of a kind, in words."""
        shown, count = getattr(self, f"{kind}_lines"), getattr(self, kind)
        return ("line " if count == 1 else "lines ") + ", ".join(map(str, shown)) + (", ..." if count > _SHOWN else "")


class Sequences(Sequence[Example]):
    """Training sequences read from the memory-mapped rows as they are asked for; indices choose and order them."""

    def __init__(self, rows: datasets.Dataset, indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Sequences(self.rows, self.indices[i])
        row = self.row(i)
        return Example(row["ids"], row["prompt_length"], str(row["line"]))

    def row(self, i: int) -> dict[str, Any]:
        """Everything kept of one row: ids, prompt_length, line, prompt, answers."""
        return self.rows[self.indices[i]]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The tokenised rows of a job, split."""

    train: Sequences
    held_out: Sequences
    findings: Findings
    digest: str
    """Of the rows' content: the file's sha256, or the hub data set's fingerprint (first 12 digits)."""
    name: str


def source_name(settings: TrainSettings) -> Path | str:
    """The data's file, or its hub id. Raises ValueError for a file that is not there."""
    path = Path(settings.data)
    if path.is_file():
        return path
    if settings.data == "example":
        return EXAMPLE
    if path.is_dir():
        raise ValueError(f"{settings.data} is a folder: give one .jsonl, .csv or .parquet file")
    if path.suffix or settings.data.startswith((".", "/", "~")) or settings.data.count("/") != 1:
        raise ValueError(f"no data file {settings.data}, and it is no hub id (owner/name)")
    return settings.data


def prepare(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, limit: int, folder: Path) -> TrainingData:
    """Tokenise the rows into folder/rows.arrow, or take what an earlier call with the same input left there.

    limit: tokens a sequence may have. Raises ValueError naming file and line of the first broken row, and the lines of
    rows without text or above the limit unless the settings drop them.
    """
    source = source_name(settings)
    if isinstance(source, Path):
        name, digest, rows = source.name, file_digest(source), lambda: read_rows(source, settings.columns)
    else:
        name, loaded = source, _hub(source, settings)
        digest = str(loaded._fingerprint)[:12]
        rows = lambda: typed_rows(enumerate(loaded, 1), source, "row", settings.columns)  # noqa: E731
    key = _key(settings, tokenizer, limit, digest)
    if not _is_made(folder, key):
        _write(rows(), name, settings, tokenizer, limit, folder, key)
    findings = Findings(**json.loads((folder / "rows.json").read_text())["findings"])
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    train, held_out = _split(len(table), settings)
    return TrainingData(
        train=Sequences(table, train),
        held_out=Sequences(table, held_out),
        findings=findings,
        digest=digest,
        name=name,
    )


def file_digest(path: Path) -> str:
    """First 12 hex digits of a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _hub(source: str, settings: TrainSettings) -> datasets.Dataset:
    hub.check_data(source)
    try:
        return datasets.load_dataset(source, settings.subset, split=settings.split)
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        said = str(error).strip().splitlines()
        raise ValueError(
            f"cannot load {source} from the hub ({type(error).__name__}{': ' + said[0] if said else ''}): check its "
            "name, the network and --split, or give a file"
        ) from None


def _key(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, limit: int, digest: str) -> str:
    """Digest of everything that decides the tokenised rows."""
    probe = tokenizer("0 a b c The quick brown fox")["input_ids"]
    template = Path(settings.chat_template).read_text() if settings.chat_template else tokenizer.chat_template
    asked = [settings.columns, settings.delimiter, settings.drop_overlong, settings.drop_empty, template]
    text = json.dumps([digest, limit, len(tokenizer), probe, *asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_made(folder: Path, key: str) -> bool:
    try:
        return json.loads((folder / "rows.json").read_text())["key"] == key and (folder / "rows.arrow").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    rows: Iterator[Row],
    name: str,
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    folder: Path,
    key: str,
) -> None:
    """Stream rows into folder, which is replaced whole once all of them are read."""
    temporary = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    findings = Findings()
    with (
        pa.OSFile(str(temporary / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        tqdm(desc=f"tokenising {name}", unit=" rows", mininterval=1, leave=False) as bar,
    ):
        while batch := list(islice(rows, _BATCH)):
            kept = [
                made for made in _tokenise(batch, name, settings, tokenizer, findings) if _fits(made, limit, findings)
            ]
            writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=_SCHEMA))
            findings.rows += len(kept)
            bar.update(len(batch))
    _refuse(findings, name, settings, limit)
    (temporary / "rows.json").write_text(json.dumps({"key": key, "findings": asdict(findings)}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _refuse(findings: Findings, name: str, settings: TrainSettings, limit: int) -> None:
    """Raises ValueError for what the settings do not allow."""
    total = findings.rows + findings.overlong + findings.empty
    if findings.empty and not settings.drop_empty:
        raise ValueError(
            f"{name}: {findings.empty} of {total} rows are empty or white space ({findings.lines('empty')}): "
            "fill them in, or leave them out with --drop-empty"
        )
    if findings.overlong and not settings.drop_overlong:
        raise ValueError(
            f"{name}: {findings.overlong} of {total} rows exceed max_length={limit} tokens "
            f"({findings.lines('overlong')}): raise --max-length up to the model's limit, or leave them out with "
            "--drop-overlong"
        )
    if not findings.rows:
        raise ValueError(f"{name} holds no {'row that fits' if total else 'rows'}")


def _fits(made: dict[str, Any], limit: int, findings: Findings) -> bool:
    length = len(made["ids"])
    if length > limit:
        findings.note("overlong", made["line"])
        return False
    findings.longest = max(findings.longest, length)
    findings.tokens += length
    return True


def _tokenise(
    batch: list[Row], name: str, settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> Iterator[dict[str, Any]]:
    """Token ids of each row with text: prompt, delimiter, completion and the end token, tokenised as one text."""
    rows = []
    for row in batch:
        if row.empty:
            findings.note("empty", row.line)
        else:
            rows.append(row)
    if not rows:
        return
    kind = "messages" if rows[0].messages is not None else "prompt" if rows[0].answers else "text"
    findings.kind = kind
    if kind == "messages":
        texts = [_chat(row, name, settings, tokenizer) for row in rows]
    else:
        texts = [(row.prompt, row.prompt + _delimiter(row, settings.delimiter) + row.completion) for row in rows]
    own = kind != "messages"  # a chat template writes its own special tokens
    wholes = tokenizer([whole for _, whole in texts], add_special_tokens=own, verbose=False)["input_ids"]
    prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=own, verbose=False)["input_ids"]
    for row, (prompt, _), ids, given in zip(rows, texts, wholes, prompts, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ids, given, strict=False)) if a != b), min(len(ids), len(given)))
        if kind != "text" and same < len(given):
            findings.note("merged", row.line)
        ends = [tokenizer.eos_token_id] if own and tokenizer.eos_token_id is not None else []
        yield {
            "ids": [*ids, *ends],
            # The first token has nothing before it to be predicted from.
            "prompt_length": 1 if kind == "text" else max(1, same),
            "line": row.line,
            "prompt": "" if kind == "text" else prompt,
            "answers": row.answers or ([row.messages[-1]["content"]] if row.messages else []),
        }


def _delimiter(row: Row, delimiter: str) -> str:
    """Nothing where there is no prompt or where the row brings its own white space."""
    if not row.prompt or row.prompt[-1:].isspace() or row.completion[:1].isspace():
        return ""
    return delimiter


def _chat(row: Row, name: str, settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(the conversation up to the last answer, all of it) as the chat template writes them."""
    assert row.messages is not None
    prompt = chat_prompt(row.messages[:-1], tokenizer, settings.chat_template)
    whole = _template(row.messages, tokenizer, settings.chat_template, False)
    if not whole.startswith(prompt):
        raise BrokenRow(f"{name}, line {row.line}: the chat template does not write the answer after its prompt")
    return prompt, whole


def chat_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """What the model is given to answer: the messages and the opening of the assistant's turn."""
    return _template(messages, tokenizer, template, True)


def _template(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, template: str | None, opened: bool
) -> str:
    if template is None and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: give a Jinja file with --chat-template, or rows with prompt and "
            "completion"
        )
    if template is not None and not Path(template).is_file():
        raise ValueError(f"no chat template file {template}")
    text = Path(template).read_text() if template is not None else None
    return str(
        tokenizer.apply_chat_template(messages, chat_template=text, add_generation_prompt=opened, tokenize=False)
    )


def _split(rows: int, settings: TrainSettings) -> tuple[list[int], list[int]]:
    """(training, held-out) row numbers, drawn from the seed; at least one of each when a share is asked for."""
    if not settings.eval_share:
        return list(range(rows)), []
    if rows < 2:
        raise ValueError("one row cannot be split into training and held-out ones: set --eval-share 0")
    count = min(rows - 1, max(1, round(rows * settings.eval_share)))
    held_out = set(random.Random(f"held out {settings.seed}").sample(range(rows), count))
    return [i for i in range(rows) if i not in held_out], sorted(held_out)
