"""The adapter on the device: what each token makes of its kept rows, with no T x R matrix and no loop over experts.

index_TK holds, per token, positions among the U rows; -1 marks an empty place and contributes nothing. On a GPU, or
when nearly all rows are used by every token, one dense product over the U rows is cheapest; else only the chosen pairs
are computed: on the processor in fp32 by native kernels, elsewhere by embedding_bag.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_bench.meft.dense import activate, activation_slope
from meft_bench.meft.engine import native

# A dense product does U/K times the work of the sparse sum at a several times higher rate (measured on CPU: 8 to 20).
_DENSE_BELOW = 8


def _prefers_dense(index_TK: Tensor, rows: int, dtype: torch.dtype) -> bool:
    # In half precision a dense product sums in fp32, embedding_bag may not.
    sparse_dtype = dtype in (torch.float32, torch.float64)
    return index_TK.is_cuda or not sparse_dtype or rows <= _DENSE_BELOW * index_TK.shape[1]


def adapter_forward(
    h_TD: Tensor,
    rows_U2D: Tensor,
    local_TK: Tensor,
    gates_TK: Tensor | None,
    activation: str,
    dots_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum over kept rows j of act(gate_j * key_j . h) * value_j [T, D], the dots key_j . h [T, K]).

    rows_U2D holds keys and values in h's dtype; gates_TK None is 1. dots_TK: the dots, if a search has made them.
    """
    sparse = not _prefers_dense(local_TK, rows_U2D.shape[0], h_TD.dtype)
    if dots_TK is None and sparse and native.fits_products(h_TD, rows_U2D, local_TK, gates_TK):
        return native.adapter_forward(h_TD, rows_U2D, local_TK, gates_TK, activation == "silu")
    if dots_TK is None:
        dots_TK = row_dots(h_TD, rows_U2D[:, 0], local_TK)
    output_TK = dots_TK if gates_TK is None else dots_TK * gates_TK
    return weighted_rows(activate(output_TK, activation), rows_U2D[:, 1], local_TK), dots_TK


def adapter_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    rows_U2D: Tensor,
    local_TK: Tensor,
    dots_TK: Tensor,
    gates_TK: Tensor | None,
    activation: str,
    grads_UHD: Tensor,
) -> tuple[Tensor, Tensor]:
    """(gradient of h [T, D], of the outputs gate * dot [T, K]) from that of adapter_forward's sum.

    The gradients of the rows are written into grads_UHD: keys and values, or values alone for K = 1.
    """
    native_fits = native.fits_products(grad_TD, h_TD, rows_U2D, local_TK, dots_TK, gates_TK, grads_UHD)
    if not _prefers_dense(local_TK, rows_U2D.shape[0], h_TD.dtype) and native_fits:
        silu = activation == "silu"
        return native.adapter_backward(grad_TD, h_TD, rows_U2D, local_TK, dots_TK, gates_TK, silu, grads_UHD)
    output_TK = dots_TK if gates_TK is None else dots_TK * gates_TK
    grad_output_TK = row_dots(grad_TD, rows_U2D[:, 1], local_TK) * activation_slope(output_TK, activation)
    grad_output_TK = grad_output_TK.masked_fill(local_TK < 0, 0.0)  # a gate may be NaN there
    grad_dots_TK = grad_output_TK if gates_TK is None else grad_output_TK * gates_TK
    union = rows_U2D.shape[0]
    if grads_UHD.shape[1] == 2:
        grads_UHD[:, 0] = scatter_rows(grad_dots_TK, h_TD, local_TK, union)
    grads_UHD[:, -1] = scatter_rows(activate(output_TK, activation), grad_TD, local_TK, union)
    return weighted_rows(grad_dots_TK, rows_U2D[:, 0], local_TK), grad_output_TK


def _spread(index_TK: Tensor, weights_TK: Tensor, rows: int) -> Tensor:
    """The T x U matrix with weights_TK at index_TK and zero elsewhere."""
    spread_TU = weights_TK.new_zeros(index_TK.shape[0], rows)
    return spread_TU.scatter_add_(1, index_TK.clamp(min=0), weights_TK.masked_fill(index_TK < 0, 0.0))


def row_dots(x_TD: Tensor, rows_UD: Tensor, index_TK: Tensor) -> Tensor:
    """x_t . rows[index_tk] as [T, K]; 0 at empty places."""
    T, K = index_TK.shape
    if T == 0 or rows_UD.shape[0] == 0:
        return x_TD.new_zeros(T, K)
    filled = index_TK.clamp(min=0)
    if _prefers_dense(index_TK, rows_UD.shape[0], rows_UD.dtype):
        dots_TK = (x_TD @ rows_UD.T).gather(1, filled)
    else:
        # The gradient of embedding_bag for its weights is exactly this dot product, fused and without copies.
        starts = torch.arange(0, T * K, K, device=index_TK.device)
        owner = torch.arange(T, device=index_TK.device).repeat_interleave(K)
        dots_TK = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD.contiguous(), rows_UD, filled.reshape(-1), starts, owner, 0
        ).view(T, K)
    return dots_TK.masked_fill(index_TK < 0, 0.0)


def weighted_rows(weights_TK: Tensor, rows_UD: Tensor, index_TK: Tensor) -> Tensor:
    """sum over k of weights_tk * rows[index_tk] as [T, D]."""
    T = index_TK.shape[0]
    if T == 0 or rows_UD.shape[0] == 0:
        return rows_UD.new_zeros(T, rows_UD.shape[1])
    if _prefers_dense(index_TK, rows_UD.shape[0], rows_UD.dtype):
        return _spread(index_TK, weights_TK, rows_UD.shape[0]) @ rows_UD
    weights_TK = weights_TK.masked_fill(index_TK < 0, 0.0)
    return F.embedding_bag(index_TK.clamp(min=0), rows_UD, per_sample_weights=weights_TK, mode="sum")


def scatter_rows(weights_TK: Tensor, x_TD: Tensor, index_TK: Tensor, rows: int) -> Tensor:
    """sum over (t, k) with index_tk = u of weights_tk * x_t as [U, D]; the transpose of weighted_rows."""
    T, K = index_TK.shape
    if T == 0 or rows == 0:
        return x_TD.new_zeros(rows, x_TD.shape[1])
    if _prefers_dense(index_TK, rows, x_TD.dtype):
        return _spread(index_TK, weights_TK, rows).T @ x_TD
    # Group the pairs by row, empty places first, then sum each group: a bag per row.
    order = index_TK.reshape(-1).argsort()
    sizes = torch.bincount(index_TK.reshape(-1) + 1, minlength=rows + 1)
    starts = sizes.cumsum(0)[:-1]
    empty = int(sizes[0])
    tokens, weights = (order // K)[empty:], weights_TK.reshape(-1)[order][empty:]
    return F.embedding_bag(tokens, x_TD.contiguous(), starts - empty, per_sample_weights=weights, mode="sum")
