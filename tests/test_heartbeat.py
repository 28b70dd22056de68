"""The heartbeat of ranks: silence is noticed in time, by one voice, and nothing else is taken for silence."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistStoreError, HashStore, TCPStore

from meft_bench import heartbeat
from meft_bench.fields import seconds
from meft_bench.heartbeat import Heartbeat

LIMIT_S = 0.6


class Rank:
    """A rank of a test, without a process of its own."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self.said: list[str | None] = []
        self.ended = threading.Event()
        self.heart = Heartbeat(store, rank, ranks, LIMIT_S, "start again", self._end)
        self.heart._name = "beat "  # all ranks are in one process here, which counts its own
        self.heart.start()

    def _end(self, line: str | None) -> None:
        self.said.append(line)
        self.ended.set()
        self.heart._stop.set()

    def die(self) -> None:
        """Beat no more, without a word."""
        self.heart.store = Dead()


class Dead:
    """A store that nobody answers at."""

    def add(self, name: str, number: int) -> int:
        raise RuntimeError("connection reset")


class Frozen:
    """A store on a machine without power: it never answers."""

    def add(self, name: str, number: int) -> int:
        threading.Event().wait()
        raise AssertionError


@pytest.fixture
def store() -> HashStore:
    return HashStore()


def test_a_silent_rank_ends_all_and_one_says_so(store: HashStore) -> None:
    ranks = [Rank(store, number, 3) for number in range(3)]
    time.sleep(LIMIT_S / 2)
    began = time.monotonic()
    ranks[1].die()
    assert ranks[0].ended.wait(20) and ranks[2].ended.wait(20)
    assert time.monotonic() - began >= 0.9 * LIMIT_S
    assert ranks[0].said == [
        "rank 1 of 3 has been silent for 0.6 s (MEFT_BENCH_HEARTBEAT_TIMEOUT): its machine or the network is gone, "
        "so all end: start again"
    ]
    assert ranks[2].said == [None]


def test_ranks_that_leave_one_after_the_other_are_not_taken_for_dead(store: HashStore) -> None:
    """And who remains listens to the next one that is there."""
    ranks = [Rank(store, number, 3) for number in range(3)]
    time.sleep(LIMIT_S / 3)
    ranks[1].heart.leave()
    time.sleep(1.5 * LIMIT_S)
    assert not ranks[0].said and not ranks[2].said
    ranks[2].die()
    assert ranks[0].ended.wait(20) and "rank 2 of 3" in str(ranks[0].said[0])


def test_a_rank_that_has_not_begun_is_waited_for(store: HashStore) -> None:
    first = Rank(store, 0, 2)
    time.sleep(2 * LIMIT_S)
    assert not first.said
    first.heart.leave()


def test_a_store_that_does_not_answer_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    told = Rank(Frozen(), 1, 2)
    assert told.ended.wait(20)
    assert "the machine on which the 2 ranks met has not answered for 0.6 s" in str(told.said[0])
    monkeypatch.setenv("LOCAL_RANK", "1")
    silent = Rank(Frozen(), 1, 2)
    assert silent.ended.wait(20) and silent.said == [None]


def test_the_beats_of_a_real_store_go_over_a_connection_of_their_own() -> None:
    store = TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    blocked = threading.Thread(target=_waits_in_vain, args=(store,))
    blocked.start()
    other = store.clone()
    began = time.monotonic()
    assert other.add("number", 1) == 1 and time.monotonic() - began < 0.9
    blocked.join()


def _waits_in_vain(store: TCPStore) -> None:
    with pytest.raises(DistStoreError):
        store.wait(["never"], timedelta(seconds=1))


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "1e9"])
def test_a_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat.LIMIT, given)
    with pytest.raises(ValueError, match="no positive number of seconds"):
        seconds(heartbeat.LIMIT, heartbeat.USUAL_S)


def test_ranks_of_other_limits_are_refused_before_one_is_taken_for_dead(store: HashStore) -> None:
    for limit_s in (45.0, 45.0):
        heartbeat._agree(store, limit_s)
    with pytest.raises(ValueError, match="MEFT_BENCH_HEARTBEAT_TIMEOUT is 45 on one rank and 9 on another: start all"):
        heartbeat._agree(store, 9.0)
    usual, short = Heartbeat(store, 0, 2, 45.0, "", print), Heartbeat(store, 1, 2, 4.0, "", print)
    assert usual.pause > short.limit_s, "so rank 1 would have ended all between two beats"


def test_a_process_alone_has_none() -> None:
    before = threading.active_count()
    with heartbeat.watched("start again"):
        assert threading.active_count() == before
