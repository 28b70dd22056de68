"""Which neurons the tokens of some rows keep, counted for micro-batches of many sizes in one pass.

Which neurons a token keeps depends on its row alone, and weights stand still between two optimizer steps. So neurons
are marked for blocks of consecutive real tokens, and joined blocks are what larger micro-batches need, or several
micro-batches of one step together: A micro-batches of T tokens touch the U of A T tokens. Symbols: T tokens, R neurons,
N experts, K kept for a token, B blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.harness.probes import batches, entropy, watched
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.routing import Selection
from meft_bench.train.models import LoadedModel

_TOKENS_AT_ONCE = 512
_ACTIVE_TOKENS = 1024
"""Tokens whose products with all R keys are looked at: every token would cost more than the rest."""


@torch.no_grad()
def look(
    model: nn.Module,
    loaded: LoadedModel,
    adapters: Sequence[MeftAdapter],
    rows: Sequence[list[int]],
    block: int,
    blocks: int,
    on_blocks: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """What the first block * blocks real tokens of the rows keep; every list has a number for each layer:

    "unions": for 1, 2, 4 ... blocks as one micro-batch, U / R and the share of experts in use, means over as many
    micro-batches as there are ("samples"); "kept_share": neurons kept for a token over R; "active_share": neurons whose
    key times the hidden state is above 0 over R; "expert_entropy" of what is kept, over its maximum.

    on_blocks(blocks) is told what was done. model is in eval mode. Raises ValueError where the rows have fewer tokens.
    """
    tokens = sum(map(len, rows))
    if tokens < block * blocks:
        raise ValueError(f"the rows have {tokens:,} tokens, {block * blocks:,} are looked at: give more rows")
    layers = [_Layer(adapter, block, blocks) for adapter in adapters]
    done, at_once = 0, max(1, _TOKENS_AT_ONCE * len(rows) // tokens)
    for batch in batches(model, loaded, rows, at_once):
        with watched(adapters) as seen:
            model(**batch, use_cache=False, logits_to_keep=1)
        valid_T = batch["attention_mask"].reshape(-1).bool().cpu()
        taken_T = valid_T.nonzero()[: block * blocks - done, 0]
        for layer, (h_TD, selection) in zip(layers, seen, strict=True):
            layer.add(h_TD[taken_T], _kept(selection)[taken_T], done)
        on_blocks((done + taken_T.numel()) // block - done // block)
        done += taken_T.numel()
        if done == block * blocks:
            break
    return {"tokens": done, "unions": _unions(layers), **_by_layer(layers)}


class _Layer:
    """Counts of one layer."""

    def __init__(self, adapter: MeftAdapter, block: int, blocks: int) -> None:
        self.adapter, self.block, self.neurons = adapter, block, adapter.config.neurons
        self.used_BR = torch.zeros(blocks, self.neurons, dtype=torch.bool)
        self.kept_R = torch.zeros(self.neurons, dtype=torch.int64)
        self.tokens = self.active = self.active_of = 0

    def add(self, h_TD: Tensor, neuron_TK: Tensor, first: int) -> None:
        """Count the neurons (-1: none) of tokens that go on from token number `first`."""
        there_TK = neuron_TK >= 0
        block_T = (first + torch.arange(neuron_TK.shape[0])) // self.block
        places_TK = block_T[:, None] * self.neurons + neuron_TK
        self.used_BR.view(-1)[places_TK[there_TK]] = True
        self.kept_R += torch.bincount(neuron_TK[there_TK], minlength=self.neurons)
        self.tokens += neuron_TK.shape[0]
        if first < _ACTIVE_TOKENS:
            fires_TR = h_TD[: _ACTIVE_TOKENS - first].float() @ self.adapter.store.keys.float().T > 0
            self.active += int(fires_TR.sum())
            self.active_of += fires_TR.numel()

    def share(self, used_GR: Tensor) -> float:
        """Mean U / R of groups of blocks."""
        return round(float(used_GR.sum()) / used_GR.numel(), 4)

    def experts(self, used_GR: Tensor) -> float:
        """Mean share of the experts of which some neuron is used."""
        return self.share(used_GR.view(used_GR.shape[0], self.adapter.config.experts or 1, -1).any(2))


def _unions(layers: Sequence[_Layer]) -> list[dict[str, Any]]:
    found, used = [], [layer.used_BR for layer in layers]
    joined = 1
    while used[0].shape[0]:
        point: dict[str, Any] = {"tokens": joined * layers[0].block, "samples": used[0].shape[0]}
        point["share_by_layer"] = [layer.share(u) for layer, u in zip(layers, used, strict=True)]
        if layers[0].adapter.config.key_experts:
            point["experts_by_layer"] = [layer.experts(u) for layer, u in zip(layers, used, strict=True)]
        found.append(point)
        pairs = used[0].shape[0] // 2
        used, joined = [u[: 2 * pairs : 2] | u[1 : 2 * pairs : 2] for u in used], 2 * joined
    return found


def _by_layer(layers: Sequence[_Layer]) -> dict[str, list[float]]:
    counted = {
        "kept_share_by_layer": [round(float(c.kept_R.sum()) / c.tokens / c.neurons, 5) for c in layers],
        "active_share_by_layer": [round(c.active / c.active_of, 4) for c in layers],
    }
    experts = layers[0].adapter.config.experts
    if layers[0].adapter.config.key_experts and experts:
        counted["expert_entropy_by_layer"] = [entropy(c.kept_R.view(experts, -1).sum(1)) for c in layers]
    return counted


def _kept(selection: Selection) -> Tensor:
    """The number of each token's kept neurons, [T, K]; -1 where it keeps fewer."""
    union_U, local_TK = selection.union_U.cpu(), selection.local_TK.cpu()
    if not union_U.numel():
        return torch.full_like(local_TK, -1)
    return union_U[local_TK.clamp(min=0)].masked_fill(local_TK < 0, -1)
