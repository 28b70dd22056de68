"""TrainSettings: everything `meft-bench train` is told, from a YAML file and the command line. No torch here."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
ROLES = ("prompt", "completion", "text", "messages")
_NOT_NUMBERS = ("output", "gpu_memory", "host_memory", "checkpoint_minutes", "checkpoint_steps")
"""Fields that say where and how, not what: a run may be gone on with under other values of these."""
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
          "tib": 2**40}  # fmt: skip


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
    """Peak; None takes the middle of the method's grid, scaled from the embedded model's width to this one's."""
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
        for name, least in (("batch_size", 1), ("eval_rows", 1), ("seed", 0)):
            _whole(name, getattr(self, name), least)
        for name in ("neurons", "kept", "steps", "accumulation", "max_length", "checkpoint_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) is not None:
                _above(name, getattr(self, name))
        for name in ("clip", "checkpoint_minutes"):
            _above(name, getattr(self, name))
        _between("eval_share", self.eval_share)
        _between("warmup_share", self.warmup_share)
        if not _number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r} must be a number of at least 0")
        for name, allowed in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs:g} both say how long to train: give one")
        if self.accumulation and self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        for name in ("options", "columns"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r} must map names to values")
        self._check_columns()
        for name in ("gpu_memory", "host_memory"):
            memory_bytes(getattr(self, name), name)

    def _check_columns(self) -> None:
        if unknown := sorted(set(self.columns) - set(ROLES)):
            raise ValueError(f"columns: no role {', '.join(unknown)}; the roles are {', '.join(ROLES)}")
        if self.columns and set(self.columns) not in ({"prompt", "completion"}, {"text"}, {"messages"}):
            raise ValueError("columns must name prompt and completion, or text, or messages")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSettings":
        """Raises ValueError naming unknown or missing keys."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := [name for name in ("data", "output") if not values.get(name)]:
            named = " and ".join(f"--{name}" for name in missing)
            raise ValueError(f"no {' and no '.join(missing)} given: name it with {named} or in the YAML file")
        for name in ("data", "output", "model", "method", "split", "delimiter"):
            if name in values and not isinstance(values[name], str):
                raise ValueError(f"{name}={values[name]!r} must be text")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return dataclasses.asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is trained; what says where and in how much memory is left out."""
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


def memory_bytes(text: str | None, name: str = "memory") -> int | None:
    """Bytes of "24GB", "16GiB" or a plain number; None for None. Raises ValueError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = found.group(2).lower() if found else None
    if found is None or unit not in _UNITS or float(found.group(1)) <= 0:
        raise ValueError(f"{name}={text!r} is no size: write it as 24GB (10^9 bytes) or 24GiB (2^30)")
    return int(float(found.group(1)) * _UNITS[unit])


def in_gb(size: int) -> str:
    """Bytes for a reader, in powers of ten."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def _above(name: str, value: Any) -> None:
    if not _number(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a number above 0")


def _between(name: str, value: Any) -> None:
    if not _number(value) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must be at least 0 and below 1")
