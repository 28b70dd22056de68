"""The replay: blocks run by the training thread, host workers, the device's stream and two copy streams.

Kernels of all threads join one stream. A numbered copy (meft/link.py) goes on the copy stream of its direction: one to
the host after all that the device's stream holds, one to the device as soon as that copy stream is free. Any other copy
joins the device's stream, and a blocking one holds up its thread. Tasks of one queue run in the order of submission;
an idle worker takes the queue that holds the most urgent task, then the one submitted first. A queue that the training
thread waits for is as urgent as what the device waits for.

The host's cores and memory are one resource: whoever works has all of it, the most urgent first, and among equals who
came first; work is put aside at any moment for more urgent work of another worker. Host work of the training thread
comes before all. Issuing kernels and copies takes a thread's time and none of that resource.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from meft_bench.meft.engine.workers import RETRIEVAL
from meft_bench.simulate.blocks import COPY, DEVICE, HOST, Block
from meft_bench.simulate.machine import PIECE, PREFETCH, SUBMIT, WAIT_COPY, WAIT_TASK

LAUNCH = "launch"
"""Name of what a thread does to issue."""
STEP = "step"
"""Kind of a block that ends a step of the training thread."""
_WAITS = {SUBMIT: WAIT_TASK, COPY: WAIT_COPY}  # by what makes the thing that is waited for
_FIRST = -1  # the training thread's priority
Span = Callable[[str, str, Block, float, float], None]
"""Is told (lane, part, block, start, end) of what ran."""


class _Thread:
    """The training thread, or a task."""

    __slots__ = ("blocks", "at", "task", "queue", "urgency", "left", "arrived")

    def __init__(self, blocks: Sequence[Block], task: Block | None, queue: "_Queue | None", order: int) -> None:
        self.blocks, self.at, self.task, self.queue = blocks, 0, task, queue
        self.urgency = (_FIRST if task is None else task.priority, order)
        """(priority, place in the order of submission)."""
        self.left, self.arrived = 0.0, 0

    @property
    def lane(self) -> str:
        return "host" if self.task is None else "workers"


class _Queue:
    """Tasks that wait, in order; the running one is not among them."""

    __slots__ = ("waiting", "running", "last", "_awaited", "_urgency")

    def __init__(self) -> None:
        self._awaited = False
        self.waiting: deque[_Thread] = deque()
        self.running: _Thread | None = None
        self.last = 0
        self._urgency: tuple[int, int] | None = None

    def urgency(self) -> tuple[int, int]:
        """The most urgent of all its tasks', running or not."""
        if self._urgency is None:
            running = [self.running] if self.running is not None else []
            most = min(t.urgency for t in (*self.waiting, *running))
            self._urgency = (min(most[0], RETRIEVAL), most[1]) if self._awaited else most
        return self._urgency

    def awaited(self, now: bool) -> None:
        """Whether the training thread waits for one of its tasks."""
        self._awaited = now
        self.changed()

    def changed(self) -> None:
        """A task came or ended."""
        self._urgency = None


class Replay:
    """One replay of blocks. ends: when each STEP of the training thread and all that the device then held was over;
    end: when everything was. Raises ValueError for a program that waits for ever."""

    def __init__(self, blocks: Sequence[Block], workers: int, span: Span | None = None) -> None:
        self.span, self.idle = span, workers
        self.streams = {"device": 0.0, "h2d": 0.0, "d2h": 0.0}
        self.ends: list[float] = []
        self.end = 0.0
        self._of_task: dict[int, list[Block]] = defaultdict(list)
        self._copies: dict[int, tuple[str, float]] = {}
        self._done: set[int] = set()
        self._known = {(_WAITS[b.kind], b.number) for b in blocks if b.kind in _WAITS}
        self._parked: dict[tuple[str, int], list[_Thread]] = defaultdict(list)
        self._queues: dict[int, _Queue] = defaultdict(_Queue)
        self._events: list[tuple[float, int, Any]] = []
        self._count = 0
        self._working: list[_Thread] = []
        self._served: _Thread | None = None
        self._since, self._version = 0.0, 0
        for block in blocks:
            self._of_task[block.thread].append(block)
        self._run()

    # ---- the clock ----

    def _run(self) -> None:
        main = _Thread(self._of_task[0], None, None, 0)
        self._at(0.0, main)
        while self._events:
            now, _, what = heapq.heappop(self._events)
            if isinstance(what, _Thread):
                self._go_on(what, now)
            elif what == self._version and self._served is not None:
                self._worked(self._served, now)
        self.end = max(self.end, *self.streams.values())
        if main.at < len(main.blocks) or any(q.waiting or q.running for q in self._queues.values()):
            raise ValueError("this program waits for ever: a thread waits for what nobody does")

    def _at(self, time: float, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, what))

    def _go_on(self, thread: _Thread, now: float) -> None:
        """Run the thread until it waits, works on the host, ends, or another's turn comes first."""
        blocks = thread.blocks
        while thread.at < len(blocks):
            if self._events and self._events[0][0] < now:
                return self._at(now, thread)
            block = blocks[thread.at]
            kind = block.kind
            if kind == HOST:
                return self._work(thread, block.seconds, now)
            if kind == PIECE and self._put_aside(thread, now):
                return None
            if kind in (WAIT_TASK, WAIT_COPY):
                ready = self._ready(thread, block, now)
                if ready is None:
                    return None
                now = ready
            else:
                now = self._do(thread, block, now)
            thread.at += 1
        self.end = max(self.end, now)
        if thread.task is not None:
            self._task_done(thread, now)
        return None

    def _do(self, thread: _Thread, block: Block, now: float) -> float:
        """One block that needs nobody; returns when its thread goes on."""
        streams = self.streams
        if block.kind == DEVICE:
            streams["device"] = end = max(streams["device"] + block.seconds, now + block.lag)
            self._tell(thread.lane, LAUNCH, block, now, now + block.issuing)
            self._tell("gpu", block.part, block, end - block.seconds, end)
            return now + block.issuing
        if block.kind == COPY:
            return self._copy(thread, block, now)
        if block.kind == PREFETCH:
            start = max(now, streams["h2d"])
            streams["h2d"] = end = start + block.seconds
            streams["device"] = max(streams["device"], end)
            self._tell("h2d", block.part, block, start, end)
        elif block.kind == SUBMIT:
            self._submit(block, now)
        elif block.kind == STEP:
            self.ends.append(max(now, streams["device"]))
        return now

    def _copy(self, thread: _Thread, block: Block, now: float) -> float:
        streams, lane, issued = self.streams, block.place, now + block.issuing
        after = issued if block.number and lane == "h2d" else max(issued, streams["device"])
        start = max(after, streams[lane])
        streams[lane] = end = start + block.seconds
        self._tell(thread.lane, LAUNCH, block, now, issued)
        self._tell(lane, block.part, block, start, end)
        if block.number:
            self._copies[block.number] = lane, end
            self._wake((WAIT_COPY, block.number), now)
        else:
            streams["device"] = end
        return end if block.blocking else issued

    def _tell(self, lane: str, part: str, block: Block, start: float, end: float) -> None:
        if self.span is not None:
            self.span(lane, part, block, start, end)

    # ---- waiting ----

    def _ready(self, thread: _Thread, block: Block, now: float) -> float | None:
        """When the thread goes on; None where what it waits for is not there yet, and the thread is parked."""
        number = block.number
        if block.kind == WAIT_TASK:
            if (WAIT_TASK, number) not in self._known:  # of a step before this program: all that the queue was given
                number = self._queues[block.queue].last if block.queue else 0
            if not number or number in self._done:
                return now
        elif (WAIT_COPY, number) not in self._known:
            return now
        elif number in self._copies:
            lane, end = self._copies[number]
            if lane == "d2h":
                return max(now, end)
            self.streams["device"] = max(self.streams["device"], end)
            return now
        self._parked[block.kind, number].append(thread)
        if block.kind == WAIT_TASK and thread.task is None and block.queue:
            self._queues[block.queue].awaited(True)
            self._serve(now)
        return None

    def _wake(self, key: tuple[str, int], now: float) -> None:
        for thread in self._parked.pop(key, ()):
            self._at(now, thread)

    # ---- workers ----

    def _submit(self, block: Block, now: float) -> None:
        queue = self._queues[block.queue]
        self._count += 1
        queue.waiting.append(_Thread(self._of_task[block.number], block, queue, self._count))
        queue.changed()
        queue.last = block.number
        self._start(now)
        self._serve(now)  # the running task of a queue becomes as urgent as what waits behind it

    def _start(self, now: float) -> None:
        """Idle workers take the most urgent queues."""
        while self.idle:
            free = [q for q in self._queues.values() if q.waiting and q.running is None]
            if not free:
                return
            queue = min(free, key=_Queue.urgency)
            queue.running = queue.waiting.popleft()
            self.idle -= 1
            self._at(now, queue.running)

    def _task_done(self, thread: _Thread, now: float) -> None:
        assert thread.task is not None and thread.queue is not None
        self._done.add(thread.task.number)
        if any(t.task is None for t in self._parked.get((WAIT_TASK, thread.task.number), ())):
            thread.queue.awaited(False)
        thread.queue.running = None
        thread.queue.changed()
        self.idle += 1
        self._wake((WAIT_TASK, thread.task.number), now)
        self._start(now)

    def _put_aside(self, thread: _Thread, now: float) -> bool:
        """Whether the task makes room for a more urgent queue, to go on from here later."""
        queue = thread.queue
        assert queue is not None
        others = [q.urgency() for q in self._queues.values() if q.waiting and q.running is None]
        if not others or min(others) > queue.urgency():
            return False
        thread.at += 1
        queue.waiting.appendleft(thread)
        queue.running = None
        self.idle += 1
        self._start(now)
        return True

    # ---- the host's cores and memory ----

    def _work(self, thread: _Thread, seconds: float, now: float) -> None:
        self._count += 1
        thread.left, thread.arrived = seconds, self._count
        self._working.append(thread)
        self._serve(now)

    def _serve(self, now: float) -> None:
        """Give the host to the most urgent of those who want it."""
        best = min(self._working, key=_claim, default=None)
        if best is self._served:
            return
        self._pause(now)
        self._served, self._since = best, now
        self._version += 1
        if best is not None:
            self._at(now + best.left, self._version)

    def _pause(self, now: float) -> None:
        served = self._served
        if served is not None and now > self._since:
            served.left -= now - self._since
            block = served.blocks[served.at]
            self._tell(served.lane, block.part, block, self._since, now)

    def _worked(self, thread: _Thread, now: float) -> None:
        self._pause(now)
        self._working.remove(thread)
        self._served = None
        self._version += 1
        thread.at += 1
        self._at(now, thread)
        self._serve(now)


def _claim(thread: _Thread) -> tuple[int, int]:
    """Whose turn at the host it is: (priority, who came first)."""
    return (_FIRST if thread.queue is None else thread.queue.urgency()[0]), thread.arrived
