"""The simulated GPU as a torch device, "simgpu": tensors on it have shapes and dtypes but no data.

It is a PrivateUse1 device implemented in Python (no compiled code, no change to torch's binaries) under FakeTensorMode.
What a machine without CUDA would do otherwise than one with it, and nobody would notice, is put right here: attention
takes the kernel that CUDA would choose, `is_cuda` is true, foreach kernels are taken, two storages never share an
address, page-locked memory is known as such, host queues are in the background as on a GPU (each task runs where it is
submitted, as one thread follows all), and transformers does not believe it is being traced. Autocast, which has no
rules for this device, raises by itself.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils as foreach_utils

from meft_bench.meft.engine.workers import at_once

NAME = "simgpu"
_aten = torch.ops.aten
_library: torch.library.Library | None = None


class _Backend:
    """What torch asks of a device's module (torch.simgpu)."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Make "simgpu" a device of this process; later calls do nothing.

    Raises RuntimeError when this torch lacks what the simulation stands on, or another PrivateUse1 device is there.
    """
    global _library
    if _library is not None:
        return
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
    except ImportError:
        raise RuntimeError(
            f"torch {torch.__version__} has no Python backends for PrivateUse1 devices, which the simulated GPU needs: "
            "install torch 2.11 or newer"
        ) from None
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise RuntimeError(f"this process already uses the device {taken!r}: run the simulation in its own process")
    setup(NAME, backend_module=_Backend())
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("scaled_dot_product_attention", _attention_as_on_cuda, "AutogradPrivateUse1")
    _library.impl("silu_backward", _silu_backward_as_on_cuda, "AutogradPrivateUse1")


@contextlib.contextmanager
def simulated_gpu() -> Iterator[FakeTensorMode]:
    """Inside, tensors on "simgpu" and on "cpu" are fake: shapes, dtypes and devices are right, data is absent."""
    import transformers.masking_utils
    import transformers.utils.import_utils

    register()
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object  # raises AttributeError, loudly, when a name is gone from torch or transformers
        stack.enter_context(patch(FakeTensor, "is_cuda", property(_is_cuda), create=True))
        stack.enter_context(patch(FakeTensor, "data_ptr", _address))
        stack.enter_context(patch(torch.utils, "swap_tensors", _swap_tensors))
        stack.enter_context(patch(FakeTensor, "is_pinned", _is_page_locked, create=True))
        # Gradient norms and optimizers go one tensor at a time when they do not know a tensor's type.
        for owner in (foreach_utils, torch_optimizer):
            known = owner._foreach_supported_types
            stack.enter_context(patch(owner, "_foreach_supported_types", [*known, FakeTensor]))
        # transformers takes another path through its attention masks when it believes it is traced.
        for module in (transformers.masking_utils, transformers.utils.import_utils):
            stack.enter_context(patch(module, "is_tracing", lambda *_: False))
        # torch.tensor(1.0, device=...) and x[[0, 1]] make a host tensor and move it. Where torch believes that the
        # device has kernels, it moves the data itself below every mode.
        stack.enter_context(patch(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(at_once())
        fakes = stack.enter_context(_Fakes())
        _check_backward()
        yield fakes


@functools.cache
def _check_backward() -> None:
    """Raises RuntimeError where torch's backward passes began before the device was there: they never learn of it."""
    try:
        torch.ones((), device=NAME, requires_grad=True).backward()
    except RuntimeError as error:
        raise RuntimeError(
            "this process ran a backward pass before the simulated GPU was there: run the simulation in its own process"
        ) from error


def _is_cuda(tensor: Tensor) -> bool:
    return tensor.device.type in (NAME, "cuda")


def _address(tensor: Tensor) -> int:
    """A number that two tensors share exactly when they share storage and offset."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


class _Fakes(FakeTensorMode):
    """Absent memory cannot be locked; what asked for page-locked memory remembers that it did."""

    def dispatch(self, func, types, args=(), kwargs=None):
        out = super().dispatch(func, types, args, kwargs)
        if kwargs and kwargs.get("pin_memory"):
            out.untyped_storage().page_locked = True
        return out


def _is_page_locked(tensor: Tensor, device: Any = None) -> bool:
    return getattr(tensor.untyped_storage(), "page_locked", False)


def _swap_tensors(one: Tensor, other: Tensor, inner: Any = torch.utils.swap_tensors) -> None:
    # The converter's memo holds weak references, which torch refuses to swap.
    for tensor in (one, other):
        if isinstance(tensor, FakeTensor):
            tensor.fake_mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
    inner(one, other)


def _attention_as_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by the kernel CUDA takes (sdp_utils.cpp: flash, then memory-efficient, then math).

    q, k, v [B, heads, length, head size]. A machine without CUDA has only the math kernel for an unknown device, which
    keeps the length x length scores that flash attention never stores.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and half and q.size(-1) <= 256:
        pad = -q.size(-1) % 8
        scale = scale if scale is not None else 1 / math.sqrt(q.size(-1))
        if pad:
            q, k, v = (torch.nn.functional.pad(t, (0, pad)) for t in (q, k, v))
        out = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., : out.size(-1) - pad] if pad else out
    if q.dtype == torch.float64 or (enable_gqa and q.size(-3) != k.size(-3)):
        return _aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        attn_mask = _as_bias(attn_mask, q, k)
    keep_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return _aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, keep_sums, dropout_p, is_causal, scale=scale
    )[0]


def _silu_backward_as_on_cuda(grad_output: Tensor, self: Tensor) -> Tensor:
    """One kernel that reads both and writes one, as CUDA's; an unknown device gets eight. threshold_backward moves the
    same bytes."""
    return _aten.threshold_backward(grad_output, self, 0)


def _as_bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A boolean mask becomes a bias of q's dtype, its last axis padded to 16 bytes, as the memory-efficient kernel
    asks."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -math.inf)
    step, length = 16 // mask.element_size(), mask.size(-1)
    if length % step:
        mask = torch.nn.functional.pad(mask, (0, step - length % step))[..., :length]
    return mask.expand(q.size(0), q.size(1), q.size(2), k.size(2))
