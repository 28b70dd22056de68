"""The grids: each table and figure as a list of cells, a cell being a place in it and the spec that fills it.

Sizes are written out here, options with every default filled in, so that a plan needs neither torch nor a model.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meft_bench.harness.spec import SYNTHETIC_TASKS, RunSpec
from meft_bench.meft.config import MeftConfig

SUITES = ("smoke", "default", "real", "paper", "sweep")


@dataclass(frozen=True)
class Cell:
    """A place in a table or figure. row names the method as tables call it; share is the nominal size."""

    row: str
    share: str
    spec: RunSpec
    artefacts: tuple[str, ...] = ("table1",)


@dataclass(frozen=True)
class Row:
    """A line of the comparison: a method with fixed choices, and the option that makes it larger."""

    title: str
    method: str
    options: dict[str, Any]
    size: str | None = None


ROWS = {
    "base": Row("Base model", "base", {}),
    "lora": Row("LoRA, attention q v (alpha 16)", "lora", {"targets": "attention", "alpha": "fixed"}, "rank"),
    "lora_alpha_rank": Row("LoRA, attention q v (alpha 2r)", "lora", {"targets": "attention", "alpha": "rank"}, "rank"),
    "lora_ffn": Row("LoRA, FFN (alpha 16)", "lora", {"targets": "ffn", "alpha": "fixed"}, "rank"),
    "lora_all": Row("LoRA, all linear (alpha 16)", "lora", {"targets": "all", "alpha": "fixed"}, "rank"),
    "adapter_h": Row("AdapterH", "adapter_h", {"start": "normal"}, "size"),
    "adapter_h_identity": Row("AdapterH, identity start", "adapter_h", {"start": "identity"}, "size"),
    "parallel_adapter": Row("Parallel Adapter (ReLU)", "parallel_adapter", {"activation": "relu"}, "neurons"),
    "parallel_adapter_silu": Row("Parallel Adapter (SiLU)", "parallel_adapter", {"activation": "silu"}, "neurons"),
    "parallel_adapter_offload": Row(
        "Parallel Adapter, offloaded whole", "parallel_adapter_offload", {"activation": "relu"}, "neurons"
    ),
    "meft": Row("MEFT", "meft", {}),
    "meft_no_ke": Row("MEFT without Key-Experts", "meft", {"key_experts": False}),
    "full": Row("Full fine-tuning", "full", {}),
}
HEADLINE = ("lora", "adapter_h", "parallel_adapter", "meft")
_SAME_SIZES = {
    "lora_alpha_rank": "lora",
    "adapter_h_identity": "adapter_h",
    "parallel_adapter_silu": "parallel_adapter",
    "parallel_adapter_offload": "parallel_adapter",
}

# Per model, the size that comes nearest to a share of the base's parameters (MEFT's router counted). MEFT's tuples are
# R, N, P, K; without Key-Experts R, K. LoRA on the attention stops at the width of the model: "40%" is 24 % there.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "embedded": {
        "lora": {"0.5%": 2, "2%": 10, "10%": 52, "40%": 128},
        "lora_ffn": {"2%": 3, "10%": 17},
        "lora_all": {"2%": 2, "10%": 10},
        "adapter_h": {"0.5%": 2, "2%": 7, "10%": 35, "40%": 139},
        "parallel_adapter": {"0.5%": 5, "2%": 21, "10%": 104, "40%": 416},
        "meft": {"0.5%": (4, 2, 1, 2), "2%": (18, 6, 2, 4), "10%": (96, 16, 4, 8), "40%": (384, 32, 4, 16)},
        "meft_no_ke": {"2%": (21, 4), "10%": (104, 8)},
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
    # The paper's own sizes (Table 1 and the released configurations); its "10%" MEFT is R = 8464.
    "llama-7b": {
        "lora": {"2%": 256, "10%": 1280},
        "lora_ffn": {"2%": 93, "10%": 465},
        "lora_all": {"2%": 54, "10%": 270},
        "adapter_h": {"2%": 171, "10%": 857},
        "parallel_adapter": {"2%": 512, "10%": 2560},
        "meft": {"10%": (8464, 368, 8, 64)},
        "meft_no_ke": {"10%": (8464, 64)},
    },
}


def row_options(row: str, share: str, model: str) -> dict[str, Any]:
    """Options of a row at a size, complete. Raises ValueError when the size is not listed for the model."""
    sizes = SIZES.get(model, {}).get(_SAME_SIZES.get(row, row), {})
    if row in ("base", "full"):
        return {}
    if share not in sizes:
        raise ValueError(f"no size {share} of {row} for {model}; listed: {', '.join(sizes) or 'none'}")
    if row == "meft":
        neurons, experts, probed, kept = sizes[share]
        return MeftConfig(neurons=neurons, experts=experts, probed=probed, kept=kept).to_dict()
    if row == "meft_no_ke":
        neurons, kept = sizes[share]
        return MeftConfig(neurons=neurons, kept=kept, key_experts=False).to_dict()
    size = ROWS[row].size
    assert size is not None
    return {size: sizes[share], **ROWS[row].options}


def learning_rates() -> dict[str, float]:
    """ "row share" -> peak learning rate, chosen by the sweep on the development split of facts."""
    return json.loads((Path(__file__).parent / "learning_rates.json").read_text())["chosen"]


def cell(row: str, share: str, artefacts: Iterable[str] = ("table1",), sizes: str = "embedded", **fields: Any) -> Cell:
    """A cell of the embedded suites unless fields say otherwise; the learning rate is the swept one."""
    if row in ("base", "full"):
        share = {"base": "0%", "full": "100%"}[row]
    if "learning_rate" not in fields:
        swept = {"parallel_adapter_offload": "parallel_adapter"}.get(row, row)  # the same mathematics
        fields["learning_rate"] = learning_rates().get(f"{swept} {share}", 1e-2)
    if row == "base":
        fields["steps"] = 0
    spec = RunSpec(method=ROWS[row].method, options=row_options(row, share, sizes), **fields)
    return Cell(row, share, spec, tuple(artefacts))


# Chosen so that size matters: at 600 facts every method at 10 % knows all of them, at 1500 none does (see LOG.md).
EMBEDDED_TASKS: dict[str, dict[str, Any]] = {
    "facts": {"task": "facts", "train_rows": 900, "steps": 200, "batch_size": 64},
    "cloze": {"task": "cloze", "train_rows": 900, "steps": 200, "batch_size": 64},
    "tools": {"task": "tools", "train_rows": 300, "steps": 150, "batch_size": 64},
    "arithmetic": {"task": "arithmetic", "train_rows": 4000, "steps": 100, "batch_size": 64},
}


def default() -> list[Cell]:
    """Table 1 and Figure 1 on the embedded model, one seed."""
    cells = [cell(row, share, ("table1", "figure1") if row in HEADLINE else ("table1",), **EMBEDDED_TASKS["facts"])
             for row in ROWS for share in _table_shares(row)]  # fmt: skip
    cells += [
        cell(row, share, ("figure1",), **EMBEDDED_TASKS["facts"]) for row in HEADLINE for share in ("0.5%", "40%")
    ]
    for task in SYNTHETIC_TASKS[1:]:
        settings = EMBEDDED_TASKS[task]
        cells.append(cell("base", "0%", **settings))
        # The paper's contrast: baselines at 2 % (its 24 GB group) and the dense adapter at 10 %, against MEFT at 10 %.
        pairs = [
            ("lora", "2%"),
            ("adapter_h", "2%"),
            ("parallel_adapter", "2%"),
            ("parallel_adapter", "10%"),
            ("meft", "10%"),
        ]
        cells += [cell(row, share, **settings) for row, share in pairs]
    return cells


def _table_shares(row: str) -> tuple[str, ...]:
    return {"base": ("0%",), "full": ("100%",)}.get(row, ("2%", "10%"))


def smoke() -> list[Cell]:
    """The default suite's path on a tiny grid: too short to mean anything."""
    tiny: dict[str, Any] = {"task": "facts", "train_rows": 60, "eval_rows": 60, "steps": 20, "batch_size": 16}
    cells = [cell("base", "0%", **tiny)]
    cells += [cell(row, share, ("table1", "figure1"), **tiny) for row in HEADLINE for share in ("2%", "10%")]
    return cells


def sweep(grids: dict[str, tuple[float, ...]]) -> list[Cell]:
    """Every row and size of the default suite's facts at every rate of its method's grid, scored on the development
    split only."""
    found: dict[tuple[str, str], RunSpec] = {}
    for c in default():
        if c.spec.task == "facts" and c.row not in ("base", "parallel_adapter_offload"):
            found[c.row, c.share] = c.spec
    return [
        Cell(row, share, replace(spec, learning_rate=rate, splits=("validation",)), ("sweep",))
        for (row, share), spec in found.items()
        for rate in grids[spec.method]
    ]


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
        for row in ROWS
    ]  # fmt: skip


def paper(model: str, data: str, device: str) -> list[Cell]:
    """Table 1 at the paper's sizes and settings (batch 64, 256 tokens, lr 1e-4)."""
    epochs_rows = {"nq": (4, 87_925), "squad": (8, 87_599), "toolbench": (1, 100_000), "gsm8k": (1, 395_000)}
    cells = []
    for task, (epochs, rows) in epochs_rows.items():
        batch = 256 if task == "squad" else 64
        for row in ROWS:
            shares = [
                s
                for s in _table_shares(row)
                if row in ("base", "full") or s in SIZES["llama-7b"][_SAME_SIZES.get(row, row)]
            ]
            for share in shares:
                cells.append(
                    cell(row, share, ("table1",), "llama-7b", task=task, model=model, data=data, device=device,
                         train_rows=rows, eval_rows=501, steps=epochs * rows // batch, batch_size=batch,
                         accumulation=batch // 2, learning_rate=1e-5 if row == "full" else 1e-4, max_length=256,
                         overlong="drop", dtype="bfloat16")
                )  # fmt: skip
    return cells
