"""Large host memory in huge pages: rows are read in random order, and most of a small page's cost is finding it."""

import ctypes
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HUGE, _ADVICE = 1 << 21, 14  # bytes of a huge page; MADV_HUGEPAGE
_FENCE = threading.Lock()


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, on a Linux host in huge pages where it is large and the system lends them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    advise(tensor)
    return tensor


def advise(tensor: Tensor) -> None:
    """Ask for huge pages for a large tensor in host memory."""
    ask = _madvise()
    if ask is None or type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.nbytes < 2 * _HUGE:
        return
    first = -(-tensor.data_ptr() // _HUGE) * _HUGE
    last = (tensor.data_ptr() + tensor.nbytes) // _HUGE * _HUGE
    ask(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _ADVICE)  # advice: a refusal changes nothing


def zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, as empty()."""
    return empty(shape, dtype, device).zero_()


def fence() -> None:
    """What this thread wrote so far is seen by other processes before what it writes from now on. Locks order memory:
    what stands before the release of one and after the taking of the next stays there, on every processor."""
    for _ in range(2):
        with _FENCE:
            pass


@cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def is_half(tensor: Tensor, buffer_R2D: Tensor, half: int) -> bool:
    """Whether a tensor [R, D] is this half of the buffer's rows, in the same memory."""
    width = buffer_R2D.shape[2]
    return (
        tensor.device == buffer_R2D.device
        and tensor.dtype == buffer_R2D.dtype
        and tensor.untyped_storage()._cdata == buffer_R2D.untyped_storage()._cdata
        and tensor.storage_offset() == half * width
        and tensor.stride() == (2 * width, 1)
    )
