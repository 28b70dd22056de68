"""The training loop: deterministic batches, accumulation, schedule, clipping, checkpoints, step log."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench.harness.spec import RunSpec
from meft_bench.train.checkpoints import StepLog, resume, save_checkpoint
from meft_bench.train.methods import Attached
from meft_bench.train.tokens import sequences

NUMERICS = 1
"""Raised by a change of what this file computes (numerics.py)."""
IGNORED = -100


class Diverged(Exception):
    """The loss or a parameter became infinite or not a number; the message names the step."""


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, of which the first prompt_length are not supervised."""

    ids: list[int]
    prompt_length: int
    doc_id: str = ""


def render(docs: Any, tokenizer: PreTrainedTokenizerBase, delimiter: str = " ") -> list[Example]:
    """Training sequences: prompt, delimiter, target and the end token, tokenised as one text.

    The prompt's own tokens are what evaluation will feed, which is checked here for every document: raises ValueError
    if a tokenizer merges across the boundary.
    """
    docs, examples = list(docs), []
    prompts = [doc["prompt"] for doc in docs]
    wholes = [prompt + delimiter + doc["target"] for prompt, doc in zip(prompts, docs, strict=True)]
    for doc, (ids, prompt_length, merged) in zip(docs, sequences(tokenizer, prompts, wholes), strict=True):
        if merged:
            raise ValueError(f"the tokenizer merges the end of the prompt with the answer: {doc['prompt'][-40:]!r}")
        examples.append(Example(ids, prompt_length, doc["id"]))
    return examples


def fit_length(examples: list[Example], limit: int, overlong: str) -> tuple[list[Example], int]:
    """(examples within limit tokens, how many were dropped). Raises ValueError when any is longer and not to drop."""
    fitting = [e for e in examples if len(e.ids) <= limit]
    dropped = len(examples) - len(fitting)
    if dropped and overlong == "refuse":
        longest = max(len(e.ids) for e in examples)
        raise ValueError(
            f"{dropped} of {len(examples)} training rows exceed max_length={limit} tokens (the longest has {longest}): "
            "raise max_length up to the model's limit, or set overlong=drop"
        )
    if not fitting:
        raise ValueError(f"no training row fits max_length={limit} tokens")
    return fitting, dropped


def batch_indices(step: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """Rows of one optimizer step: epochs of a seeded shuffle, laid end to end. A function of its arguments alone, so a
    resumed run needs no state to go on with the same data."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, rows)
        indices.append(_permutation(epoch, rows, seed)[offset])
    return indices


_PERMUTATIONS: dict[tuple[int, int, int], list[int]] = {}


def _permutation(epoch: int, rows: int, seed: int) -> list[int]:
    key = (epoch, rows, seed)
    if key not in _PERMUTATIONS:
        if len(_PERMUTATIONS) > 4:
            _PERMUTATIONS.clear()
        _PERMUTATIONS[key] = random.Random(f"order {seed} {epoch}").sample(range(rows), rows)
    return _PERMUTATIONS[key]


def collate(examples: list[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels [B, longest], padded on the right; prompts and padding are not supervised."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, example in enumerate(examples):
        n = len(example.ids)
        ids[i, :n], mask[i, :n] = torch.tensor(example.ids), 1
        labels[i, example.prompt_length : n] = ids[i, example.prompt_length : n]
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def learning_rate_scale(step: int, steps: int, warmup_share: float) -> float:
    """Factor on the peak rate: linear from 1/w to 1 over w warm-up steps, then linear to 0 (step counts from 0)."""
    warmup = max(1, round(steps * warmup_share))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def train(
    attached: Attached,
    examples: list[Example],
    spec: RunSpec,
    pad_id: int,
    checkpoints: Path | None = None,
    checkpoint_every_s: float = 30.0,
    checkpoint_every_steps: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> tuple[torch.optim.Optimizer, StepLog]:
    """spec.steps optimizer steps; resumes from the newest whole checkpoint. progress is called with the steps done.

    The loss of a step is the mean over its supervised tokens, so accumulation changes nothing but memory. Raises
    Diverged when the loss, or a parameter that would be saved, is no finite number.
    """
    model, device = attached.model, next(attached.model.parameters()).device
    optimizer = attached.make_optimizer(lr=spec.learning_rate, weight_decay=spec.weight_decay)
    log, first = StepLog(), 0
    torch.manual_seed(spec.seed)
    if checkpoints is not None:
        first, log = resume(checkpoints, attached, optimizer, spec.steps)
    model.train()
    saved_at = time.monotonic()
    for step in range(first, spec.steps):
        progress(step)
        rows = [examples[i] for i in batch_indices(step, spec.batch_size, len(examples), spec.seed)]
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * learning_rate_scale(step, spec.steps, spec.warmup_share)
        one_step(attached, optimizer, rows, spec, pad_id, device, log)
        check_loss(log, spec.steps)
        due, last = time.monotonic() - saved_at > checkpoint_every_s, step + 1 == spec.steps
        if checkpoint_every_steps is not None:
            due = (step + 1) % checkpoint_every_steps == 0
        if last:
            check_parameters(attached, optimizer, step + 1, spec.steps)
        elif checkpoints is not None and due:
            check_parameters(attached, optimizer, step + 1, spec.steps)
            save_checkpoint(checkpoints, step + 1, attached, optimizer, log)
            saved_at = time.monotonic()
    progress(spec.steps)
    return optimizer, log


def check_loss(log: StepLog, steps: int) -> None:
    """Raises Diverged unless the newest loss and gradient norm are finite."""
    for what, series in (("loss", log.loss), ("gradient's norm", log.gradient_norm)):
        if not math.isfinite(series[-1]):
            raise Diverged(f"the {what} is {series[-1]} at step {len(series)} of {steps}")


def check_parameters(attached: Attached, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Raises Diverged unless all trained parameters are finite: no loss is computed after the last update."""
    if hasattr(optimizer, "settle"):
        optimizer.settle()  # rows whose updates were put off
    for name, group in attached.groups.items():
        for parameter in group:
            extremes = torch.aminmax(parameter.detach()) if parameter.numel() else ()
            if not all(math.isfinite(extreme.item()) for extreme in extremes):
                raise Diverged(f"the {name} hold a value that is no finite number after step {step} of {steps}")


def one_step(
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    rows: list[Example],
    spec: RunSpec,
    pad_id: int,
    device: torch.device,
    log: StepLog,
) -> None:
    """One optimizer step over rows in spec.accumulation micro-batches, appended to log."""
    start = time.perf_counter()
    moved = _moved(attached)
    supervised = sum(len(e.ids) - e.prompt_length for e in rows)
    size = len(rows) // spec.accumulation
    loss_sum, padded = 0.0, 0
    for i in range(0, len(rows), size):
        batch = collate(rows[i : i + size], pad_id, device)
        loss = token_loss(attached.model, batch) / supervised
        loss.backward()
        loss_sum += loss.item()
        padded += batch["input_ids"].numel()
    norm = attached.clip_gradients(spec.clip)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    log.loss.append(loss_sum)
    log.gradient_norm.append(float(norm))
    log.step_s.append(time.perf_counter() - start)
    log.tokens_real.append(sum(len(e.ids) for e in rows))
    log.tokens_padded.append(padded)
    log.tokens_supervised.append(supervised)
    for series, before, after in zip((log.h2d_bytes, log.d2h_bytes), moved, _moved(attached), strict=True):
        series.append(after - before)


def token_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy summed over the supervised tokens; position t predicts token t + 1."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    wanted = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][wanted].float(), labels[wanted], reduction="sum")


def _moved(attached: Attached) -> tuple[int, int]:
    if attached.link is None:
        return 0, 0
    counts = attached.link.bytes
    return tuple(sum(n for (way, _), n in counts.items() if way == d) for d in ("h2d", "d2h"))  # type: ignore[return-value]
