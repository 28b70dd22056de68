"""The whole method in plain torch: masks over all R neurons, and autograd does the rest.

Read this first. Nothing is gathered, moved or offloaded here. Everything else in this folder computes the same without
touching the neurons that no token uses, and tests hold it to this file. Shapes: T tokens of width D; R neurons, each a
key and a value of width D, in N experts of R / N neurons; P experts are searched and K neurons kept for a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meft_bench.meft.config import MeftOptions


def neuron_outputs(
    h_TD: Tensor, keys_RD: Tensor, router_ND: Tensor | None, config: MeftOptions
) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2 (section 4.2): the output [T, R] of every neuron before its activation, and the mask [T, R] of
    the candidates, the neurons of the P experts that the router scores highest for a token."""
    output_TR = h_TD @ keys_RD.T
    if not config.key_experts:
        return output_TR, torch.ones_like(output_TR, dtype=torch.bool)
    assert router_ND is not None and config.probed is not None and config.experts is not None
    scores_TN = h_TD @ router_ND.T
    probed_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter(1, scores_TN.topk(config.probed).indices, True)
    gates_TN = {"score": scores_TN, "softmax": scores_TN.softmax(1), "none": torch.ones_like(scores_TN)}[config.gate]
    size = config.neurons // config.experts
    return output_TR * gates_TN.repeat_interleave(size, 1), probed_TN.repeat_interleave(size, 1)


def kept_neurons(output_TR: Tensor, candidates_TR: Tensor, config: MeftOptions) -> Tensor:
    """Step 3 (Algorithm 1): the mask [T, R] of the K candidates with the largest output that a token keeps."""
    ranked_TR = output_TR.relu() if config.selection == "relu_first" else output_TR
    best_TK = ranked_TR.masked_fill(~candidates_TR, -torch.inf).topk(config.kept).indices
    kept_TR = torch.zeros_like(candidates_TR).scatter(1, best_TK, True)
    return kept_TR & (output_TR > 0) if config.selection == "positive" else kept_TR


class ReferenceAdapter(nn.Module):
    """FFN(h) plus the sparse adapter of h (step 4, Equation 4), its keys and values [R, D] and router [N, D] being
    ordinary parameters. router may be None without Key-Experts."""

    def __init__(
        self, ffn: nn.Module, keys_RD: Tensor, values_RD: Tensor, router_ND: Tensor | None, config: MeftOptions
    ) -> None:
        super().__init__()
        self.ffn, self.config = ffn, config
        self.keys = nn.Parameter(keys_RD.detach().clone(), requires_grad=not config.frozen_keys)
        self.values = nn.Parameter(values_RD.detach().clone())
        # A router that only selects gets no gradient: a mask has none.
        self.router = None if router_ND is None else nn.Parameter(router_ND.detach().clone(), config.trains_router)

    def forward(self, h: Tensor) -> Tensor:
        """h [..., D], the FFN's input, to an output of the same shape."""
        h_TD = h.reshape(-1, h.shape[-1])
        output_TR, candidates_TR = neuron_outputs(h_TD, self.keys, self.router, self.config)
        kept_TR = kept_neurons(output_TR, candidates_TR, self.config)
        if self.config.reading == "union":  # every token uses S, all neurons that any token kept
            kept_TR = kept_TR.any(0).expand_as(kept_TR)
        active_TR = F.silu(output_TR) if self.config.activation == "silu" else output_TR.relu()
        return self.ffn(h) + ((active_TR * kept_TR) @ self.values).view_as(h)
