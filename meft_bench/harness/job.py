"""A job of a cluster: one run in this process, `python -m meft_bench.harness.job FOLDER`. No torch until it works.

FOLDER is the run's folder with its spec (runner.write_spec). A run that is done, or that another process works on, ends
the job at once.

SIGUSR2 comes some minutes before the job's time ends. The step under way is finished, a checkpoint written, and the
job asks to be started again, but not for ever where no start finishes a step. SIGTERM is Slurm's first word of a
preemption or a cancellation: a checkpoint is written, and the work goes on until Slurm ends it. A job that ended by
itself would not be started again after a preemption. A local job leaves on SIGTERM.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from meft_bench import fields, stopping
from meft_bench.fields import Text, Whole, flag

TIME_IS_UP = signal.SIGUSR2
"""What submitit has clusters send (SUBMITIT_PREEMPT_SIGNAL names another)."""
_IDLE_STARTS = 3
"""So many times Slurm is asked for another start although none finished a step; submitit's local starter counts."""


def main(arguments: list[str] | None = None) -> int:
    """Make the run; returns the exit code: 0 for a result, 1 for a run that failed, 2 for bad input."""
    in_slurm = bool(slurm_job_id())
    stopping.leave_on(TIME_IS_UP)
    (stopping.checkpoint_on if in_slurm else stopping.leave_on)(signal.SIGTERM)
    from meft_bench.harness.runner import environment, read_spec, steps_kept, work

    args = _parser().parse_args(arguments)
    folder = args.folder.resolve()
    try:
        spec = read_spec(folder)
    except ValueError as error:
        print(f"meft-bench job: {fields.one_line(error)}", file=sys.stderr)
        return 2
    os.environ.update(environment([spec], args.threads, args.gpu))
    places = {"run_dir": str(folder), "model_dir": args.model_dir, "data_dir": args.data_dir, "keep_last": True}
    first, reports = steps_kept(folder), _Reports()
    owner = None if in_slurm else os.getppid()  # Slurm itself ends all processes of a job
    try:
        work(spec.to_dict(), places, reports, owner)
    except stopping.Left as left:
        if left.number != TIME_IS_UP:
            raise
        return _again(steps_kept(folder) > first)
    state, why = reports.last
    print(f"run {spec.run_key}: {state}{f': {why}' if why else ''}", flush=True)
    return 1 if state in ("failed", "killed", "disk") else 0


class _Reports:
    """What runner.work tells, of which the last word is kept."""

    last: tuple[str, Any] = ("failed", "it said nothing")

    def send(self, message: tuple[str, Any]) -> None:
        if message[0] != "progress":
            self.last = message


def _again(went_on: bool) -> int:
    """Ask for another start, as the cluster has it; returns the exit code. went_on: whether a step was finished."""
    if not went_on and int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= _IDLE_STARTS:
        print("meft-bench job: no step was finished in the job's time: give it more (MINUTES=...)", file=sys.stderr)
        return 1
    if job := slurm_job_id():
        print(f"meft-bench job: time is up; job {job} starts again from its checkpoint", flush=True)
        return subprocess.run(["scontrol", "requeue", job], timeout=60).returncode
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

    return int(LOCAL_REQUEUE_RETURN_CODE)


def slurm_job_id() -> str:
    """This job's id as squeue shows it, "4711_3" in an array; "" for a local job."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return ""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def command(folder: Path, places: dict[str, Any], threads: int, gpu: str | None = None) -> list[str]:
    """The command line of a run's job. gpu: the one it has, as CUDA_VISIBLE_DEVICES names it; None: what its starter
    gives it."""
    given = [f"--{name.replace('_', '-')}={places[name]}" for name in ("model_dir", "data_dir") if places.get(name)]
    given += [f"--gpu={gpu}"] if gpu is not None else []
    return [sys.executable, "-m", "meft_bench.harness.job", str(folder), f"--threads={threads}", *given]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m meft_bench.harness.job", description="One run, in a job.")
    parser.add_argument("folder", type=fields.path, help="the run's folder, with its spec.json")
    parser.add_argument("--model-dir", type=flag(Text()), help="folder of a model that is none of the hub's")
    parser.add_argument("--data-dir", type=flag(Text()), help="folder of real rows")
    parser.add_argument("--gpu", type=flag(Text()), help="the GPU to use, as CUDA_VISIBLE_DEVICES names it")
    parser.add_argument("--threads", type=flag(Whole(1, 1024)), default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
