"""What the host does with rows: score, gather, accumulate; adamw.py updates them. Plain torch, and native kernels where
they fit.

Every function here has one meaning, written in torch (the *_torch functions); the native kernel of the same name is
used instead when native.py could build it and all tensors are real ones in host memory. Element-wise kernels give the
same bits either way; scores differ in the order of their sums.

X is the width of a row: D for keys or values alone, 2 D for both. Rows are matrices whose last axis is contiguous; the
row stride is free, so keys, values and whole neurons are views of one buffer [R, 2, D].
"""

import torch
from torch import Tensor

from meft_bench.meft.engine import native
from meft_bench.meft.engine.products import row_dots

# ---- scoring ----


def search_experts(
    h_TD: Tensor,
    keys_RD: Tensor,
    scales_R: Tensor | None,
    experts_TP: Tensor,
    gates_TP: Tensor | None,
    size: int,
    kept: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Each token's `kept` best neurons among those of its experts: (neuron numbers [T, K] int64, outputs [T, K] fp32).

    h_TD fp32; keys_RD fp32, bf16, fp16, or int8 with scales_R (fp32); experts_TP int64, distinct within a token; expert
    e holds neurons e * size up to (e + 1) * size. The output is gate * key . h, its relu when relu is set, with the
    experts' gates_TP (fp32); with bf16 keys it is that of h rounded to bf16. The K are in no particular order.
    """
    if native.fits_search(h_TD, keys_RD, scales_R, experts_TP, gates_TP):
        return native.search_experts(h_TD, keys_RD, scales_R, experts_TP, gates_TP, size, kept, relu)
    return search_experts_torch(h_TD, keys_RD, scales_R, experts_TP, gates_TP, size, kept, relu)


def search_experts_torch(
    h_TD: Tensor,
    keys_RD: Tensor,
    scales_R: Tensor | None,
    experts_TP: Tensor,
    gates_TP: Tensor | None,
    size: int,
    kept: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """search_experts in plain torch."""
    candidates_TQ = _candidates(experts_TP, size)
    if keys_RD.dtype == torch.bfloat16:
        h_TD = h_TD.bfloat16().to(h_TD.dtype)
    dots_TQ = row_dots(h_TD, (keys_RD.to(h_TD.dtype),), candidates_TQ)
    best = _best(dots_TQ, scales_R, candidates_TQ, gates_TP, size, kept, relu)
    return candidates_TQ.gather(1, best.indices), best.values


def search_experts_dense(
    h_TD: Tensor,
    keys_RD: Tensor,
    scales_R: Tensor | None,
    experts_TP: Tensor,
    gates_TP: Tensor | None,
    size: int,
    kept: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """search_experts by one product [T, R] with all keys, which on a GPU costs less than gathering those of experts; in
    any float dtype. Third is key . h [T, K] of the kept (of int8 keys, without their scales)."""
    candidates_TQ = _candidates(experts_TP, size)
    dots_TQ = (h_TD @ keys_RD.to(h_TD.dtype).T).gather(1, candidates_TQ)
    best = _best(dots_TQ, scales_R, candidates_TQ, gates_TP, size, kept, relu)
    return candidates_TQ.gather(1, best.indices), best.values, dots_TQ.gather(1, best.indices)


def _candidates(experts_TP: Tensor, size: int) -> Tensor:
    """The neurons of each token's experts [T, Q], Q = P m."""
    within = torch.arange(size, device=experts_TP.device)
    return (experts_TP[:, :, None] * size + within).flatten(1)


def _best(
    dots_TQ: Tensor,
    scales_R: Tensor | None,
    candidates_TQ: Tensor,
    gates_TP: Tensor | None,
    size: int,
    kept: int,
    relu: bool,
) -> torch.return_types.topk:
    """Places among the candidates, and outputs, of the `kept` best."""
    output_TQ = dots_TQ if scales_R is None else dots_TQ * scales_R[candidates_TQ].to(dots_TQ.dtype)
    if gates_TP is not None:
        output_TQ = output_TQ * gates_TP.repeat_interleave(size, dim=1)
    return (output_TQ.relu() if relu else output_TQ).topk(kept, dim=1, sorted=False)


# ---- moving ----


def gather(rows_RX: Tensor, index_U: Tensor, out_UX: Tensor) -> Tensor:
    """out[u] = rows[index[u]], cast to out's dtype (round to nearest even). rows fp32; out fp32, bf16 or fp16."""
    if native.fits(rows_RX, index_U, out_UX):
        native.gather(rows_RX, index_U, out_UX)
        return out_UX
    return gather_torch(rows_RX, index_U, out_UX)


def gather_torch(rows_RX: Tensor, index_U: Tensor, out_UX: Tensor) -> Tensor:
    """gather in plain torch."""
    return out_UX.copy_(rows_RX.index_select(0, index_U))


def accumulate(sums_RX: Tensor, index_U: Tensor, source_UX: Tensor, filled_R: Tensor, squares_R: Tensor) -> None:
    """sums[index[u]] += source[u]; of rows not filled yet (bool [R]) = source[u], whatever they hold. squares[index[u]]
    becomes the sum of squares of the new sum, as squares() gives it (fp64 [R]).

    sums fp32; source fp32, bf16 or fp16; index without repeats. Raises ValueError where their rows differ in width.
    """
    if source_UX.shape[1] != sums_RX.shape[1]:
        raise ValueError(
            f"gradients of rows {source_UX.shape[1]} wide cannot be added to rows {sums_RX.shape[1]} wide: keys were "
            "frozen, or not, since they were made"
        )
    if native.fits(sums_RX, index_U, source_UX, filled_R):
        native.accumulate(sums_RX, index_U, source_UX, filled_R, squares_R)
    else:
        accumulate_torch(sums_RX, index_U, source_UX, filled_R, squares_R)


def accumulate_torch(sums_RX: Tensor, index_U: Tensor, source_UX: Tensor, filled_R: Tensor, squares_R: Tensor) -> None:
    """accumulate in plain torch."""
    source_UX = source_UX.to(sums_RX.dtype)
    new_UX = torch.where(filled_R[index_U][:, None], sums_RX[index_U] + source_UX, source_UX)
    sums_RX[index_U] = new_UX
    squares_R[index_U] = squares_torch(new_UX)


def squares(rows_UX: Tensor) -> Tensor:
    """The sum of squares of each row, fp64 [U]; rows fp32, bf16 or fp16. Added up in fp64 in an order of its own, so
    that every number of threads and every instruction set gives the same bits."""
    if native.fits(rows_UX):
        sums_U = torch.empty(rows_UX.shape[0], dtype=torch.float64, device=rows_UX.device)
        native.squares(rows_UX, sums_U)
        return sums_U
    return squares_torch(rows_UX)


def nonzero_rows(rows_RX: Tensor) -> Tensor:
    """Which rows have a value that is not 0 (NaN is not), bool [R]; rows fp32, bf16 or fp16."""
    if native.fits(rows_RX):
        return squares(rows_RX).ne(0)  # no square of such a value is 0 in fp64; several times as fast as any()
    return rows_RX.ne(0).any(1)


_LANES = 32


def squares_torch(rows_UX: Tensor) -> Tensor:
    """squares in plain torch: every 32nd column into one of 32 sums, from left to right; then these in pairs."""
    sums_UL = torch.zeros(rows_UX.shape[0], _LANES, dtype=torch.float64, device=rows_UX.device)
    for part in rows_UX.split(_LANES, dim=1):
        sums_UL[:, : part.shape[1]] += part.double().square()  # exact: fp64 holds the square of any fp32
    return in_pairs(sums_UL)


def in_pairs(values: Tensor) -> Tensor:
    """The sum over the last axis, first half and second half added until one is left: the same bits everywhere."""
    while values.shape[-1] > 1:
        half = (values.shape[-1] + 1) // 2
        first, second = values[..., :half], values[..., half:]
        values = first.clone()
        values[..., : second.shape[-1]] += second
    return values[..., 0]


def zero(sums_RX: Tensor, index_U: Tensor) -> None:
    """sums[index[u]] = 0."""
    if native.fits(sums_RX, index_U):
        native.zero(sums_RX, index_U)
    else:
        sums_RX.index_fill_(0, index_U, 0.0)
