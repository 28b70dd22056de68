"""Which neurons a token uses: scores -> experts -> candidates -> top-K -> the union S. Pure functions on tensors of one
device, the host or another.

Paper section 4.2 and Algorithm 1, lines 3-8; the symbols are those of config.py. On the host nothing of size T x R
exists when Key-Experts are on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.dense import PAPER_KEY_STD
from meft_bench.meft.engine import kernels

# Without Key-Experts all R neurons are scored; tokens go in blocks so that the T x R scores stay below this many.
_SCORES_AT_ONCE = 1 << 24
_KEYS_AT_ONCE = 4096


@dataclass(frozen=True)
class Selection:
    """What the host found for one micro-batch. Neurons are numbered 0..R-1 in the layer, 0..U-1 in the union."""

    union_U: Tensor
    """Neuron numbers of S, ascending, int64."""
    local_TK: Tensor
    """Position in union_U of each kept neuron, int64; -1 where a token kept fewer than K."""
    expert_TK: Tensor | None
    """Expert of each kept neuron (0 at empty places); None without a gate."""
    gates_TN: Tensor | None
    """Gate value of every expert for every token, fp32; None without a gate or where a router elsewhere made them."""


class Routed(NamedTuple):
    """What the router says of each token."""

    experts_TP: Tensor
    """The probed experts, int64, distinct within a token."""
    gates_TP: Tensor | None
    """Their gates; None without a gate."""
    gates_TN: Tensor | None
    """Gates of all experts, where the router is; None without a gate or where only the probed ones are known."""


class Kept(NamedTuple):
    """The neurons that each token keeps, before there is a union."""

    neuron_TK: Tensor
    """Numbers 0..R-1 in the layer, int64; -1 where a token kept fewer than K."""
    dots_TK: Tensor | None
    """key . h of each, in h's dtype and 0 at empty places; None where the search's products are not the adapter's."""
    gates_TN: Tensor | None
    """Gate value of every expert for every token; None without a gate (or see Routed)."""
    used_R: Tensor | None = None
    """Marks of S, bool, where it is to hold more than what the tokens keep."""


def route(h_TD: Tensor, router_ND: Tensor, config: MeftOptions) -> Routed:
    """Each token's P experts and their gates, where h [T, D] and the router are."""
    assert config.probed is not None
    scores_TN = h_TD @ router_ND.T
    gates_TN = gate_values(scores_TN, config.gate)
    experts_TP = scores_TN.topk(config.probed, dim=1, sorted=False).indices
    return Routed(experts_TP, None if gates_TN is None else gates_TN.gather(1, experts_TP), gates_TN)


def keep(
    h_TD: Tensor,
    keys_RD: Tensor,
    routed: Routed | None,
    config: MeftOptions,
    valid_T: Tensor | None,
    *,
    scales_R: Tensor | None = None,
) -> Kept:
    """Each token's K best neurons: among those of its experts, or of all for routed None (no Key-Experts).

    Arguments as select()'s, all on one device. A device that is no CPU scores all keys by one dense product.
    """
    dots_TK = gates_TN = None
    if routed is None:
        neuron_TK, output_TK = _search_all(h_TD, keys_RD, scales_R, config)
    else:
        experts_TP, gates_TP, gates_TN = routed
        relu = config.selection == "relu_first"
        given = h_TD, keys_RD, scales_R, experts_TP, gates_TP, config.expert_size, config.kept, relu
        if h_TD.device.type == "cpu":
            wide_TP = None if gates_TP is None else gates_TP.float()
            neuron_TK, output_TK = kernels.search_experts(h_TD.float(), *given[1:4], wide_TP, *given[5:])
        else:
            neuron_TK, output_TK, dots_TK = kernels.search_experts_dense(*given)
    empty_TK = _empty(output_TK, config, valid_T)
    if dots_TK is not None:
        shared = scales_R is None and keys_RD.dtype == h_TD.dtype
        dots_TK = dots_TK.masked_fill(empty_TK, 0.0) if shared else None
    return Kept(neuron_TK.masked_fill(empty_TK, -1), dots_TK, gates_TN)


def select(
    h_TD: Tensor,
    keys_RD: Tensor,
    router_ND: Tensor | None,
    config: MeftOptions,
    valid_T: Tensor | None,
    *,
    scales_R: Tensor | None = None,
    routed: Routed | None = None,
    refresh: Callable[[Tensor | None], None] = lambda experts: None,
) -> Selection:
    """Route each token and keep its K best neurons.

    h_TD, router_ND: fp32; keys_RD: fp32, bf16, or int8 with a scale per row; all on the same device. valid_T: bool,
    False for padding, which selects nothing; None means all tokens are real. The K best are those with the largest
    signed gate * key . h ("positive", "signed") or the largest relu of it ("relu_first"). routed: what a router
    elsewhere has said. refresh is called, before keys are read, with the probed experts ([N] bool), or None for all.
    """
    if config.key_experts:
        if routed is None:
            assert router_ND is not None
            routed = route(h_TD, router_ND, config)
        experts = torch.zeros(config.experts or 0, dtype=torch.bool, device=h_TD.device)
        refresh(experts.index_fill_(0, routed.experts_TP.flatten(), True))
    else:
        refresh(None)
    return united(keep(h_TD, keys_RD, routed, config, valid_T, scales_R=scales_R), config)


def united(kept: Kept, config: MeftOptions) -> Selection:
    """The union of what the tokens keep. On a GPU this waits for the number of its rows."""
    used_R, local_TK = mark(kept.neuron_TK, config.neurons, kept.used_R)
    return Selection(used_R.nonzero()[:, 0], local_TK, expert_of(kept.neuron_TK, config), kept.gates_TN)


def mark(neuron_TK: Tensor, neurons: int, also_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(which neurons are in S, bool [R]; each kept neuron's place in it [T, K], -1 where there is none), by marking
    rather than sorting, and without asking how many they are. also_R: neurons that are in S whoever keeps them."""
    used_R = torch.zeros(neurons + 1, dtype=torch.bool, device=neuron_TK.device)
    if also_R is not None:
        used_R[:neurons] = also_R
    # The last entry collects the empty places. A fill, since a GPU would wait to copy the value True.
    used_R.index_fill_(0, torch.where(neuron_TK < 0, neurons, neuron_TK).flatten(), True)
    place_R = torch.cumsum(used_R, 0) - 1
    return used_R[:neurons], place_R[neuron_TK].masked_fill(neuron_TK < 0, -1)


def listed(used_R: Tensor, union: int) -> Tensor:
    """The numbers of the `union` marked neurons, ascending, int64; a GPU is not asked how many they are."""
    place_R = torch.where(used_R, torch.cumsum(used_R, 0) - 1, union)  # one place more, for those that are not marked
    numbers = torch.zeros(union + 1, dtype=torch.int64, device=used_R.device)
    return numbers.scatter_(0, place_R, torch.arange(used_R.shape[0], device=used_R.device))[:union]


def expert_of(neuron_TK: Tensor, config: MeftOptions) -> Tensor | None:
    """Expert of each kept neuron, 0 at empty places; None without a gate."""
    return None if config.gate == "none" else neuron_TK.clamp(min=0) // config.expert_size


def _empty(output_TK: Tensor, config: MeftOptions, valid_T: Tensor | None) -> Tensor:
    """Places that keep no neuron."""
    empty_TK = output_TK <= 0 if config.selection == "positive" else torch.zeros_like(output_TK, dtype=torch.bool)
    return empty_TK if valid_T is None else empty_TK | ~valid_T[:, None]


def gate_values(scores_TN: Tensor, gate: str) -> Tensor | None:
    """The factor each expert's neurons are multiplied with; None for gate "none"."""
    if gate == "none":
        return None
    return scores_TN.softmax(dim=1) if gate == "softmax" else scores_TN


def gate_gradient(grad_TN: Tensor, gates_TN: Tensor, gate: str) -> Tensor:
    """Gradient for the router scores [T, N] from that for the gate values."""
    if gate == "softmax":
        return gates_TN * (grad_TN - (grad_TN * gates_TN).sum(1, keepdim=True))
    return grad_TN


def _search_all(h_TD: Tensor, keys_RD: Tensor, scales_R: Tensor | None, config: MeftOptions) -> tuple[Tensor, Tensor]:
    block = max(1, _SCORES_AT_ONCE // config.neurons)
    best = [_top(_scores(h, keys_RD, scales_R), config) for h in h_TD.split(block)]
    if not best:
        none_TK = h_TD.new_zeros(0, config.kept)
        return none_TK.long(), none_TK
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _scores(h_TD: Tensor, keys_RD: Tensor, scales_R: Tensor | None) -> Tensor:
    """key . h as [T, R] in h's dtype; keys in another dtype are converted a block of rows at a time."""
    if keys_RD.dtype == h_TD.dtype:
        return h_TD @ keys_RD.T
    scores = torch.cat([h_TD @ some.to(h_TD.dtype).T for some in keys_RD.split(_KEYS_AT_ONCE)], dim=1)
    return scores if scales_R is None else scores * scales_R.to(h_TD.dtype)


def _top(output_TQ: Tensor, config: MeftOptions):
    ranked = output_TQ.relu() if config.selection == "relu_first" else output_TQ
    return ranked.topk(config.kept, dim=1, sorted=False)


def fresh_router(keys_RD: Tensor, config: MeftOptions, generator: torch.Generator) -> Tensor:
    """A router [N, D] for these keys [R, D], fp32, as config.router_init says."""
    assert config.experts is not None
    if config.router_init == "normal":
        return torch.randn(config.experts, keys_RD.shape[1], generator=generator) * PAPER_KEY_STD
    mean_ND = keys_RD.view(config.experts, config.expert_size, -1).mean(dim=1)
    if config.router_init == "mean_key_x50":
        return mean_ND * 50
    return mean_ND / mean_ND.norm(dim=1, keepdim=True) * keys_RD.norm(dim=1).mean()
