"""The adapter on the device: what each token makes of its kept rows, with no T x R matrix and no loop over experts.

index_TK holds, per token, positions among the U rows; -1 marks an empty place and contributes nothing. On a GPU, or
when nearly all rows are used by every token, one dense product over the U rows is cheapest; else only the chosen pairs
are computed: on the processor in fp32 by native kernels, elsewhere by embedding_bag.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_bench.meft.dense import activate, activation_slope
from meft_bench.meft.engine import native
from meft_bench.meft.link import GPUS


@dataclass(frozen=True)
class Rows:
    """What a micro-batch computes with: U rows in blocks, one below the other, so that rows which lie in several places
    need not be brought together. Several blocks only where always_dense() says so."""

    keys: tuple[Tensor, ...]
    """[.., D] each; none where nobody asks for keys."""
    values: tuple[Tensor, ...]
    both_U2D: Tensor | None = None
    """Keys and values as one matrix, where they are one."""
    where_U: Tensor | None = None
    """Where each row of the union lies in the blocks; None: in the union's own order."""

    @classmethod
    def of(cls, rows_U2D: Tensor) -> "Rows":
        """One block of keys and values [U, 2, D]."""
        return cls((rows_U2D[:, 0],), (rows_U2D[:, 1],), rows_U2D)

    @property
    def count(self) -> int:
        """U, and what the blocks hold beside the union's rows."""
        return sum(block.shape[0] for block in self.values)

    def placed(self, local_TK: Tensor) -> Tensor:
        """Places in the blocks, from places in the union; -1 stays."""
        if self.where_U is None:
            return local_TK
        return self.where_U[local_TK.clamp(min=0)].masked_fill(local_TK < 0, -1)


def always_dense(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of this dtype are multiplied by dense products there, however few a token keeps."""
    # In half precision a dense product sums in fp32, embedding_bag may not.
    return device.type in GPUS or dtype not in (torch.float32, torch.float64)


# A dense product does U/K times the work of the sparse sum at a several times higher rate (measured on CPU: 8 to 20).
_DENSE_BELOW = 8


def _prefers_dense(index_TK: Tensor, rows: int, dtype: torch.dtype) -> bool:
    return always_dense(index_TK.device, dtype) or rows <= _DENSE_BELOW * index_TK.shape[1]


def adapter_forward(
    h_TD: Tensor,
    rows: Rows,
    local_TK: Tensor,
    gates_TK: Tensor | None,
    activation: str,
    dots_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum over kept rows j of act(gate_j * key_j . h) * value_j [T, D], the dots key_j . h [T, K]).

    rows are in h's dtype; gates_TK None is 1. dots_TK: the dots, if a search has made them; then keys are not read.
    """
    sparse, both_U2D = not _prefers_dense(local_TK, rows.count, h_TD.dtype), rows.both_U2D
    if dots_TK is None and sparse and both_U2D is not None:
        if native.fits_products(h_TD, both_U2D, local_TK, gates_TK):
            return native.adapter_forward(h_TD, both_U2D, local_TK, gates_TK, activation == "silu")
    if dots_TK is None:
        dots_TK = row_dots(h_TD, rows.keys, local_TK)
    output_TK = dots_TK if gates_TK is None else dots_TK * gates_TK
    return weighted_rows(activate(output_TK, activation), rows.values, local_TK), dots_TK


def adapter_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    rows: Rows,
    local_TK: Tensor,
    dots_TK: Tensor,
    gates_TK: Tensor | None,
    activation: str,
    grads_UHD: Tensor,
) -> tuple[Tensor, Tensor]:
    """(gradient of h [T, D], of the outputs gate * dot [T, K]) from that of adapter_forward's sum.

    The gradients of the rows are written into grads_UHD: keys and values, or values alone for H = 1.
    """
    both_U2D = rows.both_U2D
    if both_U2D is not None and not _prefers_dense(local_TK, rows.count, h_TD.dtype):
        if native.fits_products(grad_TD, h_TD, both_U2D, local_TK, dots_TK, gates_TK, grads_UHD):
            silu = activation == "silu"
            return native.adapter_backward(grad_TD, h_TD, both_U2D, local_TK, dots_TK, gates_TK, silu, grads_UHD)
    output_TK = dots_TK if gates_TK is None else dots_TK * gates_TK
    grad_output_TK = row_dots(grad_TD, rows.values, local_TK) * activation_slope(output_TK, activation)
    grad_output_TK = grad_output_TK.masked_fill(local_TK < 0, 0.0)  # a gate may be NaN there
    grad_dots_TK = grad_output_TK if gates_TK is None else grad_output_TK * gates_TK
    if grads_UHD.shape[1] == 2:
        scatter_rows(grad_dots_TK, h_TD, local_TK, grads_UHD[:, 0])
    scatter_rows(activate(output_TK, activation), grad_TD, local_TK, grads_UHD[:, -1])
    return weighted_rows(grad_dots_TK, rows.keys, local_TK), grad_output_TK


def _spread(index_TK: Tensor, weights_TK: Tensor, rows: int) -> Tensor:
    """The T x U matrix with weights_TK at index_TK and zero elsewhere."""
    spread_TU = weights_TK.new_zeros(index_TK.shape[0], rows)
    return spread_TU.scatter_add_(1, index_TK.clamp(min=0), weights_TK.masked_fill(index_TK < 0, 0.0))


def row_dots(x_TD: Tensor, blocks: Sequence[Tensor], index_TK: Tensor) -> Tensor:
    """x_t . rows[index_tk] as [T, K]; 0 at empty places. blocks: the rows [U, D] (see Rows)."""
    (T, K), rows = index_TK.shape, sum(block.shape[0] for block in blocks)
    if T == 0 or rows == 0:
        return x_TD.new_zeros(T, K)
    filled = index_TK.clamp(min=0)
    if _prefers_dense(index_TK, rows, x_TD.dtype):
        dots = [x_TD @ block.T for block in blocks]
        dots_TK = (dots[0] if len(dots) == 1 else torch.cat(dots, dim=1)).gather(1, filled)
    else:
        # The gradient of embedding_bag for its weights is exactly this dot product, fused and without copies.
        (rows_UD,) = blocks
        starts = torch.arange(0, T * K, K, device=index_TK.device)
        owner = torch.arange(T, device=index_TK.device).repeat_interleave(K)
        dots_TK = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD.contiguous(), rows_UD, filled.reshape(-1), starts, owner, 0
        ).view(T, K)
    return dots_TK.masked_fill(index_TK < 0, 0.0)


def weighted_rows(weights_TK: Tensor, blocks: Sequence[Tensor], index_TK: Tensor) -> Tensor:
    """sum over k of weights_tk * rows[index_tk] as [T, D]. blocks: the rows [U, D] (see Rows)."""
    T, rows = index_TK.shape[0], sum(block.shape[0] for block in blocks)
    if T == 0 or rows == 0:
        return blocks[0].new_zeros(T, blocks[0].shape[1])
    if _prefers_dense(index_TK, rows, blocks[0].dtype):
        first, *others = _spread(index_TK, weights_TK, rows).split([block.shape[0] for block in blocks], dim=1)
        sum_TD = first @ blocks[0]
        for some, block in zip(others, blocks[1:], strict=True):
            sum_TD = torch.addmm(sum_TD, some, block)
        return sum_TD
    (rows_UD,) = blocks
    weights_TK = weights_TK.masked_fill(index_TK < 0, 0.0)
    return F.embedding_bag(index_TK.clamp(min=0), rows_UD, per_sample_weights=weights_TK, mode="sum")


def scatter_rows(weights_TK: Tensor, x_TD: Tensor, index_TK: Tensor, out_UD: Tensor) -> None:
    """Write the sum over (t, k) with index_tk = u of weights_tk * x_t into out_UD; the transpose of weighted_rows."""
    (T, K), rows = index_TK.shape, out_UD.shape[0]
    if T == 0 or rows == 0:
        out_UD.zero_()
        return
    if _prefers_dense(index_TK, rows, x_TD.dtype):
        torch.mm(_spread(index_TK, weights_TK, rows).T, x_TD, out=out_UD)
        return
    # Group the pairs by row, empty places first, then sum each group: a bag per row.
    order = index_TK.reshape(-1).argsort()
    sizes = torch.bincount(index_TK.reshape(-1) + 1, minlength=rows + 1)
    starts = sizes.cumsum(0)[:-1]
    empty = int(sizes[0])
    tokens, weights = (order // K)[empty:], weights_TK.reshape(-1)[order][empty:]
    out_UD.copy_(F.embedding_bag(tokens, x_TD.contiguous(), starts - empty, per_sample_weights=weights, mode="sum"))
