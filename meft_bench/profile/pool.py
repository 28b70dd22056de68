"""Processes that simulate: they know what all rows share, and end with the command that started them."""

import concurrent.futures
import concurrent.futures.process
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.stopping import end_with

shared: dict[str, Any] = {}
"""In a worker: what the pool was made with."""


class Pool:
    """Worker processes that know known, as the module's shared. They start only when there is work."""

    def __init__(self, known: dict[str, Any], workers: int | None) -> None:
        self.known = known
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def begin(self) -> multiprocessing.context.BaseContext:
        """Start the process that workers are forked from, unless it runs: it imports for seconds, beside what the
        caller prepares. Returns the workers' context."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["meft_bench.profile.simulate_matrix", "meft_bench.baselines.lora"])
        # Simulated operations are small, so the fork server has one thread. What else this process starts has all: rows
        # that a GPU measures after the simulation do MEFT's host work with them.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        return context

    def each(
        self, function: Callable[..., Any], jobs: list[tuple[Any, ...]], what: str = ""
    ) -> Iterator[tuple[Any, Any]]:
        """(the job's first argument, function's result) of every job: as they end, with a progress bar that says what;
        without a name for it in the order of the jobs."""
        if not jobs:
            return
        if self.pool is None:
            context = self.begin()
            self.pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, _begin, (self.known, os.getpid()))
        waiting = {self.pool.submit(function, *job): job[0] for job in jobs}
        ended: Iterable[concurrent.futures.Future[Any]] = waiting
        if what:
            ended = tqdm(concurrent.futures.as_completed(waiting), total=len(waiting), unit="run", desc=what)
        try:
            for future in ended:
                yield waiting[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError(
                "the system ended a simulating process, as it does when memory runs out: give fewer --workers; the "
                "same command goes on with what is done"
            ) from None


def _begin(known: dict[str, Any], owner: int) -> None:
    end_with(owner)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it saves and ends the pool
    gc.collect()
    gc.freeze()  # what the imports made is never garbage: looking through it takes a tenth of the time
    shared.update(known)
