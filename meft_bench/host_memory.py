"""The memory there is: the machine's, or what a container (cgroup) or `ulimit -v` leaves of it. No torch here."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from meft_bench.fields import one_line

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 2**60
"""Version 1 writes "no limit" as a number near 2^63."""

_NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the host's: libraries on a GPU, page-locked memory and torch's allocator of
    the host say so in words alone."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def asked_of(error: BaseException) -> str:
    """What an error of no memory says was asked for, on one line."""
    return one_line(error).partition(". ")[0] if str(error) else "the host's allocator"


def total_bytes() -> int:
    """Bytes of memory that this process could ever have."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits(_GROUPS, _OWN))])


def available_bytes() -> int:
    """Bytes of memory that are free for this process now; what the system would give back of its caches is free."""
    free = [psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _limits(_GROUPS, _OWN))]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        free.append(max(0, address_space - psutil.Process().memory_info().vms))
    return min(free)


def _limits(groups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every group that this process is in and that has a limit."""
    for folder, limit, used, cache in _places(groups, own):
        most = _number(folder / limit)
        if most is not None and most < _NO_LIMIT:
            yield most, max(0, (_number(folder / used) or 0) - _cached(folder / "memory.stat", cache))


def _places(groups: Path, own: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, and in it the names of limit, use and cache) of version 2 and 1, from the own group up to the root."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    parts = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    two = next((path for number, names, path in parts if number == "0" and not names), "/")
    one = next((path for _, names, path in parts if "memory" in names.split(",")), "/")
    for root, path, names in (
        (groups, two, ("memory.max", "memory.current", "inactive_file")),
        (groups / "memory", one, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            if place == root or root in place.parents:
                yield place, *names


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _cached(file: Path, name: str) -> int:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
    except (OSError, ValueError, IndexError):
        return 0
