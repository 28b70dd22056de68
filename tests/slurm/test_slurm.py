"""On a real Slurm of this machine: an array, a job whose time is up, one that is preempted, one that is cancelled."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meft_bench.harness import cluster, runner, slurm, status
from meft_bench.harness.cluster import Jobs
from meft_bench.harness.runner import plan
from meft_bench.harness.spec import RunSpec
from tests.methods import short_spec
from tests.slurm import one_node

if lacking := one_node.missing():
    pytest.skip(lacking, allow_module_level=True)
pytest.importorskip("submitit")
pytestmark = pytest.mark.slow

_PATIENCE_S = 400
JOBS = Jobs(cluster="slurm", partition="batch", minutes=30, memory="1GB")


@pytest.fixture(scope="module")
def one_slurm(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    before = os.environ.get("SLURM_CONF")
    try:
        os.environ.update(one_node.start(folder))
    except RuntimeError as error:  # a container may lack what its daemons need
        pytest.skip(f"needs slurm, which does not start here: {error}")
    try:
        yield
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], check=False)
        subprocess.run(["scancel", "--user=root"], check=False)
        one_node.stop(folder)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _until(what: str, there: Callable[[], object], runs: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not there():
        if time.monotonic() > deadline:
            logs = "\n".join(file.read_text(errors="replace")[-2000:] for file in runs.glob("*/log.txt"))
            logs += "\n".join(file.read_text(errors="replace")[-2000:] for file in (runs / ".jobs").glob("*.err"))
            pytest.fail(f"not within {_PATIENCE_S} s: {what}\n{logs}")
        time.sleep(0.3)


def _submit(spec: RunSpec, runs: Path) -> Path:
    cluster.submit(plan([spec], runs), runs, {}, JOBS, None)
    return runner.run_dir(runs, spec)


def _checkpoint(job: str, folder: Path) -> int:
    """Ask for one as Slurm's first word of a preemption does; the steps of the newest."""
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    time.sleep(0.5)
    return runner.steps_kept(folder)


def _state(spec: RunSpec, runs: Path) -> str:
    return status.rows([spec], runs)[0][0].state


def test_the_daemons_answer(one_slurm):
    assert slurm.longest_minutes(None) == slurm.longest_minutes("batch") == 120
    assert slurm.longest_minutes("batch,urgent") == 60
    with pytest.raises(ValueError, match="unknown partition moon; known: batch, urgent"):
        slurm.longest_minutes("moon")
    assert slurm.queue() == {} and slurm.ended(["1"]) == {}, "this cluster keeps no accounts"


def test_a_gpu_is_asked_for_as_slurm_has_it(one_slurm, tmp_path):
    spec = short_spec("lora", device="cuda")
    jobs = Jobs(cluster="slurm", partition="batch", minutes=30, memory="1GB", cpus_per_run=1, constraint="moon")
    with pytest.raises(ValueError, match=r"Slurm refused 1 runs .*Invalid feature specification; 0 of 1 runs are sub"):
        cluster.submit(plan([spec], tmp_path), tmp_path, {}, jobs, None)
    urgent = Jobs(cluster="slurm", partition="urgent", minutes=30, memory="1GB", cpus_per_run=1)
    cluster.submit(plan([spec], tmp_path), tmp_path, {}, urgent, None)
    job = cluster.job_id(runner.run_dir(tmp_path, spec))
    said = subprocess.run(["scontrol", "show", "job", str(job)], capture_output=True, text=True, check=True).stdout
    subprocess.run(["scancel", str(job)], check=True)
    assert "gres:gpu:1" in said or "gres/gpu:1" in said or "gpu=1" in said, said
    assert "Partition=urgent" in said and "TimeLimit=00:30:00" in said and "MinMemoryNode=1G" in said


def test_an_array_makes_its_records(one_slurm, tmp_path, capsys):
    fields = {"steps": 2, "splits": ("validation",), "eval_rows": 4}
    specs = [short_spec(name, **fields) for name in ("lora", "meft")]
    cluster.submit(plan(specs, tmp_path), tmp_path, {}, JOBS, None)
    assert {_state(spec, tmp_path) for spec in specs} <= {"queued", "starting", "running"}
    cluster.submit(plan(specs, tmp_path), tmp_path, {}, JOBS, None)
    out = capsys.readouterr().out
    assert out.count("submitted as job") == 1 and "2 have a job already" in out
    _until("both records", lambda: {p.state for p in plan(specs, tmp_path)} == {"ok"}, tmp_path)
    assert all((folder / "log.txt").read_text().count("run ") >= 1 for folder in (tmp_path / s.run_key for s in specs))


def test_a_job_that_leaves_is_started_again_and_goes_on(one_slurm, tmp_path):
    """By the signal before its time ends; then by a job of another partition, which preempts it; then it is cancelled,
    and nothing is lost, and nothing starts it again."""
    spec = short_spec("lora", steps=10**6)
    folder = _submit(spec, tmp_path)
    _until("it trains", lambda: (folder / "numerics.json").is_file(), tmp_path)
    job = cluster.job_id(folder)
    assert job is not None

    _until("a checkpoint that is asked for", lambda: _checkpoint(job, folder) > 0, tmp_path)
    first = runner.steps_kept(folder)
    assert _state(spec, tmp_path) == "running", "it goes on"
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    _until("it waits to be started again", lambda: _state(spec, tmp_path) == "queued", tmp_path)
    second = runner.steps_kept(folder)
    assert second > first and f"job {job} starts again from its checkpoint" in (folder / "log.txt").read_text()
    _until("it is back", lambda: _state(spec, tmp_path) == "running", tmp_path)
    (row,), _ = status.rows([spec], tmp_path)
    assert f"slurm {job} RUNNING" in row.note and f"step {second} of 1000000 kept" in row.note

    _until("it trains again", lambda: (folder / "log.txt").read_text().count(f"run {spec.run_key}:") == 2, tmp_path)
    _until("it goes on from there", lambda: _checkpoint(job, folder) > second, tmp_path)
    third = runner.steps_kept(folder)
    urgent = ["sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, check=True)
    _until("it makes way", lambda: _state(spec, tmp_path) == "queued", tmp_path)
    assert runner.steps_kept(folder) > third
    _until("it is back", lambda: _state(spec, tmp_path) in ("starting", "running"), tmp_path)

    subprocess.run(["scancel", job], check=True)
    _until("it is gone", lambda: job not in slurm.queue(), tmp_path)
    assert _state(spec, tmp_path) == "partial" and runner.steps_kept(folder) > third
