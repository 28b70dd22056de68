"""MEFT's native host kernels in the simulation: one operation each, where plain torch would be several.

The kernels are called through ctypes, which no dispatch mode sees and which fake tensors have no memory for. Inside
host_kernels() they are torch operations of the same names ("meft_rows"): on fake tensors they make shapes, on real ones
they run the kernel, and costs.py knows what each moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meft_bench.meft.engine import native

NAMESPACE = "meft_rows"
_SCHEMAS = (
    "gather(Tensor rows, Tensor index, Tensor(a!) out) -> ()",
    "accumulate(Tensor(a!) sums, Tensor index, Tensor source, Tensor filled, Tensor(b!) squares) -> ()",
    "squares(Tensor rows, Tensor(a!) sums) -> ()",
    "zero(Tensor(a!) sums, Tensor index) -> ()",
    "advance(Tensor(a!) rows, Tensor(b!) first, Tensor(c!) second, Tensor(d!) done, Tensor(e!) settled, Tensor? grads, "
    "Tensor index) -> ()",
    "search(Tensor h, Tensor keys, Tensor experts, int size, int kept) -> (Tensor, Tensor)",
)


@cache
def _operations() -> Any:
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        if name != "search":
            torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::search", _search_shapes, lib=library)
    library.impl("gather", native.gather, "CPU")
    library.impl("accumulate", native.accumulate, "CPU")
    library.impl("squares", native.squares, "CPU")
    library.impl("zero", native.zero, "CPU")
    library.impl("advance", _advance_real, "CPU")
    library.impl("search", _search_real, "CPU")
    return library, torch.ops.meft_rows


def _search_shapes(h: Tensor, keys: Tensor, experts: Tensor, size: int, kept: int) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape[0], kept, dtype=torch.int64), h.new_empty(h.shape[0], kept)


_given: dict[str, tuple] = {}
"""What a real call needs beyond tensors that cost anything; written just before the operation runs."""
_real_advance, _real_search, _real_fits = native.advance, native.search_experts, native.fits


def _advance_real(*_: Any) -> None:
    _real_advance(*_given["advance"])


def _search_real(*_: Any) -> tuple[Tensor, Tensor]:
    return _real_search(*_given["search"])


@contextmanager
def host_kernels() -> Iterator[None]:
    """Inside, the kernels of native.py are visible operations, on fake host tensors too."""
    library, ops = _operations()

    def fits(*tensors: Tensor | None) -> bool:
        given = [t for t in tensors if t is not None]
        fake = [isinstance(t, FakeTensor) for t in given]
        return all(t.device.type == "cpu" for t in given) if all(fake) else _real_fits(*tensors)

    def advance(state: Any, grads_RX: Tensor | None, index_U: Tensor, *rest: Any) -> None:
        _given["advance"] = (state, grads_RX, index_U, *rest)
        ops.advance(state.rows_RX, state.first_RX, state.second_RX, state.done_R, state.still_R, grads_RX, index_U)

    def search(
        h: Tensor, keys: Tensor, scales: Any, experts: Tensor, gates: Any, size: int, kept: int, relu: bool
    ) -> Any:
        _given["search"] = (h, keys, scales, experts, gates, size, kept, relu)
        return ops.search(h, keys, experts, size, kept)

    with native.standing_in(
        fits=fits,
        fits_products=lambda *_: False,  # the adapter's own products are the device's work, which is no processor here
        gather=ops.gather,
        accumulate=ops.accumulate,
        squares=ops.squares,
        zero=ops.zero,
        advance=advance,
        search_experts=search,
    ):
        yield
