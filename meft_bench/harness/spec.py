"""RunSpec: everything that can change a number of one run, and its key. No torch here: plans must be cheap to make."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meft_bench.digests import folder_digest as folder_digest
from meft_bench.fields import (
    MOST_ROWS_A_STEP,
    MOST_SEED,
    MOST_STEPS,
    Choice,
    Items,
    Kind,
    Maybe,
    Pairs,
    Plain,
    Real,
    Text,
    Whole,
    check_names,
    check_table,
    shown,
)

PACKAGE = Path(__file__).parent.parent
SYNTHETIC_TASKS = ("facts", "cloze", "tools", "arithmetic")
"""In the language of the embedded model."""
NATURAL_TASKS = ("people",)
"""In natural sentences, for a pretrained model; they, too, make their own rows."""
DATA_SETS: dict[str, tuple[str, ...]] = {
    "nq": ("nq_open",),
    "squad": ("squad",),
    "toolbench": ("toolbench",),
    "gsm8k": ("gsm8k", "metamath"),
}
"""Sub-folders of a data folder that each real task reads."""
REAL_TASKS = tuple(DATA_SETS)
TASKS = SYNTHETIC_TASKS + NATURAL_TASKS + REAL_TASKS
SPLITS = ("recall", "validation", "test")
HEADLINE_METRIC = {
    "facts": "contains",
    "cloze": "contains",
    "tools": "iou",
    "arithmetic": "accuracy",
    "people": "contains",
    "nq": "contains",
    "squad": "contains",
    "toolbench": "iou",
    "gsm8k": "accuracy",
}
"""What a task is judged by, as in the paper."""
MODES = ("ours", "paper")
DTYPES = ("float32", "bfloat16")
MOST_ROWS = 10**6
"""Of a task: its documents are in memory together, about 1 KB each."""
_ADDED_LATER: dict[str, Any] = {"modes": ["ours"]}
"""Fields that earlier specs did not have: hashed only when they differ from this, so that earlier keys stay true."""
_OPTIONS_ADDED_LATER: dict[str, Any] = {
    "device_budget": 0,
    "overlap": None,
    "lookahead": 0,
    "scoring": "fp32",
    "retrieval": "host",
    "wire": "model",
    "moments": "fp32",
    "distinctive": None,
    "distinctive_above": None,
}
"""Likewise the method's options: MEFT's engine, and distinctive updates."""


def package_dir(name: str) -> Path:
    """Folder of meft_bench.tasks or .baselines: beside the package in a checkout, inside it when installed."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training and evaluation. Raises ValueError, naming the field, for values that make no run."""

    task: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    """The method's settings, defaults filled in."""
    model: str = "embedded"
    """"embedded", a hub id, or "local/<folder name>@<digest of its files>"."""
    revision: str | None = None
    """Commit of a hub id."""
    data: str = "synthetic"
    """"synthetic", "hub" (pinned revisions), or "local@<digest of the files used>"."""
    train_rows: int = 600
    """Facts, needs or rows to train on; see the task. More facts or rows than there are is refused."""
    eval_rows: int = 600
    """At most this many documents per evaluated split."""
    splits: tuple[str, ...] = ("test", "recall")
    modes: tuple[str, ...] = ("ours",)
    """How each split is generated and cut: "ours" (greedy, all rows up to eval_rows) and "paper" (the released
    evaluation: first 501 rows, 4 beams, repetition penalty 2, no stop at the end token)."""
    steps: int = 250
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences per optimizer step."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float = 1e-2
    """Peak: linear warm-up, then linear decay to zero."""
    warmup_share: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global gradient norm."""
    max_length: int | None = None
    """Tokens per sequence; None is the model's limit. Longer training rows are refused."""
    overlong: str = "refuse"
    """What to do with rows above max_length: "refuse", or "drop" (counted in the record)."""
    seed: int = 0
    """Decides data, order and initialisation."""
    dtype: str = "float32"
    """Of the base model and of what crosses to the device."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields({name: getattr(self, name) for name in FIELDS})
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        object.__setattr__(self, "splits", tuple(self.splits))
        object.__setattr__(self, "modes", tuple(self.modes))
        if self.task in REAL_TASKS and self.data == "synthetic":
            raise ValueError(f"{self.task} needs real rows: give a folder with --data or MEFT_DATA, or --data hub")
        if self.task not in REAL_TASKS and self.data != "synthetic":
            raise ValueError(f"{self.task} makes its own rows: leave out --data")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return {**dataclasses.asdict(self), "splits": list(self.splits), "modes": list(self.modes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunSpec":
        """Raises ValueError naming unknown or missing fields."""
        check_fields(values)
        if missing := [n for n in ("task", "method") if n not in values]:
            raise ValueError(f"the spec lacks {', '.join(missing)}")
        return cls(**values)

    @property
    def run_key(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON."""
        fields = _without(self.to_dict(), _ADDED_LATER)
        options = _without(fields["options"], _OPTIONS_ADDED_LATER)
        if options.get("retrieval") == "auto" and "device_budget" not in options:
            del options["retrieval"]  # the same as "host" was
        fields["options"] = options
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:12]


FIELDS: dict[str, Kind] = {
    "task": Choice(TASKS),
    "method": Text(),
    "options": Pairs(Plain()),
    "model": Text(),
    "revision": Maybe(Text()),
    "data": Text(),
    "train_rows": Whole(1, MOST_ROWS),
    "eval_rows": Whole(1, MOST_ROWS),
    "splits": Items(Choice(SPLITS), most=len(SPLITS)),
    "modes": Items(Choice(MODES), least=1, most=len(MODES)),
    "steps": Whole(0, MOST_STEPS),
    "batch_size": Whole(1, MOST_ROWS_A_STEP),
    "accumulation": Whole(1),
    "learning_rate": Real(above=0),
    "warmup_share": Real(least=0, below=1),
    "weight_decay": Real(least=0),
    "clip": Real(above=0),
    "max_length": Maybe(Whole(1)),
    "overlong": Choice(("refuse", "drop")),
    "seed": Whole(0, MOST_SEED),
    "dtype": Choice(DTYPES),
    "device": Choice(("cpu", "cuda")),
}
"""What each field above may be."""


def check_fields(values: Any) -> None:
    """Raises ValueError for fields that a spec does not have, or whose values are of another kind; some may lack."""
    if not isinstance(values, dict):
        raise ValueError(f"spec={shown(values)} must map names to values")
    check_names(values, FIELDS, "spec field")
    if "task" in values and not (isinstance(values["task"], str) and values["task"] in TASKS):
        raise ValueError(f"unknown task {shown(values['task'])}; known: {', '.join(TASKS)}")
    check_table({name: kind for name, kind in FIELDS.items() if name in values}, values)


def _without(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces; the same text for the same value on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
