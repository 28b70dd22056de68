"""TrainSettings: everything `meft-bench train` is told, from a YAML file and the command line. No torch here."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meft_bench.fields import (
    MOST_EPOCHS,
    MOST_ROWS_A_STEP,
    MOST_STEPS,
    Choice,
    Flag,
    Kind,
    Maybe,
    Pairs,
    Plain,
    Real,
    Size,
    Text,
    Whole,
    check_names,
    check_table,
    memory_bytes,
    one_line,
)

__all__ = ["DEVICES", "DTYPES", "FIELDS", "ROLES", "TrainSettings", "in_gb", "memory_bytes"]

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
ROLES = ("prompt", "completion", "text", "messages")
_NOT_NUMBERS = ("output", "checkpoint_minutes", "checkpoint_steps")
"""Fields that say where and when, not what: a run may be gone on with under other values of these."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One fine-tuning job. Raises ValueError, naming the field, for values that make none.

    Example: TrainSettings(model="embedded", data="facts.jsonl", output="facts-adapter", steps=100)
    """

    data: str
    """A .jsonl, .csv or .parquet file, a hub id, or "example" (200 rows that ship with the package)."""
    output: str
    """Folder that will hold the adapter; it appears when the run is whole."""
    model: str = "embedded"
    """A folder, a hub id, or "embedded" (the small base that ships with the package)."""
    revision: str | None = None
    """Commit of a hub model."""
    method: str = "meft"
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the method, as in `meft-bench run --option`."""
    neurons: int | None = None
    """R, key-value pairs added per layer (meft and the Parallel Adapters); None lets the plan choose."""
    kept: int | None = None
    """K, neurons kept per token (meft)."""
    gpu_memory: str | None = None
    """What the plan may use of the device, such as 24GB (10^9 bytes) or 24GiB (2^30)."""
    host_memory: str | None = None
    """What the plan may use of host memory; None takes what is free."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role to column name, for columns with other names: {"prompt": "frage", "completion": "antwort"}."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    delimiter: str = " "
    """Between prompt and completion, unless either brings its own white space."""
    chat_template: str | None = None
    """Jinja file for `messages` rows, where the tokenizer has no template of its own."""
    max_length: int | None = None
    """Tokens per sequence; None is the model's limit."""
    drop_overlong: bool = False
    """Leave out rows above max_length instead of refusing them."""
    drop_empty: bool = False
    """Leave out rows without text instead of refusing them."""
    eval_share: float = 0.05
    """Share of the rows held out of training and scored at the end; 0 holds out none."""
    eval_rows: int = 200
    """At most this many rows are scored, held-out and trained ones each."""
    epochs: float | None = None
    """Passes over the training rows; None is 3 unless steps is given."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    accumulation: int | None = None
    """Micro-batches per optimizer step; None lets the plan choose."""
    learning_rate: float | None = None
    """Peak; None takes the middle of the method's grid, scaled down by the base's width over the embedded
    model's."""
    warmup_share: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global gradient norm."""
    seed: int = 0
    """Decides the split, the order and the initialisation."""
    dtype: str = "auto"
    """Of the base: bfloat16 on a GPU and float32 on the CPU unless named."""
    device: str = "auto"
    checkpoint_minutes: float = 10.0
    """Time between checkpoints."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, instead of time."""

    def __post_init__(self) -> None:
        for name in ("data", "output", "model", "chat_template"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        check_table(FIELDS, self)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs:g} both say how long to train: give one")
        if self.accumulation and self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        self._check_columns()

    def _check_columns(self) -> None:
        if unknown := sorted(set(self.columns) - set(ROLES)):
            raise ValueError(f"columns: no role {one_line(', '.join(unknown))}; the roles are {', '.join(ROLES)}")
        if self.columns and set(self.columns) not in ({"prompt", "completion"}, {"text"}, {"messages"}):
            raise ValueError("columns must name prompt and completion, or text, or messages")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSettings":
        """Raises ValueError naming unknown or missing keys."""
        check_names(values, FIELDS, "setting")
        if missing := [name for name in ("data", "output") if values.get(name) is None]:
            named = " and ".join(f"--{name}" for name in missing)
            raise ValueError(f"no {' and no '.join(missing)} given: name it with {named} or in the YAML file")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return dataclasses.asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is trained, the memory that sizes are chosen for among them."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_NUMBERS}

    def method_options(self) -> dict[str, Any]:
        """options with neurons and kept, which have flags of their own, put in. Raises ValueError if both differ."""
        merged = dict(self.options)
        for name in ("neurons", "kept"):
            value = getattr(self, name)
            if value is not None and merged.setdefault(name, value) != value:
                raise ValueError(f"{name}={value} and the option {name}={merged[name]} differ: give one")
        return merged

    @property
    def destination(self) -> Path:
        return Path(self.output)


def in_gb(size: int) -> str:
    """Bytes for a reader, in powers of ten."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


_COUNT = Maybe(Whole(1))
FIELDS: dict[str, Kind] = {
    "data": Text(),
    "output": Text(),
    "model": Text(),
    "revision": Maybe(Text()),
    "method": Text(),
    "options": Pairs(Plain()),
    "neurons": _COUNT,
    "kept": _COUNT,
    "gpu_memory": Maybe(Size()),
    "host_memory": Maybe(Size()),
    "columns": Pairs(Text()),
    "subset": Maybe(Text()),
    "split": Text(),
    "delimiter": Text(empty=True),
    "chat_template": Maybe(Text()),
    "max_length": _COUNT,
    "drop_overlong": Flag(),
    "drop_empty": Flag(),
    "eval_share": Real(least=0, below=1),
    "eval_rows": Whole(1),
    "epochs": Maybe(Real(above=0, most=MOST_EPOCHS)),
    "steps": Maybe(Whole(1, MOST_STEPS)),
    "batch_size": Whole(1, MOST_ROWS_A_STEP),
    "accumulation": _COUNT,
    "learning_rate": Maybe(Real(above=0)),
    "warmup_share": Real(least=0, below=1),
    "weight_decay": Real(least=0),
    "clip": Real(above=0),
    "seed": Whole(0, 2**63 - 1),
    "dtype": Choice(DTYPES),
    "device": Choice(DEVICES),
    "checkpoint_minutes": Real(above=0),
    "checkpoint_steps": _COUNT,
}
"""The door's table of the settings above."""
