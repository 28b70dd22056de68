"""The suite on a real pretrained model: SmolLM2-135M, taught invented people and real rows, and asked what it forgot.

Cells stand in the order of their worth, so that a suite which was stopped half-way has decided something. Learning
rates are swept on people's development split, as many for every row. The plan gives hours before it starts.
"""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from meft_bench.harness.rates import swept_rate
from meft_bench.harness.rows import ROWS, row_options
from meft_bench.harness.spec import REAL_TASKS, RunSpec
from meft_bench.harness.suites import MORE_SEEDS, SEEDS, Cell
from meft_bench.train.contract import describe

NAME = "smollm2-135m"
PARAMETERS = 134_515_008
_WIDTH, _SWEPT_WIDTH = 576, 128
TASKS: dict[str, dict[str, Any]] = {
    # Ten people: each of the 60 facts is seen some 13 times in four wordings. At 27 times a middle rate learns all of
    # them, and at 9 times three times as many facts are not learnt: neither tells methods apart (results/LOG.md).
    "people": {"train_rows": 60, "eval_rows": 60, "steps": 100, "batch_size": 8, "max_length": 64},
    "nq": {"train_rows": 60, "eval_rows": 60, "steps": 100, "batch_size": 8, "max_length": 96},
    "squad": {"train_rows": 60, "eval_rows": 60, "steps": 100, "batch_size": 8, "max_length": 96},
    "toolbench": {"train_rows": 48, "eval_rows": 48, "steps": 48, "batch_size": 8, "max_length": 384},
    "gsm8k": {"train_rows": 48, "eval_rows": 48, "steps": 24, "batch_size": 8, "max_length": 384},
}
TOKENS = {"people": 27, "nq": 25, "squad": 27, "toolbench": 150, "gsm8k": 190}
"""Tokens of a usual row, for the plan."""
_AT_10 = ("meft", "parallel_adapter", "lora_ffn", "lora", "lora_all", "adapter_h", "adapter_h_spread", "meft_no_ke",
          "meft_union")  # fmt: skip
_AT_2 = ("meft", "parallel_adapter", "lora_ffn", "lora", "lora_all", "adapter_h", "adapter_h_spread")
_SHORT = ("meft", "parallel_adapter", "lora", "adapter_h")
CONTRASTED = (("meft", "10%"), ("parallel_adapter", "10%"), ("full", "100%"), ("lora_ffn", "10%"), ("adapter_h", "2%"),
              ("lora", "2%"), ("parallel_adapter", "2%"), ("meft_no_ke", "10%"), ("lora_ffn", "2%"), ("lora", "10%"),
              ("adapter_h", "10%"), ("base", "0%"))  # fmt: skip
"""What claims compare on people and the short table shows, with the seeds that the embedded model's contrasts have."""
UNION_SIZES = ("11%", "41%", "161%")
"""MEFT at R = 384, 1536 and 6144: how many neurons a micro-batch needs after training."""
UNION_RATE_OF = "34%"
"""The size whose learning rate they take."""


def cells(model: str, data: str) -> list[Cell]:
    """The suite on the model that specs call so. Without real rows (data "synthetic") it is people's part alone."""
    tasks = ("people", "nq") if data != "synthetic" else ("people",)
    first = [(row, "10%") for row in _AT_10] + [("base", "0%"), ("full", "100%")]
    then = [(row, "2%") for row in _AT_2] + [("meft", "34%")]
    found = [
        _cell(row, share, task, seed, model, data)
        for lines in (first, then)
        for task in tasks
        for seed in SEEDS
        for row, share in lines
    ]
    found += [_cell(row, share, "people", seed, model, data) for seed in MORE_SEEDS for row, share in CONTRASTED]
    found += [_cell("meft", share, "people", SEEDS[0], model, data, ("union",)) for share in UNION_SIZES]
    if data != "synthetic":
        short = [("base", "0%"), *((row, "10%") for row in _SHORT), ("full", "100%")]
        found += [
            _cell(row, share, task, SEEDS[0], model, data)
            for task in ("squad", "toolbench", "gsm8k")
            for row, share in short
        ]
    return found


def sweep(model: str, grids: dict[str, tuple[float, ...]]) -> list[Cell]:
    """Every row and size on people at three rates, scored on the development split alone."""
    lines = {(c.row, c.share): c for c in cells(model, "synthetic") if c.spec.steps and c.spec.seed == SEEDS[0]}
    lines = {key: c for key, c in lines.items() if key[1] not in UNION_SIZES}
    return [
        Cell(row, share, replace(c.spec, learning_rate=rate, splits=("validation",)), ("sweep",))
        for (row, share), c in lines.items()
        for rate in _narrowed(grids[c.spec.method])
    ]


def _narrowed(grid: Iterable[float]) -> list[float]:
    """A grid that was made at the embedded model's width, for this one."""
    return [float(f"{rate * _SWEPT_WIDTH / _WIDTH:.2g}") for rate in grid]


def _cell(
    row: str, share: str, task: str, seed: int, model: str, data: str, artefacts: tuple[str, ...] = ("smollm2",)
) -> Cell:
    about = describe(ROWS[row].method)
    fields = dict(TASKS[task])
    if about.untrained:
        fields["steps"] = 0
    spec = RunSpec(
        task=task,
        method=ROWS[row].method,
        options=row_options(row, share, NAME),
        model=model,
        data=data if task in REAL_TASKS else "synthetic",
        seed=seed,
        learning_rate=learning_rate(row, UNION_RATE_OF if share in UNION_SIZES else share, task),
        overlong="drop" if task in REAL_TASKS else "refuse",
        # Half the time of fp32. Weights that are trained themselves would lose small steps in it; adapters are fp32.
        dtype="float32" if about.trains_base else "bfloat16",
        **fields,
    )
    return Cell(row, share, spec, artefacts)


def learning_rate(row: str, share: str, task: str) -> float:
    """The swept peak rate, or the middle of the row's grid where its size was not swept."""
    rate, grid = swept_rate(row, share, task, NAME), describe(ROWS[row].method).learning_rates
    if rate is not None:
        return rate
    return _narrowed(grid)[len(grid) // 2] if grid else 1e-3


# ---- the plan ----


def unswept(cells: Iterable[Cell]) -> str:
    """Which lines of the suite have no learning rate from a sweep yet, in words; "" if all have."""
    lines = dict.fromkeys((c.row, c.share) for c in cells if c.spec.steps and c.share not in UNION_SIZES)
    lacking = [f"{row} {share}" for row, share in lines if swept_rate(row, share, "people", NAME) is None]
    if not lacking:
        return ""
    return (
        f"{len(lacking)} of {len(lines)} lines have no swept learning rate ({', '.join(lacking[:3])}, ...) and take "
        f"the middle of their grid, which is no fair comparison: first make replicate SUITE=sweep MODEL={NAME}"
    )


def plan_text(specs: list[RunSpec], done: int, workers: int) -> str:
    """What will be run and how long it takes about, by this machine's speed in fp32 products, measured now."""
    rate = product_rate()
    seconds = sum(work(spec) for spec in specs) / rate / max(1, workers)
    return (
        f"SmolLM2-135M: {len(specs)} runs to make, {done} are there; about {seconds / 3600:.1f} hours with {workers} "
        f"at a time on one thread each (this machine multiplies at {rate / 1e9:.0f} GFLOP/s a thread, of which models "
        f"reach {_REACHED:.0%}). It may be stopped and given again: a run goes on from its last checkpoint."
    )


_REACHED = 0.8
"""Of the fp32 product rate, for the bfloat16 of most runs."""
_PROBED_TOKENS = 12_000
"""Tokens of the looks after training: forgetting, neurons in use."""


def work(spec: RunSpec) -> float:
    """Floating-point operations of a run, over the share of the product rate that models reach: training (4 a parameter
    and token with a frozen base, else 6), generation for two splits (2, one row's tokens each) and what is looked at
    afterwards."""
    row = TOKENS[spec.task]
    each = (6 if describe(spec.method).trains_base else 4) * PARAMETERS
    trained = spec.steps * spec.batch_size * row * each
    looked = (len(spec.splits) * spec.eval_rows * 2 * row + ("test" in spec.splits) * _PROBED_TOKENS) * 2 * PARAMETERS
    return (trained + looked) / _REACHED


def product_rate() -> float:
    """Floating-point operations a second of fp32 products on one thread of this machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.rand(512, 576), torch.rand(576, 1536)
        best = min(_timed(lambda: a @ b) for _ in range(20))
    finally:
        torch.set_num_threads(before)
    return 2 * 512 * 576 * 1536 / best


def _timed(product: Any) -> float:
    start = time.perf_counter()
    product()
    return time.perf_counter() - start
