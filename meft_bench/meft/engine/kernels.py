"""What the host does with rows: score, gather, accumulate, update. Plain torch, and native kernels where they fit.

Every function here has one meaning, written in torch (the *_torch functions); the native kernel of the same name is
used instead when native.py could build it and all tensors are real ones in host memory. Element-wise kernels give the
same bits either way; scores differ in the order of their sums.

X is the width of a row: D for keys or values alone, 2 D for both. Rows are matrices whose last axis is contiguous; the
row stride is free, so keys, values and whole neurons are views of one buffer [R, 2, D].
"""

from dataclasses import dataclass, replace

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

    h_TD fp32; keys_RD fp32, bf16, or int8 with scales_R (fp32); experts_TP int64, distinct within a token; expert e
    holds neurons e * size up to (e + 1) * size. The output is gate * key . h, its relu when relu is set, with the
    experts' gates_TP (fp32). The K are in no particular order.
    """
    if native.fits(h_TD, keys_RD, scales_R, experts_TP, gates_TP):
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
    dots_TQ = row_dots(h_TD, keys_RD.to(h_TD.dtype), candidates_TQ)
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

    sums fp32; source fp32, bf16 or fp16; index without repeats.
    """
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


# ---- AdamW ----


@dataclass
class RowState:
    """One matrix of rows and its Adam state, all [R, X] or [R]; or the H halves of whole rows, [R, H, D] and [R, H],
    each of which counts as a row of its own."""

    rows_RX: Tensor
    """fp32 master weights."""
    first_RX: Tensor
    """m: fp32, or bf16 with stochastic rounding."""
    second_RX: Tensor
    """v: as m."""
    done_R: Tensor
    """int32: the optimizer step up to which a row is current."""
    still_R: Tensor
    """bool: without a gradient and weight decay, no step at a rate up to Steps.withstood will change a bit of this row
    (its moments may still decay)."""
    salt: int
    """Tells the matrices of a model apart in the rounding of bf16 moments; the second half has the next number."""

    def half(self, number: int) -> "RowState":
        """One half of whole rows."""
        return RowState(
            self.rows_RX[:, number], self.first_RX[:, number], self.second_RX[:, number], self.done_R[:, number],
            self.still_R[:, number], self.salt + number,
        )  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """The constants of optimizer steps first + 1, first + 2, ...; table [steps, 3] fp32 per step t: lr / (1 - beta1^t),
    1 / sqrt(1 - beta2^t), 1 - lr * weight decay."""

    table: Tensor
    first: int
    beta1: float
    beta2: float
    eps: float
    withstood: float
    """At least the largest table[:, 0]: the rate at which a row must stay as it is to count as still. Where a step
    exceeds it, no row is still any more (adam.py)."""

    def resting(self, but_last: bool) -> "Steps":
        """The same steps at rate 0 and without weight decay, which change moments alone; but_last leaves the last."""
        table = self.table.clone()
        rested = table[:-1] if but_last else table
        rested[:, 0], rested[:, 2] = 0.0, 1.0
        return replace(self, table=table)


def advance(
    state: RowState,
    grads: Tensor | None,
    index_U: Tensor,
    step: int | None,
    steps: Steps,
    factor: float = 1.0,
    listed: bool = False,
) -> None:
    """Bring the rows in index (no repeats) up to date: AdamW with zero gradient for every step missed, up to and with
    `step`, whose gradient is grads[row] * factor if grads are given: fp32, shaped as the rows; or, listed,
    grads[u] * factor for index[u], fp32, bf16 or fp16 [U, ..].

    Per step: m = m b1 + g (1 - b1), v = v b2 + (g g) (1 - b2), p = p decay - rate * m / (sqrt(v) scale + eps), with
    every product and sum rounded to fp32 (no fused multiply-add), g = grads * factor too: the same bits in torch and in
    any kernel, however many steps are caught up at once. Without grads, still rows are skipped: their p would not
    change. With step None every row takes the step after its own last one, whichever that is.
    """
    if native.fits(state.rows_RX, state.first_RX, grads, index_U):
        native.advance(state, grads, index_U, step, steps, factor, listed)
    else:
        advance_torch(state, grads, index_U, step, steps, factor, listed)


def advance_torch(
    state: RowState,
    grads: Tensor | None,
    index_U: Tensor,
    step: int | None,
    steps: Steps,
    factor: float = 1.0,
    listed: bool = False,
) -> None:
    """advance in plain torch."""
    if state.rows_RX.dim() == 3:
        for number in range(state.rows_RX.shape[1]):
            grads_half = None if grads is None else grads[:, number]
            advance_torch(state.half(number), grads_half, index_U, step, steps, factor, listed)
        return
    if grads is None:
        index_U = index_U[~state.still_R[index_U]]
    if index_U.numel() == 0:
        return
    values = (state.rows_RX[index_U], state.first_RX[index_U].float(), state.second_RX[index_U].float())
    done_U = last_U = state.done_R[index_U]
    grads_UX = None
    if grads is not None:
        grads_UX = (grads if listed else grads[index_U]).float()
        grads_UX = grads_UX * _f32(factor) if factor != 1.0 else grads_UX
    if step is None:
        taken_U = done_U + 1
        values = _one_step(values, grads_UX, taken_U, state, index_U, steps)
    else:
        if bool((steps.table[:, 2] == 1).all()):
            # Without weight decay a row that never had a gradient has missed nothing.
            untouched_U = ~(values[1].any(1) | values[2].any(1))
            done_U = done_U.masked_fill(untouched_U & (done_U < step), step - 1)
        for t in range(int(done_U.min()) + 1, step + 1):
            taken_U = torch.full_like(done_U, t)
            moved = _one_step(values, grads_UX if t == step else None, taken_U, state, index_U, steps)
            missed_U1 = (done_U < t)[:, None]
            rows_UX, first_UX, second_UX = (
                torch.where(missed_U1, new, old) for new, old in zip(moved, values, strict=True)
            )
            values = rows_UX, first_UX, second_UX
        taken_U = torch.full_like(done_U, step)
    rows_UX, first_UX, second_UX = values
    state.rows_RX[index_U] = rows_UX
    state.first_RX[index_U] = first_UX.to(state.first_RX.dtype)
    state.second_RX[index_U] = second_UX.to(state.second_RX.dtype)
    state.done_R[index_U] = taken_U
    still_U = _still(rows_UX, first_UX, second_UX, taken_U, steps)
    # What was up to date before has not been looked at again.
    state.still_R[index_U] = torch.where(last_U < taken_U, still_U, state.still_R[index_U])


_Values = tuple[Tensor, Tensor, Tensor]


def _constants(taken_U: Tensor, steps: Steps) -> _Values:
    """Rate, scale and decay [U, 1] of every row's step."""
    table = steps.table.to(taken_U.device)[(taken_U - steps.first - 1).long()]
    return table[:, 0:1], table[:, 1:2], table[:, 2:3]


def _one_step(
    values: _Values, grads_UX: Tensor | None, taken_U: Tensor, state: RowState, index_U: Tensor, steps: Steps
) -> _Values:
    narrow = state.first_RX.dtype == torch.bfloat16
    return made_step(values, grads_UX, _constants(taken_U, steps), taken_U, index_U, state.salt, narrow, steps)


def made_step(
    values: _Values,
    grads_UX: Tensor | None,
    constants: _Values,
    taken_U: Tensor,
    index_U: Tensor,
    salt: int,
    narrow: bool,
    steps: Steps,
) -> _Values:
    """Rows, m and v, all fp32 [U, X], after one step as advance() says. constants: rate, scale, decay [U, 1]; taken_U:
    the step's number for each row, index_U the row's own; narrow: m and v are kept as bf16. Of steps, only betas and
    eps are read. On any device; waits for nothing."""
    rows_UX, first_UX, second_UX = values
    rate_U1, scale_U1, decay_U1 = constants
    first_UX = first_UX * _f32(steps.beta1)
    second_UX = second_UX * _f32(steps.beta2)
    if grads_UX is not None:
        first_UX = first_UX + grads_UX * _f32(1 - steps.beta1)
        second_UX = second_UX + (grads_UX * grads_UX) * _f32(1 - steps.beta2)
    if narrow:
        first_UX = _round_bf16(first_UX, index_U, taken_U, salt, high=False)
        second_UX = _round_bf16(second_UX, index_U, taken_U, salt, high=True)
    rows_UX = rows_UX * decay_U1 - _update(first_UX, second_UX, rate_U1, scale_U1, steps.eps)
    return rows_UX, first_UX, second_UX


def _update(first: Tensor, second: Tensor, rate: Tensor | float, scale: Tensor, eps: float) -> Tensor:
    # torch's fp32 square root may be a bit off (MKL); the fp64 one, rounded, is the fp32 root that hardware computes.
    return rate * first / (second.double().sqrt().float() * scale + _f32(eps))


def _still(rows_UX: Tensor, first_UX: Tensor, second_UX: Tensor, taken_U: Tensor, steps: Steps) -> Tensor:
    """Without a gradient |m| never grows (a product with beta1 rounds monotonely, and so does bf16), the divisor
    sqrt(v) scale + eps is never below eps while v is finite, and quotient and difference round monotonely: what leaves
    p as it is now at the rate withstood, divided by eps alone, leaves it so in every later step, for any betas."""
    decay_U1 = _constants(taken_U, steps)[2]
    # Matrices, as torch may divide by a number otherwise than by a tensor.
    most_11, eps_11 = (torch.tensor([[number]], device=rows_UX.device) for number in (steps.withstood, steps.eps))
    still_UX = (rows_UX - most_11 * first_UX / eps_11 == rows_UX) & (second_UX < torch.inf)
    return still_UX.all(1) & (decay_U1[:, 0] == 1)


def _f32(number: float) -> float:
    """number as fp32 sees it: torch multiplies an fp32 tensor by a Python float rounded to fp32."""
    return torch.tensor(number, dtype=torch.float32).item()


def _round_bf16(values_UX: Tensor, index_U: Tensor, taken_U: Tensor, salt: int, high: bool) -> Tensor:
    """values rounded to bf16, up or down by a hash of place, step and salt so that the mean is exact: rounding to
    nearest would never let v decay by 0.1 %. Returns fp32."""
    width = values_UX.shape[1]
    place = index_U[:, None] * width + torch.arange(width, device=values_UX.device)
    x = ((place * 0x9E3779B1) & _U32) ^ ((taken_U.long()[:, None] * 0x85EBCA6B) & _U32) ^ (salt & _U32)
    x = (((x ^ (x >> 16)) & _U32) * 0x7FEB352D) & _U32
    x = (((x ^ (x >> 15)) & _U32) * 0x846CA68B) & _U32
    x = x ^ (x >> 16)
    noise = (x >> 16) if high else (x & 0xFFFF)
    bits = ((values_UX.view(torch.int32).long() & _U32) + noise) & 0xFFFF0000
    rounded_UX = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    return torch.where(values_UX.isnan(), values_UX, rounded_UX)


_U32 = 0xFFFFFFFF
