"""The sparse Parallel Adapter of one FFN: its mathematics, forward and backward.

A token t with hidden state h keeps a few neurons j, each a key and a value of width D:

    adapter(h_t) = sum over j of act(g_j key_j . h_t) value_j          g_j: the gate, the router's score of j's expert

Here are the two readings of the paper (section 4, Algorithm 1): per token, a token uses its own K neurons; union, it
uses all of S. Which neurons a token keeps, how their rows come to the device and where gradients go is the engine's
part (engine/host_part.py). reference.py says the same in plain torch, and tests hold the one to the other. T tokens,
D hidden size, K neurons kept per token, U rows in the union S, N experts.
"""

import torch
from torch import Tensor

from meft_bench.meft.dense import activate, activation_slope
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.host_part import HostPart
from meft_bench.meft.engine.micro_batch import OnDevice
from meft_bench.meft.engine.products import Rows, adapter_backward, adapter_forward


class MeftAdapter(HostPart):
    """adapter(h) of one layer. Input and output [..., D] in the model's dtype; fp32 on the host."""

    @engine
    def forward(self, h: Tensor) -> Tensor:
        if not self.is_prepared:
            self.prepare(h)
        # What trains rides along as an input so that autograd reaches this layer although the base is frozen.
        return _SparseAdapter.apply(h, self.store.shown_to_autograd(), self)


class _SparseAdapter(torch.autograd.Function):
    """Rows' gradients go to the store, not through autograd. Rows stay on the device from forward to backward."""

    @staticmethod
    def forward(ctx, h: Tensor, trained: Tensor, adapter: MeftAdapter) -> Tensor:
        config, used = adapter.config, adapter.take()
        h_TD = h.detach().reshape(-1, h.shape[-1])
        rows, local_TK, gates, there = used.arrive(h_TD)
        if config.reading == "per_token":
            assert local_TK is not None
            places_TK = rows.placed(local_TK)
            out_TD, dots = adapter_forward(h_TD, rows, places_TK, gates, config.activation, used.dots_TK)
        else:
            out_TD, dots = union_forward(h_TD, rows, gates, config.activation)
        # All that lies on the device is saved this way, so that activation checkpointing can drop it and make it again.
        ctx.save_for_backward(h_TD, local_TK, gates, dots, *there)
        ctx.adapter, ctx.used = adapter, used
        used.let_go(there, backward=any(ctx.needs_input_grad))
        return out_TD.reshape(h.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @engine
    def backward(ctx, grad: Tensor):
        adapter, used = ctx.adapter, ctx.used
        config = adapter.config
        h_TD, local_TK, gates, dots, *saved = ctx.saved_tensors
        grad_TD = grad.reshape(h_TD.shape).contiguous()
        rows, there = used.arrive_again(OnDevice(*saved), h_TD.dtype)
        grads_UHD = used.room_for_gradients(rows, h_TD)
        if config.reading == "per_token":
            grad_h_TD, grad_outputs_TK = adapter_backward(
                grad_TD, h_TD, rows, rows.placed(local_TK), dots, gates, config.activation, grads_UHD
            )
            grad_gates = None if gates is None else grad_outputs_TK * dots
        else:
            grad_h_TD, grad_gates = union_backward(
                grad_TD, h_TD, rows, dots, gates, there.experts, config.experts, config.activation, grads_UHD
            )
        # Where the router is on the host, its few numbers go first: backward waits for them, and for no row.
        sent = None if grad_gates is None else used.to_router(grad_gates)
        used.take_gradients(grads_UHD, there)
        wants_h = ctx.needs_input_grad[0]
        if sent is not None:
            grad_scores_TN = used.score_gradient(sent, there)
            used.take_router_gradient(grad_scores_TN, h_TD)
            if wants_h:  # the router saw h, too
                grad_h_TD = grad_h_TD + used.through_router(grad_scores_TN, h_TD)
        return grad_h_TD.reshape(grad.shape) if wants_h else None, None, None


def union_forward(h_TD: Tensor, rows: Rows, gates_TU: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(sum over all of S, one block, of act(gate_u * key_u . h) * value_u [T, D], the dots key_u . h [T, U])."""
    (keys_UD,), (values_UD,) = rows.keys, rows.values
    dots_TU = h_TD @ keys_UD.T
    output_TU = dots_TU if gates_TU is None else dots_TU * gates_TU
    return activate(output_TU, activation) @ values_UD, dots_TU


def union_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    rows: Rows,
    dots_TU: Tensor,
    gates_TU: Tensor | None,
    experts_U: Tensor | None,
    experts: int | None,
    activation: str,
    grads_UHD: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of h [T, D], of the gates [T, N] or None) from that of union_forward's sum. The gradients of the rows
    are written into grads_UHD: keys and values, or values alone."""
    (keys_UD,), (values_UD,) = rows.keys, rows.values
    output_TU = dots_TU if gates_TU is None else dots_TU * gates_TU
    grad_output_TU = (grad_TD @ values_UD.T) * activation_slope(output_TU, activation)
    grad_dots_TU = grad_output_TU if gates_TU is None else grad_output_TU * gates_TU
    grad_gates_TN = None
    if gates_TU is not None:
        assert experts_U is not None and experts is not None
        grad_gates_TN = grad_TD.new_zeros(grad_TD.shape[0], experts)
        grad_gates_TN.index_add_(1, experts_U, grad_output_TU * dots_TU)
    if grads_UHD.shape[1] == 2:
        torch.mm(grad_dots_TU.T, h_TD, out=grads_UHD[:, 0])
    torch.mm(activate(output_TU, activation).T, grad_TD, out=grads_UHD[:, -1])
    return grad_dots_TU @ keys_UD, grad_gates_TN
