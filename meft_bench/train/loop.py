"""The one training loop: deterministic batches, accumulation, schedule, clipping, checkpoints, step log.

train() is what suites, `meft-bench train` and the embedded base's pretraining run; one_step() is the step inside it,
which profiles and benchmarks run alone. It announces its phases (observe.py), so that clocks need not know its lines.
"""

import functools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench import observe
from meft_bench.ranks import ALONE, Ranks
from meft_bench.train.checkpoints import Checkpoints, StepLog, resume, save_checkpoint
from meft_bench.train.checks import Diverged as Diverged
from meft_bench.train.checks import check_loss, check_parameters
from meft_bench.train.methods import Attached
from meft_bench.train.own_optimizer import FusedOptimizer
from meft_bench.train.tokens import sequences

NUMERICS = 1
"""Raised by a change of what this file computes (numerics.py)."""
IGNORED = -100


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


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
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


class Settings(Protocol):
    """What the loop reads of a run's specification, of a job's settings and of the base's recipe."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_share(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def seed(self) -> int: ...


class Order(Protocol):
    """What decides the rows of a step."""

    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one optimizer step learns from, and its tokens."""

    losses: Sequence[Callable[[], Tensor]]
    """One function per micro-batch of this rank: makes it, runs forward. The values (scalars) of all ranks add up to
    the step's loss."""
    real: int
    padded: int
    """Real tokens and padding, of all ranks."""
    supervised: int


def train(
    attached: Attached,
    settings: Settings,
    batches: Callable[[int], Batch],
    *,
    schedule: Callable[[int, int, float], float] = learning_rate_scale,
    on_step: Callable[[int, StepLog], None] = lambda done, log: None,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
) -> tuple[torch.optim.Optimizer, StepLog]:
    """settings.steps optimizer steps; resumes from the newest whole checkpoint.

    With several ranks each runs its micro-batches of a step, gradients are added up, and all have the same log and the
    same parameters; rank 0 writes the checkpoints, which any number of ranks may go on from.

    batches(step) gives what a step learns from, steps counting from 0. schedule(step, steps, warmup_share) is the
    factor on the peak learning rate. on_step(done, log) is called before the first step and after every one; what it
    raises ends the training. Raises Diverged when the loss, or a parameter that would be saved, is no finite number,
    and ValueError for an optimizer that updates within backward on several ranks.
    """
    steps = settings.steps
    optimizer = attached.make_optimizer(lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if not ranks.alone and isinstance(optimizer, FusedOptimizer):
        raise ValueError(
            f"{ranks.count} ranks: this method updates each weight in its backward pass, before gradients could be "
            "added up: start one process, without torchrun"
        )
    log, first = StepLog(), 0
    torch.manual_seed(settings.seed)
    if checkpoints is not None:
        first, log = resume(checkpoints.folder, attached, optimizer, steps, checkpoints.say, ranks)
    if not ranks.first:  # what a base draws in training, as for dropout, differs between the ranks
        torch.manual_seed(random.Random(f"rank {ranks.rank} {settings.seed} {first}").getrandbits(63))
    if attached.background is not None and not first:
        attached.background.collect()
    attached.model.train()
    saved_at = time.monotonic()
    on_step(first, log)
    for step in range(first, steps):
        batch, done = batches(step), step + 1
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, steps, settings.warmup_share)
        logged_step(attached, optimizer, batch, settings.clip, log, ranks)
        check_loss(log, steps)
        last = done == steps
        due = checkpoints is not None and (checkpoints.after_last if last else checkpoints.due(done, saved_at, ranks))
        if last or due:
            check_parameters(attached, optimizer, done, steps, ranks)
        if checkpoints is not None and due:
            save_checkpoint(checkpoints.folder, done, attached, optimizer, log, ranks)
            saved_at = time.monotonic()
        on_step(done, log)
    return optimizer, log


def one_step(
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[], Tensor]],
    clip: Callable[[], Tensor | None] = lambda: None,
) -> tuple[float, Tensor | None]:
    """One optimizer step over the micro-batches of losses (Batch.losses), announced by phase.

    Returns (the losses' sum, what clip returned: the gradients' global norm before clipping).
    """
    total, parts = 0.0, list(losses)
    for number, forward in enumerate(parts, 1):
        with observe.phase("forward"):
            loss = forward()
        with observe.phase("backward"), _last(optimizer) if number == len(parts) else nullcontext():
            loss.backward()
            total += loss.item()
            del loss
    with observe.phase("update"):
        norm = clip()
        with observe.part("adam", optimizer):
            optimizer.step()
        with observe.part("adam", optimizer, "zero_grad"):
            optimizer.zero_grad()
    return total, norm


def _last(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Around a step's last backward pass, in which some optimizers update (own_optimizer.py)."""
    return optimizer.last_backward() if isinstance(optimizer, FusedOptimizer) else nullcontext()


def logged_step(
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    clip: float,
    log: StepLog,
    ranks: Ranks = ALONE,
) -> None:
    """one_step over batch, its gradients added up over the ranks and clipped to the norm clip, appended to log."""
    start, before = time.perf_counter(), _moved(attached)

    def added_and_clipped() -> Tensor:
        attached.add_gradients(ranks)
        return attached.clip_gradients(clip)

    loss, norm = one_step(optimizer, batch.losses, added_and_clipped)
    assert norm is not None
    if next(attached.model.parameters()).is_cuda:
        torch.cuda.synchronize()
    moved = [after - earlier for earlier, after in zip(before, _moved(attached), strict=True)]
    loss, h2d, d2h = (sum(values) for values in zip(*ranks.gather([loss, *moved]), strict=True))
    log.loss.append(loss)
    log.gradient_norm.append(float(norm))
    log.step_s.append(time.perf_counter() - start)
    log.tokens_real.append(batch.real)
    log.tokens_padded.append(batch.padded)
    log.tokens_supervised.append(batch.supervised)
    log.h2d_bytes.append(h2d)
    log.d2h_bytes.append(d2h)


# ---- batches ----


def shuffled(
    attached: Attached, examples: Sequence[Example], order: Order, pad_id: int, ranks: Ranks = ALONE
) -> Callable[[int], Batch]:
    """batches of train(): rows of examples in epochs shuffled by the order's seed, the same rows in a step whatever the
    number of ranks."""

    def batch(step: int) -> Batch:
        indices = batch_indices(step, order.batch_size, len(examples), order.seed)
        return batch_of(attached.model, [examples[i] for i in indices], order.accumulation, pad_id, ranks)

    return batch


def batch_of(
    model: torch.nn.Module, rows: Sequence[Example], accumulation: int, pad_id: int, ranks: Ranks = ALONE
) -> Batch:
    """rows in `accumulation` micro-batches, of which each rank gets its share. The loss of the step is the mean over
    the supervised tokens of all of them, so neither accumulation nor ranks change anything but memory."""
    device = next(model.parameters()).device
    size = len(rows) // micro_batches(len(rows), accumulation, ranks.count)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    supervised = sum(len(e.ids) - e.prompt_length for e in rows)

    def loss(part: Sequence[Example]) -> Tensor:
        return token_loss(model, collate(part, pad_id, device)) / supervised

    return Batch(
        losses=[functools.partial(loss, part) for part in ranks.share(parts)],
        real=sum(len(e.ids) for e in rows),
        padded=sum(len(part) * max(len(e.ids) for e in part) for part in parts),
        supervised=supervised,
    )


def micro_batches(rows: int, accumulation: int, ranks: int) -> int:
    """Into how many micro-batches a step of so many rows is cut: accumulation, or the smallest multiple of it that
    gives every rank one. Raises ValueError where the rows do not go so far."""
    for count in range(accumulation, rows + 1, accumulation):
        if count >= ranks and rows % count == 0:
            return count
    raise ValueError(f"{rows} rows a step cannot be dealt to {ranks} ranks: start at most {rows}")


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
