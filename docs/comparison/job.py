"""The one job that every script here does: the same base, rows, order, steps and score. What a script's own lines are
worth is counted without this file, which stands for a user's data and evaluation code.

run.py starts a script with COMPARISON_SEED, COMPARISON_VARIANT and COMPARISON_OUT set, and reads what finish() wrote.
"""

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from meft_bench.harness import rates
from meft_bench.harness.evaluation import evaluate_split, load_task
from meft_bench.harness.rows import ROWS, row_options
from meft_bench.harness.spec import RunSpec
from meft_bench.train.loop import Example, batch_indices, render
from meft_bench.train.loop import collate as padded
from meft_bench.train.methods import Attached
from meft_bench.train.models import EMBEDDED, load_model

NUMERICS = 1
"""Raised when this job or a script beside it measures something else (meft_bench/harness/numerics.py)."""
SEED = int(os.environ.get("COMPARISON_SEED", "0"))
VARIANT = os.environ.get("COMPARISON_VARIANT", "")
STEPS = int(os.environ.get("COMPARISON_STEPS", "200"))
SPLIT = os.environ.get("COMPARISON_SPLIT", "test")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "comparison"
BATCH, WARMUP = 64, 4
RATE = 1e-2
"""AdamW's peak rate: what the sweep on the development split chose for LoRA, Parallel Adapter and MEFT at this size."""
LORA = {"qv": (["q_proj", "v_proj"], 52), "all": ("all-linear", 10), "ffn": (["gate_proj", "up_proj", "down_proj"], 17)}
"""Places and the rank that makes 10 % of the base's parameters there."""

spec = RunSpec(task="facts", method="base", train_rows=900, steps=STEPS, batch_size=BATCH, seed=SEED, splits=(SPLIT,))
task = load_task(spec, None)
loaded = load_model(EMBEDDED, None, "float32", "cpu")
examples = render(task.dataset["train"], loaded.tokenizer)
_called: list[float] = []
_tokens: list[int] = []
_resident: list[int] = []


def lomo_rate() -> float:
    """LOMO is SGD and needs rates of its own: the best of those in lomo_rates.json, or the one being tried now."""
    if tried := os.environ.get("COMPARISON_RATE"):
        return float(tried)
    return float(json.loads((FOLDER / "lomo_rates.json").read_text(encoding="utf-8"))["chosen"][VARIANT])


def swept_rate(row: str) -> float:
    """What the sweep of the suites chose for a row of theirs, on the development split and at this size."""
    rate = rates.swept_rate(row, _share(row), "facts")
    assert rate is not None
    return rate


def options(row: str) -> dict[str, Any]:
    """The options that the suites give the row."""
    return row_options(row, _share(row), EMBEDDED)


def _share(row: str) -> str:
    return ROWS[row].only_share or "10%"


def base() -> Any:
    """The base model, as a user's AutoModelForCausalLM.from_pretrained gives it."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    _resident.append(psutil.Process().memory_info().rss)
    return loaded.model


def collate(rows: list[Example]) -> dict[str, Tensor]:
    """One batch; called once a step, which is what step times are taken from."""
    _called.append(time.perf_counter())
    _tokens.append(sum(len(row.ids) for row in rows))
    return padded(rows, loaded.tokenizer.pad_token_id, torch.device("cpu"))


def batches() -> Iterator[dict[str, Tensor]]:
    """STEPS batches: epochs of a seeded shuffle."""
    for step in range(STEPS):
        yield collate([examples[i] for i in batch_indices(step, BATCH, len(examples), SEED)])


def finish(model: nn.Module, optimizer: Any = None, attached: Attached | None = None) -> None:
    """Score the model on words that training never used, and write what was measured. optimizer: where its state is
    not AdamW's; attached: a method of this repository, which counts its own bytes."""
    _called.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = sorted(b - a for a, b in zip(_called[3:], _called[4:], strict=False))
    found = {
        **trained(model),
        **(_accounted(attached, optimizer) if attached else _state_bytes(optimizer) if optimizer else {}),
        "steps": STEPS,
        "tokens": sum(_tokens[:STEPS]),
        "median_step_s": round(steps[len(steps) // 2], 5),
        "peak_rss_bytes": peak,
        "peak_above_base_bytes": peak - _resident[0],
        **score(model),
    }
    Path(os.environ["COMPARISON_OUT"]).write_text(json.dumps(found), encoding="utf-8")


def score(model: nn.Module) -> dict[str, Any]:
    """Share of held-out questions whose answer the model's greedy text contains."""
    found = evaluate_split(model.eval(), loaded.tokenizer, task, SPLIT, loaded.max_length)
    hits = found.scores["contains"]
    return {"split": SPLIT, "score": round(sum(hits) / len(hits), 6), "items": len(hits)}


def trained(model: nn.Module) -> dict[str, Any]:
    """Trainable parameters, and what MEFT's link counted."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    counted: dict[str, Any] = {"trainable": sum(sizes), "largest_tensor": max(sizes)}
    if any(type(module).__name__ == "MeftLayer" for module in model.modules()):
        from meft_bench.integrations.peft_method import active_adapters

        adapters = active_adapters(model)
        moved = adapters[0].link.bytes
        counted["trainable"] = sum(p.numel() for a in adapters for p in a.store.parameters() if p.requires_grad)
        counted["layers"] = len(adapters)
        counted["bytes_by_purpose"] = {f"{way} {purpose}": n for (way, purpose), n in sorted(moved.items())}
    return counted


def _accounted(attached: Attached, optimizer: Any) -> dict[str, Any]:
    """What the method itself keeps, and what its link counted."""
    found: dict[str, Any] = {"accounted_bytes": attached.accounted_bytes(optimizer)}
    if attached.link is not None:
        moved = attached.link.bytes
        found["bytes_by_purpose"] = {f"{way} {purpose}": n for (way, purpose), n in sorted(moved.items())}
    return found


def _state_bytes(optimizer: Any) -> dict[str, int]:
    """Tensors that the optimizer keeps of its parameters, those of galore-torch's projectors included."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value if isinstance(value, Tensor) else getattr(value, "ortho_matrix", None) for value in kept]
    return {"state_bytes": sum(t.nbytes for t in tensors if isinstance(t, Tensor))}


# ---- for meft_command.sh, which is no Python script ----


def write_rows(path: Path) -> None:
    """The training rows as a user's file."""
    rows = [{"prompt": row["prompt"], "completion": row["target"]} for row in task.dataset["train"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def finish_adapter(folder: Path) -> None:
    """Score the adapter that the command left, and write what its training.json says was measured."""
    from meft_bench.finetune.generate import load_adapted

    about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    training, model = about["training"], load_adapted(folder).model
    found = {
        "trainable": sum(about["plan"]["trainable"].values()),
        "steps": training["steps"],
        "tokens": training["tokens"],
        "mean_step_s": round(training["step_s_sum"] / training["steps"], 5),
        **score(model),
    }
    Path(os.environ["COMPARISON_OUT"]).write_text(json.dumps(found), encoding="utf-8")
