"""Native kernels behind kernels.py and groups.py (elementwise.c) and products.py (products.c), built with the machine's
C compiler and loaded with ctypes.

`python -m meft_bench.meft.engine.native` builds them (set-up does), else the first use does. The instruction set is
that of the processor at run time, not of the one they were built on: each set has its own file in the cache. Without a
compiler everything works through plain torch, and one warning says so. MEFT_BENCH_KERNELS=torch asks for that.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from meft_bench.meft.engine import kernel_cache

_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-Wno-psabi")
# Element-wise kernels round every product and sum, as torch does; dot products may fuse them.
_SOURCES = {"elementwise": "-ffp-contract=off", "products": "-ffp-contract=fast"}
_LEVELS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_PLAIN = (Tensor, Parameter)
_DTYPES = {*_KINDS, torch.int64, torch.int32, torch.uint8, torch.bool}
_INLINE_BYTES = 1 << 18  # below this a second thread costs more than it saves
_LARGE_BYTES = 1 << 24  # outputs above this leave the caches before anybody reads them
_CHUNKS = 8  # per thread, so that a late thread does not hold up the others
_log = logging.getLogger(__name__)
_off = threading.local()


@dataclass(frozen=True)
class Kernels:
    """The loaded libraries, or why there are none."""

    elementwise: Any
    products: Any
    level: str
    text: str
    place: str = ""
    """The folder they were loaded from, and why it is not the usual one."""


def status() -> str:
    """One line for `meft-bench doctor`: what computes on the host."""
    return kernels().text


@contextmanager
def without_kernels() -> Iterator[None]:
    """Plain torch inside, on this thread."""
    before, _off.now = getattr(_off, "now", False), True
    try:
        yield
    finally:
        _off.now = before


@contextmanager
def standing_in(**functions: Callable[..., Any]) -> Iterator[None]:
    """Inside, these are called for the functions of their names in this file, whoever calls them: a simulation makes
    the kernels operations that it sees."""
    own = {name: globals()[name] for name in functions}
    globals().update(functions)
    try:
        yield
    finally:
        globals().update(own)


def fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and take these tensors: real ones in host memory, last axis contiguous."""
    if getattr(_off, "now", False) or kernels().elementwise is None:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            return False
        if tensor.dtype == torch.float16 and not kernels().elementwise.has_fp16():
            return False
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return False
    return True


def fits_products(*tensors: Tensor | None) -> bool:
    """fits(), for adapter_forward and adapter_backward: fp32, and int64 indices."""
    return all(t is None or t.dtype in (torch.float32, torch.int64) for t in tensors) and fits(*tensors)


# ---- building ----


@cache
def kernels(level: str | None = None) -> Kernels:
    """The kernels for this processor (or a named lower level), built if they are not in the cache."""
    if os.environ.get("MEFT_BENCH_KERNELS") == "torch":
        return Kernels(None, None, "", "plain torch: MEFT_BENCH_KERNELS=torch asks for it")
    level = level or torch.backends.cpu.get_cpu_capability()
    try:
        compiler, version = _compiler()
        loaded, place = _load(level, compiler, version)
    except (OSError, subprocess.SubprocessError) as error:
        text = f"plain torch: {error}"
        _log.warning(
            "MEFT's host kernels could not be built (%s); plain torch does the same, several times slower. Install a C "
            "compiler (gcc or clang) or name one in CC.",
            error,
        )
        return Kernels(None, None, "", text)
    return Kernels(loaded[0], loaded[1], level, f"native kernels, {level}, {version}", place)


def _compiler() -> tuple[list[str], str]:
    """(command, version line). Raises OSError when there is none."""
    asked = shlex.split(os.environ.get("CC") or "")
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            command = [found, *command[1:]]
            done = subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=True)
            return command, (done.stdout.decode(errors="replace").splitlines() or ["a compiler"])[0].strip()
    raise OSError(f"no C compiler found (looked for {asked[0] if asked else 'cc, gcc, clang'})")


def _load(level: str, compiler: list[str], version: str) -> tuple[list[Any], str]:
    """(libraries, where they lie) from the first folder that can be trusted and used. Raises OSError when none can."""
    problems: list[str] = []
    for folder in kernel_cache.folders():
        try:
            files = [_library(folder, name, level, compiler, version) for name in _SOURCES]
            # A folder that no code may be loaded from (noexec) says so here.
            return [ctypes.CDLL(str(file)) for file in files], "; ".join([str(folder), *problems])
        except OSError as error:
            problems.append(str(error))
    raise OSError("; ".join(dict.fromkeys(problems)) or "no folder to build in")


def _library(folder: Path, name: str, level: str, compiler: list[str], version: str) -> Path:
    source = Path(__file__).with_name(f"{name}.c")
    flags = (*_FLAGS, _SOURCES[name], *_LEVELS.get(level, ()))
    key = "\n".join((source.read_text(encoding="utf-8"), *flags, *compiler, version, platform.machine()))

    def build(made: Path) -> None:
        command = [*compiler, *flags, str(source), "-o", str(made), "-lm"]
        environment = {**os.environ, "TMPDIR": str(made.parent)}  # the compiler's own files: /tmp may be full
        done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
        if done.returncode:
            raise OSError(f"{compiler[0]} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")

    return kernel_cache.built(folder, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}", build)


# ---- threads ----

_pool: tuple[int, int, ThreadPoolExecutor] | None = None
_pool_lock = threading.Lock()


def _threads(count: int) -> ThreadPoolExecutor:
    """At least count helpers; made anew in a forked child, which has none of its parent's."""
    global _pool
    with _pool_lock:
        if _pool is None or _pool[0] != os.getpid() or _pool[1] < count:
            _pool = os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="meft-kernel")
        return _pool[2]


def _run(function: Any, arguments: tuple, count: int, size: int) -> None:
    """function(*arguments, count, grain, next) on torch's number of threads; size is the bytes it moves.

    Threads take chunks of the count rows until none is left, the caller among them, so helpers that come late are not
    waited for.
    """
    taken = ctypes.c_int64(0)
    threads = min(torch.get_num_threads(), count) if size > _INLINE_BYTES else 1
    grain = max(1, count // (threads * _CHUNKS)) if threads > 1 else max(1, count)
    call = (*arguments, ctypes.c_int64(count), ctypes.c_int64(grain), ctypes.byref(taken))
    helpers: list[Future] = []
    try:
        for _ in range(threads - 1):
            helpers.append(_threads(threads - 1).submit(function, *call))
        function(*call)
    finally:  # after ctrl-C too: the memory they work on goes when the caller's frame does
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _int(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


# ---- the kernels ----


def gather(rows_RX: Tensor, index_U: Tensor, out_UX: Tensor) -> None:
    """kernels.gather."""
    count, width = out_UX.shape
    arguments = (_at(rows_RX), _int(rows_RX.stride(0)), _at(index_U), _at(out_UX), _int(out_UX.stride(0)), _int(width),
                 _int(_KINDS[out_UX.dtype]), _int(out_UX.nbytes > _LARGE_BYTES))  # fmt: skip
    _run(kernels().elementwise.gather, arguments, count, 6 * out_UX.numel())


def gather_groups(blocks_RB: Tensor, index_U: Tensor, out_UHD: Tensor, bits: int) -> None:
    """groups.gather."""
    count, halves, width = out_UHD.shape
    arguments = (_at(blocks_RB), _int(blocks_RB.stride(0)), _at(index_U), _at(out_UHD), _int(halves), _int(width),
                 _int(bits), _int(_KINDS[out_UHD.dtype]))  # fmt: skip
    _run(kernels().elementwise.gather_groups, arguments, count, 6 * out_UHD.numel())


def accumulate(sums_RX: Tensor, index_U: Tensor, source_UX: Tensor, filled_R: Tensor, squares_R: Tensor) -> None:
    """kernels.accumulate."""
    count, width = source_UX.shape
    arguments = (_at(sums_RX), _int(sums_RX.stride(0)), _at(index_U), _at(source_UX), _int(source_UX.stride(0)),
                 _int(width), _int(_KINDS[source_UX.dtype]), _at(filled_R), _at(squares_R))  # fmt: skip
    _run(kernels().elementwise.accumulate, arguments, count, 8 * source_UX.numel())


def squares(rows_UX: Tensor, sums_U: Tensor) -> None:
    """kernels.squares into sums, fp64."""
    count, width = rows_UX.shape
    arguments = (_at(rows_UX), _int(rows_UX.stride(0)), _int(width), _int(_KINDS[rows_UX.dtype]), _at(sums_U))
    _run(kernels().elementwise.squares, arguments, count, rows_UX.nbytes)


def zero(sums_RX: Tensor, index_U: Tensor) -> None:
    """Zero these rows."""
    count, width = index_U.shape[0], sums_RX.shape[1]
    arguments = (_at(sums_RX), _int(sums_RX.stride(0)), _at(index_U), _int(width))
    _run(kernels().elementwise.zero, arguments, count, 4 * count * width)


class _Advance(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("rows", "first", "second", "grads", "done", "is_still", "index", "table")]
        + [(name, ctypes.c_int64) for name in ("rows_stride", "rows_half", "moments_stride", "moments_half",
                                               "grads_stride", "grads_half", "done_stride", "halves", "width",
                                               "table_first", "step", "salt", "grads_kind", "listed")]
        + [(name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "eps", "most", "factor")]
    )  # fmt: skip


def _strides(rows: Tensor | None) -> tuple[int, int]:
    """From one row to the next, and from half to half within one."""
    if rows is None:
        return 0, 0
    return rows.stride(0), rows.stride(1) if rows.dim() == 3 else 0


def advance(
    state: Any, grads: Tensor | None, index_U: Tensor, step: int | None, steps: Any, factor: float, listed: bool
) -> None:
    """kernels.advance."""
    rows, first = state.rows_RX, state.first_RX
    table = steps.table.contiguous()
    (rows_stride, rows_half), (moments_stride, moments_half), (grads_stride, grads_half) = map(
        _strides, (rows, first, grads)
    )
    about = _Advance(
        rows=rows.data_ptr(), first=first.data_ptr(), second=state.second_RX.data_ptr(),
        grads=None if grads is None else grads.data_ptr(), done=state.done_R.data_ptr(),
        is_still=state.still_R.data_ptr(), index=index_U.data_ptr(), table=table.data_ptr(),
        rows_stride=rows_stride, rows_half=rows_half, moments_stride=moments_stride, moments_half=moments_half,
        grads_stride=grads_stride, grads_half=grads_half, done_stride=state.done_R.stride(0),
        halves=rows.shape[1] if rows.dim() == 3 else 1, width=rows.shape[-1], table_first=steps.first,
        step=-1 if step is None else step, salt=state.salt, listed=listed,
        grads_kind=0 if grads is None else _KINDS[grads.dtype], beta1=steps.beta1, beta2=steps.beta2,
        rest1=1 - steps.beta1, rest2=1 - steps.beta2, eps=steps.eps, most=steps.withstood, factor=factor,
    )  # fmt: skip
    arguments = (ctypes.byref(about), _int(first.dtype == torch.bfloat16))
    _run(kernels().elementwise.advance, arguments, index_U.shape[0], 28 * index_U.shape[0] * rows[0].numel())


class _Search(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("h", "keys", "scales", "experts", "starts", "order", "gates", "scores",
                                              "kept", "outputs")]
        + [(name, ctypes.c_int64) for name in ("h_stride", "keys_stride", "tokens", "width", "number",
                                               "probed", "size", "best", "relu", "kind")]
    )  # fmt: skip


def search_experts(
    h_TD: Tensor,
    keys_RD: Tensor,
    scales_R: Tensor | None,
    experts_TP: Tensor,
    gates_TP: Tensor | None,
    size: int,
    kept: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """kernels.search_experts."""
    library = kernels().products
    experts_TP, gates_TP = experts_TP.contiguous(), None if gates_TP is None else gates_TP.contiguous()
    (tokens, width), probed, number = h_TD.shape, experts_TP.shape[1], keys_RD.shape[0] // size
    starts, order = torch.empty(number + 1, dtype=torch.int64), torch.empty(tokens * probed, dtype=torch.int64)
    scores_TQ = torch.empty(tokens, probed * size)
    kept_TK, output_TK = torch.empty(tokens, kept, dtype=torch.int64), torch.empty(tokens, kept)
    about = _Search(
        h=h_TD.data_ptr(), keys=keys_RD.data_ptr(), scales=None if scales_R is None else scales_R.data_ptr(),
        experts=experts_TP.data_ptr(), starts=starts.data_ptr(), order=order.data_ptr(),
        gates=None if gates_TP is None else gates_TP.data_ptr(), scores=scores_TQ.data_ptr(), kept=kept_TK.data_ptr(),
        outputs=output_TK.data_ptr(), h_stride=h_TD.stride(0), keys_stride=keys_RD.stride(0),
        tokens=tokens, width=width, number=number, probed=probed, size=size, best=kept, relu=relu,
        kind=_KINDS[keys_RD.dtype],
    )  # fmt: skip
    library.sort_pairs(_at(experts_TP), _int(tokens * probed), _int(number), _at(starts), _at(order))
    _run(library.score, (ctypes.byref(about),), number, 4 * keys_RD.numel())
    threads = max(1, torch.get_num_threads())
    work, next_work = torch.empty(threads, probed * size, dtype=torch.int64), ctypes.c_int64(0)
    arguments = (ctypes.byref(about), _at(work), ctypes.byref(next_work))
    _run(library.keep_best, arguments, tokens, 16 * scores_TQ.numel())
    return kept_TK, output_TK


class _Math(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("h", "grad", "rows", "local", "gates", "dots", "outputs_grad", "weights",
                                              "out", "grads", "starts", "order")]
        + [(name, ctypes.c_int64) for name in ("h_stride", "grad_stride", "rows_stride", "width", "kept", "halves",
                                               "silu")]
    )  # fmt: skip


def adapter_forward(
    h_TD: Tensor, rows_U2D: Tensor, local_TK: Tensor, gates_TK: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """products.adapter_forward: (output [T, D], dots [T, K])."""
    (tokens, width), kept = h_TD.shape, local_TK.shape[1]
    dots_TK, out_TD = torch.empty(tokens, kept), torch.empty(tokens, width)
    about = _Math(
        h=h_TD.data_ptr(), rows=rows_U2D.data_ptr(), local=local_TK.data_ptr(),
        gates=None if gates_TK is None else gates_TK.data_ptr(), dots=dots_TK.data_ptr(), out=out_TD.data_ptr(),
        h_stride=h_TD.stride(0), rows_stride=rows_U2D.stride(0), width=width, kept=kept, silu=silu,
    )  # fmt: skip
    _run(kernels().products.adapter_forward, (ctypes.byref(about),), tokens, 8 * local_TK.numel() * width)
    return out_TD, dots_TK


def adapter_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    rows_U2D: Tensor,
    local_TK: Tensor,
    dots_TK: Tensor,
    gates_TK: Tensor | None,
    silu: bool,
    grads_UHD: Tensor,
) -> tuple[Tensor, Tensor]:
    """products.adapter_backward: (gradient of h [T, D], of the outputs [T, K]); grads_UHD is written."""
    (tokens, width), kept, union = h_TD.shape, local_TK.shape[1], rows_U2D.shape[0]
    starts, order = torch.empty(union + 1, dtype=torch.int64), torch.empty(local_TK.numel(), dtype=torch.int64)
    outputs_TK, out_TD = torch.zeros(tokens, kept), torch.empty(tokens, width)
    about = _Math(
        h=h_TD.data_ptr(), grad=grad_TD.data_ptr(), rows=rows_U2D.data_ptr(), local=local_TK.data_ptr(),
        gates=None if gates_TK is None else gates_TK.data_ptr(), dots=dots_TK.data_ptr(),
        outputs_grad=outputs_TK.data_ptr(), out=out_TD.data_ptr(), grads=grads_UHD.data_ptr(),
        starts=starts.data_ptr(), order=order.data_ptr(), h_stride=h_TD.stride(0), grad_stride=grad_TD.stride(0),
        rows_stride=rows_U2D.stride(0), width=width, kept=kept, halves=grads_UHD.shape[1], silu=silu,
    )  # fmt: skip
    library, size = kernels().products, 8 * local_TK.numel() * width
    library.sort_places(_at(local_TK), _int(local_TK.numel()), _int(union), _at(starts), _at(order))
    _run(library.adapter_backward, (ctypes.byref(about),), union, size)
    weights_TK = outputs_TK if gates_TK is None else outputs_TK * gates_TK
    about.weights = weights_TK.data_ptr()
    _run(library.adapter_hidden, (ctypes.byref(about),), tokens, size)
    return out_TD, outputs_TK


if __name__ == "__main__":
    print(status())
    print(kernels().place)
