"""AdamW of rows on a GPU where torch has no fused kernel for it: rows that count their own steps, and bf16 moments.

A GPU waits for its memory here, so what counts is how often each number is read and written. The update is that of
adamw.made_step, to rounding; bf16 moments are rounded up or down by chance as there, but by noise that needs no hash of
each element. Waits for nothing.
"""

import torch
from torch import Tensor

from meft_bench.meft.engine import adamw

_U32, _LOW = 0xFFFFFFFF, 0xFFFF


def advance(
    weights_MD: Tensor,
    first_MD: Tensor,
    second_MD: Tensor,
    grads_MD: Tensor,
    steps: adamw.Steps,
    taken_M: Tensor,
    rates: tuple[float | Tensor, float | Tensor, float],
    marked_M: Tensor | None,
    numbers_M: Tensor,
    salt: int,
) -> None:
    """One step, in place: fp32 weights, moments in fp32 or bf16, fp32 gradients. rates: rate, scale and decay of
    adamw.Steps.table, the first two perhaps [M, 1]. marked_M: the rows that make it (bool), None for all; others have
    no gradient. taken_M: the number of each row's step, numbers_M the row's own; with salt they decide how bf16 is
    rounded."""
    rate, scale, decay = rates
    beta1: float | Tensor = steps.beta1
    beta2: float | Tensor = steps.beta2
    divided = scale / rate if isinstance(rate, Tensor) or rate else torch.inf
    if marked_M is not None:
        # Chosen, not multiplied: what others hold may be no number.
        marked_M1 = marked_M[:, None]
        grads_MD = torch.where(marked_M1, grads_MD, 0.0)
        beta1, beta2 = (torch.where(marked_M1, beta, 1.0) for beta in (beta1, beta2))
    narrow = first_MD.dtype == torch.bfloat16
    first, second = (first_MD.float(), second_MD.float()) if narrow else (first_MD, second_MD)
    first.mul_(beta1).add_(grads_MD, alpha=1 - steps.beta1)
    second.mul_(beta2).addcmul_(grads_MD, grads_MD, value=1 - steps.beta2)
    if narrow:
        first = _rounded(first, numbers_M, taken_M, salt, high=False)
        second = _rounded(second, numbers_M, taken_M, salt, high=True)
        if marked_M is not None:  # nothing was added, and nothing is rounded again: bf16 stays as it is
            first, second = (torch.where(marked_M1, n, o) for n, o in ((first, first_MD), (second, second_MD)))
        first_MD.copy_(first)
        second_MD.copy_(second)
    if decay != 1:
        weights_MD.mul_(decay if marked_M is None else torch.where(marked_M1, decay, 1.0))
    # rate * m / (sqrt(v) * scale + eps), the divisor over the rate.
    divisor = second.sqrt().add_(steps.eps / scale).mul_(divided)
    if marked_M is not None:
        divisor = torch.where(marked_M1, divisor, torch.inf)
    weights_MD.addcdiv_(first, divisor, value=-1)


def _rounded(values_MD: Tensor, numbers_M: Tensor, taken_M: Tensor, salt: int, high: bool) -> Tensor:
    """values, which may be written, rounded to bf16 as fp32. The noise is a number of the row and its step and one of
    the column, added modulo 2^16: as likely to be any number for each element, and independent for any two rows."""
    salt = 2 * salt + high
    columns = torch.arange(values_MD.shape[1], device=values_MD.device)
    rows_M1 = _mixed(_mixed(numbers_M * 0x9E3779B1 ^ salt) ^ taken_M.long() * 0x85EBCA6B)[:, None]
    columns_D = _mixed(columns * 0x9E3779B1 ^ ~salt)
    noise_MD = ((rows_M1 & _LOW).int() + (columns_D & _LOW).int()).bitwise_and_(_LOW)
    bits_MD = noise_MD.add_(values_MD.view(torch.int32)).bitwise_and_(~_LOW)
    # The noise may carry a NaN's bits away.
    return torch.where(values_MD == values_MD, bits_MD.view(torch.float32), values_MD)


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits; int64."""
    x = x & _U32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _U32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _U32
    return x ^ (x >> 16)
