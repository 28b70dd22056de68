"""Who listens to a step: phases, parts of the work and copies are announced here, clocks and counters hear of them.

The training loop announces phases ("forward", "backward", "update"), the engine announces parts of its work
("retrieval", "gather", "gradients", "adam"), every copy between host and device, every task that the host does for the
device, and who waits for which copy or task. Where the work is done says nothing of who listens, and a listener never
patches a method:

    with observe.listening(clock):
        train(...)

Announcements come from any thread, and parts nest: a gather announces the copies that it makes. A listener that keeps
state guards it. Without listeners an announcement costs one look at an empty tuple.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Work:
    """One announced piece of work."""

    kind: str
    """"phase", "part", "copy", "task" or "wait"."""
    name: str
    """Of a phase or a part; of a copy its purpose, as "rows" or "grads"; of a task its function; of a wait "task" or
    "copy"."""
    about: Any = None
    """Whose work it is: an adapter ("retrieval"), its store ("gather", "gradients"), an optimizer ("adam"), a link; a
    task's queue."""
    doing: str = ""
    """Of a part that has several: which, as "add_router_gradient"."""
    direction: str = ""
    """Of a copy: "h2d" or "d2h"."""
    nbytes: int = 0
    """What a copy moves."""
    number: int = 0
    """Of a copy or a task, from 1 in the order in which they were asked for; of a wait, the number waited for. A task
    that is done in pieces announces each."""
    priority: int = 0
    """A task's; the smallest is the most urgent."""


class Listener(Protocol):
    """Hears the beginning and the end of every piece of work."""

    def during(self, work: Work) -> AbstractContextManager[Any]:
        """Entered before the work and left after it, in the thread that does it; must not swallow its exceptions."""
        ...


_listeners: tuple[Listener, ...] = ()
_lock = threading.Lock()
_NOBODY = nullcontext()


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """These listeners hear everything announced within, by any thread of this process.

    Work that is under way when it begins is not told; work that is under way when it ends is told its end.
    """
    global _listeners
    with _lock:
        _listeners = (*_listeners, *listeners)
    try:
        yield
    finally:
        with _lock:
            for gone in listeners:
                _listeners = _without(_listeners, gone)


def _without(listeners: tuple[Listener, ...], gone: Listener) -> tuple[Listener, ...]:
    """Without the newest `gone`: a listener that listens twice goes on once."""
    last = max(i for i, known in enumerate(listeners) if known is gone)
    return listeners[:last] + listeners[last + 1 :]


def phase(name: str) -> AbstractContextManager[Any]:
    """Announce a phase of a step."""
    return _announce(Work("phase", name)) if _listeners else _NOBODY


def part(name: str, about: Any = None, doing: str = "") -> AbstractContextManager[Any]:
    """Announce a part of the engine's or the optimizer's work."""
    return _announce(Work("part", name, about, doing)) if _listeners else _NOBODY


def copy(purpose: str, direction: str, nbytes: int, about: Any = None, number: int = 0) -> AbstractContextManager[Any]:
    """Announce a copy between host and device."""
    if not _listeners:
        return _NOBODY
    return _announce(Work("copy", purpose, about, direction=direction, nbytes=nbytes, number=number))


def task(name: str, queue: Any, number: int, priority: int) -> AbstractContextManager[Any]:
    """Announce a task of a queue, or the next piece of it."""
    return _announce(Work("task", name, queue, number=number, priority=priority)) if _listeners else _NOBODY


def wait(name: str, number: int, about: Any = None) -> AbstractContextManager[Any]:
    """Announce that whoever runs this waits for the "copy" or "task" of that number."""
    return _announce(Work("wait", name, about, number=number)) if _listeners else _NOBODY


def announced(name: str) -> Callable[[Method], Method]:
    """A method whose whole work is the part `name` of its object."""

    def announce(method: Method) -> Method:
        @functools.wraps(method)
        def announcing(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not _listeners:
                return method(self, *args, **kwargs)
            with part(name, self, method.__name__):
                return method(self, *args, **kwargs)

        return announcing  # type: ignore[return-value]

    return announce


@contextmanager
def _announce(work: Work) -> Iterator[None]:
    with ExitStack() as stack:
        for listener in _listeners:
            stack.enter_context(listener.during(work))
        yield
