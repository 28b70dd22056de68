"""The grids: each table and figure as a list of cells, a cell being a place in it and the spec that fills it.

What the lines and sizes are stands in rows.py and sizes.py; a plan needs neither torch nor a model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from meft_bench.harness.rates import learning_rates, swept_rate
from meft_bench.harness.rows import (
    ENGINE_ROWS,
    FIGURE6_KEPT,
    FIGURE7_EXPERTS,
    HEADLINE,
    PEERS,
    RATE_OF,
    ROWS,
    SAME_SIZES,
    TABLE_ROWS,
    row_options,
)
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import SYNTHETIC_TASKS, RunSpec
from meft_bench.train.contract import describe

SUITES = ("smoke", "default", "full", "real", "smollm2", "frontier", "paper", "sweep", "neighbours")
SEEDS, MORE_SEEDS = (0, 1, 2), (3, 4)
"""Of the full suite; the second for the contrasts of Table 1 alone. A seed decides which people and answers are taught,
the order and the initialisation."""


@dataclass(frozen=True)
class Cell:
    """A place in a table or figure. row names the method as tables call it; share is the nominal size; variant says
    what else differs from the task's own settings ("300 facts")."""

    row: str
    share: str
    spec: RunSpec
    artefacts: tuple[str, ...] = ("table1",)
    variant: str = ""


def cell(
    row: str,
    share: str,
    artefacts: Iterable[str] = ("table1",),
    sizes: str = "embedded",
    variant: str = "",
    **fields: Any,
) -> Cell:
    """A cell of the embedded suites unless fields say otherwise; the learning rate is the swept one."""
    share = ROWS[row].only_share or share
    if "learning_rate" not in fields:
        fields["learning_rate"] = swept_rate(row, share, fields["task"]) or 1e-2
    if describe(ROWS[row].method).untrained:
        fields["steps"] = 0
    spec = RunSpec(method=ROWS[row].method, options=row_options(row, share, sizes), **fields)
    return Cell(row, share, spec, tuple(artefacts), variant)


# Chosen so that size matters: at 600 facts every method at 10 % knows all of them, at 1500 none does (see LOG.md).
EMBEDDED_TASKS: dict[str, dict[str, Any]] = {
    "facts": {"task": "facts", "train_rows": 900, "steps": 200, "batch_size": 64},
    "cloze": {"task": "cloze", "train_rows": 900, "steps": 200, "batch_size": 64},
    "tools": {"task": "tools", "train_rows": 300, "steps": 150, "batch_size": 64},
    "arithmetic": {"task": "arithmetic", "train_rows": 4000, "steps": 100, "batch_size": 64},
}


def default() -> list[Cell]:
    """Table 1 and Figure 1 on the embedded model, one seed."""
    cells = [cell(row, share, _tags(row), **EMBEDDED_TASKS["facts"]) for row in TABLE_ROWS
             for share in _table_shares(row)]  # fmt: skip
    cells += [
        cell(row, share, ("figure1",), **EMBEDDED_TASKS["facts"]) for row in HEADLINE for share in ("0.5%", "40%")
    ]
    # The paper's contrast: baselines at 2 % (its 24 GB group) and the dense adapter at 10 %, against MEFT at 10 %.
    pairs = [("base", "0%"), ("lora", "2%"), ("adapter_h", "2%"), ("parallel_adapter", "2%"),
             ("parallel_adapter", "10%"), ("meft", "10%")]  # fmt: skip
    cells += [cell(row, share, **EMBEDDED_TASKS[task]) for task in SYNTHETIC_TASKS[1:] for row, share in pairs]
    return cells


def full() -> list[Cell]:
    """Every contrast that carries a verdict, with every seed; holds the default suite as its first seed."""
    cells = default()
    facts = EMBEDDED_TASKS["facts"]
    for task in SYNTHETIC_TASKS[1:]:
        pairs = [("lora", "10%"), ("adapter_h", "10%"), ("parallel_adapter", "0.5%"), ("parallel_adapter", "40%"),
                 ("meft_no_ke", "10%"), ("full", "100%")]  # fmt: skip
        cells += [cell(row, share, **EMBEDDED_TASKS[task]) for row, share in pairs]
    for row in ("lora_ffn", "lora_alpha_rank", "adapter_h_identity"):
        cells += [cell(row, share, ("figure1",), **facts) for share in ("0.5%", "40%")]
    cells += [cell(row, "10%", **facts) for row in PEERS]
    cells.append(cell("adapter_h_spread", "2%", **facts))
    cells += [cell(row, "10%", ("ablations",), **facts) for row in ROWS if row in ABLATIONS]
    cells.append(cell("meft_softmax", "10%", ("ablations",), **EMBEDDED_TASKS["cloze"]))
    cells.append(cell("meft_lazy", "40%", ("ablations",), **facts))
    cells.append(cell("meft", "150%", ("ablations",), **facts))
    cells.append(cell("parallel_adapter", "4%", ("figure1",), **facts))
    cells.append(cell("meft_no_ke", "40%", ("figure6",), **facts))
    cells += [cell(f"meft_no_ke_k{k}", share, ("figure6",), **facts) for share, ks in FIGURE6_KEPT.items() for k in ks]
    cells += [cell(f"meft_n{n}", "10%", ("figure7",), **facts) for n in FIGURE7_EXPERTS]
    for rows, steps in CAPACITY.items():
        for row, share in CAPACITY_ROWS:
            fields = {**facts, "train_rows": rows, "steps": steps}
            cells.append(cell(row, share, ("capacity",), variant=f"{rows} facts", **fields))
    for parts in ACCUMULATIONS:
        for row in ("meft", "parallel_adapter_offload"):
            fields = {**facts, "accumulation": parts, "splits": ("test",)}
            cells.append(cell(row, "10%", ("accumulation",), variant=f"{parts} micro-batches", **fields))
    for parts in (*ACCUMULATIONS, 8):
        # Few tokens against many neurons, as at 7B: T / R is 1/15 with 8 micro-batches, the paper's 1/12.
        fields = {**facts, "accumulation": parts, "splits": ("test",)}
        cells.append(cell("meft", "150%", ("accumulation",), variant=f"{parts} micro-batches", **fields))
    # Offloaded whole, the adapter's numbers are the resident one's to the digit: one seed shows it.
    return [
        replace(c, spec=replace(c.spec, seed=seed))
        for seed in (*SEEDS, *MORE_SEEDS)
        for c in cells
        if (seed == SEEDS[0] or c.row != "parallel_adapter_offload")
        and (seed in SEEDS or ((c.row, c.share) in CONTRASTED and not c.variant))
    ]


ABLATIONS = ("meft_gate_none", "meft_gate_no_search", "meft_softmax", "meft_union", "meft_lazy", "meft_init_x50",
             "meft_init_normal", "meft_frozen_keys", "meft_released", "meft_paper", *ENGINE_ROWS)  # fmt: skip
CONTRASTED = (("lora", "2%"), ("adapter_h", "2%"), ("parallel_adapter", "2%"), ("parallel_adapter", "10%"),
              ("meft", "10%"), ("meft_no_ke", "10%"), ("full", "100%"))  # fmt: skip
"""What the paper's Table 1 and Figure 4 are about."""
CAPACITY = {300: 67, 1800: 400}
"""Facts taught -> optimizer steps: every fact is seen as often as in the suite's 900."""
CAPACITY_ROWS = (("lora_ffn", "10%"), ("parallel_adapter", "2%"), ("parallel_adapter", "10%"), ("meft", "10%"))
ACCUMULATIONS = (4, 16)


def _tags(row: str) -> tuple[str, ...]:
    return ("table1", "figure1") if row in HEADLINE else ("table1",)


def _table_shares(row: str) -> tuple[str, ...]:
    only = ROWS[row].only_share
    return (only,) if only else ("2%", "10%")


def smoke() -> list[Cell]:
    """The default suite's path on a tiny grid: too short to mean anything."""
    tiny: dict[str, Any] = {"task": "facts", "train_rows": 60, "eval_rows": 60, "steps": 20, "batch_size": 16}
    cells = [cell("base", "0%", **tiny)]
    cells += [cell(row, share, ("table1", "figure1"), **tiny) for row in HEADLINE for share in ("2%", "10%")]
    return cells


def sweep(grids: dict[str, tuple[float, ...]]) -> list[Cell]:
    """Every row and size of facts, and of the other tasks the rows of TASK_SWEPT, at every rate of its
    method's grid, scored on the development split only. A task's own grid lies around the rate chosen on facts."""
    found: dict[tuple[str, str, str], RunSpec] = {}
    for c in full():
        swept = c.spec.task == "facts" or (c.row, c.share) in TASK_SWEPT
        if swept and c.spec.steps and c.row not in RATE_OF and not c.variant:
            found.setdefault((c.row, c.share, c.spec.task), c.spec)
    return [
        Cell(row, share, replace(spec, learning_rate=rate, splits=("validation",)), ("sweep",))
        for (row, share, task), spec in found.items()
        for rate in _grid(row, share, task, grids[spec.method])
    ]


TASK_SWEPT = (("lora", "2%"), ("lora", "10%"), ("adapter_h", "2%"), ("adapter_h", "10%"), ("parallel_adapter", "0.5%"),
              ("parallel_adapter", "2%"), ("parallel_adapter", "10%"), ("parallel_adapter", "40%"), ("meft", "10%"),
              ("meft_no_ke", "10%"), ("full", "100%"), ("meft_softmax", "10%"))  # fmt: skip
"""Every row and size that carries a verdict on more than facts."""
GRID_FACTOR = 2.5
"""Between neighbouring rates of a grid."""


def _grid(row: str, share: str, task: str, grid: tuple[float, ...]) -> tuple[float, ...]:
    around = learning_rates().get(f"{row} {share}")
    if task == "facts" or around is None:
        return grid
    return tuple(float(f"{around * factor:.3g}") for factor in (1 / GRID_FACTOR, 1, GRID_FACTOR))


def real(model: str, data: str) -> list[Cell]:
    """Every method on real rows with a small real pretrained model: does the mechanism work on text from outside?"""
    tasks: dict[str, dict[str, Any]] = {
        "nq": {"steps": 300, "batch_size": 16, "max_length": 160, "train_rows": 100, "eval_rows": 100},
        "squad": {"steps": 300, "batch_size": 16, "max_length": 160, "train_rows": 100, "eval_rows": 100},
        # Long rows: half as many, or the suite takes an hour on two cores.
        "toolbench": {"steps": 80, "batch_size": 8, "max_length": 384, "train_rows": 50, "eval_rows": 50},
        "gsm8k": {"steps": 40, "batch_size": 8, "max_length": 512, "train_rows": 50, "eval_rows": 50},
    }
    return [
        cell(row, "10%", ("real",), "stories260K", task=task, model=model, data=data,
             overlong="drop", **settings)
        for task, settings in tasks.items()
        for row in (TABLE_ROWS if task in ("nq", "squad") else ("base", *HEADLINE, "full"))
    ]  # fmt: skip


def paper(model: str, data: str, device: str, shape: str = "llama-7b") -> list[Cell]:
    """Table 1 at the paper's sizes and settings: batch 64 (SQuAD 256), 256 tokens, K = 64, its epochs, both modes of
    evaluation; a bf16 base, fp32 where it is trained itself. shape: whose sizes to take, llama-7b or mistral-7b."""
    epochs_rows = {"nq": (4, 87_925), "squad": (8, 87_599), "toolbench": (1, 100_000), "gsm8k": (1, 395_000)}
    cells = []
    for task, (epochs, rows) in epochs_rows.items():
        batch = 256 if task == "squad" else 64
        for row in TABLE_ROWS:
            trains_base = describe(ROWS[row].method).trains_base
            for share in _paper_shares(row, shape, task):
                cells.append(
                    cell(row, share, ("table1",), shape, task=task, model=model, data=data, device=device,
                         train_rows=rows, eval_rows=ALL_ROWS, splits=("test",), modes=("ours", "paper"),
                         steps=epochs * rows // batch, batch_size=batch, accumulation=batch // 2,
                         learning_rate=1e-5 if trains_base else 1e-4, max_length=256, overlong="drop",
                         # A step of 1e-5 is below half a bf16 unit of most weights, and would be lost. Adapters are
                         # fp32 on any base.
                         dtype="float32" if trains_base else "bfloat16")
                )  # fmt: skip
    if shape == "llama-7b":
        # The sweeps differ from the table's own MEFT in their options alone.
        own = {c.spec.task: c for c in cells if (c.row, c.share) == ("meft", "34%")}
        for row, task, artefact in PAPER_SWEEPS:
            spec = replace(own[task].spec, options=row_options(row, "34%", shape))
            cells.append(Cell(row, "34%", spec, (artefact,)))
    return [replace(c, spec=replace(c.spec, seed=seed)) for seed in SEEDS for c in cells]


PAPER_SWEEPS = (("meft_no_ke_k16", "nq", "figure6"), ("meft_no_ke_all", "nq", "figure6"),
                ("meft_few_experts", "nq", "figure7"), ("meft_softmax", "nq", "ablations"),
                ("meft_softmax", "squad", "ablations"))  # fmt: skip
"""Row, task and artefact of what the paper's sweeps need beside its Table 1, at R = 8464."""
ALL_ROWS = 1_000_000
"""More than any test file has: evaluate on all of it."""


def _paper_shares(row: str, shape: str, task: str) -> tuple[str, ...]:
    if ROWS[row].only_share:
        return _table_shares(row)
    shares = SIZES[shape][SAME_SIZES.get(row, row)]
    if shape == "mistral-7b" and row in ("meft", "meft_no_ke"):
        unused = "14%" if task == "nq" else "16%"  # R = 4096 on NQ, 3600 elsewhere
        return tuple(s for s in shares if s != unused)
    return tuple(shares)
