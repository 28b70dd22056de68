"""Runs as jobs: arrays of Slurm through submitit, or local processes started as submitit starts jobs. No torch here.

A job is a plain command (job.py) on a run's folder. submitit keeps that command, pickled, in a folder beside the runs,
and unpickles it when the job starts; nothing of it is read back here. What a job made is known from its run's folder.
"""

import argparse
import fcntl
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from meft_bench.fields import Choice, Maybe, Size, Text, Whole, memory_bytes, one_line
from meft_bench.flags import setting
from meft_bench.harness import slurm
from meft_bench.harness.job import command
from meft_bench.harness.runner import Planned, flock, run_dir, write_spec
from meft_bench.harness.spec import RunSpec

JOBS = ".jobs"
"""submitit's own folder, in the folder of runs."""
_JOB_ID = "job_id"
_MOST_IN_ARRAY = 1000
"""Slurm's MaxArraySize is 1001 unless it is set."""
_GPU_RUN_CPUS = 8
_NOTICE_S = 300
"""How long before its end a job is told, for the step under way and a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """How a suite's runs become jobs."""

    cluster: str | None = setting(
        Maybe(Choice(("slurm", "local"))), "make the runs as jobs of Slurm, or as local ones (needs submitit)", None,
        heading="on a cluster",
    )  # fmt: skip
    partition: str | None = setting(Maybe(Text()), "Slurm's partition", None, unset="Slurm's default")
    account: str | None = setting(Maybe(Text()), "Slurm's account", None)
    qos: str | None = setting(Maybe(Text()), "Slurm's quality of service", None)
    constraint: str | None = setting(Maybe(Text()), "features that nodes must have, as Slurm writes them", None)
    gpus_per_run: int | None = setting(
        Maybe(Whole(0, 64)), "1: a GPU for each run; 0: none", None, unset="1 where the suite asks for a GPU"
    )
    cpus_per_run: int | None = setting(
        Maybe(Whole(1, 1024)), "cores and threads of each run", None, unset=f"1, with a GPU {_GPU_RUN_CPUS}"
    )
    minutes: int | None = setting(Maybe(Whole(1, 525_600)), "time a job asks for", None, unset="from the plan")
    memory: str | None = setting(Maybe(Size()), "host memory a job asks for", None, unset="from the plan")
    gpu_memory: str | None = setting(
        Maybe(Size()), "of a GPU of the cluster: runs of the paper's suite that need more are left out", None
    )

    def threads(self, device: str) -> int:
        """Cores of a run on that device."""
        return self.cpus_per_run or (_GPU_RUN_CPUS if device == "cuda" else 1)

    def gpus(self, device: str) -> int:
        """GPUs of a run on that device. Raises ValueError where it needs one and shall have none."""
        if device == "cuda" and self.gpus_per_run == 0:
            raise ValueError("these runs are made on a GPU: give GPUS_PER_RUN=1")
        return 1 if device == "cuda" else 0


def asked_jobs(args: argparse.Namespace) -> Jobs | None:
    """What the flags of Jobs ask for, checked before any work; None without a cluster. Raises ValueError.

    Sets args.device: the runs of --gpus-per-run 1 are on "cuda", whatever this machine has.
    """
    given = {field.name: value for field in fields(Jobs) if (value := getattr(args, field.name)) is not None}
    if args.cluster is None:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} is for jobs: give --cluster slurm or local")
        return None
    jobs = Jobs(**given)
    if (jobs.gpus_per_run or 0) > 1:
        raise ValueError(f"a run uses one GPU, and --gpus-per-run {jobs.gpus_per_run} would leave others idle: give 1")
    if jobs.gpus_per_run and args.device == "cpu":
        raise ValueError("--device cpu and --gpus-per-run 1 do not go together: leave out one")
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("jobs are submitted by submitit, which is not installed: pip install 'meft-bench[cluster]'")
    if jobs.cluster == "slurm":
        slurm.check_here()
        most = slurm.longest_minutes(jobs.partition)
        if most is not None and (jobs.minutes or 0) > most:
            raise ValueError(f"--minutes {jobs.minutes} is more than the {most} that the partition gives a job")
    elif asked := [name for name in ("partition", "account", "qos", "constraint", "gpu_memory") if name in given]:
        raise ValueError(f"--{asked[0].replace('_', '-')} is Slurm's: leave it out, or give --cluster slurm")
    if jobs.gpus_per_run:
        args.device = "cuda"
    elif args.device == "auto" and (jobs.cluster == "slurm" or jobs.gpus_per_run == 0):
        args.device = "cpu"  # what a login node has says nothing
    return jobs


def submit(planned: list[Planned], runs: Path, places: dict[str, Any], jobs: Jobs, workers: int | None) -> None:
    """Submit a job for every run that is due and has none, in arrays of those that ask for the same; prints what was
    submitted. workers: how many may run at a time. Raises ValueError when Slurm refuses.

    Under a lock: a second command waits, and then finds the jobs of the first.
    """
    runs = runs.resolve()
    with _one_at_a_time(runs):
        queued = slurm.queue()
        due = [p.spec for p in planned if p.due and p.state != "running"]
        free = [spec for spec in due if job_id(run_dir(runs, spec)) not in queued]
        if len(free) < len(due):
            print(f"{len(due) - len(free)} have a job already")
        done = 0
        for asked, specs in _arrays(free, places, jobs):
            try:
                names = _submit_array(specs, runs, places, asked, workers)
            except RuntimeError as error:  # submitit's, with sbatch's own words
                raise ValueError(
                    f"Slurm refused {len(specs)} runs ({_terms(asked)}): {one_line(error)}; {done} of {len(free)} runs "
                    "are submitted, and the same command submits the others"
                ) from None
            done += len(specs)
            print(f"{len(specs)} runs submitted as job {names[0].partition('_')[0]} ({_terms(asked)})", flush=True)


def job_id(folder: Path) -> str | None:
    """The Slurm job that was last submitted for a run, "4711_3" in an array; None without one."""
    file = folder / _JOB_ID
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def _arrays(specs: list[RunSpec], places: dict[str, Any], jobs: Jobs) -> Iterator[tuple[dict[str, Any], list[RunSpec]]]:
    """(what sbatch is asked for, the runs that ask for it), both in the order of specs."""
    groups: dict[tuple[Any, ...], list[RunSpec]] = {}
    asking = _Asking(places, jobs)
    for spec in specs:
        groups.setdefault(tuple(asking(spec).items()), []).append(spec)
    for asked, group in groups.items():
        rest = iter(group)
        while part := list(islice(rest, _MOST_IN_ARRAY)):
            yield dict(asked), part


class _Asking:
    """What a run's job asks Slurm for."""

    def __init__(self, places: dict[str, Any], jobs: Jobs) -> None:
        self.places, self.jobs = places, jobs
        self.most = slurm.longest_minutes(jobs.partition)
        self.models: dict[tuple[str, str | None], tuple[Any, Any, int]] = {}

    def __call__(self, spec: RunSpec) -> dict[str, Any]:
        minutes, gib = self._needs(spec)
        threads, gpus = self.jobs.threads(spec.device), self.jobs.gpus(spec.device)
        asked: dict[str, Any] = {"time": minutes, "mem": f"{gib}G", "cpus_per_task": threads}
        asked |= {"gpus_per_node": gpus} if gpus else {}
        named = ((name, getattr(self.jobs, name)) for name in ("partition", "account", "qos", "constraint"))
        return asked | {name: value for name, value in named if value is not None}

    def _needs(self, spec: RunSpec) -> tuple[int, int]:
        """(minutes, GiB): as the flags say, else from the plan, within the partition's limit."""
        minutes, memory = self.jobs.minutes, memory_bytes(self.jobs.memory)
        if minutes is None or memory is None:
            from meft_bench.harness.needs import needs

            planned = needs(spec, *self._model(spec), self.jobs.threads(spec.device))
            minutes = minutes or min(planned.minutes, self.most or planned.minutes)
            memory = memory or planned.memory_gib * 2**30
        return minutes, max(1, -(-memory // 2**30))

    def _model(self, spec: RunSpec) -> tuple[Any, Any, int]:
        """(shape, counts, words) of the spec's model, read once."""
        from meft_bench.train.counts import Counted
        from meft_bench.train.models import model_shape

        source = self.places.get("model_dir") or spec.model, spec.revision
        if source not in self.models:
            counted = Counted.of(*source)
            self.models[source] = model_shape(*source), counted, counted.config.get_text_config().vocab_size
        return self.models[source]


def _submit_array(
    specs: list[RunSpec], runs: Path, places: dict[str, Any], asked: dict[str, Any], workers: int | None
) -> list[str]:
    """Job ids, in the order of specs. Raises RuntimeError when sbatch refuses."""
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=runs / JOBS)
    executor.update_parameters(
        job_name="meft-bench",
        signal_delay_s=min(_NOTICE_S, 15 * asked["time"]),
        array_parallelism=workers or len(specs),
        wckey=None,
        # Since Slurm 22.05 a step does not take the job's cores by itself.
        srun_args=[f"--cpus-per-task={asked['cpus_per_task']}"],
        additional_parameters={"requeue": True},
        **asked,
    )
    functions = []
    for spec in specs:
        folder = run_dir(runs, spec)
        folder.mkdir(parents=True, exist_ok=True)
        write_spec(folder, spec)
        functions.append(as_function(folder, places, asked["cpus_per_task"]))
    names = [job.job_id for job in executor.submit_array(functions)]
    for spec, name in zip(specs, names, strict=True):
        (run_dir(runs, spec) / _JOB_ID).write_text(name + "\n", encoding="utf-8")
    return names


def as_function(folder: Path, places: dict[str, Any], threads: int, gpu: str | None = None) -> Any:
    """What submitit calls in a job: it becomes the command, so that signals reach the run itself."""
    words = command(folder, places, threads, gpu)
    return partial(os.execv, words[0], words)


def _terms(asked: dict[str, Any]) -> str:
    named = {"time": "minutes", "mem": "memory", "cpus_per_task": "cores", "gpus_per_node": "GPUs"}
    return ", ".join(f"{named.get(name, name)} {value}" for name, value in asked.items())


@contextmanager
def _one_at_a_time(runs: Path) -> Iterator[None]:
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / ".submitting", "a", encoding="utf-8") as file:
        flock(file, fcntl.LOCK_EX)
        yield
