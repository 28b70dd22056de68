"""HostQueue: one layer's work on the host, in order; at once, or in the background while the device computes.

Work of different layers runs side by side on a few threads that all queues share. What the device waits for next goes
first: a thread takes the layer whose queue holds the most urgent work, wherever in the queue it stands, since work of
one layer never overlaps or overtakes. A queue that somebody waits for is the most urgent. So background and immediate
work give the same bits. Work that is a generator is done piece by piece, and a thread between two pieces looks for a
more urgent layer.
"""

import atexit
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from meft_bench import observe
from meft_bench.meft.engine import cores
from meft_bench.meft.engine.handle import engine

RETRIEVAL, GRADIENTS, UPDATE, LATER = range(4)
"""Priorities: search and gather, which the device waits for and which may fail and be done again; adding gradients;
AdamW; catching up rows that nobody waits for."""
WORKERS = 2
"""Threads that run queued work; each kernel uses as many as torch besides."""
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

    def __init__(self, work: Callable[..., Any], args: tuple, priority: int, device: torch.device | None) -> None:
        super().__init__()
        self.number, self.priority = next(_numbers), priority
        self.name = getattr(work, "__name__", type(work).__name__)
        self._work, self._args = work, args
        self._pieces: Iterator[Any] | None = None
        # A thread's own settings; sums must not depend on which thread makes them.
        self.threads, self._grad = torch.get_num_threads(), torch.is_grad_enabled()
        # Copies and kernels that it issues belong to the caller's stream, whichever that is.
        on_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if on_gpu else None

    @engine
    def run_piece(self, queue: "HostQueue") -> bool:
        """Do all of it, or its next piece; True when it is done and has its result. Raises what the work raises."""
        on_stream: AbstractContextManager[Any] = nullcontext()
        if self._stream is not None:
            on_stream = torch.cuda.stream(self._stream)
        told = observe.task(self.name, queue, self.number, self.priority)
        with torch.set_grad_enabled(self._grad), on_stream, told:
            if self._pieces is None:
                made = self._work(*self._args)
                if not isinstance(made, Iterator):
                    self._finish(made)
                    return True
                self._pieces = made
            try:
                next(self._pieces)
            except StopIteration as end:
                self._finish(end.value)
                return True
        return False

    def _finish(self, result: Any) -> None:
        del self._work, self._args  # what they hold may be large
        self._pieces = None
        self.set_result(result)


class HostQueue:
    """Runs what is submitted in the order of submission.

    name is what errors call it. When work raises, everything queued behind it is dropped, and that submit (immediate),
    or the next submit, wait or result (background), raises RuntimeError from the cause; so does every later one: the
    rows of that layer may be half updated. But what a retrieval raises (ctrl-C, a device without room) only its own
    submit or result raises, as it is: it leaves rows and gradients as they are, or says so (must_end). Made where
    MEFT_BENCH_CORES is no list of cores, it raises ValueError.
    """

    def __init__(self, name: str, background: bool = False) -> None:
        cores.given()  # a slip in the environment shows here, before any work
        self.name, self.background = name, background
        self.device: torch.device | None = None
        """Where the layer computes."""
        self._idle = threading.Condition()
        self._tasks: deque[Task] = deque()
        self._worker: int | None = None
        self._failure: BaseException | None = None
        self._stream: Any = None
        """The CUDA stream that this layer's work was last asked for on."""
        self._last = 0  # number of the newest task
        self._waiters = 0

    def turn(self, background: bool, device: torch.device | None = None) -> None:
        """Run what comes from now on in the background, or at once, for a layer on this device."""
        self.device = device
        if background != self.background:
            self.wait()
            self.background = background

    def follow(self) -> None:
        """The caller's CUDA stream goes on from where this layer's work, on whichever stream it was asked for, ends. A
        program may compute on one stream and step on another that waits for the first; it cannot know of what a thread
        gives to either of them later. On one stream nobody waits for anything."""
        if self.device is None or self.device.type != "cuda" or threading.get_ident() == self._worker:
            return
        before, now = self._stream, torch.cuda.current_stream(self.device)
        if before is not None and before != now:
            self._wait()
            now.wait_stream(before)
        self._stream = now

    def submit(self, work: Callable[..., Any], *args: Any, priority: int) -> Task:
        """Queue work(*args) and return its future; done on return unless the queue runs in the background. A generator
        is done in pieces, and what it returns is the result."""
        self._raise_failure()
        self.follow()
        task = Task(work, args, priority, self.device)
        self._last = task.number
        if not self.background or _AT_ONCE:
            self._wait()
            while not self.run_piece(task):
                pass
            self._raise_failure()
            return task
        with self._idle:
            self._tasks.append(task)
        _workers().offer(self)
        return task

    def result(self, future: Task) -> Any:
        """What the submitted work returned, waiting for it. Raises RuntimeError from what went wrong."""
        with observe.wait("task", future.number, self), self._waited_for():
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
        self.follow()

    def _wait(self) -> None:
        if threading.get_ident() != self._worker:  # work that asks about its own queue would wait for itself
            with self._waited_for(), self._idle:
                while self._tasks and self._failure is None:
                    self._idle.wait()
        self._raise_failure()

    @contextmanager
    def _waited_for(self) -> Iterator[None]:
        """Inside, what is queued here is as urgent as what the device waits for."""
        with self._idle:
            self._waiters += 1
        try:
            yield
        finally:
            with self._idle:
                self._waiters -= 1

    @contextmanager
    def must_end(self) -> Iterator[None]:
        """For changes of rows or gradients: what raises inside has left them half made, whatever the work."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        with self._idle:
            self._failure = self._failure or error
            self._idle.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"host work of {self.name} failed ({type(self._failure).__name__}: {self._failure}); its rows may be "
                "half updated: go on from the last checkpoint"
            ) from self._failure

    # ---- for the workers ----

    @property
    def urgency(self) -> tuple[int, int] | None:
        """(priority, number) of the most urgent task that waits here; None when there is none. While somebody waits for
        the queue, all of them are as urgent as can be."""
        with self._idle:
            waited = self._waiters > 0
            return min(((RETRIEVAL if waited else t.priority, t.number) for t in self._tasks), default=None)

    def run_first(self) -> bool:
        """Do the first task, or its next piece; True when nothing is left."""
        with self._idle:
            task = self._tasks[0]
        done = self.run_piece(task)
        with self._idle:
            if done:
                self._tasks.popleft()
            if not self._tasks or self._failure is not None:
                self._idle.notify_all()
            return not self._tasks

    def run_piece(self, task: Task) -> bool:
        """Do a task, or its next piece, as this queue's; True when it is done, however it ended."""
        outer, self._worker = self._worker, threading.get_ident()
        try:
            if self._failure is not None:
                raise RuntimeError(f"dropped: earlier host work of {self.name} failed") from self._failure
            if self.background and torch.get_num_threads() != task.threads:
                torch.set_num_threads(task.threads)
            return task.run_piece(self)
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            retrieval = task.priority == RETRIEVAL
            if not retrieval:
                self._fail(error)
            task.set_exception(error)
            if not self.background and (retrieval or not isinstance(error, Exception)):
                raise
            return True
        finally:
            self._worker = outer

    def __deepcopy__(self, memo: dict) -> "HostQueue":
        self.wait()
        return HostQueue(self.name, self.background)

    def __reduce__(self) -> tuple:
        self.wait()
        return HostQueue, (self.name, self.background)


class _Workers:
    """Threads that run queues, the most urgent first."""

    def __init__(self) -> None:
        self._offered = threading.Condition()
        self._ready: list[HostQueue] = []
        self._taken: set[int] = set()
        self._ending = False
        self._threads = [
            threading.Thread(target=self._work, name=f"meft-host-{n}", daemon=True) for n in range(WORKERS)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._end)

    def offer(self, queue: HostQueue) -> None:
        """The queue has something to do."""
        with self._offered:
            if id(queue) not in self._taken and all(queue is not known for known in self._ready):
                self._ready.append(queue)
            self._offered.notify()

    def _work(self) -> None:
        cores.bind_worker()
        while (queue := self._take()) is not None:
            while True:
                empty = queue.run_first()
                with self._offered:
                    if empty and queue.urgency is None:
                        self._taken.discard(id(queue))
                        break
                    if self._is_behind(queue):
                        self._taken.discard(id(queue))
                        self._ready.append(queue)
                        self._offered.notify()
                        break
            del queue  # one that failed holds all that its error's frames do, which may lie on a GPU

    def _take(self) -> HostQueue | None:
        """The most urgent queue that no other thread works on; waits for one. None at the end of the process, when all
        that was submitted is done."""
        with self._offered:
            while True:
                waiting = [(urgency, i) for i, q in enumerate(self._ready) if (urgency := q.urgency) is not None]
                if waiting:
                    queue = self._ready.pop(min(waiting)[1])
                    self._taken.add(id(queue))
                    return queue
                self._ready.clear()
                if self._ending:
                    return None
                self._offered.wait()

    def _is_behind(self, queue: HostQueue) -> bool:
        """Whether a queue that nobody works on is more urgent than this one."""
        own = queue.urgency
        return own is not None and any(u < own for q in self._ready if (u := q.urgency) is not None)

    def _end(self) -> None:
        with self._offered:
            self._ending = True
            self._offered.notify_all()
        for thread in self._threads:
            thread.join()


_shared: tuple[int, _Workers] | None = None
_shared_lock = threading.Lock()


def _workers() -> _Workers:
    """The shared threads; made anew in a forked child, which has none of its parent's."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = os.getpid(), _Workers()
        return _shared[1]
