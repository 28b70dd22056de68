"""Who listens hears every announcement, from any thread, and nobody else pays for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from meft_bench import observe
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.workers import RETRIEVAL, HostQueue
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.model import attach
from meft_bench.observe import Work
from tests.meft.tiny_models import next_token_loss, tiny_stack, tokens


class Diary:
    """Writes down the beginning and the end of what it hears."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.works: list[Work] = []
        self.ended: list[str] = []
        self._lock = threading.Lock()
        self._open: dict[int, list[str]] = {}

    @contextmanager
    def during(self, work: Work) -> Iterator[None]:
        own = self._open.setdefault(threading.get_ident(), [])
        with self._lock:
            self.begun.append((work.name, len(own)))
            self.works.append(work)
        own.append(work.name)
        try:
            yield
        finally:
            assert own.pop() == work.name
            with self._lock:
                self.ended.append(work.name)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.begun]


def test_without_listeners_every_announcement_is_the_same_empty_one() -> None:
    assert observe.phase("forward") is observe.part("adam") is observe.copy("rows", "h2d", 1)


def test_a_listener_hears_what_is_announced_and_how_it_nests() -> None:
    diary, owner = Diary(), object()
    with observe.listening(diary):
        with observe.phase("forward"), observe.part("gather", owner):
            with observe.copy("rows", "h2d", 12, owner):
                pass
        with observe.part("adam"):
            pass
    assert diary.begun == [("forward", 0), ("gather", 1), ("rows", 2), ("adam", 0)]
    assert diary.ended == ["rows", "gather", "forward", "adam"]
    assert diary.works[:3] == [
        Work("phase", "forward"),
        Work("part", "gather", owner),
        Work("copy", "rows", owner, direction="h2d", nbytes=12),
    ]
    with observe.part("unheard"):
        pass
    assert "unheard" not in diary.names


def test_a_listener_is_gone_after_an_exception_and_was_told_the_end_of_the_work() -> None:
    diary, other = Diary(), Diary()
    with observe.listening(other):
        with pytest.raises(KeyError, match="of the work"):
            with observe.listening(diary), observe.part("gather"):
                raise KeyError("of the work")
        with observe.part("adam"):
            pass
    assert diary.begun == [("gather", 0)] and diary.ended == ["gather"]
    assert other.names == ["gather", "adam"] and other.ended == ["gather", "adam"]
    assert observe.part("nobody listens") is observe.phase("now")


def test_who_listens_twice_goes_on_once() -> None:
    diary = Diary()
    with observe.listening(diary):
        with observe.listening(diary), observe.part("twice"):
            pass
        with observe.part("once"):
            pass
    assert diary.names == ["twice", "twice", "once"]


def test_a_method_that_announces_itself_returns_what_it_returned() -> None:
    class Worker:
        @observe.announced("gather")
        def work(self, number: int, *, more: int = 0) -> int:
            """Its words."""
            return number + more

    worker, diary = Worker(), Diary()
    assert worker.work(1, more=2) == 3
    with observe.listening(diary):
        assert worker.work(1, more=2) == 3
    assert diary.works == [Work("part", "gather", worker, doing="work")] and Worker.work.__doc__ == "Its words."


def test_announcements_of_many_threads_are_all_heard_whoever_comes_and_goes() -> None:
    diary, barrier, threads, each = Diary(), threading.Barrier(5), 4, 200

    def work() -> None:
        barrier.wait()
        for _ in range(each):
            with observe.part("outer"), observe.part("inner"):
                pass

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    with observe.listening(diary):
        barrier.wait()
        while any(worker.is_alive() for worker in workers):
            with observe.listening(Diary()):
                pass
        for worker in workers:
            worker.join()
    assert diary.begun.count(("outer", 0)) == diary.begun.count(("inner", 1)) == threads * each
    assert len(diary.ended) == 2 * threads * each


def train_a_step(config: MeftOptions, diary: Diary) -> tuple:
    torch.manual_seed(0)
    meft = attach(tiny_stack(), config)
    optimizer = meft.make_optimizer(lr=0.1)
    ids = tokens(seed=0)
    with observe.listening(diary):
        next_token_loss(meft.model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        for store in meft.stores:
            store.queue.wait()
    return meft, optimizer


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("engine", [{}, {"device_budget": 1 << 20}, {"retrieval": "device", "key_experts": False}])
def test_the_engine_announces_its_work_and_every_byte_that_it_copies(engine: dict, overlap: bool) -> None:
    diary = Diary()
    meft, optimizer = train_a_step(MeftOptions(neurons=32, kept=4, overlap=overlap, **engine), diary)
    by_name: dict[str, list[Work]] = {}
    for work in diary.works:
        if work.kind == "part":
            by_name.setdefault(work.name, []).append(work)
    assert set(by_name) == {"retrieval", "gather", "gradients", "adam"}
    assert {id(w.about) for w in by_name["retrieval"]} == {id(a) for a in meft.adapters}
    assert {id(w.about) for w in by_name["gather"]} == {id(s) for s in meft.stores}
    assert {id(w.about) for w in by_name["gradients"]} == {id(s) for s in meft.stores}
    assert [w.about for w in by_name["adam"]] == [optimizer, optimizer]
    copied: dict[tuple[str, str], int] = {}
    for work in diary.works:
        if work.kind == "copy":
            assert work.about is meft.link
            copied[work.direction, work.name] = copied.get((work.direction, work.name), 0) + work.nbytes
    assert copied == dict(meft.link.bytes) and copied


def test_rows_that_share_a_memory_with_the_base_are_not_copied() -> None:
    diary = Diary()
    meft, _ = train_a_step(MeftOptions(neurons=32, kept=4, placement="device"), diary)
    assert isinstance(meft.link, Resident)
    assert not [work for work in diary.works if work.kind == "copy"]


def test_tasks_and_waits_carry_the_numbers_of_what_they_are() -> None:
    diary, queue = Diary(), HostQueue("layer 0", background=True)
    with observe.listening(diary):
        first, second = (queue.submit(_nothing, priority=RETRIEVAL) for _ in range(2))
        queue.result(first)
        queue.wait()
    told = [(w.kind, w.name, w.number) for w in diary.works]
    tasks = [("task", "_nothing", first.number), ("task", "_nothing", second.number)]
    assert [t for t in told if t[0] == "task"] == tasks and first.number < second.number
    assert [t for t in told if t[0] == "wait"] == [("wait", "task", first.number), ("wait", "task", second.number)]
    assert all(w.about is queue for w in diary.works)


def test_whoever_waits_for_a_copy_says_for_which() -> None:
    diary, link = Diary(), Link()
    with observe.listening(diary):
        one, two = (link.send_to_host(torch.zeros(3), purpose) for purpose in ("hidden", "grads"))
        two.here()
    assert [(w.kind, w.name) for w in diary.works] == [("copy", "hidden"), ("copy", "grads"), ("wait", "copy")]
    assert [w.number for w in diary.works] == [one.number, two.number, two.number] and one.number != two.number


def _nothing() -> None:
    pass
