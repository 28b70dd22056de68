"""Plan a list of specs, run what is missing in worker processes, resume what was cut off. No torch in this process."""

import fcntl
import multiprocessing
import os
import queue as queues
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from meft_bench.harness.record import read_record
from meft_bench.harness.spec import RunSpec, code_digest

_PRELOADED = ("meft_bench.harness.worker", "meft_bench.baselines.lora")


@dataclass(frozen=True)
class Planned:
    """A spec and where it stands: missing, running (in another process), partial (resumes), ok, stale (made by other
    code), oom, diverged, failed, killed (before its first checkpoint)."""

    spec: RunSpec
    state: str

    @property
    def due(self) -> bool:
        """True when running it would add something; oom and diverged are results."""
        return self.state not in ("ok", "oom", "diverged")


def run_dir(runs: Path, spec: RunSpec) -> Path:
    """Folder of one run."""
    return runs / spec.run_key


def state_of(spec: RunSpec, runs: Path) -> str:
    """State of one spec in the folder of runs; freshness goes by content, never by time."""
    folder = run_dir(runs, spec)
    if (folder / "record.json").is_file():
        try:
            record = read_record(folder / "record.json")
        except ValueError:
            return "failed"
        fresh = record["code_digest"] == code_digest(spec.task, spec.method, spec.model)
        return record["state"] if fresh else "stale"
    if _is_locked(folder):
        return "running"
    if any((folder / "checkpoints").glob("step-*")):
        return "partial" if _made_by(folder) == code_digest(spec.task, spec.method, spec.model) else "stale"
    log = folder / "log.txt"
    if not log.is_file():
        return "missing"
    # A worker that fails writes a traceback; one that was killed writes nothing more.
    return "failed" if "Traceback" in log.read_text(errors="replace", encoding="utf-8") else "killed"


def plan(specs: Iterable[RunSpec], runs: Path) -> list[Planned]:
    """Each distinct spec once, in order, with its state."""
    unique = {spec.run_key: spec for spec in specs}
    return [Planned(spec, state_of(spec, runs)) for spec in unique.values()]


@contextmanager
def locked(folder: Path):
    """Hold the run's lock, which the system releases even after kill -9. Raises ValueError if it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"run {folder.name} is being worked on by another process: wait for it") from None
        yield


def _made_by(folder: Path) -> str | None:
    """Digest of the code that began the run; None when nothing has."""
    file = folder / "code_digest"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _is_locked(folder: Path) -> bool:
    if not (folder / "lock").is_file():
        return False
    try:
        with locked(folder):
            return False
    except ValueError:
        return True


def execute(
    planned: list[Planned],
    runs: Path,
    places: dict[str, Any],
    workers: int = 2,
    threads: int = 1,
    quiet: bool = False,
) -> dict[str, tuple[str, str]]:
    """Run what is due, at most workers at a time with threads each; returns run key -> (state, reason).

    Workers are forked from one process that has done the slow imports. A run that fails does not stop the others; one
    interrupted by ctrl-C or kill leaves its checkpoint and resumes next time. Raises ValueError when runs cannot be
    written.
    """
    due = [p.spec for p in planned if p.due]
    if not due:
        return {}
    _check_writable(runs)
    # The fork server is started with these, so they hold for every worker.
    os.environ.update(
        {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
    )
    if not any(s.data == "hub" or not (s.model == "embedded" or s.model.startswith("local/")) for s in due):
        os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return _Pool(context, due, runs, places, workers, quiet).run()


class _Pool:
    """Keeps workers processes busy and one progress bar honest; a step of the bar is an optimizer step."""

    def __init__(self, context, due: list[RunSpec], runs: Path, places: dict[str, Any], workers: int, quiet: bool):
        self.context, self.runs, self.places, self.workers = context, runs, places, workers
        # Seed by seed, so that a suite that is cut off has whole seeds; long runs first, so that no worker ends on one.
        self.waiting = sorted(due, key=lambda s: (s.seed, -cost(s)))
        self.cost = {s.run_key: cost(s) for s in due}
        self.queue = context.Queue()
        self.running: dict[str, tuple[Any, RunSpec]] = {}
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
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.workers:
                    self._start(self.waiting.pop(0))
                self._listen()
                self._bury_dead()
        finally:
            for process, _ in self.running.values():
                process.terminate()
            self.bar.close()
        return self.done

    def _start(self, spec: RunSpec) -> None:
        places = {**self.places, "run_dir": str(run_dir(self.runs, spec))}
        arguments = (spec.to_dict(), places, self.queue, os.getpid())
        process = self.context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        self.running[spec.run_key] = (process, spec)

    def _listen(self) -> None:
        try:
            key, kind, value = self.queue.get(timeout=0.2)
        except queues.Empty:
            return
        if kind == "progress":
            self._advance(key, value)
        else:
            self.done[key] = (kind, value)

    def _bury_dead(self) -> None:
        for key, (process, spec) in list(self.running.items()):
            if process.is_alive():
                continue
            process.join()
            deadline = time.monotonic() + 2
            while key not in self.done and time.monotonic() < deadline:
                self._listen()  # its last words may still be in the pipe
            if key not in self.done:
                why = f"the worker died (exit code {process.exitcode}); it resumes from its checkpoint when run again"
                self.done[key] = ("killed", why)
            del self.running[key]
            self._advance(key, 1.0)
            state, why = self.done[key]
            if state != "ok":
                self.bar.write(f"{key} {label(spec)}: {state}: {why}")

    def _advance(self, key: str, share: float) -> None:
        before = self.shares.get(key, 0.0)
        self.shares[key] = max(before, share)
        self.bar.update(round(self.cost[key] * self.shares[key]) - round(self.cost[key] * before))
        running = len(self.running)
        self.bar.set_postfix_str(f", {len(self.done)}/{len(self.cost)} runs done, {running} running", refresh=False)


def _work(spec: dict[str, Any], places: dict[str, Any], queue: Any, owner: int) -> None:
    """A worker's life: it holds the run's lock, and ends when the process that started it is gone."""
    from meft_bench.harness.worker import main_process

    threading.Thread(target=_follow, args=(owner,), daemon=True).start()
    folder, run_spec = Path(places["run_dir"]), RunSpec.from_dict(spec)
    try:
        with locked(folder):
            _start_anew_if_stale(folder, code_digest(run_spec.task, run_spec.method, run_spec.model))
            main_process(spec, places, queue)
    except ValueError as error:
        queue.put((run_spec.run_key, "failed", str(error)))


def _follow(owner: int) -> None:
    """After kill -9 of the owner nobody would stop its workers, and the next command would start them twice."""
    while True:
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.5)


def cost(spec: RunSpec) -> float:
    """Rough work of a run in optimizer steps, evaluation included; for the bar and the order only."""
    return spec.steps + 40 + 10 * len(spec.splits)


def label(spec: RunSpec) -> str:
    """A run in words, for progress and lists."""
    sizes = [f"{k}={v}" for k, v in spec.options.items() if k in ("neurons", "rank", "size", "targets", "kept")]
    return " ".join([spec.method, spec.task, *sizes, f"lr={spec.learning_rate:g}", f"seed={spec.seed}"])


def _check_writable(runs: Path) -> None:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / ".probe"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to the runs folder {runs.name} ({error.strerror}): free space or use --runs"
        ) from None


def _start_anew_if_stale(folder: Path, digest: str) -> None:
    """What other code left is not gone on with: its record is kept beside, its checkpoints are dropped."""
    if (folder / "record.json").is_file():
        (folder / "record.json").replace(folder / "record.stale.json")
    if _made_by(folder) != digest:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "code_digest").write_text(digest, encoding="utf-8")
