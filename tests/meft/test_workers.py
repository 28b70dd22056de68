"""Host work in the background: what the device waits for goes first, and nothing overtakes within a layer."""

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from meft_bench import observe
from meft_bench.meft.engine import workers
from meft_bench.meft.engine.workers import LATER, RETRIEVAL, UPDATE, HostQueue

WAIT_S = 20
"""Longer than any work here takes; a test that would wait for ever fails instead."""


@pytest.fixture
def held(monkeypatch):
    """One thread for all queues, held by a task until go is set: what is submitted meanwhile is ordered, not run."""
    monkeypatch.setattr(workers, "WORKERS", 1)
    monkeypatch.setattr(workers, "_shared", None)
    go, began = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert go.wait(WAIT_S)

    first = HostQueue("holder", background=True)
    first.submit(hold, priority=RETRIEVAL)
    assert began.wait(WAIT_S)
    return go


def noting(done: list[str], name: str):
    return lambda: done.append(name)


def let_run(*queues: HostQueue) -> None:
    """Return when all is done, without waiting for any one, which would make it urgent."""
    patience = time.monotonic() + WAIT_S
    while any(q.urgency is not None for q in queues) and time.monotonic() < patience:
        time.sleep(0.001)


def test_a_search_overtakes_the_updates_of_other_layers(held: threading.Event) -> None:
    done: list[str] = []
    queues = [HostQueue(f"layer {i}", background=True) for i in range(4)]
    for i in range(3):
        queues[i].submit(noting(done, f"update {i}"), priority=UPDATE)
    queues[3].submit(noting(done, "search 3"), priority=RETRIEVAL)
    held.set()
    let_run(*queues)
    assert done == ["search 3", "update 0", "update 1", "update 2"]


@pytest.mark.parametrize("how", ["wait", "result"])
def test_a_layer_that_somebody_waits_for_goes_first(held: threading.Event, how: str) -> None:
    """The training loop needs that layer's rows next, however late they were queued."""
    done: list[str] = []
    queues = [HostQueue(f"layer {i}", background=True) for i in range(3)]
    tasks = [q.submit(noting(done, f"update {i}"), priority=UPDATE) for i, q in enumerate(queues)]
    behind = queues[2].submit(noting(done, "keys 2"), priority=LATER)
    waiting = threading.Thread(target=queues[2].wait if how == "wait" else lambda: queues[2].result(behind))
    waiting.start()
    patience = time.monotonic() + WAIT_S
    while queues[2].urgency != (RETRIEVAL, tasks[2].number) and time.monotonic() < patience:
        time.sleep(0.001)
    held.set()
    waiting.join(WAIT_S)
    assert done[:2] == ["update 2", "keys 2"]
    for queue in queues:
        queue.wait()
    assert done[2:] == ["update 0", "update 1"]


def test_within_a_layer_nothing_overtakes_and_its_search_lends_it_its_urgency(held: threading.Event) -> None:
    done: list[str] = []
    early, late = (HostQueue(name, background=True) for name in ("early", "late"))
    early.submit(noting(done, "early update"), priority=UPDATE)
    late.submit(noting(done, "late update"), priority=UPDATE)
    late.submit(noting(done, "late search"), priority=RETRIEVAL)
    held.set()
    let_run(early, late)
    assert done == ["late update", "late search", "early update"]


def test_between_two_pieces_a_more_urgent_layer_is_served_and_none_of_the_own(held: threading.Event) -> None:
    done: list[str] = []
    long, other = (HostQueue(name, background=True) for name in ("long", "other"))

    def pieces():
        for i in range(3):
            done.append(f"piece {i}")
            if i == 0:  # while a piece runs, both layers get work
                other.submit(noting(done, "search"), priority=RETRIEVAL)
                long.submit(noting(done, "behind"), priority=LATER)
            yield
        return "whole"

    task = long.submit(pieces, priority=UPDATE)
    held.set()
    let_run(long, other)
    assert long.result(task) == "whole"
    assert done == ["piece 0", "search", "piece 1", "piece 2", "behind"]


def test_pieces_are_done_at_once_where_the_queue_does_not_run_in_the_background() -> None:
    done: list[int] = []

    def pieces():
        for i in range(3):
            done.append(i)
            yield
        return sum(done)

    queue = HostQueue("layer")
    assert queue.submit(pieces, priority=RETRIEVAL).result() == 3 and done == [0, 1, 2]


def test_every_piece_is_announced_as_the_tasks_with_its_priority() -> None:
    heard: list[observe.Work] = []

    class Ear:
        def during(self, work: observe.Work):
            heard.append(work)
            return threading.Lock()

    def pieces():
        yield
        yield

    queue = HostQueue("layer")
    with observe.listening(Ear()):
        task = queue.submit(pieces, priority=UPDATE)
    told = [w for w in heard if w.kind == "task"]
    assert len(told) == 3 and {(w.number, w.priority, w.name) for w in told} == {(task.number, UPDATE, "pieces")}


def test_what_is_queued_behind_a_failure_is_dropped_and_everybody_is_told(held: threading.Event) -> None:
    done: list[str] = []
    queue = HostQueue("layer 7", background=True)

    def fails():
        yield
        raise OSError("no memory")

    bad = queue.submit(fails, priority=UPDATE)
    behind = queue.submit(noting(done, "behind"), priority=RETRIEVAL)
    held.set()
    with pytest.raises(RuntimeError, match="host work of layer 7 failed .OSError: no memory"):
        queue.result(bad)
    assert isinstance(behind.exception(WAIT_S), RuntimeError) and not done
    for again in (queue.wait, lambda: queue.submit(noting(done, "more"), priority=RETRIEVAL)):
        with pytest.raises(RuntimeError, match="layer 7"):
            again()


def test_threads_keep_nothing_of_work_that_failed(monkeypatch) -> None:
    """What it had on a GPU when that ran out of memory would be missing to whatever is trained next."""
    monkeypatch.setattr(workers, "_shared", None)
    held: list[weakref.ref] = []

    def fails() -> None:
        large = threading.Event()
        held.append(weakref.ref(large))
        raise OSError("no memory")

    queue = HostQueue("layer 7", background=True)
    with contextlib.suppress(RuntimeError):
        queue.result(queue.submit(fails, priority=UPDATE))
    del queue
    patience = time.monotonic() + WAIT_S / 4
    while held[0]() is not None and time.monotonic() < patience:
        time.sleep(0.01)
        gc.collect()
    assert held[0]() is None


def test_work_runs_on_the_stream_that_its_caller_computed_on(monkeypatch) -> None:
    """A trainer on a stream of its own: what workers issue is ordered behind what it issued."""
    now = SimpleNamespace(stream="default")
    seen: list[str] = []

    class Stream:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, now.stream = now.stream, self.stream

        def __exit__(self, *error: object) -> None:
            now.stream = self.before

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now.stream)
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    queue = HostQueue("layer", background=True)
    queue.turn(True, torch.device("cuda"))
    now.stream = "trainer's"
    task = queue.submit(lambda: seen.append(now.stream), priority=RETRIEVAL)
    now.stream = "default"
    queue.result(task)
    assert seen == ["trainer's"] and now.stream == "default"


class Streams:
    """CUDA's streams as the engine asks for them; done notes what happens, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.now = self.made("default")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def made(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.done.append(f"{name} waits for {other.name}"))


@pytest.mark.parametrize("asks", ["follow", "submit", "wait"])
def test_another_stream_goes_on_where_queued_work_of_the_first_ends(asks: str, monkeypatch) -> None:
    """A program that steps on one stream and computes on another, which waits for the first before the layer's thread
    has given the step to it."""
    streams, held = Streams(monkeypatch), threading.Event()
    queue = HostQueue("layer", background=True)
    queue.turn(True, torch.device("cuda"))

    def step() -> None:
        held.wait(WAIT_S)
        streams.done.append("step")

    queue.submit(step, priority=UPDATE)
    queue.follow()
    assert not streams.done, "on one stream nobody waits"
    streams.now = streams.made("side")
    threading.Timer(0.05, held.set).start()
    if asks == "submit":
        queue.submit(lambda: None, priority=RETRIEVAL)
    else:
        getattr(queue, asks)()
    assert streams.done == ["step", "side waits for default"]
    queue.follow()
    assert len(streams.done) == 2, "once"


def test_many_layers_on_the_shared_threads_each_keep_their_order() -> None:
    queues = [HostQueue(f"layer {i}", background=True) for i in range(12)]
    done: list[list[int]] = [[] for _ in queues]
    for n in range(30):
        for own, queue in zip(done, queues, strict=True):
            queue.submit(own.append, n, priority=(n * 7 + id(queue)) % 4)
    for queue in queues:
        queue.wait()
    assert done == [list(range(30))] * len(queues)


def test_a_save_at_the_end_of_the_process_finds_all_work_done() -> None:
    """Handlers that were registered before the first host work run after the threads were told to end."""
    program = (
        "import atexit, time\n"
        "from meft_bench.meft.engine.workers import HostQueue\n"
        "queue, done = HostQueue('layer', background=True), []\n"
        "atexit.register(lambda: (queue.wait(), print('saved', len(done))))\n"
        "for _ in range(3):\n"
        "    queue.submit(lambda: (time.sleep(0.05), done.append(1)), priority=0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.strip()) == (0, "saved 3"), ended.stderr


# ---- a retrieval that fails ----


@pytest.mark.parametrize("background", [False, True])
def test_a_retrieval_that_failed_may_be_done_again(background: bool) -> None:
    """It changes nothing, so whoever asked for it is told, and the layer goes on."""
    queue = HostQueue("layer", background)

    def fails() -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        queue.result(queue.submit(fails, priority=RETRIEVAL))
    queue.wait()
    assert queue.result(queue.submit(lambda: 7, priority=RETRIEVAL)) == 7


@pytest.mark.parametrize("background", [False, True])
def test_a_retrieval_that_left_rows_half_changed_ends_the_layer(background: bool) -> None:
    queue = HostQueue("layer 7", background)

    def fails() -> None:
        with queue.must_end():
            raise ZeroDivisionError("half")

    with pytest.raises((RuntimeError, ZeroDivisionError), match="half"):
        queue.result(queue.submit(fails, priority=RETRIEVAL))
    with pytest.raises(RuntimeError, match="layer 7 failed .ZeroDivisionError: half.*half updated"):
        queue.wait()
