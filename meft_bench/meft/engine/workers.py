"""HostQueue: one layer's work on the host, in order; at once, or in the background while the device computes.

Work of different layers runs side by side on a few threads that all queues share and that end with the process. Work of
one layer never overlaps or overtakes, so background and immediate work give the same bits.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from meft_bench import observe
from meft_bench.meft.engine.handle import engine

_WORKERS = 2
_POOL: tuple[int, ThreadPoolExecutor] | None = None
_POOL_LOCK = threading.Lock()
_AT_ONCE = False
_numbers = itertools.count(1)


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, queues that run in the background do their work where it is submitted, and all else is as in the
    background: so a simulation follows, on one thread, what threads would do."""
    global _AT_ONCE
    before, _AT_ONCE = _AT_ONCE, True
    try:
        yield
    finally:
        _AT_ONCE = before


class Task(Future):
    """What a queue was given to do. number: what announcements call it (observe.Work.number)."""

    def __init__(self) -> None:
        super().__init__()
        self.number = next(_numbers)


class HostQueue:
    """Runs what is submitted in the order of submission.

    name is what errors call it. When work raises, everything queued behind it is dropped, and that submit (immediate),
    or the next submit, wait or result (background), raises RuntimeError from the cause; so does every later one: the
    rows of that layer may be half updated.
    """

    def __init__(self, name: str, background: bool = False) -> None:
        self.name, self.background = name, background
        self._lock = threading.Condition()
        self._items: deque[tuple[Task, Callable[..., Any], tuple, int, bool]] = deque()
        self._running = False
        self._worker: int | None = None
        self._failure: BaseException | None = None
        self._last = 0  # number of the newest task

    def turn(self, background: bool) -> None:
        """Run what comes from now on in the background, or at once."""
        if background != self.background:
            self.wait()
            self.background = background

    def submit(self, work: Callable[..., Any], *args: Any) -> Task:
        """Queue work(*args) and return its future; done on return unless the queue runs in the background."""
        self._raise_failure()
        future = Task()
        self._last = future.number
        item = (future, work, args, torch.get_num_threads(), torch.is_grad_enabled())
        if not self.background or _AT_ONCE:
            self._wait()
            self._run(item)
            self._raise_failure()
            return future
        with self._lock:
            self._items.append(item)
            start, self._running = not self._running, True
        if start:
            _pool().submit(self._drain)
        return future

    def result(self, future: Task) -> Any:
        """What the submitted work returned, waiting for it. Raises RuntimeError from what went wrong."""
        with observe.wait("task", future.number, self):
            error = future.exception()
        if error is not None:
            self._raise_failure()
            raise error
        return future.result()

    def wait(self) -> None:
        """Return when everything submitted is done. Raises RuntimeError from what went wrong."""
        if self._last and threading.get_ident() != self._worker:
            with observe.wait("task", self._last, self):
                self._wait()
        else:
            self._raise_failure()

    def _wait(self) -> None:
        if threading.get_ident() != self._worker:  # work that asks about its own queue would wait for itself
            with self._lock:
                while self._running and self._failure is None:
                    self._lock.wait()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"host work of {self.name} failed ({type(self._failure).__name__}: {self._failure}); its rows may be "
                "half updated: go on from the last checkpoint"
            ) from self._failure

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._items:
                    self._running = False
                    self._lock.notify_all()
                    return
                item = self._items.popleft()
            self._run(item)

    @engine
    def _run(self, item: tuple[Task, Callable[..., Any], tuple, int, bool]) -> None:
        future, work, args, threads, grad = item
        outer, self._worker = self._worker, threading.get_ident()
        try:
            if self._failure is not None:
                raise RuntimeError(f"dropped: earlier host work of {self.name} failed") from self._failure
            # Both settings are a thread's own; sums must not depend on which thread makes them.
            if self.background and torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            name = getattr(work, "__name__", type(work).__name__)
            with torch.set_grad_enabled(grad), observe.task(name, self, future.number, 0):
                future.set_result(work(*args))
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            with self._lock:
                self._failure = self._failure or error
                self._lock.notify_all()
            future.set_exception(error)
            if not self.background and not isinstance(error, Exception):
                raise  # ctrl-C on the caller's own thread is not this layer's failure
        finally:
            self._worker = outer

    def __deepcopy__(self, memo: dict) -> "HostQueue":
        self.wait()
        return HostQueue(self.name, self.background)

    def __reduce__(self) -> tuple:
        self.wait()
        return HostQueue, (self.name, self.background)


def _pool() -> ThreadPoolExecutor:
    """The shared threads; made anew in a forked child, which has none of its parent's."""
    global _POOL
    with _POOL_LOCK:
        if _POOL is None or _POOL[0] != os.getpid():
            _POOL = os.getpid(), ThreadPoolExecutor(_WORKERS, thread_name_prefix="meft-host")
        return _POOL[1]
