"""TrainSettings: everything `meft-bench train` is told, from a YAML file and the command line. No torch here."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.fields import (
    MOST_EPOCHS,
    MOST_ROWS_A_STEP,
    MOST_STEPS,
    Choice,
    Flag,
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
from meft_bench.flags import kinds, setting

__all__ = ["DEVICES", "DTYPES", "FIELDS", "ROLES", "ROWS", "SIZES", "TrainSettings", "in_gb", "memory_bytes"]

DTYPES = ("auto", "float32", "bfloat16")
ROWS = ("fp32", "int8", "int4")
"""How MEFT's rows are held to answer: as they were trained, or quantised by group of 32."""
DEVICES = ("auto", "cpu", "cuda")
ROLES = ("prompt", "completion", "text", "messages")
MOST_WAIT = 10_000.0
_COUNT, _NAME, _SHARE = Maybe(Whole(1)), Maybe(Text()), Real(least=0, below=1)
NOT_NUMBERS = ("output", "checkpoint_minutes", "checkpoint_steps", "wait_minutes")
"""Fields that say where and when, not what: a run may be gone on with under other values of these."""

SIZES = ("neurons", "kept")
"""Options of the method that have flags of their own, too."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One fine-tuning job. Raises ValueError, naming the field, for values that make none.

    Each field is a flag of `meft-bench train` and a name in its YAML file; the text beside it is its help.

    Example: TrainSettings(model="embedded", data="facts.jsonl", output="facts-adapter", steps=100)
    """

    data: str = setting(
        Text(),
        ".jsonl, .csv or .parquet file, hub id, or example (200 rows that ship here)",
        heading="the job",
    )
    output: str = setting(Text(), "folder for the adapter; it appears when the run is whole")
    model: str = setting(
        Text(),
        "folder, hub id, smollm2-135m (pip brings it) or embedded (ships here, knows 843 words)",
        "embedded",
    )
    revision: str | None = setting(_NAME, "commit of a hub model", None)
    method: str = setting(Text(), "meft, lora, parallel_adapter, adapter_h, full, ...", "meft")
    options: dict[str, Any] = setting(
        Pairs(Plain()), "a setting of the method; may be repeated", flag="--option", metavar="NAME=VALUE"
    )

    gpu_memory: str | None = setting(
        Maybe(Size()),
        "what the plan may use of the GPU: 24GB (10^9 bytes each) or 24GiB (2^30)",
        None,
        metavar="SIZE",
        heading="size",
    )
    host_memory: str | None = setting(
        Maybe(Size()), "what it may use of host memory", None, metavar="SIZE", unset="what is free"
    )
    neurons: int | None = setting(
        _COUNT,
        "key-value pairs added per layer (meft, Parallel Adapters)",
        None,
        metavar="R",
        unset="chosen by the plan",
    )
    kept: int | None = setting(_COUNT, "neurons kept per token (meft)", None, metavar="K", unset="chosen by the plan")

    columns: dict[str, str] = setting(
        Pairs(Text()),
        "columns with other names; roles: prompt and completion, text, or messages",
        metavar="ROLE=NAME,...",
        heading="rows",
    )
    subset: str | None = setting(_NAME, "configuration of a hub data set", None)
    split: str = setting(Text(), "split of a hub data set", "train")
    delimiter: str = setting(
        Text(empty=True),
        "between prompt and completion, unless either brings its own white space; words in it belong to the prompt",
        " ",
        unset="one space",
    )
    chat_template: str | None = setting(
        _NAME, "Jinja template for messages rows", None, metavar="FILE", unset="the tokenizer's"
    )
    max_length: int | None = setting(
        _COUNT, "tokens of a row at most", None, metavar="TOKENS", unset="the model's limit"
    )
    drop_overlong: bool = setting(Flag(), "leave longer rows out, counted, instead of refusing them", False)
    drop_empty: bool = setting(Flag(), "leave rows without text out, counted, instead of refusing them", False)
    eval_share: float = setting(
        _SHARE, "share of the rows held out and scored; 0 holds out none", 0.05, metavar="SHARE"
    )
    eval_rows: int = setting(Whole(1), "rows scored of each set, held-out and trained", 200, metavar="N")

    background: str | None = setting(
        _NAME,
        "texts, one a line, that distinctive updates (--option distinctive=T) are to leave alone",
        None,
        metavar="FILE",
        unset="what the base writes by itself",
    )
    epochs: float | None = setting(
        Maybe(Real(above=0, most=MOST_EPOCHS)), "passes over the rows", None, unset="3", heading="training"
    )
    steps: int | None = setting(Maybe(Whole(1, MOST_STEPS)), "optimizer steps, instead of epochs", None)
    batch_size: int = setting(Whole(1, MOST_ROWS_A_STEP), "rows per optimizer step", 16, metavar="ROWS")
    accumulation: int | None = setting(
        _COUNT, "micro-batches per optimizer step", None, metavar="N", unset="chosen by the plan"
    )
    learning_rate: float | None = setting(
        Maybe(Real(above=0)), "peak of the learning rate", None, metavar="RATE", unset="by method and width"
    )
    warmup_share: float = setting(_SHARE, "share of the steps in which the rate rises", 0.02, metavar="SHARE")
    weight_decay: float = setting(Real(least=0), "of the optimizer, per unit of learning rate", 0.0, metavar="FACTOR")
    clip: float = setting(Real(above=0), "largest global norm of the gradients", 1.0, metavar="NORM")
    seed: int = setting(Whole(0, 2**63 - 1), "decides the split, the order and the initialisation", 0)

    dtype: str = setting(
        Choice(DTYPES),
        "of the base's weights",
        "auto",
        unset="bfloat16 on a GPU, float32 on the CPU",
        heading="the run",
    )
    device: str = setting(Choice(DEVICES), "where the model computes", "auto", unset="a GPU if there is one")
    checkpoint_minutes: float = setting(Real(above=0), "minutes between checkpoints", 10.0, metavar="M")
    checkpoint_steps: int | None = setting(_COUNT, "steps between checkpoints, instead of minutes", None, metavar="N")
    wait_minutes: float = setting(
        Real(above=0, most=MOST_WAIT), "minutes that a rank waits for the others at most (torchrun)", 30.0, metavar="M"
    )

    def __post_init__(self) -> None:
        for name in ("data", "output", "model", "chat_template", "background"):
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
        return {name: value for name, value in self.to_dict().items() if name not in NOT_NUMBERS}

    def method_options(self) -> dict[str, Any]:
        """options with SIZES put in. Raises ValueError where both forms are given and differ."""
        merged = dict(self.options)
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and merged.setdefault(name, value) != value:
                raise ValueError(f"{name}={value} and the option {name}={merged[name]} differ: give one")
        return merged

    @property
    def destination(self) -> Path:
        return Path(self.output)


FIELDS = kinds(TrainSettings)
"""The kind of every setting, by name."""


def in_gb(size: int) -> str:
    """Bytes for a reader, in powers of ten."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
