"""The pool of worker processes behind runner.execute, and its progress bar. No torch in this process."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from meft_bench.harness.runner import cost, is_locked, label, run_dir, work
from meft_bench.harness.spec import RunSpec
from meft_bench.stopping import ctrl_c_held_back, stop_if_asked


@dataclass
class _Worker:
    """A process at work on a run, the GPU it has, and the pipe it reports through: one each, so that a killed one
    blocks no other."""

    spec: RunSpec
    gpu: str | None
    process: Any
    reports: Any


class Pool:
    """Keeps a process in every slot (runner.slots), in the order of due, and one progress bar honest; a step of the bar
    is an optimizer step."""

    def __init__(
        self,
        context: Any,
        due: list[RunSpec],
        runs: Path,
        places: dict[str, Any],
        slots: Sequence[str | None],
        quiet: bool,
    ) -> None:
        self.context, self.runs, self.places, self.free = context, runs, places, list(slots)
        self.waiting = list(due)
        self.elsewhere: list[RunSpec] = []  # another process holds their locks
        self.told: set[str] = set()
        self.looked = 0.0
        self.cost = {s.run_key: cost(s) for s in due}
        self.running: dict[str, _Worker] = {}
        self.done: dict[str, tuple[str, str]] = {}
        self.shares: dict[str, float] = {}
        self.bar = tqdm(
            total=round(sum(self.cost.values())),
            unit="step",
            smoothing=0.05,
            mininterval=1,
            disable=quiet,
            bar_format="{l_bar}{bar}| {elapsed} so far, {remaining} left{postfix}",
        )

    def run(self) -> dict[str, tuple[str, str]]:
        try:
            while self.waiting or self.running or self.elsewhere:
                stop_if_asked()
                self._look_elsewhere()
                while self.waiting and self.free:
                    self._start(self.waiting.pop(0))
                self._listen()
                self._bury_dead()
        finally:
            for worker in self.running.values():
                worker.process.terminate()
            for worker in self.running.values():
                worker.process.join(5)
            self.bar.close()
        return self.done

    def _look_elsewhere(self) -> None:
        """Once a second: runs that other processes have let go of are taken back."""
        if time.monotonic() - self.looked < 1:
            return
        self.looked = time.monotonic()
        free = [spec for spec in self.elsewhere if not is_locked(run_dir(self.runs, spec))]
        self.elsewhere = [spec for spec in self.elsewhere if spec not in free]
        self.waiting = free + self.waiting

    def _start(self, spec: RunSpec) -> None:
        places, gpu = {**self.places, "run_dir": str(run_dir(self.runs, spec))}, self.free.pop(0)
        reports, theirs = self.context.Pipe(duplex=False)
        given = (spec.to_dict(), places, theirs, os.getpid(), gpu)
        process = self.context.Process(target=work, args=given, daemon=True)
        with ctrl_c_held_back():
            process.start()
        self.running[spec.run_key] = _Worker(spec, gpu, process, reports)
        theirs.close()

    def _listen(self) -> None:
        """Take every report that is there, waiting a moment for the first."""
        pipes: dict[Any, str] = {w.reports: key for key, w in self.running.items() if not w.reports.closed}
        if not pipes:
            time.sleep(0.2)
        for pipe in wait(list(pipes), timeout=0.2):
            self._take(pipes[pipe], pipe)

    def _take(self, key: str, pipe: Any) -> None:
        try:
            kind, value = pipe.recv()
        except (EOFError, OSError):  # its worker is gone
            pipe.close()
            return
        if kind == "progress":
            self._advance(key, value)
        else:
            self.done[key] = (kind, value)

    def _bury_dead(self) -> None:
        for key, worker in list(self.running.items()):
            if worker.process.is_alive():
                continue
            worker.process.join()
            while key not in self.done and not worker.reports.closed:
                self._take(key, worker.reports)  # its last words may still be in the pipe
            if key not in self.done:
                code = worker.process.exitcode
                why = f"the worker died (exit code {code}); it resumes from its checkpoint when run again"
                self.done[key] = ("killed", why)
            del self.running[key]
            self.free.append(worker.gpu)
            worker.reports.close()
            self._conclude(key, worker.spec, *self.done[key])

    def _conclude(self, key: str, spec: RunSpec, state: str, why: str) -> None:
        if state == "taken":
            del self.done[key]
            self.elsewhere.append(spec)
            if key not in self.told:
                self.told.add(key)
                self.bar.write(f"{key} {label(spec)}: another process works on it; waiting for its result")
            return
        if state == "disk":
            del self.done[key]
            raise ValueError(self._disk_text(why))
        self._advance(key, 1.0)
        if state != "ok":
            self.bar.write(f"{key} {label(spec)}: {state}: {why}")

    def _disk_text(self, why: str) -> str:
        kept = sum(any((self.runs / key / "checkpoints").glob("step-*")) for key in self.cost if key not in self.done)
        return (
            f"cannot write to {self.runs} ({why}); {len(self.done)} of {len(self.cost)} runs are finished and kept, "
            f"{kept} more have a checkpoint: free space and repeat the command"
        )

    def _advance(self, key: str, share: float) -> None:
        before = self.shares.get(key, 0.0)
        self.shares[key] = max(before, share)
        self.bar.update(round(self.cost[key] * self.shares[key]) - round(self.cost[key] * before))
        elsewhere = f", {len(self.elsewhere)} in another process" if self.elsewhere else ""
        counts = f", {len(self.done)}/{len(self.cost)} runs done, {len(self.running)} running{elsewhere}"
        self.bar.set_postfix_str(counts, refresh=False)
