"""The grids: each table and figure as a list of cells, a cell being a place in it and the spec that fills it.

Sizes are written out here, options with every default filled in, so that a plan needs neither torch nor a model.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meft_bench.harness.spec import SYNTHETIC_TASKS, RunSpec
from meft_bench.meft.config import PRESETS, MeftOptions
from meft_bench.train.contract import describe

SUITES = ("smoke", "default", "full", "real", "paper", "sweep")
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


@dataclass(frozen=True)
class Row:
    """A line of the comparison: a method with fixed choices; what makes it larger the method tells."""

    title: str
    method: str
    options: dict[str, Any]

    @property
    def size(self) -> str | None:
        """The option that makes it larger; None where it has one size."""
        return describe(self.method).size

    @property
    def only_share(self) -> str | None:
        """The nominal size of a method that has but one."""
        about = describe(self.method)
        return "0%" if about.untrained else "100%" if about.trains_base else None


ROWS = {
    "base": Row("Base model", "base", {}),
    "lora": Row("LoRA, attention q v (alpha 16)", "lora", {"targets": "attention", "alpha": "fixed"}),
    "lora_alpha_rank": Row("LoRA, attention q v (alpha 2r)", "lora", {"targets": "attention", "alpha": "rank"}),
    "lora_ffn": Row("LoRA, FFN (alpha 16)", "lora", {"targets": "ffn", "alpha": "fixed"}),
    "lora_all": Row("LoRA, all linear (alpha 16)", "lora", {"targets": "all", "alpha": "fixed"}),
    "adapter_h": Row("AdapterH", "adapter_h", {"start": "normal"}),
    "adapter_h_identity": Row("AdapterH, identity start", "adapter_h", {"start": "identity"}),
    "parallel_adapter": Row("Parallel Adapter (ReLU)", "parallel_adapter", {"activation": "relu"}),
    "parallel_adapter_silu": Row("Parallel Adapter (SiLU)", "parallel_adapter", {"activation": "silu"}),
    "parallel_adapter_offload": Row(
        "Parallel Adapter, offloaded whole", "parallel_adapter_offload", {"activation": "relu"}
    ),
    "meft": Row("MEFT", "meft", {}),
    "meft_no_ke": Row("MEFT without Key-Experts", "meft", {"key_experts": False}),
    "full": Row("Full fine-tuning", "full", {}),
}
TABLE_ROWS = tuple(ROWS)
"""The rows of Table 1; those below are the ablations."""
FIGURE6_KEPT = {"10%": (2, 4, 16, 32, 104), "40%": (4, 12, 64, 416)}
"""K of the sweep without Key-Experts; the last is R: every neuron is used. K = 8 at 10 % and 16 at 40 % are meft_no_ke
itself."""
FIGURE7_EXPERTS = (4, 8, 32, 48, 96)
"""N of the sweep at R = 96; 24 candidates a token throughout, so P = N / 4. N = 16 is meft itself."""
ROWS |= {
    "meft_gate_none": Row("MEFT, router only selects (no gate)", "meft", {"gate": "none"}),
    "meft_gate_no_search": Row("MEFT, gate but no search (P = N)", "meft", {"probed": 16}),
    "meft_softmax": Row("MEFT, softmax gate", "meft", {"gate": "softmax"}),
    "meft_union": Row("MEFT, union reading", "meft", {"reading": "union"}),
    "meft_lazy": Row("MEFT, lazy Adam", "meft", {"adam": "lazy"}),
    "meft_init_x50": Row("MEFT, router init mean key x50", "meft", {"router_init": "mean_key_x50"}),
    "meft_init_normal": Row("MEFT, router init normal", "meft", {"router_init": "normal"}),
    "meft_frozen_keys": Row("MEFT, frozen keys", "meft", {"frozen_keys": True}),
    "meft_released": Row("MEFT, preset released", "meft", PRESETS["released"]),
    "meft_paper": Row("MEFT, preset paper", "meft", PRESETS["paper"]),
}
ENGINE_ROWS = {
    "meft_int8": Row("MEFT, int8 keys for scoring", "meft", {"scoring": "int8"}),
    "meft_lookahead": Row("MEFT, selected one layer early", "meft", {"lookahead": 1}),
    "meft_bf16_moments": Row("MEFT, moments in bf16", "meft", {"moments": "bf16"}),
    "meft_no_ke_device": Row(
        "MEFT without Key-Experts, int8 keys on the device", "meft", {"key_experts": False, "retrieval": "device"}
    ),
}
"""What the engine's options that are not exact cost in quality."""
ROWS |= ENGINE_ROWS
ROWS |= {
    f"meft_no_ke_k{k}": Row(f"MEFT without Key-Experts, K = {k}", "meft", {"key_experts": False, "kept": k})
    for k in sorted({k for ks in FIGURE6_KEPT.values() for k in ks})
}
ROWS |= {f"meft_n{n}": Row(f"MEFT, N = {n}", "meft", {"experts": n, "probed": n // 4}) for n in FIGURE7_EXPERTS}
ROWS |= {
    "meft_few_experts": Row("MEFT, N = 46, P = 1", "meft", {"experts": 46, "probed": 1}),
    "meft_no_ke_all": Row("MEFT without Key-Experts, K = R = 8464", "meft", {"key_experts": False, "kept": 8464}),
}
"""At R = 8464 alone: 184 candidates a token, as with N = 368 and P = 8; and every neuron."""
HEADLINE = ("lora", "adapter_h", "parallel_adapter", "meft")
_SAME_SIZES = {
    "lora_alpha_rank": "lora",
    "adapter_h_identity": "adapter_h",
    "parallel_adapter_silu": "parallel_adapter",
    "parallel_adapter_offload": "parallel_adapter",
}

# Per model, the size that comes nearest to a share of the base's parameters (MEFT's router counted). MEFT's tuples are
# R, N, P, K; without Key-Experts R, K. LoRA on the attention stops at the width of the model: "40%" is 24.5 % there;
# its "0.5%" is 0.38 %. What a run really has is in its record, and every page shows it where it is another.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "embedded": {
        "lora": {"0.5%": 2, "2%": 10, "10%": 52, "40%": 128},
        "lora_ffn": {"0.5%": 1, "2%": 3, "10%": 17, "40%": 70},
        "lora_all": {"2%": 2, "10%": 10},
        "adapter_h": {"0.5%": 2, "2%": 7, "10%": 35, "40%": 139},
        "parallel_adapter": {"0.5%": 5, "2%": 21, "4%": 43, "10%": 104, "40%": 416},
        "meft": {
            "0.5%": (4, 2, 1, 2),
            "2%": (18, 6, 2, 4),
            "10%": (96, 16, 4, 8),
            "40%": (384, 32, 4, 16),
            "150%": (1536, 128, 8, 8),
        },
        "meft_no_ke": {"2%": (21, 4), "10%": (104, 8), "40%": (416, 16)},
    },
    "stories260K": {
        "lora": {"10%": 23},
        "lora_ffn": {"10%": 7},
        "lora_all": {"10%": 5},
        "adapter_h": {"10%": 14},
        "parallel_adapter": {"10%": 40},
        "meft": {"10%": (36, 12, 4, 8)},
        "meft_no_ke": {"10%": (40, 8)},
    },
    # The paper's own sizes (Table 1 and the released configurations): its "10%" is R = 3072 (12 %) for the Parallel
    # Adapter and R = 8464 (34 % with the router) for MEFT, which stands here at both.
    "llama-7b": {
        "lora": {"2%": 256, "10%": 1280},
        "lora_ffn": {"2%": 93, "10%": 465},
        "lora_all": {"2%": 54, "10%": 270},
        "adapter_h": {"2%": 171, "10%": 857},
        "parallel_adapter": {"2%": 512, "10%": 2560, "12%": 3072, "24%": 6144},
        "meft": {"12%": (3072, 192, 8, 64), "34%": (8464, 368, 8, 64)},
        "meft_no_ke": {"34%": (8464, 64)},
    },
    # The released configurations: R = 4096 on NQ, 3600 elsewhere; one of each share here, chosen by task in paper().
    "mistral-7b": {
        "lora": {"2%": 340, "10%": 1700},
        "lora_ffn": {"2%": 82, "10%": 409},
        "lora_all": {"2%": 55, "10%": 276},
        "adapter_h": {"2%": 184, "10%": 921},
        "parallel_adapter": {"2%": 552, "10%": 2763, "12%": 3072},
        "meft": {"12%": (3072, 192, 8, 64), "14%": (3600, 240, 8, 64), "16%": (4096, 256, 8, 64)},
        "meft_no_ke": {"14%": (3600, 64), "16%": (4096, 64)},
    },
}


def row_options(row: str, share: str, model: str) -> dict[str, Any]:
    """Options of a row at a size, complete. Raises ValueError when the size is not listed for the model."""
    without_ke = row.startswith("meft_no_ke")
    like = ("meft_no_ke" if without_ke else "meft") if ROWS[row].method == "meft" else _SAME_SIZES.get(row, row)
    sizes = SIZES.get(model, {}).get(like, {})
    if ROWS[row].only_share:
        return {}
    if share not in sizes:
        raise ValueError(f"no size {share} of {row} for {model}; listed: {', '.join(sizes) or 'none'}")
    if ROWS[row].method == "meft":
        own = dict(zip(("neurons", "kept") if without_ke else ("neurons", "experts", "probed", "kept"), sizes[share],
                       strict=True))  # fmt: skip
        return MeftOptions(**{**own, **ROWS[row].options}).to_dict()
    size = ROWS[row].size
    assert size is not None
    return {size: sizes[share], **ROWS[row].options}


def learning_rates() -> dict[str, float]:
    """ "row share" (facts) or "row share task" -> peak learning rate, chosen by the sweep on the development split."""
    return json.loads((Path(__file__).parent / "learning_rates.json").read_text(encoding="utf-8"))["chosen"]


def learning_rates_swept() -> tuple[dict[str, dict[float, dict[str, Any]]], dict[str, float]]:
    """(name -> rate -> what came of it, name -> chosen rate) of the whole sweep."""
    book = json.loads((Path(__file__).parent / "learning_rates.json").read_text(encoding="utf-8"))
    return {n: {float(r): e for r, e in rates.items()} for n, rates in book["tried"].items()}, book["chosen"]


# Rows that take another row's swept rate, and why: the same mathematics (offloaded), the row that they change (the
# engine's options), or, for the sweeps over K and N, one rate for the whole curve as in the paper.
_RATE_OF = {"parallel_adapter_offload": "parallel_adapter"}
_RATE_OF |= {f"meft_n{n}": "meft" for n in FIGURE7_EXPERTS}
_RATE_OF |= {row: "meft_no_ke" for row in ROWS if row.startswith("meft_no_ke_k")}
_RATE_OF |= {row: "meft_no_ke" if row.startswith("meft_no_ke") else "meft" for row in ENGINE_ROWS}


def rate_source(row: str) -> str | None:
    """The row whose swept rate this one takes; None for a row with a sweep of its own, or without training."""
    return _RATE_OF.get(row)


def swept_rate(row: str, share: str, task: str) -> float | None:
    """The rate the sweep chose for a row and size on a task; where the task was not swept, that of facts; else None."""
    row = _RATE_OF.get(row, row)
    rates = learning_rates()
    return rates.get(f"{row} {share} {task}", rates.get(f"{row} {share}"))


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
        if swept and c.spec.steps and c.row not in _RATE_OF and not c.variant:
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
    evaluation. shape: whose sizes to take, llama-7b or mistral-7b."""
    epochs_rows = {"nq": (4, 87_925), "squad": (8, 87_599), "toolbench": (1, 100_000), "gsm8k": (1, 395_000)}
    cells = []
    for task, (epochs, rows) in epochs_rows.items():
        batch = 256 if task == "squad" else 64
        for row in TABLE_ROWS:
            for share in _paper_shares(row, shape, task):
                cells.append(
                    cell(row, share, ("table1",), shape, task=task, model=model, data=data, device=device,
                         train_rows=rows, eval_rows=ALL_ROWS, splits=("test",), modes=("ours", "paper"),
                         steps=epochs * rows // batch, batch_size=batch, accumulation=batch // 2,
                         learning_rate=1e-5 if describe(ROWS[row].method).trains_base else 1e-4, max_length=256,
                         overlong="drop", dtype="bfloat16")
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
    shares = SIZES[shape][_SAME_SIZES.get(row, row)]
    if shape == "mistral-7b" and row in ("meft", "meft_no_ke"):
        unused = "14%" if task == "nq" else "16%"  # R = 4096 on NQ, 3600 elsewhere
        return tuple(s for s in shares if s != unused)
    return tuple(shares)
