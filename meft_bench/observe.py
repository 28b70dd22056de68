"""Who listens to a step: phases, parts of the work and copies are announced here, clocks and counters hear of them.

The training loop announces phases ("forward", "backward", "update"), the engine announces parts of its work
("retrieval", "gather", "gradients", "adam") and every copy between host and device ("transfer"). Where the work is done
says nothing of who listens, and a listener never patches a method:

    with observe.listening(clock):
        train(...)

Announcements come from any thread; a listener that keeps state guards it. Without listeners an announcement costs one
look at an empty tuple.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Work:
    """One announced piece of work."""

    kind: str
    """"phase", "part" or "copy"."""
    name: str
    """Of a phase or a part; of a copy its purpose, as "rows" or "grads"."""
    about: Any = None
    """Whose work it is: a layer's store or adapter, an optimizer; of a copy its direction, "h2d" or "d2h"."""
    nbytes: int = 0
    """What a copy moves."""


class Listener(Protocol):
    """Hears the beginning and the end of every piece of work."""

    def during(self, work: Work) -> AbstractContextManager[None]:
        """Entered before the work and left after it, in the thread that does it."""
        ...


_listeners: tuple[Listener, ...] = ()
_lock = threading.Lock()
_NOBODY = nullcontext()


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """These listeners hear everything announced within, by any thread of this process."""
    global _listeners
    with _lock:
        _listeners = (*_listeners, *listeners)
    try:
        yield
    finally:
        with _lock:
            _listeners = tuple(known for known in _listeners if all(known is not gone for gone in listeners))


def phase(name: str) -> AbstractContextManager[Any]:
    """Announce a phase of a step."""
    return _announce("phase", name) if _listeners else _NOBODY


def part(name: str, about: Any = None) -> AbstractContextManager[Any]:
    """Announce a part of the engine's or the optimizer's work."""
    return _announce("part", name, about) if _listeners else _NOBODY


def copy(purpose: str, direction: str, nbytes: int) -> AbstractContextManager[Any]:
    """Announce a copy between host and device."""
    return _announce("copy", purpose, direction, nbytes) if _listeners else _NOBODY


@contextmanager
def _announce(kind: str, name: str, about: Any = None, nbytes: int = 0) -> Iterator[None]:
    work = Work(kind, name, about, nbytes)
    with ExitStack() as stack:
        for listener in _listeners:
            stack.enter_context(listener.during(work))
        yield
