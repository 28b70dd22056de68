"""What a refusal may cost: processor seconds and peak memory of a block, measured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


def _status(field: str) -> int:
    """Kilobytes that the kernel keeps of this process under a name; 0 where it does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)
    except OSError:
        return 0


@contextmanager
def within(seconds: float = 10, megabytes: float = 500) -> Iterator[None]:
    """Fails when the block computes longer, or its memory grows higher for a moment.

    Processor time, as the machine may be busy; some of it goes into the first import of a family's code.
    """
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the peak starts anew
        before = _status("VmRSS")
    except OSError:
        before = None
    start = time.process_time()
    yield
    taken = time.process_time() - start
    assert taken < seconds, f"took {taken:.1f} s"
    if before is not None:
        grown = (_status("VmHWM") - before) / 1024
        assert grown < megabytes, f"took {grown:.0f} MB"
