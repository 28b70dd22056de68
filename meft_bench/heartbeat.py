"""A rank whose machine has lost its power or its network says nothing: no error, no closed connection. So every rank
beats, and another one listens.

A thread adds one to this rank's number, again and again, in the store where the ranks have met, and looks whether the
number of the next rank grows. One that has not grown for so many seconds is given up: the rank that listened says so in
one line, and all end as if they had been killed, since their main threads may wait in a collective that nothing wakes.
What is written then is written beside the old and renamed, so the last checkpoint is whole.

A rank that computes for long goes on beating, in its own thread (a library that held Python's lock for so long would be
taken for dead; those used here give it up). One that hangs does so too: for that, each wait has a limit. Of a rank that
has not beaten yet, nothing is expected. Costs two threads and a connection to the store for each rank, and every few
seconds three short messages. torch has no such thing for gloo: its monitored_barrier is a collective of the main
threads, and NCCL's heartbeats look after NCCL's own threads.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from meft_bench.fields import seconds

LIMIT, USUAL_S = "MEFT_BENCH_HEARTBEAT_TIMEOUT", 45.0
"""A variable of the environment: seconds of silence after which a rank is given up; and what it is when unset."""
ENDED = "meft_bench/ended"
"""Under this name the store holds which rank speaks for the end of all."""
_GONE, _LIMIT_S = "meft_bench/gone", "meft_bench/limit"
_BEATS_A_LIMIT = 9
_LEFT = 1 << 40
"""Added to the number of a rank that beats no more, and is not dead."""
_sessions = count()


class Heartbeat:
    """The beats of one rank, and its ear for the next one. store: a connection of its own, which no other thread uses.
    end(line): ends this process; the line is for the user, or None where another rank has spoken."""

    def __init__(
        self, store: Any, rank: int, ranks: int, limit_s: float, go_on: str, end: Callable[[str | None], None]
    ) -> None:
        self.store, self.rank, self.ranks, self.limit_s, self.go_on, self.end = store, rank, ranks, limit_s, go_on, end
        self.pause = limit_s / _BEATS_A_LIMIT
        self._name = f"meft_bench/beat {next(_sessions)} "
        self._stop = threading.Event()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch_store)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Beat no more, and say that this rank is not dead."""
        self._stop.set()
        self._threads[0].join(timeout=self.pause)

    def _beat(self) -> None:
        next_rank, before, grew = (self.rank + 1) % self.ranks, 0, time.monotonic()
        while not self._stop.is_set():
            try:
                if self.store.add(_GONE, 0):
                    return self.end(None)
                self.store.add(f"{self._name}{self.rank}", 1)
                beats = self.store.add(f"{self._name}{next_rank}", 0)
            except RuntimeError:
                return  # nobody answers: _watch_store() ends this rank, unless its main thread does before
            now, own = time.monotonic(), self._answered
            self._answered = now
            if beats >= _LEFT:  # then it listens to nobody either
                next_rank, before = (next_rank + 1) % self.ranks, 0
            elif not beats or beats != before or now - own > self.limit_s / 2:  # the last: this rank was frozen itself
                before, grew = beats, now
            elif now - grew > self.limit_s:
                return self._give_up(next_rank)
            self._stop.wait(self.pause)
        try:
            self.store.add(f"{self._name}{self.rank}", _LEFT)
        except RuntimeError:
            pass

    def _give_up(self, silent: int) -> None:
        if self.store.compare_set(ENDED, "", str(self.rank)).decode() != str(self.rank):
            return self.end(None)
        self.store.add(_GONE, 1)
        if self.rank == 0:  # its process may hold the store: the others hear of it first
            time.sleep(2 * self.pause)
        self.end(
            f"rank {silent} of {self.ranks} has been silent for {self.limit_s:g} s ({LIMIT}): its machine or the "
            f"network is gone, so all end: {self.go_on}"
        )

    def _watch_store(self) -> None:
        """In a thread of its own, since a store on a dead machine never answers the other one."""
        looked = time.monotonic()
        while not self._stop.wait(self.pause):
            now = time.monotonic()
            if now - looked > self.limit_s / 2:  # this rank was frozen itself
                self._answered = max(self._answered, now - self.limit_s / 2)
            elif now - self._answered > self.limit_s:
                said = (
                    f"the machine on which the {self.ranks} ranks met has not answered for {self.limit_s:g} s "
                    f"({LIMIT}): it or the network is gone, so all end: {self.go_on}"
                )
                return self.end(said if os.environ.get("LOCAL_RANK", "0") == "0" else None)
            looked = now


@contextmanager
def watched(go_on: str) -> Iterator[None]:
    """Inside, this rank beats, and ends when another one is silent. go_on: what the user may do then, in words. Nothing
    where torch.distributed runs one process or none. Raises ValueError for a limit that is none, or another than one
    of the other ranks has."""
    from torch import distributed
    from torch.distributed import distributed_c10d

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield
        return
    limit_s, store = seconds(LIMIT, USUAL_S), distributed_c10d._get_default_store()
    _agree(store, limit_s)
    own: Any = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    heartbeat = Heartbeat(own, distributed.get_rank(), distributed.get_world_size(), limit_s, go_on, _end)
    heartbeat.start()
    try:
        yield
    finally:
        heartbeat.leave()


def _agree(store: Any, limit_s: float) -> None:
    """Raises ValueError where a rank that was here before has another limit: one that beats more seldom than another
    one listens is taken for dead."""
    first = store.compare_set(_LIMIT_S, "", f"{limit_s:g}").decode()
    if first != f"{limit_s:g}":
        raise ValueError(f"{LIMIT} is {first} on one rank and {limit_s:g} on another: start all with the same one")


def _end(line: str | None) -> None:
    if line is not None:
        print(f"\nmeft-bench: {line}", file=sys.stderr, flush=True)  # below a progress bar, if one is there
    os._exit(2)
