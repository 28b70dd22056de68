"""Plan a list of specs, run what is missing in worker processes, resume what was cut off. No torch in this process."""

import errno
import fcntl
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from meft_bench.harness.numerics import numerics
from meft_bench.harness.record import read_record
from meft_bench.harness.spec import RunSpec, canonical_json
from meft_bench.inputs import NO_CUDA
from meft_bench.provenance import visible_gpus
from meft_bench.reading import JSON_BYTES, read_json
from meft_bench.stopping import ctrl_c_held_back, end_with
from meft_bench.write import disk_error, replace, write_json

SPEC, NUMERICS = "spec.json", "numerics.json"
_HOLDER_BYTES = 4096
_TRIES_S = (0.01, 0.05, 0.2)
"""Pauses between tries to take a run's lock: who only looks whether it is held (is_locked) has it for an instant."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_PRELOADED = ("meft_bench.harness.worker", "meft_bench.baselines.lora")


@dataclass(frozen=True)
class Planned:
    """A spec and where it stands: missing, running (in another process), partial (resumes), ok, stale (made with other
    numerics), oom, diverged, failed, killed (before its first checkpoint)."""

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
    """State of one spec in the folder of runs; freshness goes by numerics, never by time."""
    folder = run_dir(runs, spec)
    if (folder / "record.json").is_file():
        try:
            record = _fresh_record(spec, folder)
        except ValueError:
            return "failed"
        return record["state"] if record else "stale"
    if is_locked(folder):
        return "running"
    if any((folder / "checkpoints").glob("step-*")):
        return "partial" if _made_by(folder) == _numbers(spec) else "stale"
    if not (folder / "log.txt").is_file():
        return "missing"
    return "failed" if has_failed(folder) else "killed"


def has_failed(folder: Path) -> bool:
    """Whether the run's last start ended in a failure: a worker that fails writes a traceback, and one that was killed
    writes nothing more."""
    return "Traceback" in last_log(folder)


def last_log(folder: Path) -> str:
    """What the run's last start wrote into its log, to which every start adds a line that begins with the run's key;
    "" without a log."""
    try:
        log = (folder / "log.txt").read_text(errors="replace", encoding="utf-8")
    except OSError:
        return ""
    _, start, rest = f"\n{log}".rpartition(f"\nrun {folder.name}: {{")
    return rest.partition("\n")[2] if start else log


def steps_kept(folder: Path) -> int:
    """Optimizer steps of a run's newest checkpoint; 0 without one."""
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def plan(specs: Iterable[RunSpec], runs: Path) -> list[Planned]:
    """Each distinct spec once, in order, with its state."""
    unique = {spec.run_key: spec for spec in specs}
    return [Planned(spec, state_of(spec, runs)) for spec in unique.values()]


def _fresh_record(spec: RunSpec, folder: Path) -> dict[str, Any] | None:
    """The run's record if it was made with today's numerics. Raises ValueError for a broken one."""
    if not (folder / "record.json").is_file():
        return None
    record = read_record(folder / "record.json")
    return record if record["numerics"] == numerics(spec.task, spec.method, spec.model) else None


class Taken(ValueError):
    """Another process holds the run's lock."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock, which the system releases even after kill -9. Raises Taken (a ValueError) if it is held, and
    ValueError where the file system has no locks.

    The lock file names its holder (holder_of).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a", encoding="utf-8") as file:
        if not (_take(file) and _is_lock_of(file, folder)):
            raise Taken(f"run {folder.name} is being worked on by another process: wait for it")
        with suppress(OSError):  # a full disk is told by who writes results
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield


def _take(file: IO[str]) -> bool:
    """False where another process holds it."""
    for pause in _TRIES_S:
        if flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return True
        time.sleep(pause)
    return flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flock(file: IO[Any], how: int) -> bool:
    """fcntl.flock; False where another process holds it. Raises ValueError where the file system has no locks."""
    try:
        fcntl.flock(file, how)
        return True
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise ValueError(
            f"this file system has no locks ({error.strerror}), by which processes share a folder of runs: use --runs "
            "on another"
        ) from None


def _is_lock_of(file: IO[str], folder: Path) -> bool:
    """False where its last holder has just cleared the folder away."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock"))
    except OSError:
        return False


def holder_of(folder: Path) -> str:
    """ "host:process id" of who holds the run's lock, or held it last; "" where nobody said."""
    try:
        said = read_json(folder / "lock", _HOLDER_BYTES, "lock")
        return f"{said['host']}:{said['pid']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _made_by(folder: Path) -> str | None:
    """The numerics that began the run, as _numbers gives them; None when nothing has."""
    file = folder / NUMERICS
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _numbers(spec: RunSpec) -> str:
    return canonical_json(numerics(spec.task, spec.method, spec.model))


def is_locked(folder: Path) -> bool:
    """Whether a process works on the run."""
    if not (folder / "lock").is_file():
        return False
    with open(folder / "lock", encoding="utf-8") as file:  # for reading, which is allowed in a folder of others, too
        # Shared, so that two who look do not take each other for a holder.
        return not flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def environment(specs: Iterable[RunSpec], threads: int, gpu: str | None = None) -> dict[str, str]:
    """Variables that the libraries of a worker read when they are loaded. gpu: the one to use; None: any."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not any(s.data == "hub" or not (s.model == "embedded" or s.model.startswith("local/")) for s in specs):
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    return variables


def slots(specs: Iterable[RunSpec], workers: int | None = None) -> Sequence[str | None]:
    """What each of the runs made at the same time has: a GPU, as CUDA_VISIBLE_DEVICES names it, or None where they are
    made on the CPU. Unless workers says how many: one per core and at most 8, on GPUs one each."""
    if not any(spec.device == "cuda" for spec in specs):
        return [None] * (workers or min(8, os.cpu_count() or 1))
    gpus: Sequence[str | None] = visible_gpus() or [None]  # where NVML finds none, torch may, or says what is missing
    return [gpus[i % len(gpus)] for i in range(workers or len(gpus))]


def execute(
    planned: list[Planned],
    runs: Path,
    places: dict[str, Any],
    workers: int | None = None,
    threads: int = 1,
    quiet: bool = False,
) -> dict[str, tuple[str, str]]:
    """Run what is due, at most workers at a time (default: slots()) with threads each; returns run key -> (state,
    reason).

    Workers are forked from one process that has done the slow imports, but on a GPU (_context). A run that fails does
    not stop the others; one interrupted by ctrl-C or kill leaves its checkpoint and resumes next time. A run that
    another process works on is waited for, and its result taken, or the rest of its work done. Raises ValueError when
    runs cannot be written, and where torch finds no GPU for runs that need one.
    """
    due = [p.spec for p in planned if p.due]
    if not due:
        return {}
    _check_writable(runs)
    check_cuda(due)
    os.environ.update(environment(due, threads))  # what is started below has these, so they hold for all workers
    from meft_bench.harness.pool import Pool

    return Pool(_context(due), due, runs, places, slots(due, workers), quiet).run()


def _context(due: Sequence[RunSpec]) -> Any:
    """How workers are started. On a GPU each does its imports: a library that looks for a GPU while it is imported, as
    torchao does (transformers imports it where it is installed), starts CUDA, and a fork of that process has none."""
    if any(spec.device == "cuda" for spec in due):
        multiprocessing.resource_tracker.ensure_running()  # as below
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    _start_fork_server()
    return context


def _start_fork_server() -> None:
    """With ctrl-C held back, which every worker inherits: it ends this process, and this one ends its workers."""
    multiprocessing.resource_tracker.ensure_running()  # started below, it would let ctrl-C through again
    with ctrl_c_held_back():
        multiprocessing.forkserver.ensure_running()


def work(spec: dict[str, Any], places: dict[str, Any], reports: Any, owner: int | None, gpu: str | None = None) -> None:
    """A worker's life: it holds the run's lock, and ends when the process owner is gone (None: others see to that).
    gpu: the one it has, as CUDA_VISIBLE_DEVICES names it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch, which reads it at its first call, is imported
    from meft_bench.harness.worker import main_process

    if owner is not None:
        end_with(owner)

    def report(message: tuple[str, Any]) -> None:
        try:
            reports.send(message)
        except BrokenPipeError:  # the owner is gone
            os._exit(1)

    folder, run_spec = Path(places["run_dir"]), RunSpec.from_dict(spec)
    try:
        with locked(folder):
            if (made := _made_meanwhile(run_spec, folder)) is not None:
                report((made["state"], made.get("state_reason", "")))
                return
            for leftover in folder.glob(".writing-*"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            write_spec(folder, run_spec)
            _start_anew_if_stale(folder, _numbers(run_spec))
            main_process(spec, places, report)
    except Taken:
        report(("taken", ""))
    except (OSError, ValueError) as error:
        report(("disk", disk) if (disk := disk_error(error)) else ("failed", str(error)))


def write_spec(folder: Path, spec: RunSpec) -> None:
    """Keep a run's spec in its folder: for a job that is to make it, and for `meft-bench status`."""
    if not (folder / SPEC).is_file():
        write_json(folder / SPEC, spec.to_dict())


def read_spec(folder: Path) -> RunSpec:
    """The spec kept in a run's folder. Raises ValueError for a broken one and for that of another run."""
    spec = RunSpec.from_dict(read_json(folder / SPEC, JSON_BYTES, "spec"))
    if spec.run_key != folder.name:
        raise ValueError(f"{folder.name}/{SPEC} is the spec of another run, {spec.run_key}")
    return spec


def _made_meanwhile(spec: RunSpec, folder: Path) -> dict[str, Any] | None:
    """A record that another process finished since the plan was made."""
    try:
        record = _fresh_record(spec, folder)
    except ValueError:
        return None
    return record if record and not Planned(spec, record["state"]).due else None


def cost(spec: RunSpec) -> float:
    """Rough work of a run in optimizer steps, evaluation included; for the bar and the order only."""
    return spec.steps + 40 + 10 * len(spec.splits)


def in_turn(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Seed by seed, so that a suite that is cut off has whole seeds; long runs first, so that no worker ends on one."""
    return sorted(specs, key=lambda s: (s.seed, -cost(s)))


def label(spec: RunSpec) -> str:
    """A run in words, for progress and lists."""
    sizes = [f"{k}={v}" for k, v in spec.options.items() if k in ("neurons", "rank", "size", "targets", "kept")]
    return " ".join([spec.method, spec.task, *sizes, f"lr={spec.learning_rate:g}", f"seed={spec.seed}"])


def check_cuda(due: Iterable[RunSpec]) -> None:
    """Raises ValueError where torch finds no GPU for runs that need one: once, and not by each of hundreds."""
    if any(spec.device == "cuda" for spec in due):
        asked = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
        if subprocess.run([sys.executable, "-c", asked], capture_output=True).returncode == 3:
            raise ValueError(NO_CUDA)


def _check_writable(runs: Path) -> None:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=runs, prefix=".probe-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"cannot write to the runs folder {runs.name} ({error.strerror}): free space or use --runs"
        ) from None


def _start_anew_if_stale(folder: Path, numbers: str) -> None:
    """A run begun with other numerics is not gone on with: its record is kept beside, its checkpoints are dropped."""
    if (folder / "record.json").is_file():
        (folder / "record.json").replace(folder / "record.stale.json")
    if _made_by(folder) != numbers:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        # In one step: a file that a full disk left empty would make the checkpoints those of other numerics.
        replace(folder / NUMERICS, numbers.encode())
