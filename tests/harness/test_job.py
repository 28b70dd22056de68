"""A job makes one run, leaves with a checkpoint when its time is up, and goes on from there to the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meft_bench import stopping
from meft_bench.harness import job, runner, worker
from meft_bench.harness.runner import write_spec
from meft_bench.harness.spec import RunSpec
from tests.methods import short_spec


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Signals, what came of them, and variables are this test's alone."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for name in ("_leaving", "_checkpoint_asked", "_whole_steps", "_may_leave"):
        monkeypatch.setattr(stopping, name, getattr(stopping, name))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in (
        "SUBMITIT_EXECUTOR",
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path) -> Path:
    spec = short_spec("meft_lazy", steps=6, splits=("validation",), eval_rows=4)
    (tmp_path / spec.run_key).mkdir()
    write_spec(tmp_path / spec.run_key, spec)
    return tmp_path / spec.run_key


def _told(folder: Path, number: int, at: int) -> dict | None:
    """The record of a run that gets the signal after step `at`; None where it left before the end."""
    spec = runner.read_spec(folder)

    def progress(share: float) -> None:
        if round(share / 0.9 * spec.steps) == at:
            os.kill(os.getpid(), number)

    try:
        return worker.run(spec, worker.Places(run_dir=folder, keep_last=True), progress)
    except stopping.Left as left:
        assert left.number == number and left.code == 128 + number
        return None


def test_a_run_that_leaves_and_comes_back_is_the_same_to_the_bit(folder, tmp_path):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    whole = worker.run(runner.read_spec(folder), worker.Places(run_dir=tmp_path / "whole"))
    stopping.leave_on(signal.SIGUSR2)
    assert _told(folder, signal.SIGUSR2, at=3) is None
    assert runner.steps_kept(folder) == 4, "the step under way was finished"
    stopping._leaving = None
    again = worker.run(runner.read_spec(folder), worker.Places(run_dir=folder, keep_last=True))
    assert (again["curve"], again["quality"]) == (whole["curve"], whole["quality"])
    assert runner.steps_kept(folder) == 6, "a job that ends while it scores need not train again"


def test_slurms_first_word_asks_for_a_checkpoint_and_the_work_goes_on(folder):
    stopping.checkpoint_on(signal.SIGTERM)
    seen: list[int] = []
    spec = runner.read_spec(folder)

    def progress(share: float) -> None:
        done = round(share / 0.9 * spec.steps)
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(runner.steps_kept(folder))

    assert worker.run(spec, worker.Places(run_dir=folder), progress)["state"] == "ok"
    assert seen[:6] == [0, 0, 0, 3, 3, 3], "one checkpoint, of the step after the word"


def test_a_signal_outside_training_leaves_at_once():
    stopping.leave_on(signal.SIGUSR2)
    with pytest.raises(stopping.Left):
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.pause()
    os.kill(os.getpid(), signal.SIGUSR2)  # a second one is not heard


def test_the_end_of_training_is_left_with_its_last_checkpoint():
    stopping.leave_on(signal.SIGTERM)
    with pytest.raises(stopping.Left), stopping.whole_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.leave_if_asked()  # no checkpoint has been written since


# ---- what a job says to its cluster ----


def _slurm(monkeypatch, tmp_path, code: int = 0) -> Path:
    """This process is task 3 of the array 4711; returns where scontrol writes what it was told."""
    told = tmp_path / "told"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {told}\nexit {code}\n')
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "4714",
        "SLURM_ARRAY_JOB_ID": "4711",
        "SLURM_ARRAY_TASK_ID": "3",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    return told


def _leaves(monkeypatch, folder: Path, number: int, steps: int) -> None:
    """work() gets the signal after so many steps."""

    def work(spec, places, reports, owner):
        if steps:
            (folder / "checkpoints" / f"step-{steps:07d}").mkdir(parents=True)
        os.kill(os.getpid(), number)
        signal.pause()

    monkeypatch.setattr(runner, "work", work)


def test_a_job_of_slurm_asks_to_be_started_again(folder, monkeypatch, tmp_path):
    told = _slurm(monkeypatch, tmp_path)
    _leaves(monkeypatch, folder, signal.SIGUSR2, steps=5)
    assert job.main([str(folder)]) == 0
    assert told.read_text() == "requeue 4711_3\n"


def test_a_local_job_asks_its_starter(folder, monkeypatch):
    local = pytest.importorskip("submitit.local.local")
    _leaves(monkeypatch, folder, signal.SIGUSR2, steps=5)
    assert job.main([str(folder)]) == local.LOCAL_REQUEUE_RETURN_CODE


def test_a_local_job_has_the_gpu_that_its_command_names(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "work", lambda *given: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of submitit, which was asked for no GPU
    job.main(job.command(folder, {}, 1, "GPU-b")[3:])
    assert seen == ["GPU-b"]


def test_a_job_without_a_step_is_not_started_for_ever(folder, monkeypatch, tmp_path, capsys):
    told = _slurm(monkeypatch, tmp_path)
    _leaves(monkeypatch, folder, signal.SIGUSR2, steps=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert job.main([str(folder)]) == 0 and told.is_file(), "it may have been preempted while it loaded"
    told.unlink()
    stopping._leaving = None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert job.main([str(folder)]) == 1 and not told.exists()
    assert "no step was finished in the job's time: give it more (MINUTES=...)" in capsys.readouterr().err


def test_a_local_job_that_is_ended_says_so(folder, monkeypatch):
    _leaves(monkeypatch, folder, signal.SIGTERM, steps=5)
    with pytest.raises(SystemExit) as ended:
        job.main([str(folder)])
    assert ended.value.code == 143


@pytest.mark.parametrize(("said", "code"), [("ok", 0), ("oom", 0), ("taken", 0), ("failed", 1), ("disk", 1)])
def test_the_exit_code_is_the_state(folder, monkeypatch, capsys, said, code):
    given = {}

    def work(spec, places, reports, owner):
        given.update(places, owner=owner, spec=spec, threads=os.environ["OMP_NUM_THREADS"])
        reports.send(("progress", 0.5))
        reports.send((said, "why"))

    monkeypatch.setattr(runner, "work", work)
    assert job.main([str(folder), "--threads=3", "--data-dir=/rows"]) == code
    assert capsys.readouterr().out == f"run {folder.name}: {said}: why\n"
    assert given["run_dir"] == str(folder) and given["data_dir"] == "/rows" and given["keep_last"] is True
    assert given["owner"] == os.getppid() and given["threads"] == "3"
    assert RunSpec.from_dict(given["spec"]).run_key == folder.name


def test_the_spec_of_another_run_is_refused(folder, capsys):
    other = folder.with_name("0" * 12)
    folder.rename(other)
    assert job.main([str(other)]) == 2
    assert capsys.readouterr().err.startswith("meft-bench job: 000000000000/spec.json is the spec of another run, ")
    (other / "spec.json").write_text(json.dumps({"task": "facts"}))
    assert job.main([str(other)]) == 2


def test_the_command_of_a_job_is_its_own(folder):
    words = job.command(folder, {"model_dir": "/models/a b", "data_dir": None}, 2)
    assert words == [
        sys.executable,
        "-m",
        "meft_bench.harness.job",
        str(folder),
        "--threads=2",
        "--model-dir=/models/a b",
    ]
    said = subprocess.run([*words[:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert "--model-dir" in said and "--threads" in said
