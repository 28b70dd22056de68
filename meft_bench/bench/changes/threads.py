"""The threads of a kernel: a pool in C that is woken by one call, against Python's threads, one call into C each."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.engine import kernels, native

_CALLS = 100
_ROWS = 64  # few, as in a small layer: most of the time goes into waking threads


def changes(sizes: Sizes) -> Iterator[Change]:
    """Many small kernels one after another, on torch's number of threads. Nothing where no C kernels are."""
    if native.kernels().elementwise is None:
        return
    rows = min(_ROWS, sizes.neurons)
    sums_RX, index_U = torch.zeros(rows, 2 * sizes.hidden), torch.arange(rows)
    threads = torch.get_num_threads()

    def by_pool() -> None:
        for _ in range(_CALLS):
            kernels.zero(sums_RX, index_U)

    with ThreadPoolExecutor(max(1, threads - 1)) as helpers:

        def by_python() -> None:
            for _ in range(_CALLS):
                _zero(sums_RX, index_U, threads, helpers)

        moved = _CALLS * sums_RX.nbytes
        yield Change(
            name="threads of a kernel: asleep in C, not Python's",
            old=by_python,
            new=by_pool,
            sizes={"calls": _CALLS, "rows": rows, "D": sizes.hidden},
            counts={"bytes written": (moved, moved)},
        )


def _zero(sums_RX: torch.Tensor, index_U: torch.Tensor, threads: int, helpers: ThreadPoolExecutor) -> None:
    """kernels.zero as it was: each helper is given to Python's pool, and withdrawn where it has not begun."""
    count, taken = index_U.shape[0], ctypes.c_int64(0)
    # As elementwise.c's Zero has it.
    about = (ctypes.c_int64 * 4)(sums_RX.data_ptr(), index_U.data_ptr(), sums_RX.stride(0), sums_RX.shape[1])
    grain = max(1, count // (8 * threads)) if threads > 1 else count
    call: tuple[Any, ...] = (ctypes.byref(about), ctypes.c_int64(count), ctypes.c_int64(grain), ctypes.byref(taken))
    kernel = native.kernels().elementwise.zero
    others = [helpers.submit(kernel, *call) for _ in range(threads - 1)]
    kernel(*call)
    for other in others:
        if not other.cancel():
            other.result()
