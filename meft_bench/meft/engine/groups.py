"""Rows quantised by group, for inference from host memory: int4 or int8 in groups of 32, as arXiv 2311.00502 has it.

A group is 32 neighbouring numbers of a key or of a value. It holds its scale (bf16, 2 bytes), then their codes: int8,
or int4 two to a byte, number j of the group in the low half of byte j and number j + 16 in the high half, both plus 8.
A number is code * scale, within half a scale of what it was. A row's groups lie side by side, the key's before the
value's, so a neuron stays one contiguous row. R neurons, U of them gathered, H halves of a row, D hidden size, B bytes.
"""

import torch
from torch import Tensor

from meft_bench.meft.engine import memory, native

GROUP = 32
BITS = {"int8": 8, "int4": 4}
"""Name of a format -> bits of a code."""
_MOST = {8: 127, 4: 7}
_SCALE_BYTES = 2
_ROWS_AT_ONCE = 1024


def half_bytes(width: int, bits: int) -> int:
    """Bytes of a key, or of a value, of this width: ceil(D / 32) groups of 2 + 4 bits bytes."""
    return -(-width // GROUP) * _group_bytes(bits)


def _group_bytes(bits: int) -> int:
    return _SCALE_BYTES + GROUP * bits // 8


def quantise(rows_RHD: Tensor, bits: int) -> Tensor:
    """Rows (fp32 [R, H, D], in host memory) as uint8 [R, B], B = H half_bytes(D). The last group of a half is filled up
    with zeros."""
    neurons, halves, width = rows_RHD.shape
    made_RB = memory.empty((neurons, halves * half_bytes(width, bits)), torch.uint8, rows_RHD.device)
    for some, into in zip(rows_RHD.split(_ROWS_AT_ONCE), made_RB.split(_ROWS_AT_ONCE), strict=True):
        into.copy_(_quantised(some, bits))
    return made_RB


def _quantised(rows_RHD: Tensor, bits: int) -> Tensor:
    short = -rows_RHD.shape[2] % GROUP
    groups_RG32 = torch.nn.functional.pad(rows_RHD, (0, short)).reshape(rows_RHD.shape[0], -1, GROUP)
    most = _MOST[bits]
    scales_RG1 = (groups_RG32.abs().amax(2, keepdim=True) / most).to(torch.bfloat16)
    # A scale that was rounded down leaves the largest number a quarter of a step beyond the last code, at most.
    codes_RG32 = (groups_RG32 / scales_RG1.float()).nan_to_num(0.0).round().clamp(-most, most).to(torch.int8)
    if bits == 4:
        low, high = (codes_RG32 + 8).view(torch.uint8).split(GROUP // 2, dim=2)
        codes_RG32 = low | (high << 4)
    return torch.cat([scales_RG1.view(torch.uint8), codes_RG32.view(torch.uint8)], dim=2).flatten(1)


def gather(blocks_RB: Tensor, index_U: Tensor, out_UHD: Tensor, bits: int) -> Tensor:
    """out[u] = the first H halves of row index[u], as numbers in out's dtype (fp32, bf16 or fp16, contiguous)."""
    if native.fits(blocks_RB, index_U, out_UHD):
        native.gather_groups(blocks_RB, index_U, out_UHD, bits)
        return out_UHD
    return gather_torch(blocks_RB, index_U, out_UHD, bits)


def gather_torch(blocks_RB: Tensor, index_U: Tensor, out_UHD: Tensor, bits: int) -> Tensor:
    """gather in plain torch."""
    union, halves, width = out_UHD.shape
    taken_UB = blocks_RB[:, : halves * half_bytes(width, bits)].index_select(0, index_U)
    groups = taken_UB.reshape(union, halves, -(-width // GROUP), _group_bytes(bits))
    scales = groups[..., :_SCALE_BYTES].contiguous().view(torch.bfloat16).float()
    codes = groups[..., _SCALE_BYTES:].contiguous()
    if bits == 4:
        numbers = torch.cat([codes & 15, codes >> 4], dim=3).float() - 8
    else:
        numbers = codes.view(torch.int8).float()
    return out_UHD.copy_((numbers * scales).flatten(2)[..., :width])
