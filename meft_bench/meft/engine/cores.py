"""Which cores the engine's own threads are bound to: those that MEFT_BENCH_CORES names; none where it is unset.

MEFT_BENCH_CORES    "auto", or numbers as in 2-7,10. The threads that help with a kernel get a core each, in turn;
                    those that do queued work beside the device (workers.py) may use all of them, and so may what
                    they start. The training loop's own thread stays free. "auto" is every core that the process may
                    use but the first, which is left to that thread. Of several ranks on a machine each takes its
                    part of the list.
"""

import contextlib
import os
import re

from meft_bench.fields import shown
from meft_bench.ranks import launched

ASKED = "MEFT_BENCH_CORES"
_MOST = 1024
"""Beyond it, pool.c knows no core."""


def given() -> tuple[int, ...]:
    """The cores that this process binds to; empty where nobody asked, or the system cannot. Raises ValueError, in one
    line, for what is no list of cores that it may use."""
    asked = os.environ.get(ASKED, "")
    if not asked or not _can_bind():
        return ()
    # Of the first thread: others may be bound already.
    usable = [core for core in sorted(os.sched_getaffinity(os.getpid())) if core < _MOST]
    named = usable if asked == "auto" else _listed(asked)
    for core in named:
        if core not in usable:
            raise ValueError(f"{ASKED}={shown(asked)}: this process may not use core {core} (it has {_text(usable)})")
    ranks = launched()
    here, beside = ranks.local_rank, ranks.local_count
    part = named[here * len(named) // beside : (here + 1) * len(named) // beside]
    if not part:
        raise ValueError(f"{ASKED}={shown(asked)}: {len(named)} cores for {beside} ranks; name one for each at least")
    return tuple(part[1:] or part) if asked == "auto" else tuple(part)


def text() -> str:
    """One line for who prints the engine's facts: what is bound where; empty where nobody asked. Raises as given()."""
    if not os.environ.get(ASKED):
        return ""
    if not _can_bind():
        return f"threads not bound: this system cannot ({ASKED})"
    return f"threads bound to cores {_text(given())} ({ASKED}): kernel helpers one each in turn, host workers to all"


def bind_worker() -> None:
    """Bind the calling thread, which does queued work, to all of them."""
    if cores := given():
        with contextlib.suppress(OSError):  # taken from the process since: the thread stays where it may be
            os.sched_setaffinity(0, cores)


def _can_bind() -> bool:
    return hasattr(os, "sched_setaffinity")


def _listed(asked: str) -> list[int]:
    """The numbers of a list like 2-7,10."""
    found: list[int] = []
    for part in asked.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip(), re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ValueError(f"{ASKED}={shown(asked)}: {shown(part)} names no cores; write auto, or a list like 2-7,10")
        found += range(low, high + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"{ASKED}={shown(asked)} names a core twice")
    return found


def _text(cores: tuple[int, ...] | list[int]) -> str:
    """Numbers in ascending order as a list like 2-7,10."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
