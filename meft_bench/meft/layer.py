"""The sparse Parallel Adapter of one FFN, and its autograd boundary.

Forward: hidden states go to the host, the host selects neurons, their rows come to the device, the device computes the
adapter's output. Backward: the device computes the gradients of the rows it holds and sends them back; the router's
gradient is made on the host, where the router is. Rows stay on the device between forward and backward.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meft_bench.meft import routing
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.rowmath import row_dots, scatter_rows, weighted_rows
from meft_bench.meft.store import NeuronStore


@dataclass
class BatchInfo:
    """What the layers know of the running micro-batch beyond their input; one object per model."""

    attention_mask: Tensor | None = None

    def valid_tokens(self, h: Tensor) -> Tensor | None:
        """Bool [T] on the host, False for padding; None when every token of h [..., D] is real or unknown.

        With a cache the mask covers past tokens too; the last ones are those of h.
        """
        mask, tokens = self.attention_mask, h.shape[:-1].numel()
        if mask is None or mask.dim() != 2 or tokens % mask.shape[0] or tokens // mask.shape[0] > mask.shape[1]:
            return None
        # Counted in tokens, not by h's shape: OPT hands its FFN all sequences as one.
        length = tokens // mask.shape[0]
        valid_T = mask[:, mask.shape[1] - length :].reshape(-1).to("cpu", torch.bool)
        return None if bool(valid_T.all()) else valid_T


class MeftAdapter(nn.Module):
    """adapter(h) of one layer: sum over the kept neurons j of relu(gate_j * key_j . h) * value_j.

    Input and output [..., D] in the model's dtype; fp32 on the host. usage lists (real tokens T, U) of every
    micro-batch that training has gone through, backward included.
    """

    def __init__(self, config: MeftConfig, store: NeuronStore, link: Link | Resident, batch: BatchInfo) -> None:
        super().__init__()
        self.config, self.store, self.link, self.batch = config, store, link, batch
        self.usage: list[tuple[int, int]] = []

    def forward(self, h: Tensor) -> Tensor:
        # The values ride along as an input so that autograd reaches this layer although the base is frozen.
        # autocast would change dtypes half-way; h's own is kept.
        with torch.autocast(h.device.type, enabled=False):
            return _SparseAdapter.apply(h, self.store.values, self)

    def select(self, host_h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        """The host's part: the neurons of one micro-batch, from host hidden states [T, D] fp32."""
        store = self.store
        router_ND = store.router.detach() if store.router is not None else None
        if valid_T is not None:
            valid_T = valid_T.to(host_h_TD.device)
        return routing.select(host_h_TD, store.keys.detach(), router_ND, self.config, valid_T)


class _SparseAdapter(torch.autograd.Function):
    """Saves the hidden states and the rows of S; rows' gradients go to the store, not through autograd."""

    @staticmethod
    def forward(ctx, h: Tensor, values: Tensor, adapter: MeftAdapter) -> Tensor:
        config, store, link = adapter.config, adapter.store, adapter.link
        h_TD = h.detach().reshape(-1, h.shape[-1])
        host_h_TD = link.to_host(h_TD, "hidden").float()
        valid_T = adapter.batch.valid_tokens(h)
        chosen = adapter.select(host_h_TD, valid_T)
        ctx.tokens = h_TD.shape[0] if valid_T is None else int(valid_T.sum())
        keys_UD, values_UD = (link.to_device(rows, h.device, "rows", h.dtype) for rows in store.gather(chosen.union_U))
        gates = _host_gates(chosen, config)
        if gates is not None:
            gates = link.to_device(gates, h.device, "score", h.dtype)
        if config.reading == "per_token":
            # int32 on the wire, int64 for torch's gathers.
            local_TK = link.to_device(chosen.local_TK, h.device, "index", torch.int32).long()
            out_TD, saved = _per_token_forward(h_TD, keys_UD, values_UD, gates, local_TK, config)
        else:
            if gates is not None:
                expert_U = link.to_device(chosen.union_U // config.expert_size, h.device, "index", torch.int32).long()
                gates = gates[:, expert_U]
            out_TD, saved = _union_forward(h_TD, keys_UD, values_UD, gates, config)

        ctx.save_for_backward(h_TD, keys_UD, values_UD, *saved)
        ctx.adapter, ctx.chosen, ctx.host_h_TD = adapter, chosen, host_h_TD
        return out_TD.reshape(h.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        adapter, chosen = ctx.adapter, ctx.chosen
        config, store, link = adapter.config, adapter.store, adapter.link
        h_TD, keys_UD, values_UD, *saved = ctx.saved_tensors
        if adapter.training:
            # Here and not in forward, which activation checkpointing runs twice.
            adapter.usage.append((ctx.tokens, chosen.union_U.shape[0]))
        grad_TD = grad.reshape(h_TD.shape).contiguous()
        reading = _per_token_backward if config.reading == "per_token" else _union_backward
        grad_h_TD, grad_keys_UD, grad_values_UD, grad_gates = reading(
            grad_TD, h_TD, keys_UD, values_UD, saved, chosen, config
        )
        if grad_gates is not None:
            scores_TN = _host_score_gradient(link.to_host(grad_gates, "score").float(), chosen, config)
            store.add_router_gradient(scores_TN.T @ ctx.host_h_TD)
            if ctx.needs_input_grad[0]:
                router_h_TD = link.to_device(
                    scores_TN @ store.router.detach(), grad.device, "router_hidden", grad.dtype
                )
                grad_h_TD = grad_h_TD + router_h_TD
        keys_host = None if config.frozen_keys else link.to_host(grad_keys_UD, "grads").float()
        store.add_gradients(chosen.union_U, keys_host, link.to_host(grad_values_UD, "grads").float())
        return grad_h_TD.reshape(grad.shape) if ctx.needs_input_grad[0] else None, None, None


def _host_gates(chosen: routing.Selection, config: MeftConfig) -> Tensor | None:
    """What the device needs of the router: a factor per kept neuron [T, K], or per expert [T, N] for the union."""
    if chosen.gates_TN is None:
        return None
    if config.reading == "union":
        return chosen.gates_TN
    assert chosen.expert_TK is not None
    return chosen.gates_TN.gather(1, chosen.expert_TK)


def _host_score_gradient(grad_gates: Tensor, chosen: routing.Selection, config: MeftConfig) -> Tensor:
    """Gradient for the router scores [T, N] from what came back: [T, K] per token, [T, N] for the union."""
    assert chosen.gates_TN is not None
    if config.reading == "per_token":
        assert chosen.expert_TK is not None
        grad_gates = torch.zeros_like(chosen.gates_TN).scatter_add_(1, chosen.expert_TK, grad_gates)
    return routing.gate_gradient(grad_gates, chosen.gates_TN, config.gate)


def activate(o: Tensor, activation: str) -> Tensor:
    """relu or silu."""
    return F.silu(o) if activation == "silu" else o.relu()


def activation_slope(o: Tensor, activation: str) -> Tensor:
    """Derivative of activate at o."""
    if activation == "silu":
        sigmoid = o.sigmoid()
        return sigmoid * (1 + o * (1 - sigmoid))
    return (o > 0).to(o.dtype)


def _per_token_forward(h_TD, keys_UD, values_UD, gates_TK, local_TK, config):
    dots_TK = row_dots(h_TD, keys_UD, local_TK)
    output_TK = dots_TK if gates_TK is None else dots_TK * gates_TK
    act_TK = activate(output_TK, config.activation)
    saved = (local_TK, dots_TK) if gates_TK is None else (local_TK, dots_TK, gates_TK)
    return weighted_rows(act_TK, values_UD, local_TK), saved


def _per_token_backward(grad_TD, h_TD, keys_UD, values_UD, saved, chosen, config):
    local_TK, dots_TK, *gates = saved
    U = keys_UD.shape[0]
    output_TK = dots_TK * gates[0] if gates else dots_TK
    act_TK = activate(output_TK, config.activation)
    grad_output_TK = row_dots(grad_TD, values_UD, local_TK) * activation_slope(output_TK, config.activation)
    grad_dots_TK = grad_output_TK * gates[0] if gates else grad_output_TK
    return (
        weighted_rows(grad_dots_TK, keys_UD, local_TK),
        None if config.frozen_keys else scatter_rows(grad_dots_TK, h_TD, local_TK, U),
        scatter_rows(act_TK, grad_TD, local_TK, U),
        grad_output_TK * dots_TK if gates else None,
    )


def _union_forward(h_TD, keys_UD, values_UD, gates_TU, config):
    dots_TU = h_TD @ keys_UD.T
    output_TU = dots_TU if gates_TU is None else dots_TU * gates_TU
    saved = (dots_TU,) if gates_TU is None else (dots_TU, gates_TU)
    return activate(output_TU, config.activation) @ values_UD, saved


def _union_backward(grad_TD, h_TD, keys_UD, values_UD, saved, chosen, config):
    dots_TU, *gates = saved
    output_TU = dots_TU * gates[0] if gates else dots_TU
    grad_output_TU = (grad_TD @ values_UD.T) * activation_slope(output_TU, config.activation)
    grad_dots_TU = grad_output_TU * gates[0] if gates else grad_output_TU
    grad_gates_TN = None
    if gates:
        expert_U = (chosen.union_U // config.expert_size).to(grad_TD.device)
        grad_gates_TN = grad_TD.new_zeros(grad_TD.shape[0], config.experts)
        grad_gates_TN.index_add_(1, expert_U, grad_output_TU * dots_TU)
    return (
        grad_dots_TU @ keys_UD,
        None if config.frozen_keys else grad_dots_TU.T @ h_TD,
        activate(output_TU, config.activation).T @ grad_TD,
        grad_gates_TN,
    )
