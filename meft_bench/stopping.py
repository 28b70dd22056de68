"""Ctrl-C means the same wherever it lands, also in libraries that turn it into errors of their own or lose it; and no
worker outlives the process that started it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False


@contextmanager
def ctrl_c_stops() -> Iterator[None]:
    """Inside, ctrl-C raises KeyboardInterrupt, and so does whatever error ends the block after it.

    A library may report an interrupt as its own error (an extension that was being loaded, a write that was cut short).
    After the block a second ctrl-C ends the process at once, without a word, while threads and children are put away.
    """
    global _asked
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield  # another thread is never interrupted, nor is a process that was started to ignore it
        return
    outer, _asked = signal.signal(signal.SIGINT, _interrupt), False
    try:
        yield
    except Exception as error:
        if _asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if _asked else outer)


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt where ctrl-C was pressed and its exception got lost, as in a destructor."""
    if _asked:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def end_with(owner: int) -> None:
    """End this process soon after the process owner is gone: after its kill -9 nobody else would, and the next command
    would start the same work twice."""
    threading.Thread(target=_follow, args=(owner,), daemon=True).start()


def _follow(owner: int) -> None:
    while True:
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.5)
