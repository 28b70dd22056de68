"""RunSpec: everything that can change a number of one run, and its key. No torch here: plans must be cheap to make."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
SYNTHETIC_TASKS = ("facts", "cloze", "tools", "arithmetic")
DATA_SETS: dict[str, tuple[str, ...]] = {
    "nq": ("nq_open",),
    "squad": ("squad",),
    "toolbench": ("toolbench",),
    "gsm8k": ("gsm8k", "metamath"),
}
"""Sub-folders of a data folder that each real task reads."""
REAL_TASKS = tuple(DATA_SETS)
TASKS = SYNTHETIC_TASKS + REAL_TASKS
SPLITS = ("recall", "validation", "test")
HEADLINE_METRIC = {
    "facts": "contains",
    "cloze": "contains",
    "tools": "iou",
    "arithmetic": "accuracy",
    "nq": "contains",
    "squad": "contains",
    "toolbench": "iou",
    "gsm8k": "accuracy",
}
"""What a task is judged by, as in the paper."""
MODES = ("ours", "paper")
DTYPES = ("float32", "bfloat16")
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
}
"""Likewise the method's options: MEFT's engine."""


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
    """Facts, needs or rows to train on; see the task."""
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
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        for name in ("train_rows", "eval_rows", "batch_size", "accumulation"):
            _whole(name, getattr(self, name), 1)
        _whole("steps", self.steps, 0)
        _whole("seed", self.seed, 0)
        if self.max_length is not None:
            _whole("max_length", self.max_length, 1)
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        for name in ("learning_rate", "clip"):
            if not _number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number above 0")
        if not _number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r} must be a number of at least 0")
        if not _number(self.warmup_share) or not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share={self.warmup_share!r} must be at least 0 and below 1")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("overlong", self.overlong, ("refuse", "drop"))
        _one_of("device", self.device, ("cpu", "cuda"))
        object.__setattr__(self, "splits", tuple(self.splits))
        for split in self.splits:
            _one_of("splits", split, SPLITS)
        object.__setattr__(self, "modes", tuple(self.modes))
        if not self.modes:
            raise ValueError(f"modes is empty: choose from {', '.join(MODES)}")
        for mode in self.modes:
            _one_of("modes", mode, MODES)
        if self.task in REAL_TASKS and self.data == "synthetic":
            raise ValueError(f"{self.task} needs real rows: give a folder with --data or MEFT_DATA, or --data hub")
        if self.task in SYNTHETIC_TASKS and self.data != "synthetic":
            raise ValueError(f"{self.task} makes its own rows: leave out --data")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return {**dataclasses.asdict(self), "splits": list(self.splits), "modes": list(self.modes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunSpec":
        """Raises ValueError naming unknown or missing fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown spec field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := [n for n in ("task", "method") if n not in values]:
            raise ValueError(f"the spec lacks {', '.join(missing)}")
        return cls(**values)

    @property
    def run_key(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON."""
        fields = _without(self.to_dict(), _ADDED_LATER)
        fields["options"] = _without(fields["options"], _OPTIONS_ADDED_LATER)
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:12]


def _without(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces; the same text for the same value on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


_ON_THE_ENGINE = ("meft", "parallel_adapter_offload")
_SHARED_WITH_BASELINES = ("dense", "files", "sites")
"""All that methods without rows on the host run of meft/."""


def code_digest(task: str, method: str, model: str = "embedded") -> str:
    """First 12 hex digits over every file that can change this run's numbers, by content."""
    meft = PACKAGE / "meft"
    if method in _ON_THE_ENGINE:
        files = sorted([*meft.glob("*.py"), *meft.glob("*.c")])
    else:
        files = [meft / f"{name}.py" for name in _SHARED_WITH_BASELINES]
    files += [
        PACKAGE / "harness" / f"{n}.py"
        for n in ("methods", "models", "training", "tokens", "evaluation", "probes", "worker", "meft")
    ]
    files += [package_dir("tasks") / n for n in ("docs.py", "metrics.py", "world.py", f"{task}.yaml")]
    if method != "meft":
        files.append(package_dir("baselines") / f"{method}.py")
    if model == "embedded":
        files += [PACKAGE / "embedded" / name for name in ("model.safetensors", "tokenizer.json", "config.json")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(_content(file))
    return digest.hexdigest()[:12]


_CONTENT: dict[tuple[str, int, int], bytes] = {}


def _content(file: Path) -> bytes:
    """A file's digest, remembered within the process (a suite asks for the same files many times)."""
    stat = file.stat()
    key = (str(file), stat.st_mtime_ns, stat.st_size)
    if key not in _CONTENT:
        _CONTENT[key] = hashlib.sha256(file.read_bytes()).digest()
    return _CONTENT[key]


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """First 12 hex digits over the data files that the named sets use. Raises ValueError if there are none."""
    names = list(names)
    files = sorted(f for name in names for f in (folder / name).glob("*.jsonl*"))
    if not files:
        raise ValueError(f"no {' or '.join(names)}/*.jsonl[.gz] in the data folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.parent.name}/{file.name}".encode())
        digest.update(_content(file))
    return digest.hexdigest()[:12]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
