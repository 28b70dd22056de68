"""Knowledge gained against what was forgotten: every method at several learning rates and sizes, on new facts.

A rate that was swept for the score says nothing about forgetting, so here each rate is a point, and methods are
compared by the least they forget among the runs that know as much. Four groups: equal trainable parameters (10 %),
equal bytes on the device (what MEFT holds there at 10 %), MEFT at growing sizes, whose rows lie on the host, and the
peers, which the paper does not compare with. Every run is one of the full suite's kind; those that stand there too are
not run again. No torch here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from meft_bench.harness.rows import ROWS, row_options
from meft_bench.harness.smollm2 import NAME, TASKS
from meft_bench.harness.spec import RunSpec
from meft_bench.harness.suites import EMBEDDED_TASKS, SEEDS, Cell, cell
from meft_bench.named import EMBEDDED
from meft_bench.train.contract import describe

TAG = "frontier"
TASK = "facts"
_LOW, _MIDDLE, _HIGH = (6e-4, 1.6e-3, 4e-3), (1.6e-3, 4e-3, 1e-2), (4e-3, 1e-2, 2.5e-2)


@dataclass(frozen=True)
class Curve:
    """One method at one size, at several rates."""

    row: str
    share: str
    rates: tuple[float, ...]


EQUAL_PARAMETERS = (
    Curve("meft", "10%", _MIDDLE),
    Curve("meft_distinctive", "10%", _HIGH),
    Curve("meft_distinctive_half", "10%", _HIGH),
    Curve("parallel_adapter", "10%", _MIDDLE),
    Curve("lora_ffn", "10%", _MIDDLE),
    Curve("lora", "10%", _MIDDLE[1:]),
    Curve("adapter_h", "10%", _MIDDLE),
)
EQUAL_BYTES = (
    Curve("meft", "10%", _MIDDLE),
    Curve("meft_distinctive_half", "10%", _HIGH),
    Curve("parallel_adapter", "4%", _HIGH),
    Curve("lora_ffn", "4%", _MIDDLE),
)
SIZES = (
    Curve("meft", "10%", _MIDDLE),
    Curve("meft", "40%", _LOW),
    Curve("meft_distinctive_half", "40%", _MIDDLE),
    Curve("meft", "150%", (2.5e-4, *_LOW[:2])),
    Curve("meft_distinctive", "150%", _LOW),
    Curve("meft_distinctive_half", "150%", _LOW),
)
PEERS = (
    Curve("meft", "10%", _MIDDLE),
    Curve("product_keys", "10%", _HIGH),
    Curve("shira", "10%", _HIGH),
    Curve("galore", "100%", (1e-3, 2.5e-3, 6.3e-3, 1.58e-2)),
    Curve("adalomo", "100%", (4e-3, 1e-2, 2.5e-2, 6.25e-2)),
    Curve("lsp_offload", "100%", (2.5e-3, 6.3e-3, 1.6e-2)),
)
"""Rates of their sweeps; each has the one that was chosen for the score."""
FULL = Curve("full", "100%", (4e-4, 1e-3, 2.5e-3))
GROUPS = {"parameters": EQUAL_PARAMETERS, "bytes": EQUAL_BYTES, "sizes": SIZES, "peers": PEERS}
"""What stands together in a panel; full fine-tuning is a line of every one."""


def cells() -> list[Cell]:
    """The suite on the embedded model: every curve once, with every seed; the peers last."""
    curves = dict.fromkeys(c for group in (EQUAL_PARAMETERS, EQUAL_BYTES, SIZES, (FULL,)) for c in group)
    base = cell("base", "0%", (TAG,), **EMBEDDED_TASKS[TASK])
    peers = [c for c in PEERS if c not in curves]
    return _with_seeds([base, *_at_rates(curves)]) + _with_seeds(_at_rates(peers))


def _at_rates(curves: Iterable[Curve]) -> list[Cell]:
    return [
        cell(c.row, c.share, (TAG,), variant=f"{rate:g}", learning_rate=rate, **EMBEDDED_TASKS[TASK])
        for c in curves
        for rate in c.rates
    ]


def _with_seeds(cells: list[Cell]) -> list[Cell]:
    return [replace(c, spec=replace(c.spec, seed=seed)) for seed in SEEDS for c in cells]


# ---- a pretrained model ----

REAL_TASK = "people"
REAL_CURVES = (
    Curve("meft", "10%", (2.2e-3, 3.5e-3, 5.6e-3)),
    Curve("meft_distinctive_half", "10%", (5.6e-3, 1.4e-2, 3.5e-2)),
    Curve("parallel_adapter", "10%", (5.6e-3, 8.9e-3, 1.4e-2)),
    Curve("lora_ffn", "10%", (2.2e-3, 3.5e-3, 5.6e-3)),
    Curve("adapter_h", "10%", (1.42e-4, 2.2e-4, 3.56e-4)),
    Curve("meft", "34%", (8.9e-4, 2.2e-3, 5.6e-3)),
    Curve("meft_distinctive", "10%", (5.6e-3, 1.4e-2, 3.5e-2)),
    Curve("full", "100%", (8.9e-5, 2.2e-4, 5.6e-4)),
)
"""The headline methods. The highest rate of each is the one that its sweep chose for the score, and the others lie
below, where less is forgotten. Updating distinctive neurons alone was not swept here: it begins at MEFT's choice and
goes up, as on the embedded model."""


def real_cells(model: str) -> list[Cell]:
    """REAL_CURVES on SmolLM2-135M, taught invented people, and its base. model: as specs call it."""
    found = [_real("base", "0%", 1e-3, model)]
    return _with_seeds(found + [_real(c.row, c.share, rate, model) for c in REAL_CURVES for rate in c.rates])


def _real(row: str, share: str, rate: float, model: str) -> Cell:
    about = describe(ROWS[row].method)
    fields: dict[str, Any] = {**TASKS[REAL_TASK], **({"steps": 0} if about.untrained else {})}
    spec = RunSpec(
        task=REAL_TASK,
        method=ROWS[row].method,
        options=row_options(row, share, NAME),
        model=model,
        learning_rate=rate,
        dtype="float32" if about.trains_base else "bfloat16",
        **fields,
    )
    return Cell(row, share, spec, (TAG,), "" if about.untrained else f"{rate:g}")


# ---- the plan ----

_SECONDS = {"meft": 30.0, "full": 29.0, "galore": 30.0, "adalomo": 29.0, "lsp_offload": 35.0}
_OTHERS = 23.0
"""A run on the embedded model on one core, from start to record: medians of the published records, and the start."""


def plan_text(specs: Iterable[RunSpec], done: int, workers: int) -> str:
    """What will be run and how long it takes about, on cores like those of the published records."""
    due = list(specs)
    seconds = sum(_SECONDS.get(s.method, _OTHERS) if s.steps else 5.0 for s in due) / max(1, workers)
    return (
        f"Frontier on the {EMBEDDED} model: {len(due)} runs to make, {done} are there; about {seconds / 60:.0f} "
        f"minutes with {workers} at a time on quiet cores. It may be stopped and given again."
    )
