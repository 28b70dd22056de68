"""Runs as local jobs, started as submitit starts them: the way of a cluster on one machine. No torch here.

The command stays and starts a job whenever one is over. Killed, it leaves the jobs that run; given again, it waits for
them and starts the others.
"""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from meft_bench.harness.cluster import JOBS, Jobs, as_function
from meft_bench.harness.runner import Planned, check_cuda, is_locked, label, plan, run_dir, write_spec
from meft_bench.harness.spec import RunSpec
from meft_bench.provenance import visible_gpus
from meft_bench.stopping import ctrl_c_held_back, stop_if_asked

_LOOK_S = 0.3
_MINUTES = 7 * 24 * 60
"""Of a job without --minutes: this machine need not share."""


def run(planned: list[Planned], runs: Path, places: dict[str, Any], jobs: Jobs, workers: int | None) -> bool:
    """Make the runs that are due in their order, at most workers at a time (by default one per core and at most 8, or
    one per GPU); True if all have a result. Raises ValueError where a run needs a GPU that is not here."""
    due = [p.spec for p in planned if p.due]
    slots = _slots(due, jobs, workers)
    check_cuda(due)
    return _Starter(due, runs.resolve(), places, jobs, slots).run()


def _slots(due: list[RunSpec], jobs: Jobs, workers: int | None) -> Sequence[str | None]:
    """The GPU of each job that may run at the same time, None without: no two share one."""
    if not any(jobs.gpus(spec.device) for spec in due):
        cores = (os.cpu_count() or 1) // jobs.threads("cpu")
        return [None] * (workers or max(1, min(8, cores)))
    gpus = visible_gpus()
    if not gpus:
        raise ValueError("these runs are made on a GPU, and none is here: give --device cpu, or --cluster slurm")
    return gpus[: workers or len(gpus)]


class _Starter:
    """Keeps every slot busy."""

    def __init__(
        self, due: list[RunSpec], runs: Path, places: dict[str, Any], jobs: Jobs, slots: Sequence[str | None]
    ) -> None:
        self.waiting, self.runs, self.places, self.jobs, self.free = due, runs, places, jobs, list(slots)
        self.at_work: list[tuple[RunSpec, str | None, Any]] = []
        self.total, self.states = len(due), dict[str, str]()

    def run(self) -> bool:
        try:
            self._run()
        finally:
            for _, _, job in self.at_work:  # ended by ctrl-C: each leaves with a checkpoint
                with suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGTERM)
        return not any(state in ("failed", "killed", "missing", "partial") for state in self.states.values())

    def _run(self) -> None:
        while self.waiting or self.at_work:
            stop_if_asked()
            for entry in [entry for entry in self.at_work if entry[2].done()]:
                self.at_work.remove(entry)
                self.free.append(entry[1])
                self._conclude(entry[0])
            while self.free and (spec := self._next()) is not None:
                slot = self.free.pop()
                self.at_work.append((spec, slot, self._start(spec, slot)))
            time.sleep(_LOOK_S)

    def _next(self) -> RunSpec | None:
        """The first run that waits and that no other process works on; what another has made meanwhile is taken."""
        for spec in list(self.waiting):
            if is_locked(run_dir(self.runs, spec)):
                continue
            self.waiting.remove(spec)
            if plan([spec], self.runs)[0].due:
                return spec
            self._conclude(spec)
        return None

    def _start(self, spec: RunSpec, gpu: str | None) -> Any:
        from submitit import LocalExecutor

        folder, threads = run_dir(self.runs, spec), self.jobs.threads(spec.device)
        folder.mkdir(parents=True, exist_ok=True)
        write_spec(folder, spec)
        executor = LocalExecutor(folder=self.runs / JOBS)
        executor.update_parameters(timeout_min=self.jobs.minutes or _MINUTES, signal_delay_s=30)
        with ctrl_c_held_back():
            return executor.submit(as_function(folder, self.places, threads, gpu))

    def _conclude(self, spec: RunSpec) -> None:
        (now,) = plan([spec], self.runs)
        if now.state == "running":  # another process took it first
            self.waiting.append(spec)
            return
        self.states[spec.run_key] = now.state
        print(f"{len(self.states)}/{self.total} {spec.run_key} {label(spec)}: {now.state}", flush=True)
