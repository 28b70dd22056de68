"""Plans and workers: states, nothing trained twice, locks, kills, failures that stay alone."""

import json
import multiprocessing
import subprocess
import sys
import time

import pytest

from meft_bench.harness import runner
from meft_bench.harness.runner import execute, locked, plan

from .conftest import short_spec


def test_states_follow_the_folder(tmp_path):
    spec = short_spec("parallel_adapter")
    folder = tmp_path / spec.run_key
    assert runner.state_of(spec, tmp_path) == "missing"
    folder.mkdir()
    (folder / "log.txt").write_text("run begins\n")
    assert runner.state_of(spec, tmp_path) == "killed"
    (folder / "log.txt").write_text("run begins\nTraceback (most recent call last):\n")
    assert runner.state_of(spec, tmp_path) == "failed"
    (folder / "checkpoints" / "step-0000004").mkdir(parents=True)
    assert runner.state_of(spec, tmp_path) == "stale", "nobody knows what made this checkpoint"
    (folder / "numerics.json").write_text(runner._numbers(spec))
    assert runner.state_of(spec, tmp_path) == "partial"
    (folder / "record.json").write_text("{")
    assert runner.state_of(spec, tmp_path) == "failed"


def test_a_spec_is_planned_once(tmp_path):
    spec = short_spec("full")
    assert len(plan([spec, spec, short_spec("full", seed=1)], tmp_path)) == 2


def test_checkpoints_of_other_numerics_are_not_resumed(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "numerics.json").write_text("today")
    (tmp_path / "record.json").write_text("old")
    runner._start_anew_if_stale(tmp_path, "today")
    assert checkpoint.is_dir() and (tmp_path / "record.stale.json").read_text() == "old"
    runner._start_anew_if_stale(tmp_path, "tomorrow")
    assert not checkpoint.exists() and (tmp_path / "numerics.json").read_text() == "tomorrow"


def _hold(folder, ready, release):
    with locked(folder):
        ready.set()
        release.wait(20)


def test_two_processes_cannot_share_a_run(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "abc", ready, release))
    other.start()
    assert ready.wait(20)
    with pytest.raises(ValueError, match="run abc is being worked on by another process"), locked(tmp_path / "abc"):
        pass
    other.kill()  # the system releases a killed process's lock
    other.join()
    with locked(tmp_path / "abc"):
        pass


def test_a_run_of_another_process_is_running(tmp_path):
    spec = short_spec("full")
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / spec.run_key, ready, release))
    other.start()
    assert ready.wait(20)
    assert runner.state_of(spec, tmp_path) == "running"
    other.kill()
    other.join()
    assert runner.state_of(spec, tmp_path) == "missing"


_ENDLESS = """
import sys
from pathlib import Path
from meft_bench.harness import runner
from meft_bench.harness.spec import RunSpec
if __name__ == "__main__":
    options = {"neurons": 4, "activation": "relu"}
    spec = RunSpec(task="facts", method="parallel_adapter", options=options, steps=10**6, batch_size=4, train_rows=6)
    runner.execute(runner.plan([spec], Path(sys.argv[1])), Path(sys.argv[1]), {}, workers=1, quiet=True)
"""


@pytest.mark.slow
def test_workers_die_with_a_killed_owner(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    owner = subprocess.Popen([sys.executable, str(script), str(tmp_path / "runs")])
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("*/log.txt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    (folder,) = [log.parent for log in (tmp_path / "runs").glob("*/log.txt")]
    owner.kill()
    owner.wait()
    while time.monotonic() < deadline:
        try:
            with locked(folder):
                return
        except ValueError:
            time.sleep(0.2)
    pytest.fail("the worker outlived its owner")


def test_runs_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    specs = plan([short_spec("full")], tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to the runs folder file"):
        execute(specs, tmp_path / "file", {}, quiet=True)


@pytest.mark.slow
def test_two_workers_run_resume_and_do_nothing_twice(tmp_path):
    good, other = short_spec("parallel_adapter", steps=2), short_spec("lora", steps=2)
    # A rank that fits no memory: refused by its worker, and the others go on.
    bad = type(good).from_dict({**good.to_dict(), "options": {"neurons": 10**9, "activation": "relu"}})
    done = execute(plan([good, bad, other], tmp_path), tmp_path, {}, workers=2, quiet=True)
    assert {k: v[0] for k, v in done.items()} == {good.run_key: "ok", other.run_key: "ok", bad.run_key: "failed"}
    assert "GiB" in done[bad.run_key][1]
    states = {p.spec.run_key: p.state for p in plan([good, bad, other], tmp_path)}
    assert states == {good.run_key: "ok", other.run_key: "ok", bad.run_key: "failed"}

    made = tmp_path / good.run_key / "record.json"
    before = made.stat().st_mtime_ns
    assert execute(plan([good, other], tmp_path), tmp_path, {}, quiet=True) == {}
    assert made.stat().st_mtime_ns == before

    record = json.loads(made.read_text())
    made.write_text(json.dumps({**record, "numerics": {**record["numerics"], "training": 0}}))
    assert runner.state_of(good, tmp_path) == "stale"
    assert execute(plan([good], tmp_path), tmp_path, {}, quiet=True)[good.run_key][0] == "ok"
    again = json.loads(made.read_text())
    assert again["curve"] == record["curve"] and again["quality"] == record["quality"]
    assert (tmp_path / good.run_key / "record.stale.json").is_file()
