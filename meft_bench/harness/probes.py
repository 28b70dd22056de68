"""What is measured on a finished run beside its scores: the base's own text, neurons and experts in use, sparsity.

Nothing here changes the model. Symbols as in meft/config.py: T tokens, R neurons, N experts, K kept, U the union.
"""

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.task import ConfigurableTask
from torch import Tensor, nn

from meft_bench.baselines.parallel_adapter import ParallelAdapter
from meft_bench.embedded.pretrain import BaseRecipe, BaseText
from meft_bench.harness import evaluation
from meft_bench.harness.spec import RunSpec
from meft_bench.meft.background import count_uses
from meft_bench.meft.dense import activate
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.routing import Selection
from meft_bench.named import EMBEDDED
from meft_bench.train import loop
from meft_bench.train.models import LoadedModel

NUMERICS = 1
"""Raised by a change of what this file computes (numerics.py)."""
GRID_BATCHES, GRID_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128), (8, 16, 32, 64)
CURVE_POINTS = 21


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is looked at."""

    grid: tuple[tuple[int, ...], tuple[int, ...]] = (GRID_BATCHES, GRID_LENGTHS)
    sequences: int = 256
    """Training sequences that the neuron and expert counts look at."""
    ahead: int = 64
    """Of those that the early selection looks at."""
    other_reading: bool = True


WHOLE, SHORT = Extent(), Extent(grid=((2, 8, 32), (64,)), sequences=64, ahead=16, other_reading=False)
"""SHORT is for models of more than LARGE_MODEL parameters: 128, 512 and 2048 tokens a micro-batch."""
_DOCS = 4096
"""Training documents they are drawn from (a large set need not be tokenised whole)."""
_BASE_TEXTS = 256
_BASE_SEED = 12345  # not the recipe's: other draws of the same knowledge
_TOP_SHARE = 0.05


@torch.no_grad()
def probe(model: nn.Module, loaded: LoadedModel, task: ConfigurableTask, spec: RunSpec) -> dict[str, Any]:
    """The record's probes block of a trained model in eval mode; methods without neurons have the base text alone."""
    block: dict[str, Any] = {"evidence": "measured"}
    if spec.model == EMBEDDED:
        block["base_text"] = base_text(model, loaded)
    extent = SHORT if sum(p.numel() for p in model.parameters()) >= evaluation.LARGE_MODEL else WHOLE
    sparse = [m for m in model.modules() if isinstance(m, MeftAdapter)]
    dense = [m for m in model.modules() if isinstance(m, ParallelAdapter)]
    if not sparse and not dense:
        return block
    docs = [doc for doc, _ in zip(task.training_docs(), range(_DOCS), strict=False)]
    examples = loop.render(docs, loaded.tokenizer, task.config.target_delimiter)
    sequences = [e.ids[: loaded.max_length] for e in random.Random(spec.seed).sample(examples, len(examples))]
    if dense:
        block["activation"] = activation(model, loaded, dense, sequences[: extent.sequences])
    if sparse:
        block["union_grid"] = union_grid(model, loaded, sparse, sequences, extent.grid)
        block["neurons"] = neurons_in_use(model, loaded, sparse, sequences[: extent.sequences])
        block["lookahead"] = lookahead(model, loaded, sparse, sequences[: extent.ahead])
        if sparse[0].distinctive is not None:
            block["distinctive"] = background_overlap(model, sparse, sequences[: extent.sequences])
        if extent.other_reading:
            block["other_reading"] = other_reading(model, loaded, task, sparse)
    return block


def base_text(model: nn.Module, loaded: LoadedModel) -> dict[str, Any]:
    """Mean next-token loss (nats) and perplexity on fresh draws of the embedded base's own pretraining text: people,
    needs and sums that no task teaches. The same texts for every run, so that differences are forgetting."""
    text = BaseText(dataclasses.replace(BaseRecipe(), batch_size=_BASE_TEXTS))
    text.rng = random.Random(_BASE_SEED)
    total, count = 0.0, 0
    ids = [loaded.tokenizer.encode(f"{t}</s>") for t in text.batch()]
    for batch in batches(model, loaded, ids, 64):
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        wanted = batch["attention_mask"][:, 1:].bool()
        labels = batch["input_ids"][:, 1:][wanted]
        total += float(nn.functional.cross_entropy(logits[wanted], labels, reduction="sum"))
        count += int(wanted.sum())
    return {"nats_per_token": round(total / count, 6), "perplexity": round(math.exp(total / count), 6), "tokens": count}


def union_grid(
    model: nn.Module,
    loaded: LoadedModel,
    adapters: Sequence[MeftAdapter],
    sequences: list[list[int]],
    grid: tuple[tuple[int, ...], tuple[int, ...]] = WHOLE.grid,
) -> list[dict[str, Any]]:
    """U / R by layer for micro-batches of b sequences of l tokens; rows are joined end to end and cut to l, so that
    the grid has no padding. A point that the model's length or the rows at hand cannot fill is left out."""
    stream = [token for sequence in sequences for token in sequence]
    points = []
    sizes, lengths = grid
    for length in lengths:
        for size in sizes:
            if length > loaded.max_length or size * length > len(stream):
                continue
            ids = torch.tensor(stream[: size * length]).view(size, length)
            with watched(adapters) as seen:
                model(input_ids=ids.to(_device(model)), use_cache=False)
            shares = [round(s.union_U.shape[0] / a.config.neurons, 5) for a, (_, s) in zip(adapters, seen, strict=True)]
            points.append({"batch": size, "length": length, "tokens": size * length, "share_by_layer": shares})
    return points


def neurons_in_use(
    model: nn.Module, loaded: LoadedModel, adapters: Sequence[MeftAdapter], sequences: list[list[int]]
) -> dict[str, Any]:
    """By layer, over all tokens of the sequences: the share of neurons that no token kept ("dead"), the entropy of the
    kept neurons over experts and over neurons, each over its maximum (1 is uniform), and the kept neurons a token."""
    counts = [torch.zeros(a.config.neurons) for a in adapters]
    tokens = 0
    for batch in batches(model, loaded, sequences, 64):
        with watched(adapters) as seen:
            model(**batch, use_cache=False)
        tokens += int(batch["attention_mask"].sum())
        for count, (_, s) in zip(counts, seen, strict=True):
            kept = s.local_TK[s.local_TK >= 0].cpu()
            count += torch.bincount(s.union_U.cpu()[kept], minlength=count.shape[0])
    experts = [c.view(a.config.experts, -1).sum(1) if a.config.key_experts and a.config.experts else None
               for c, a in zip(counts, adapters, strict=True)]  # fmt: skip
    block: dict[str, Any] = {
        "tokens": tokens,
        "dead_share": [round(float((c == 0).float().mean()), 5) for c in counts],
        "neuron_entropy": [entropy(c) for c in counts],
        "kept_per_token": [round(float(c.sum()) / tokens, 3) for c in counts],
    }
    if experts[0] is not None:
        block["expert_entropy"] = [entropy(e) for e in experts if e is not None]
    return block


def lookahead(
    model: nn.Module, loaded: LoadedModel, adapters: Sequence[MeftAdapter], sequences: list[list[int]]
) -> dict[str, Any]:
    """Pre-retrieval (the paper's appendix A): select a layer's neurons from the FFN input of the layer before it.
    By layer from the second on, the share of the truly kept neurons that are found so, token by token and in S."""
    found, kept, union_found, union = ([0] * (len(adapters) - 1) for _ in range(4))
    for batch in batches(model, loaded, sequences, 64):
        with watched(adapters) as seen:
            model(**batch, use_cache=False)
        valid_T = batch["attention_mask"].reshape(-1).bool().cpu()
        for i, (adapter, (_, true)) in enumerate(zip(adapters[1:], seen[1:], strict=True)):
            early = adapter.select(seen[i][0], None if bool(valid_T.all()) else valid_T)
            ours, theirs = (_marks(s, adapter.config.neurons) for s in (true, early))
            found[i] += int((ours & theirs).sum())
            kept[i] += int(ours.sum())
            union_found[i] += int((ours.any(0) & theirs.any(0)).sum())
            union[i] += int(ours.any(0).sum())
    return {
        "layers_ahead": 1,
        "recall_per_token": [round(f / max(1, k), 5) for f, k in zip(found, kept, strict=True)],
        "recall_of_union": [round(f / max(1, k), 5) for f, k in zip(union_found, union, strict=True)],
    }


def background_overlap(model: nn.Module, adapters: Sequence[MeftAdapter], sequences: list[list[int]]) -> dict[str, Any]:
    """How alike training sequences and the background use the neurons, by layer: the sum over neurons of the smaller of
    their two shares of all uses (of a text and a neuron), 1 where both use all neurons alike often, 0 where none is
    used by both. The background is that which was counted before training, the sequences are counted now."""
    counted = count_uses(model, adapters, sequences)
    backgrounds = [a.distinctive.background for a in adapters if a.distinctive is not None]
    block: dict[str, Any] = {"texts": 0, "sequences": len(sequences), "overlap_by_layer": []}
    for ours, background in zip(counted, backgrounds, strict=True):
        if background is None:  # nothing was trained
            continue
        shares = [c.double() / c.sum().clamp(min=1) for c in (ours, background.used_R)]
        block["texts"] = background.texts
        block["overlap_by_layer"].append(round(float(torch.minimum(*shares).sum()), 5))
    return block


def other_reading(
    model: nn.Module, loaded: LoadedModel, task: ConfigurableTask, adapters: Sequence[MeftAdapter]
) -> dict[str, Any]:
    """The test split under the reading that was not trained: metric -> mean and items."""
    own = [a.config for a in adapters]
    reading = "union" if own[0].reading == "per_token" else "per_token"
    try:
        for adapter, config in zip(adapters, own, strict=True):
            adapter.config = dataclasses.replace(config, reading=reading)
        scores = evaluation.evaluate_split(model, loaded.tokenizer, task, "test", loaded.max_length)
    finally:
        for adapter, config in zip(adapters, own, strict=True):
            adapter.config = config
    metrics = {m: {"mean": round(statistics.fmean(v), 6)} for m, v in scores.scores.items()}
    return {"reading": reading, "split": "test", "n": len(scores.ids), "metrics": metrics}


def _noting(inputs: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps what a module is called with."""

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    return note


def activation(
    model: nn.Module, loaded: LoadedModel, adapters: Sequence[ParallelAdapter], sequences: list[list[int]]
) -> dict[str, Any]:
    """How concentrated a dense Parallel Adapter's activation is (the paper's Figure 2), by layer: the share of neurons
    above zero for a token; the share of a token's positive activation that its own top 5 % carry; and, over all
    tokens, the cumulative share of the mean activation carried by the most active 0, 5 ... 100 % of the neurons."""
    sums = [torch.zeros(a.keys.shape[0]) for a in adapters]
    active, top, tokens = [0.0] * len(adapters), [0.0] * len(adapters), 0
    for batch in batches(model, loaded, sequences, 64):
        inputs: list[Tensor] = []
        hooks = [a.register_forward_pre_hook(_noting(inputs)) for a in adapters]
        try:
            model(**batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        valid = batch["attention_mask"].bool()
        tokens += int(valid.sum())
        for i, (adapter, h) in enumerate(zip(adapters, inputs, strict=True)):
            act_TR = activate(h[valid] @ adapter.keys.T.to(h.dtype), adapter.activation).float().clamp(min=0).cpu()
            best = act_TR.topk(max(1, round(_TOP_SHARE * act_TR.shape[1])), dim=1).values.sum(1)
            sums[i] += act_TR.sum(0)
            active[i] += float((act_TR > 0).float().mean(1).sum())
            top[i] += float((best / act_TR.sum(1).clamp(min=1e-20)).sum())
    curves = []
    for total in sums:
        cumulative = torch.cat([torch.zeros(1), total.sort(descending=True).values.cumsum(0)])
        places = torch.linspace(0, total.shape[0], CURVE_POINTS).round().long()
        curves.append([round(float(x), 5) for x in cumulative[places] / cumulative[-1].clamp(min=1e-20)])
    return {
        "tokens": tokens,
        "active_share": [round(a / tokens, 5) for a in active],
        "top5_share_of_token": [round(t / tokens, 5) for t in top],
        "cumulative_by_layer": curves,
    }


def batches(model: nn.Module, loaded: LoadedModel, ids: Sequence[list[int]], size: int) -> Iterator[dict[str, Tensor]]:
    """The rows, padded on the right, `size` at a time."""
    for i in range(0, len(ids), size):
        rows = [loop.Example(x, len(x)) for x in ids[i : i + size]]
        batch = loop.collate(rows, loaded.tokenizer.pad_token_id, _device(model))
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


@contextmanager
def watched(adapters: Sequence[MeftAdapter]) -> Iterator[list[tuple[Tensor, Selection]]]:
    """Lists (host hidden states [T, D], selection) of every adapter, in the order in which they run."""
    seen: list[tuple[Tensor, Selection]] = []

    def note(h_TD: Tensor, chosen: Selection) -> Selection:
        seen.append((h_TD, chosen))
        return chosen

    for adapter in adapters:
        adapter.on_select = note
    try:
        yield seen
    finally:
        for adapter in adapters:
            adapter.on_select = None


def _marks(selection: Selection, neurons: int) -> Tensor:
    """Bool [T, R]: which neurons each token keeps; small models only."""
    marks = torch.zeros(selection.local_TK.shape[0], neurons + 1, dtype=torch.bool)
    union_U, local_TK = selection.union_U.cpu(), selection.local_TK.cpu()
    if union_U.numel():
        marks.scatter_(1, union_U[local_TK.clamp(min=0)].masked_fill(local_TK < 0, neurons), True)
    return marks[:, :neurons]


def entropy(counts: Tensor) -> float:
    """Of the shares of counts, over its maximum: 1 is uniform."""
    if counts.shape[0] < 2 or not counts.sum():
        return 0.0
    p = counts / counts.sum()
    return round(float(-(p * p.clamp(min=1e-20).log()).sum()) / math.log(counts.shape[0]), 5)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
