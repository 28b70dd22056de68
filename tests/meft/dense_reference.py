"""MEFT as its formula reads: masks over T x R, the rest is autograd. No row is gathered, none is offloaded."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meft_bench.meft.config import MeftConfig


def outputs(h_TD: Tensor, keys_RD: Tensor, router_ND: Tensor | None, config: MeftConfig) -> tuple[Tensor, Tensor]:
    """o_j of every neuron [T, R], and the mask [T, R] of each token's candidates (steps 1 and 2)."""
    o_TR = h_TD @ keys_RD.T
    if not config.key_experts:
        return o_TR, torch.ones_like(o_TR, dtype=torch.bool)
    s_TN = h_TD @ router_ND.T
    probed_TN = torch.zeros_like(s_TN, dtype=torch.bool).scatter(1, s_TN.topk(config.probed).indices, True)
    gates_TN = {"score": s_TN, "softmax": s_TN.softmax(1), "none": torch.ones_like(s_TN)}[config.gate]
    m = config.neurons // config.experts
    return o_TR * gates_TN.repeat_interleave(m, 1), probed_TN.repeat_interleave(m, 1)


def kept(o_TR: Tensor, candidates_TR: Tensor, config: MeftConfig) -> Tensor:
    """Mask [T, R] of the neurons each token keeps (step 3)."""
    ranked_TR = o_TR.relu() if config.selection == "relu_first" else o_TR
    best_TK = ranked_TR.masked_fill(~candidates_TR, -torch.inf).topk(config.kept).indices
    kept_TR = torch.zeros_like(candidates_TR).scatter(1, best_TK, True)
    return kept_TR & (o_TR > 0) if config.selection == "positive" else kept_TR


class DenseReference(nn.Module):
    """FFN(h) + adapter(h) with keys, values [R, D] and router [N, D] as ordinary parameters."""

    def __init__(self, ffn: nn.Module, store: nn.Module, config: MeftConfig) -> None:
        super().__init__()
        self.ffn, self.config = ffn, config
        self.keys = nn.Parameter(store.keys.detach().clone(), requires_grad=not config.frozen_keys)
        self.values = nn.Parameter(store.values.detach().clone())
        self.router = None if store.router is None else nn.Parameter(store.router.detach().clone())

    def forward(self, h: Tensor) -> Tensor:
        h_TD = h.reshape(-1, h.shape[-1])
        o_TR, candidates_TR = outputs(h_TD, self.keys, self.router, self.config)
        kept_TR = kept(o_TR, candidates_TR, self.config)
        if self.config.reading == "union":
            kept_TR = kept_TR.any(0).expand_as(kept_TR)
        act_TR = F.silu(o_TR) if self.config.activation == "silu" else o_TR.relu()
        return self.ffn(h) + ((act_TR * kept_TR) @ self.values).view_as(h)

    def trained(self) -> list[nn.Parameter]:
        """keys, values and router as far as they are trained; a router that only selects is not."""
        parameters = [self.keys, self.values] + ([self.router] if self.config.trains_router else [])
        return [p for p in parameters if p.requires_grad]
