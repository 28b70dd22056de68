"""Ctrl-C means the same wherever it lands, also in libraries that turn it into errors of their own or lose it; a job
leaves with a checkpoint when a scheduler asks; and no worker outlives the process that started it."""

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


@contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Inside, ctrl-C waits; processes that are started here never see it, and are ended by who started them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt where ctrl-C was pressed and its exception got lost, as in a destructor."""
    if _asked:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


class Left(SystemExit):
    """This process was asked to leave by the signal `number`; as an exit code it is 128 + number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


_leaving: int | None = None
_checkpoint_asked = _whole_steps = _may_leave = False


def leave_on(*signals: int) -> None:
    """From now on each of these signals ends the process by Left; in whole_steps() after the next checkpoint."""
    for number in signals:
        signal.signal(number, _leave)


def checkpoint_on(number: int) -> None:
    """From now on this signal asks for a checkpoint, after which the work goes on."""
    signal.signal(number, _ask_for_checkpoint)


def checkpoint_wanted() -> bool:
    """Whether such a signal came since this was last asked, or one of leave_on(); who asks writes a checkpoint then."""
    global _checkpoint_asked, _may_leave
    asked, _checkpoint_asked = _checkpoint_asked, False
    _may_leave = _leaving is not None
    return asked or _may_leave


def leave_if_asked() -> None:
    """Raises Left where a signal of leave_on() came, and a checkpoint has been written since."""
    if _leaving is not None and _may_leave:
        raise Left(_leaving)


@contextmanager
def whole_steps() -> Iterator[None]:
    """Inside, a signal of leave_on() waits for leave_if_asked(), or for the end."""
    global _whole_steps
    _whole_steps = True
    try:
        yield
    finally:
        _whole_steps = False
    if _leaving is not None:
        raise Left(_leaving)


def _leave(number: int, frame: FrameType | None) -> None:
    global _leaving
    if _leaving is None:
        _leaving = number
        if not _whole_steps:
            raise Left(number)


def _ask_for_checkpoint(number: int, frame: FrameType | None) -> None:
    global _checkpoint_asked
    _checkpoint_asked = True


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
