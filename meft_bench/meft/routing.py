"""Which neurons a token uses: scores -> experts -> candidates -> top-K -> the union S. Pure functions on host tensors.

Paper section 4.2 and Algorithm 1, lines 3-8; the symbols are those of config.py. Nothing of size T x R exists when
Key-Experts are on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_bench.meft.config import MeftOptions
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
    """Gate value of every expert for every token, fp32; None without a gate."""


def select(
    h_TD: Tensor,
    keys_RD: Tensor,
    router_ND: Tensor | None,
    config: MeftOptions,
    valid_T: Tensor | None,
    *,
    scales_R: Tensor | None = None,
    refresh: Callable[[Tensor | None], None] = lambda experts: None,
) -> Selection:
    """Route each token and keep its K best neurons.

    h_TD, router_ND: fp32; keys_RD: fp32, bf16, or int8 with a scale per row; all on the same device. valid_T: bool,
    False for padding, which selects nothing; None means all tokens are real. The K best are those with the largest
    signed gate * key . h ("positive", "signed") or the largest relu of it ("relu_first"). refresh is called, before
    keys are read, with the probed experts ([N] bool), or None for all.
    """
    if config.key_experts:
        assert router_ND is not None and config.probed is not None
        scores_TN = h_TD @ router_ND.T
        gates_TN = gate_values(scores_TN, config.gate)
        experts_TP = scores_TN.topk(config.probed, dim=1, sorted=False).indices
        refresh(
            torch.zeros(router_ND.shape[0], dtype=torch.bool, device=h_TD.device).index_fill_(
                0, experts_TP.flatten(), True
            )
        )
        kept_TK, output_TK = kernels.search_experts(
            h_TD,
            keys_RD,
            scales_R,
            experts_TP,
            gates_TN,
            config.expert_size,
            config.kept,
            relu=config.selection == "relu_first",
        )
    else:
        gates_TN = None
        refresh(None)
        kept_TK, output_TK = _search_all(h_TD, keys_RD, scales_R, config)
    empty_TK = _empty(output_TK, config, valid_T)
    union_U, local_TK = _union(kept_TK, empty_TK, config.neurons)
    expert_TK = None
    if gates_TN is not None:
        expert_TK = (kept_TK // config.expert_size).masked_fill(empty_TK, 0)
    return Selection(union_U, local_TK, expert_TK, gates_TN)


def search_device(
    h_TD: Tensor, keys_RD: Tensor, scales_R: Tensor, config: MeftOptions, valid_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """retrieval="device": (the union [U], each kept neuron's place in it [T, K]) from int8 keys where h is."""
    kept_TK, output_TK = _search_all(h_TD, keys_RD, scales_R, config)
    return _union(kept_TK, _empty(output_TK, config, valid_T), config.neurons)


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


def _union(kept_TK: Tensor, empty_TK: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """S and each kept neuron's place in it, by marking rather than sorting."""
    used_R = torch.zeros(neurons + 1, dtype=torch.bool, device=kept_TK.device)
    used_R[kept_TK.masked_fill(empty_TK, neurons)] = True  # the last entry collects the empty places
    union_U = used_R[:neurons].nonzero()[:, 0]
    place_R = torch.cumsum(used_R, 0) - 1
    return union_U, place_R[kept_TK].masked_fill(empty_TK, -1)
