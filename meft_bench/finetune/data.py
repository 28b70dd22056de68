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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from meft_bench import hub
from meft_bench.finetune.chat import read_template
from meft_bench.finetune.encode import Encoder, Findings
from meft_bench.finetune.row_files import file_digest, source_name
from meft_bench.finetune.settings import TrainSettings
from meft_bench.finetune.user_rows import Row, read_rows, typed_rows, unit_of
from meft_bench.train.loop import Example

_BATCH = 1000
_BATCH_CHARACTERS = 2_000_000
_TOKENISED_AS = 4
"""Raised when the same row becomes other tokens than before, or more is kept of it."""
_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("line", pa.int64()),
        ("answers", pa.list_(pa.string())),
        ("digest", pa.uint64()),
    ]
)


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
        """Everything kept of one row: ids, prompt_length, line, answers."""
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
    repeated: int
    """Held-out rows that stand among the training rows too, token for token: their scores tell of training."""


def prepare(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    folder: Path,
    vocabulary: int | None = None,
) -> TrainingData:
    """Tokenise the rows into folder/rows.arrow, or take what an earlier call with the same input left there.

    limit: tokens a sequence may have. vocabulary: rows of the base's embedding. Raises ValueError naming file and line
    of the first broken row, and the lines of rows without text or above the limit unless the settings drop them.
    """
    source, template = source_name(settings.data), read_template(settings.chat_template)
    if isinstance(source, Path):
        name, unit, digest = source.name, unit_of(source), file_digest(source)
        rows = read_rows(source, settings.columns)
    else:
        name, unit, loaded = source, "row", _hub(source, settings)
        digest = str(loaded._fingerprint)[:12]
        rows = typed_rows(enumerate(loaded, 1), source, unit, settings.columns)
    key = _key(settings, tokenizer, template, limit, vocabulary, digest)
    if not _is_made(folder, key):
        with Encoder(f"{name}, {unit}", settings, template, tokenizer, limit, vocabulary) as encoder:
            _write(rows, name, settings, encoder, folder, key)
    findings = Findings(**json.loads((folder / "rows.json").read_text(encoding="utf-8"))["findings"])
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    train, held_out = _split(len(table), settings)
    return TrainingData(
        train=Sequences(table, train),
        held_out=Sequences(table, held_out),
        findings=findings,
        digest=digest,
        name=name,
        repeated=_repeated(table, train, held_out),
    )


def _repeated(table: datasets.Dataset, train: list[int], held_out: list[int]) -> int:
    """How many of the held-out rows are the same as a training row."""
    if not held_out:
        return 0
    digests = table.data.column("digest").to_numpy()
    return int(np.isin(digests[held_out], digests[train]).sum())


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


def _key(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    limit: int,
    vocabulary: int | None,
    digest: str,
) -> str:
    """Digest of everything that decides the tokenised rows."""
    asked = [settings.columns, settings.delimiter, settings.drop_overlong, settings.drop_empty]
    made = [_TOKENISED_AS, digest, limit, vocabulary, tokenizer_digest(tokenizer), template, *asked]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """First 12 hex digits over what decides a tokenizer's output: its rules, special tokens and chat template."""
    probe = tokenizer("0 a b c The quick brown fox")["input_ids"]  # also puts the padding of earlier calls back
    rules = getattr(tokenizer, "backend_tokenizer", None)
    written = rules.to_str() if rules is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [probe, written, special, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _is_made(folder: Path, key: str) -> bool:
    try:
        made = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        return made["key"] == key and (folder / "rows.arrow").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows, so many together that neither their number nor their text takes much memory."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.prompt) + len(row.completion) + len(str(row.messages or ""))
        if len(batch) >= _BATCH or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(rows: Iterator[Row], name: str, settings: TrainSettings, encoder: Encoder, folder: Path, key: str) -> None:
    """Stream rows into folder, which is replaced whole once all of them are read."""
    temporary = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (
        pa.OSFile(str(temporary / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        tqdm(desc=f"tokenising {name}", unit=" rows", mininterval=1, leave=False) as bar,
    ):
        for batch in _batches(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(list(encoder(batch)), schema=_SCHEMA))
            bar.update(len(batch))
    _refuse(encoder.findings, name, settings, encoder.limit)
    made = {"key": key, "findings": asdict(encoder.findings)}
    (temporary / "rows.json").write_text(json.dumps(made), encoding="utf-8")
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
        own = settings.max_length is None
        what = f"the model's limit of {limit}" if own else f"max_length={limit}"
        do = "shorten them" if own else "raise --max-length up to the model's limit"
        raise ValueError(
            f"{name}: {findings.overlong} of {total} rows exceed {what} tokens ({findings.lines('overlong')}): {do}, "
            "or leave them out with --drop-overlong"
        )
    if not findings.rows:
        raise ValueError(f"{name} holds no {'row that fits' if total else 'rows'}")


def _split(rows: int, settings: TrainSettings) -> tuple[list[int], list[int]]:
    """(training, held-out) row numbers, drawn from the seed; at least one of each when a share is asked for."""
    if not settings.eval_share:
        return list(range(rows)), []
    if rows < 2:
        raise ValueError("one row cannot be split into training and held-out ones: set --eval-share 0")
    count = min(rows - 1, max(1, round(rows * settings.eval_share)))
    held_out = set(random.Random(f"held out {settings.seed}").sample(range(rows), count))
    return [i for i in range(rows) if i not in held_out], sorted(held_out)
