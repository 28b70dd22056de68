"""The parameters that everybody sees. Rows may have been left behind by the optimizer, work on them may be queued, and
gradients may wait on the device: whoever uses a parameter finds it as if none of that existed.
"""

import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

Function = TypeVar("Function", bound=Callable[..., Any])


class Owner(Protocol):
    """What a parameter asks of its NeuronStore."""

    def lend_out(self) -> None:
        """Bring every row up to date; somebody is about to read or write them."""

    def lend_gradients(self) -> None:
        """Bring every gradient where .grad shows it; somebody is about to use it, and may keep it."""

    def finish_queued(self) -> None:
        """Wait for work in the background; what is trained is about to change."""


class RowsParameter(nn.Parameter):
    """keys, values or router of a NeuronStore as a parameter of the model.

    Any torch function of it, reading or writing, first makes the steps that its rows have missed and waits for queued
    work, whenever and however the parameter was got hold of; .grad first fetches gradients that wait on the device.
    What .data or .detach() gave before a step is memory as it stands then: take it anew. The engine itself works below
    this (engine()).
    """

    owner: "weakref.ref[Owner] | None" = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _TRAINED:
                # Queued gradients and steps are of what was trained when they were queued.
                for store in _owners(args):
                    store.finish_queued()
            elif func not in ABOUT:
                for store in _owners([*args, *(kwargs or {}).values()]):
                    if func in _GRADIENT:
                        store.lend_gradients()
                    else:
                        store.lend_out()
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())  # type: ignore[attr-defined]


def bind(parameter: nn.Parameter, store: Owner) -> None:
    """Make parameter, in place, one of store. A tensor that only pretends (a simulated one) is left as it is."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = RowsParameter
    if type(parameter) is RowsParameter and (parameter.owner is None or parameter.owner() is not store):
        parameter.owner = weakref.ref(store)


def engine(function: Function) -> Function:
    """For the engine's own functions: inside, parameters are plain tensors that show memory as it stands;
    torch.inference_mode is off, as what is made in it could not be written or trained with after it; and autocast is
    off, which would make single products in another dtype than those that they are added to."""

    @functools.wraps(function)
    def below(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            casting = [device for device in _AUTOCAST if torch.is_autocast_enabled(device)]
            if not casting and not torch.is_inference_mode_enabled():
                return function(*args, **kwargs)
            with contextlib.ExitStack() as plain:
                for device in casting:
                    plain.enter_context(torch.autocast(device, enabled=False))
                if torch.is_inference_mode_enabled():
                    plain.enter_context(torch.inference_mode(False))
                    plain.enter_context(torch.no_grad())
                return function(*args, **kwargs)

    return below  # type: ignore[return-value]


_AUTOCAST = ("cpu", "cuda")
"""Devices whose autocast a training loop may have on, for itself (forward passes) or around backward."""


_FLAT_KERNELS = ("deepspeed", "bitsandbytes", "apex", "torchao")


def _refuse_flat_kernels(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused optimizers take a parameter for one block of memory; keys and values are every second row of theirs, and
    would be written over. Raises ValueError before that happens."""
    flat = type(optimizer).__module__.startswith(_FLAT_KERNELS)
    for group in optimizer.param_groups:
        if flat or group.get("fused"):
            if any(not parameter.is_contiguous() for parameter in group["params"]):
                name = type(optimizer).__name__ + ("" if flat else " with fused=True")
                raise ValueError(
                    f"{name} cannot step on MEFT's rows, which share one buffer: use make_optimizer of the model or of "
                    "meft_bench, or fused=False"
                )


register_optimizer_step_pre_hook(_refuse_flat_kernels)


def _owners(values: Iterable[Any]) -> Iterator[Owner]:
    for value in values:
        if type(value) is RowsParameter:
            store = value.owner() if value.owner is not None else None
            if store is not None:
                yield store
        elif isinstance(value, list | tuple):
            yield from _owners(value)


def _found(names: str) -> set[Any]:
    """The functions behind these names of methods and properties of tensors, as __torch_function__ is told them."""
    found: set[Any] = set()
    for name in names.split():
        attribute: Any = getattr(Tensor, name, None)
        found |= {attribute.__get__, attribute.__set__} if hasattr(attribute, "__set__") else {attribute}
    return found


# What tells about a tensor without a look at its numbers.
ABOUT = _found(
    "shape dtype device layout requires_grad is_leaf ndim itemsize nbytes grad_fn _version retains_grad output_nr "
    "is_cuda is_cpu is_meta is_sparse is_sparse_csr is_quantized is_nested is_mps is_xpu is_mkldnn is_ipu is_xla "
    "is_mtia is_maia is_vulkan _backward_hooks _post_accumulate_grad_hooks size dim numel nelement stride "
    "element_size storage_offset is_contiguous is_floating_point is_complex is_signed is_pinned is_shared get_device "
    "dim_order requires_grad_ register_hook register_post_accumulate_grad_hook __len__"
) | {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_signed}
_TRAINED = {Tensor.requires_grad_, getattr(Tensor, "requires_grad").__set__}  # noqa: B009 (as below)
_GRADIENT = _found("grad") | {getattr(Tensor, "grad").__delete__}  # noqa: B009 (the type checker takes it for a tensor)
