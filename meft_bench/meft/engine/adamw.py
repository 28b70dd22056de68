"""AdamW on rows, whose steps are made when they are due or later, several at once. Plain torch, and a native kernel of
the same bits where it fits; names and shapes as in kernels.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meft_bench.meft.engine import native


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
        if _f32(steps.eps) > 0 and bool((steps.table[:, 2] == 1).all()):
            # Without weight decay a row that never had a gradient has missed nothing: 0 / eps, where that is a number.
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
