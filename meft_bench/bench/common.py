"""What the parts share: interleaved rounds, medians and ratios, this machine's bandwidth, and their files.

Machines drift, so contenders are never timed one after another: a round runs each of them once, ratios are taken within
a round, and the median over rounds is reported with every raw round beside it.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from meft_bench import host_memory
from meft_bench.harness.numerics import bench_numerics
from meft_bench.meft.engine import memory, native
from meft_bench.provenance import cpu_model, provenance
from meft_bench.write import write_if_changed, write_json

NUMERICS = 1
"""Raised when times are taken in another way, for all parts at once (harness/numerics.py)."""
TOKENS, WARMUP, LR = 512, 1, 1e-3
TRIAD = "triad"
CPU = torch.device("cpu")
REST_S = 0.01
"""Rest before a timed call: torch's threads spin for a while after their work, on the cores of whoever comes next."""
_TRIAD_BYTES = 12  # of an element: b and c read, a written


def open_folder(folder: Path) -> None:
    """Make folder if it is missing. Raises ValueError when it cannot be: better before an hour of timing than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}): name a folder with --output") from None


def about(repeats: int, **settings: Any) -> dict[str, Any]:
    """The head of every result: how its numbers came to be, with what and on what."""
    threads = torch.get_num_threads()
    return {
        "evidence": "measured",
        "settings": {"repeats": repeats, "threads": threads, "kernels": native.status(), **settings},
        "cpu": cpu_model(),
        "provenance": provenance(threads),
    }


def write_result(folder: Path, name: str, result: dict[str, Any], text: str) -> str:
    """Write the part's name.json, with the numbers that made it, and name.md into folder; returns text."""
    write_json(folder / f"{name}.json", {**result, "numerics": bench_numerics(name)})
    write_if_changed(folder / f"{name}.md", text.encode())
    return text


# ---- time ----


def seconds(work: Callable[[], Any]) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed_rounds(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    before: Callable[[], None] = lambda: None,
    slow: Mapping[str, int] | None = None,
) -> dict[str, list[float | None]]:
    """Seconds by contender and round. before() runs untimed at the start of a round (fresh inputs).

    The first WARMUP rounds are dropped: they fault pages in and make optimizer state. slow names contenders that run in
    the first so many rounds only, and are not warmed up; later rounds hold None for them.
    """
    slow = slow or {}
    times: dict[str, list[float | None]] = {name: [] for name in contenders}
    for number in range(-WARMUP, repeats):
        before()
        for name, work in contenders.items():
            runs = name not in slow or 0 <= number < slow[name]
            time.sleep(REST_S)
            taken = seconds(work) if runs else None
            if number >= 0:
                times[name].append(taken)
    return times


def median(times: Sequence[float | None]) -> float:
    """Of those rounds that ran."""
    return statistics.median(t for t in times if t is not None)


def ratios(slower: Sequence[float | None], faster: Sequence[float | None]) -> list[float]:
    """Times faster, round by round, where both ran."""
    return [round(a / b, 3) for a, b in zip(slower, faster, strict=True) if a is not None and b is not None]


def rounded(times: Sequence[float | None]) -> list[float | None]:
    """Seconds to the microsecond, as written."""
    return [None if t is None else round(t, 6) for t in times]


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value against log size by least squares: 1 for linear growth, 0.5 for a square root.

    Raises ValueError unless there are two different sizes and everything is above 0.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError("an exponent needs one value per size, two different sizes, and all of them above 0")
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def spread(values: Sequence[float]) -> str:
    """Median with the lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch, and with it the kernels, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- memory ----


class Triad:
    """a = b + s c in torch over as many bytes as a kernel moves: the rate this machine reaches when it only streams."""

    def __init__(self, most_bytes: int) -> None:
        # Ones: pages of zeros that nobody wrote are all the same page. In huge pages, as the rows are.
        size = max(1, most_bytes // _TRIAD_BYTES)
        self.a, self.b, self.c = (memory.empty((size,), torch.float32, CPU).fill_(1.0) for _ in range(3))

    def over(self, moved_bytes: int) -> Callable[[], Any]:
        n = min(self.a.numel(), max(1, moved_bytes // _TRIAD_BYTES))
        a, b, c = self.a[:n], self.b[:n], self.c[:n]
        return lambda: torch.add(b, c, alpha=1.5, out=a)


def lacks_memory(needed_bytes: int) -> str:
    """Why a size is left out, or "" when the machine holds it with a tenth to spare."""
    free = host_memory.available_bytes()
    if needed_bytes * 1.1 <= free:
        return ""
    return f"needs {needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def fill_normal(tensor: torch.Tensor, generator: torch.Generator, scale: float = 0.02) -> torch.Tensor:
    """Random rows, the same 512 again and again: drawing gigabytes would take longer than timing them."""
    block = torch.randn(512, *tensor.shape[1:], generator=generator) * scale
    for part in tensor.split(512):
        part.copy_(block[: part.shape[0]])
    return tensor
