"""Native kernels behind kernels.py, adamw.py and groups.py (elementwise.c) and products.py (products.c), called with
ctypes on as many threads as torch uses (pool.c).

`python -m meft_bench.meft.engine.native` builds them (set-up does), else the first use does. Without a compiler, or
POSIX threads, everything works through plain torch, and one warning says so. MEFT_BENCH_KERNELS=torch asks for that.
"""

import contextlib
import ctypes
import logging
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from meft_bench.meft.engine import build, cores

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_PLAIN = (Tensor, Parameter)
_DTYPES = {*_KINDS, torch.int64, torch.int32, torch.uint8, torch.bool}
_INLINE_BYTES = 1 << 18  # below this a second thread costs more than it saves
_LARGE_BYTES = 1 << 24  # outputs above this leave the caches before anybody reads them
_CHUNKS = 8  # per thread, so that a late thread does not hold up the others
_VECTOR = 64  # bytes of products.c's widest
_log = logging.getLogger(__name__)
_off = threading.local()
_kept = threading.local()
_MOST_KEPT = 1 << 26  # bytes of a search's room that a thread keeps until its next one


@dataclass(frozen=True)
class Kernels:
    """The loaded libraries, or why there are none."""

    elementwise: Any
    products: Any
    pool: Any
    level: str
    text: str
    place: str = ""
    """The folder they were loaded from, and why it is not the usual one."""


def status() -> str:
    """One line for `meft-bench doctor`: what computes on the host, and where if its threads are bound (cores.py)."""
    return "; ".join(filter(None, (kernels().text, cores.text())))


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Plain torch inside, on this thread."""
    before, _off.now = getattr(_off, "now", False), True
    try:
        yield
    finally:
        _off.now = before


@contextlib.contextmanager
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


def fits_search(h_TD: Tensor, keys_RD: Tensor, *others: Tensor | None) -> bool:
    """fits(), for search_experts, which knows fp32 hidden states and keys in fp32, bf16 or int8."""
    known = h_TD.dtype == torch.float32 and keys_RD.dtype in (torch.float32, torch.bfloat16, torch.int8)
    return known and fits(h_TD, keys_RD, *others)


# ---- loading ----


@cache
def kernels(level: str | None = None) -> Kernels:
    """The kernels for this processor (or a named lower level), built if they are not in the cache."""
    if os.environ.get("MEFT_BENCH_KERNELS") == "torch":
        return Kernels(None, None, None, "", "plain torch: MEFT_BENCH_KERNELS=torch asks for it")
    level = level or _level()
    try:
        compiler, version = build.compiler()
        try:
            loaded, place = build.load(level, compiler, version)
        except OSError:
            if not level.endswith(_NEWEST):
                raise
            level = level.removesuffix(_NEWEST)  # gcc before 10 does not know it
            loaded, place = build.load(level, compiler, version)
    except (OSError, subprocess.SubprocessError) as error:
        text = f"plain torch: {error}"
        _log.warning(
            "MEFT's host kernels could not be built (%s); plain torch does the same, several times slower. Install a C "
            "compiler (gcc or clang) or name one in CC.",
            error,
        )
        return Kernels(None, None, None, "", text)
    return Kernels(**loaded, level=level, text=f"native kernels, {level}, {version}", place=place)


_NEWEST = "_BF16"


def _level() -> str:
    """The processor's instruction set as torch names and limits it; AVX-512 with bf16 products is one more."""
    level = torch.backends.cpu.get_cpu_capability()
    return f"{level}{_NEWEST}" if level == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16") else level


# ---- threads ----


def _run(kernel: Any, about: ctypes.Structure, count: int, size: int) -> None:
    """kernel over count rows, on torch's number of threads; size is the bytes it moves.

    Threads take chunks of the rows until none is left, the caller among them, so helpers that come late are not waited
    for. It is one call into C: after ctrl-C, too, it ends before the memory that it works on goes.
    """
    threads = min(torch.get_num_threads(), count) if size > _INLINE_BYTES else 1
    grain = max(1, count // (threads * _CHUNKS)) if threads > 1 else max(1, count)
    kernels().pool.run(kernel, ctypes.byref(about), count, grain, threads - 1)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fields(pointers: str, numbers: str, reals: str = "") -> list[tuple[str, Any]]:
    """Of a structure that a kernel reads."""
    kinds = (pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), (reals, ctypes.c_float)
    return [(name, kind) for names, kind in kinds for name in names.split()]


# ---- the kernels ----


class _Gather(ctypes.Structure):
    _fields_ = _fields("rows index out", "stride out_stride width kind large")


def gather(rows_RX: Tensor, index_U: Tensor, out_UX: Tensor) -> None:
    """kernels.gather."""
    count, width = out_UX.shape
    about = _Gather(_at(rows_RX), _at(index_U), _at(out_UX), rows_RX.stride(0), out_UX.stride(0), width,
                    _KINDS[out_UX.dtype], out_UX.nbytes > _LARGE_BYTES)  # fmt: skip
    _run(kernels().elementwise.gather, about, count, 6 * out_UX.numel())


class _GatherGroups(ctypes.Structure):
    _fields_ = _fields("blocks index out", "stride halves width bits kind")


def gather_groups(blocks_RB: Tensor, index_U: Tensor, out_UHD: Tensor, bits: int) -> None:
    """groups.gather."""
    count, halves, width = out_UHD.shape
    about = _GatherGroups(_at(blocks_RB), _at(index_U), _at(out_UHD), blocks_RB.stride(0), halves, width, bits,
                          _KINDS[out_UHD.dtype])  # fmt: skip
    _run(kernels().elementwise.gather_groups, about, count, 6 * out_UHD.numel())


class _Accumulate(ctypes.Structure):
    _fields_ = _fields("sums index source filled squares", "stride source_stride width kind")


def accumulate(sums_RX: Tensor, index_U: Tensor, source_UX: Tensor, filled_R: Tensor, squares_R: Tensor) -> None:
    """kernels.accumulate."""
    count, width = source_UX.shape
    about = _Accumulate(_at(sums_RX), _at(index_U), _at(source_UX), _at(filled_R), _at(squares_R), sums_RX.stride(0),
                        source_UX.stride(0), width, _KINDS[source_UX.dtype])  # fmt: skip
    _run(kernels().elementwise.accumulate, about, count, 8 * source_UX.numel())


class _Squares(ctypes.Structure):
    _fields_ = _fields("rows sums", "stride width kind")


def squares(rows_UX: Tensor, sums_U: Tensor) -> None:
    """kernels.squares into sums, fp64."""
    count, width = rows_UX.shape
    about = _Squares(_at(rows_UX), _at(sums_U), rows_UX.stride(0), width, _KINDS[rows_UX.dtype])
    _run(kernels().elementwise.squares, about, count, rows_UX.nbytes)


class _Zero(ctypes.Structure):
    _fields_ = _fields("sums index", "stride width")


def zero(sums_RX: Tensor, index_U: Tensor) -> None:
    """Zero these rows."""
    count, width = index_U.shape[0], sums_RX.shape[1]
    about = _Zero(_at(sums_RX), _at(index_U), sums_RX.stride(0), width)
    _run(kernels().elementwise.zero, about, count, 4 * count * width)


class _Advance(ctypes.Structure):
    _fields_ = _fields(
        "rows first second grads done is_still index table",
        "rows_stride rows_half moments_stride moments_half grads_stride grads_half done_stride "
        "halves width table_first step salt grads_kind listed narrow",
        "beta1 beta2 rest1 rest2 eps most factor",
    )


def _strides(rows: Tensor | None) -> tuple[int, int]:
    """From one row to the next, and from half to half within one."""
    if rows is None:
        return 0, 0
    return rows.stride(0), rows.stride(1) if rows.dim() == 3 else 0


def _check_counts(done_U: Tensor, step: int | None, first: int, known: int) -> None:
    """Raises IndexError for rows whose next steps are not among the `known` ones that follow `first`: the kernel would
    read what lies beside their table."""
    if done_U.numel():
        least, most = (int(number) for number in done_U.aminmax())
        if least < first or (most + 1 if step is None else step) > first + known:
            raise IndexError(
                f"rows that have made {least} to {most} steps, but constants of steps {first + 1} to {first + known}"
            )


def advance(
    state: Any, grads: Tensor | None, index_U: Tensor, step: int | None, steps: Any, factor: float, listed: bool
) -> None:
    """adamw.advance."""
    rows, first = state.rows_RX, state.first_RX
    table = steps.table.contiguous()
    _check_counts(state.done_R[index_U], step, steps.first, table.shape[0])
    (rows_stride, rows_half), (moments_stride, moments_half), (grads_stride, grads_half) = map(
        _strides, (rows, first, grads)
    )
    about = _Advance(
        rows=rows.data_ptr(), first=first.data_ptr(), second=state.second_RX.data_ptr(),
        grads=_at(grads), done=state.done_R.data_ptr(),
        is_still=state.still_R.data_ptr(), index=index_U.data_ptr(), table=table.data_ptr(),
        rows_stride=rows_stride, rows_half=rows_half, moments_stride=moments_stride, moments_half=moments_half,
        grads_stride=grads_stride, grads_half=grads_half, done_stride=state.done_R.stride(0),
        halves=rows.shape[1] if rows.dim() == 3 else 1, width=rows.shape[-1], table_first=steps.first,
        step=-1 if step is None else step, salt=state.salt, listed=listed, narrow=first.dtype == torch.bfloat16,
        grads_kind=0 if grads is None else _KINDS[grads.dtype], beta1=steps.beta1, beta2=steps.beta2,
        rest1=1 - steps.beta1, rest2=1 - steps.beta2, eps=steps.eps, most=steps.withstood, factor=factor,
    )  # fmt: skip
    _run(kernels().elementwise.advance, about, index_U.shape[0], 28 * index_U.shape[0] * rows[0].numel())


class _Search(ctypes.Structure):
    _fields_ = _fields(
        "h keys scales experts starts order gates apart scores kept outputs work taken",
        "h_stride keys_stride apart_stride tokens width number probed size best relu kind",
    )


def _room(*numbers: int) -> Sequence[Tensor]:
    """Rooms for so many fp32 numbers, this thread's until it asks again. New memory is lent page by page, which takes a
    twentieth of a search; so it is kept, but for very much of it. Like all that a kernel needs while it runs, it is in
    no count of memory, and no allocation of torch's."""
    total = 4 * sum(numbers)
    room = getattr(_kept, "room", None)
    if room is None or len(room) < total:
        # Python's own way would share it with a forked process.
        own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        room = mmap.mmap(-1, max(4, total), **own)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # advice: a refusal changes nothing
                room.madvise(mmap.MADV_HUGEPAGE)
        if total <= _MOST_KEPT:
            _kept.room = room
    return torch.frombuffer(room, dtype=torch.float32)[: sum(numbers)].split(numbers)


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
    item = 2 if keys_RD.dtype == torch.bfloat16 and library.has_bf16_products() else 4
    apart_stride = (-(-item * width // _VECTOR) + 1) * _VECTOR
    apart_TX, scores_TQ = _room(tokens * apart_stride // 4, tokens * probed * size)
    taken = torch.zeros(1, dtype=torch.int64)
    work = torch.empty(max(1, torch.get_num_threads()), probed * size, dtype=torch.int64)
    kept_TK, output_TK = torch.empty(tokens, kept, dtype=torch.int64), torch.empty(tokens, kept)
    about = _Search(
        h=h_TD.data_ptr(), keys=keys_RD.data_ptr(), scales=_at(scales_R), apart=apart_TX.data_ptr(),
        experts=experts_TP.data_ptr(), starts=starts.data_ptr(), order=order.data_ptr(),
        gates=_at(gates_TP), scores=scores_TQ.data_ptr(), kept=kept_TK.data_ptr(),
        outputs=output_TK.data_ptr(), work=work.data_ptr(), taken=taken.data_ptr(), h_stride=h_TD.stride(0),
        keys_stride=keys_RD.stride(0), apart_stride=apart_stride, tokens=tokens, width=width, number=number,
        probed=probed, size=size, best=kept, relu=relu, kind=_KINDS[keys_RD.dtype],
    )  # fmt: skip
    library.sort_pairs(_at(experts_TP), tokens * probed, number, _at(starts), _at(order))
    _run(library.set_apart, about, tokens, 2 * apart_TX.nbytes)
    _run(library.score, about, number, 4 * keys_RD.numel())
    _run(library.keep_best, about, tokens, 16 * scores_TQ.numel())
    return kept_TK, output_TK


class _Math(ctypes.Structure):
    _fields_ = _fields(
        "h grad rows local gates dots outputs_grad weights out grads starts order",
        "h_stride grad_stride rows_stride width kept halves silu",
    )


def adapter_forward(
    h_TD: Tensor, rows_U2D: Tensor, local_TK: Tensor, gates_TK: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """products.adapter_forward: (output [T, D], dots [T, K])."""
    (tokens, width), kept = h_TD.shape, local_TK.shape[1]
    dots_TK, out_TD = torch.empty(tokens, kept), torch.empty(tokens, width)
    about = _Math(
        h=h_TD.data_ptr(), rows=rows_U2D.data_ptr(), local=local_TK.data_ptr(),
        gates=_at(gates_TK), dots=dots_TK.data_ptr(), out=out_TD.data_ptr(),
        h_stride=h_TD.stride(0), rows_stride=rows_U2D.stride(0), width=width, kept=kept, silu=silu,
    )  # fmt: skip
    _run(kernels().products.adapter_forward, about, tokens, 8 * local_TK.numel() * width)
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
        gates=_at(gates_TK), dots=dots_TK.data_ptr(),
        outputs_grad=outputs_TK.data_ptr(), out=out_TD.data_ptr(), grads=grads_UHD.data_ptr(),
        starts=starts.data_ptr(), order=order.data_ptr(), h_stride=h_TD.stride(0), grad_stride=grad_TD.stride(0),
        rows_stride=rows_U2D.stride(0), width=width, kept=kept, halves=grads_UHD.shape[1], silu=silu,
    )  # fmt: skip
    library, size = kernels().products, 8 * local_TK.numel() * width
    library.sort_places(_at(local_TK), local_TK.numel(), union, _at(starts), _at(order))
    _run(library.adapter_backward, about, union, size)
    weights_TK = outputs_TK if gates_TK is None else outputs_TK * gates_TK
    about.weights = weights_TK.data_ptr()
    _run(library.adapter_hidden, about, tokens, size)
    return out_TD, outputs_TK


if __name__ == "__main__":
    print(status())
    print(kernels().place)
