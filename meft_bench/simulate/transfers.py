"""Which operations move data between host and device, and how many bytes the copy kernel moves for each.

After ATen/native/cuda/Copy.cu: a blocking copy that changes the dtype converts on the host, so what crosses has the
device side's dtype; a non-blocking one converts on the device, which then holds a temporary of the host side's dtype.
Not seen: memcpy inside C++ extensions, UntypedStorage.copy_, unified memory.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from meft_bench.simulate.costs import tensors_in

_aten = torch.ops.aten
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
)
_WAITS = (_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.nonzero.default, _aten._unique2.default,
          _aten.masked_select.default)  # fmt: skip

_LIKE = (_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default,
         _aten.new_empty.default, _aten.new_zeros.default)  # fmt: skip
"""These read a shape and no data."""


class Copy(NamedTuple):
    """One crossing: direction "h2d" or "d2h", bytes, whether the host waits, and a temporary on the device."""

    direction: str
    bytes: int
    blocking: bool
    temporary_bytes: int = 0


def copies(func: Any, args: tuple, kwargs: dict[str, Any], out: Any, device: str) -> list[Copy]:
    """The crossings of one finished operation. Raises RuntimeError for one whose tensors straddle host and device in a
    way that real hardware would refuse or that is not counted here."""
    if func is _aten.copy_.default:
        return _one(args[1], args[0], _flag(args, kwargs, 2), device)
    if func is _aten._to_copy.default:
        return _one(args[0], out, bool(kwargs.get("non_blocking")), device)
    if func is _aten._foreach_copy_.default:
        flag = _flag(args, kwargs, 2)
        return [c for to, source in zip(args[0], args[1], strict=True) for c in _one(source, to, flag, device)]
    if func in _WAITS:
        on_device = args[0].device.type == device
        size = args[0].element_size() if func is _aten._local_scalar_dense.default else 8
        return [Copy("d2h", size, True)] if on_device else []
    if func in _INDEXING and args[0].device.type == device:
        return [c for index in args[1] if index is not None for c in _index(index, device)]
    _refuse_straddling(func, args, kwargs, out, device)
    return []


def _flag(args: tuple, kwargs: dict[str, Any], place: int) -> bool:
    return bool(args[place] if len(args) > place else kwargs.get("non_blocking", False))


def _one(source: Tensor, target: Tensor, non_blocking: bool, device: str) -> list[Copy]:
    if (source.device.type == device) == (target.device.type == device):
        return []
    direction = "h2d" if target.device.type == device else "d2h"
    on_device, on_host = (target, source) if direction == "h2d" else (source, target)
    temporary = 0
    crossing = on_device
    if source.dtype != target.dtype and non_blocking:
        crossing = on_host
        temporary = source.numel() * crossing.element_size()
    size = source.numel() * crossing.element_size()
    if not on_device.is_contiguous() and on_device.stride() != on_host.stride():
        temporary = max(temporary, size)  # strided data is packed before it crosses
    return [Copy(direction, size, not non_blocking, temporary)]


def _index(index: Tensor, device: str) -> list[Copy]:
    if index.device.type != device:
        return [Copy("h2d", index.numel() * index.element_size(), True)]
    return [Copy("d2h", 8, True)] if index.dtype == torch.bool else []


def _refuse_straddling(func: Any, args: tuple, kwargs: dict[str, Any], out: Any, device: str) -> None:
    if func in _LIKE or func is torch.ops.prim.device.default:
        return
    # Zero-dimensional host tensors may meet device tensors: they travel as kernel arguments.
    tensors = [t for t in tensors_in((args, kwargs, out)) if t.dim()]
    if len({t.device.type == device for t in tensors if t.device.type != "meta"}) > 1:
        raise RuntimeError(f"{func} mixes host and device tensors: its transfer is not counted")
