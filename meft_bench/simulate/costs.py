"""Work of one operation: multiply-adds and bytes, from shapes; and what a kernel keeps to itself while it runs."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def work(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[int, int, bool, Tensor | None]:
    """(floating-point operations, bytes read and written, half precision, a tensor that tells where) of an operation;
    (0, 0, ...) for views and for memory that is asked for and not written."""
    outs, ins = tensors_in(out), tensors_in((args, kwargs))
    tensors = [*outs, *ins]
    where = next((t for t in tensors if t.dim()), tensors[0] if tensors else None)
    if _is_view(func) or func.overloadpacket in _FREE or where is None:
        return 0, 0, False, where
    half = where.dtype in _HALF
    written = _written(func, args, kwargs, outs)
    special = _BYTES.get(func) or _kernel(func, _KERNEL_BYTES)
    moved = special(args, outs) if special else _streamed(func, ins, written)
    counted, own = flop_registry.get(func.overloadpacket), _FLOPS.get(func) or _kernel(func, _KERNEL_FLOPS)
    if own:
        flops = own(args)
    else:
        flops = counted(*args, **kwargs, out_val=out) if counted else sum(t.numel() for t in written)
    return flops, moved, half, where


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of an operation's arguments or results, in order: they nest in tuples, lists and dictionaries alone.
    torch's pytree, which knows every container, would be a good part of a simulation's time."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors_in(part)]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    return []


def _is_view(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and bool(schema.returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )  # fmt: skip


def _written(func: Any, args: tuple, kwargs: dict[str, Any], outs: list[Tensor]) -> list[Tensor]:
    """What the operation writes: what it returns, or, where it returns nothing, what its schema says it changes."""
    if outs or not func._schema.is_mutable:
        return outs
    declared = func._schema.arguments
    named = {**dict(zip((a.name for a in declared), args, strict=False)), **kwargs}
    changed = [named.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]
    return tensors_in(changed)


def _streamed(func: Any, ins: list[Tensor], written: list[Tensor]) -> int:
    total = sum(_read(t) for t in [*ins, *written])
    if func in _OVERWRITES or any(a.is_out for a in func._schema.arguments):
        total -= sum(_read(t) for t in written)  # the old values are not read
    return total


def _read(tensor: Tensor) -> int:
    # An expanded axis is read once.
    return tensor.element_size() * math.prod(
        n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s or n == 1
    )


def _gathered(args: tuple, outs: list[Tensor]) -> int:
    """Reads as many rows as it writes."""
    return 2 * sum(_read(t) for t in outs)


def _scattered(args: tuple, outs: list[Tensor]) -> int:
    """self.index_add_(dim, index, source): reads source, reads and writes as much of self."""
    return 3 * _read(args[3])


def _copied_into(args: tuple, outs: list[Tensor]) -> int:
    """self.index_copy_(dim, index, source): reads source and index, writes as much of self."""
    return 2 * _read(args[3]) + _read(args[2])


def _filled(args: tuple, outs: list[Tensor]) -> int:
    """self.index_fill_(dim, index, value): reads index, writes so many rows of self."""
    target, dim, index = args[:3]
    return _read(index) + index.numel() * _read(target) // max(1, target.shape[dim])


def _placed(args: tuple, outs: list[Tensor]) -> int:
    """self.index_put_(indices, values): reads indices and values, writes as many values."""
    indices = [i for i in args[1] if i is not None]
    places = max((i.numel() for i in indices), default=0)
    return sum(_read(i) for i in indices) + 2 * places * args[0].element_size()


def _row_dots(args: tuple, outs: list[Tensor]) -> int:
    """x . row for every chosen pair: rows that many tokens chose come from cache."""
    x, rows, chosen = args[:3]
    return _read(x) + min(chosen.numel(), rows.shape[0]) * rows.shape[1] * rows.element_size() + 4 * chosen.numel()


def _adam(args: tuple, outs: list[Tensor]) -> int:
    """Reads parameters, gradients and moments, writes all but the gradients."""
    parameters, gradients, *moments = args[:5]
    return sum(2 * _read(t) for group in (parameters, *moments) for t in group) + sum(_read(t) for t in gradients)


_FREE = {
    _aten._unsafe_view,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
_OVERWRITES = {
    _aten.copy_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.zero_.default,
    _aten._foreach_copy_.default,
    _aten._foreach_zero_.default,
}
_BYTES = {
    _aten.index_select.default: _gathered,
    _aten.index.Tensor: _gathered,
    _aten.gather.default: _gathered,
    _aten.embedding.default: _gathered,
    _aten.index_add_.default: _scattered,
    _aten.index_copy_.default: _copied_into,
    _aten.index_fill_.int_Scalar: _filled,
    _aten.index_put_.default: _placed,
    _aten._index_put_impl_.default: _placed,
    _aten._embedding_bag_per_sample_weights_backward.default: _row_dots,
    _aten._fused_adamw_.default: _adam,
    _aten._fused_adam_.default: _adam,
}
_FLOPS = {
    # Every element is compared, whatever few are kept.
    _aten.topk.default: lambda a: a[0].numel(),
    _aten.nonzero.default: lambda a: a[0].numel(),
    _aten.index_put_.default: lambda a: max((i.numel() for i in a[1] if i is not None), default=0),
    _aten._embedding_bag_per_sample_weights_backward.default: lambda a: 2 * a[2].numel() * a[1].shape[1],
}


# ---- MEFT's host kernels (host_kernels.py): what they move of the rows they are told, not of all; and the one-pass
# kernels of optimizers on the host (profile/host_adamw.py) ----


def _rows_of(index: Tensor, rows: Tensor) -> int:
    """Elements of the indexed rows."""
    return index.numel() * rows.shape[1:].numel()


def _advanced(args: tuple, outs: list[Tensor]) -> int:
    """Reads and writes p, m and v, and reads the gradient where there is one."""
    rows, first, second, _, _, grads, index = args
    item = 2 * (rows.element_size() + first.element_size() + second.element_size())
    return _rows_of(index, rows) * (item + (grads.element_size() if grads is not None else 0))


def _searched(args: tuple, outs: list[Tensor]) -> int:
    """Each probed key once, and the hidden states."""
    h, keys, experts, size, _ = args
    scored = min(keys.shape[0], experts.numel() * size)
    return _read(h) + scored * keys.shape[1] * keys.element_size()


_KERNEL_BYTES = {
    "gather": lambda a, _: _rows_of(a[1], a[0]) * (a[0].element_size() + a[2].element_size()),
    # A row's first gradient of a window is written, not added.
    "accumulate": lambda a, _: _rows_of(a[1], a[0]) * (a[0].element_size() + a[2].element_size()),
    "squares": lambda a, _: a[0].nbytes,
    "zero": lambda a, _: _rows_of(a[1], a[0]) * a[0].element_size(),
    "advance": _advanced,
    "drift": _advanced,
    "search": _searched,
    "adamw": lambda a, _: 2 * sum(_read(t) for t in a[:3]) + _read(a[3]) + _read(a[4]),
    "add_gradient": lambda a, _: (1 if a[2] else 2) * _read(a[0]) + _read(a[1]),
}
_KERNEL_FLOPS = {
    "gather": lambda a: 0,
    "accumulate": lambda a: _rows_of(a[1], a[0]),
    "squares": lambda a: 2 * a[0].numel(),
    "zero": lambda a: 0,
    "advance": lambda a: 12 * _rows_of(a[6], a[0]),
    "drift": lambda a: 12 * _rows_of(a[6], a[0]),
    "adamw": lambda a: 12 * a[0].numel(),
    "add_gradient": lambda a: a[0].numel(),
    "search": lambda a: 2 * a[2].numel() * a[3] * a[1].shape[1],
}


def _kernel(func: Any, table: dict[str, Any]) -> Any:
    return table.get(func._opname) if func.namespace in ("meft_rows", "meft_peers") else None


def hidden_bytes(func: Any, args: tuple) -> int:
    """Device bytes that a CUDA kernel allocates and frees within itself."""
    formula = _HIDDEN.get(func)
    return formula(args) if formula else 0


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _flash_backward(args: tuple) -> int:
    # flash_api.cpp, mha_bwd: fp32 dq accumulator and row sums; expanded dk and dv for grouped-query attention.
    q, k = args[1], args[2]
    batch, heads, length, width = q.shape
    rounded = _up(length, 128)
    total = batch * heads * rounded * (_up(width, 32) + 1) * 4
    if k.shape[1] != heads:
        total += 2 * batch * k.shape[2] * heads * width * q.element_size()
    return total


def _efficient_backward(args: tuple) -> int:
    # fp32 row sums and dq accumulator, an upper bound: the accumulator depends on the kernel chosen.
    batch, heads, length, width = args[1].shape
    return batch * heads * (length + _up(length, 64) * width) * 4


_HIDDEN = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
