"""Plans and workers: states, nothing trained twice, locks, kills, failures that stay alone."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from meft_bench.harness import runner, status
from meft_bench.harness.numerics import numerics
from meft_bench.harness.runner import execute, locked, plan
from tests.methods import short_spec
from tests.small_disk import NEEDS_ROOT, small_disk


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


def test_a_failure_is_that_of_the_last_start(tmp_path):
    spec = short_spec("lora")
    folder, begun = tmp_path / spec.run_key, f"run {spec.run_key}: {spec.to_dict()}\n"
    folder.mkdir()
    runner.write_spec(folder, spec)
    (folder / "numerics.json").write_text(runner._numbers(spec))
    failed = f"{begun}Traceback (most recent call last):\nValueError: why\n"
    as_job = f"{failed}run {spec.run_key}: failed: why\n"

    def row(log: str) -> tuple[str, str]:
        (folder / "log.txt").write_text(log)
        (found,), _ = status.rows([spec], tmp_path)
        return found.state, found.note

    assert row(failed) == ("failed", "ValueError: why")
    assert row(as_job) == ("failed", f"run {spec.run_key}: failed: why")
    assert row(failed + begun) == ("killed", ""), "that failure is over"
    assert row(f"{failed}{begun}a warning\n") == ("killed", "a warning")
    (folder / "checkpoints" / "step-0000004").mkdir(parents=True)
    assert row(failed) == ("partial", "step 4 of 8 kept, ValueError: why")
    assert row(failed + begun) == ("partial", "step 4 of 8 kept")


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


def test_a_full_disk_at_a_start_costs_no_checkpoint(tmp_path, monkeypatch):
    """Only a run that begins anew writes what began it, and a write that fails leaves the file as it was."""
    checkpoint = tmp_path / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "numerics.json").write_text("today")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def cut(path, *args, **kwargs):
        path.write_bytes(b"")
        full()

    monkeypatch.setattr(Path, "write_text", cut)
    monkeypatch.setattr(os, "fsync", full)
    runner._start_anew_if_stale(tmp_path, "today")
    assert checkpoint.is_dir()
    with pytest.raises(OSError, match="No space"):
        runner._start_anew_if_stale(tmp_path, "tomorrow")
    assert (tmp_path / "numerics.json").read_text() == "today"


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


# ---- several processes, interrupts, a full disk ----

_SHARED = """
import json
import sys
from pathlib import Path
from meft_bench.harness import runner
from meft_bench.harness.spec import RunSpec
if __name__ == "__main__":
    options = {"neurons": 4, "activation": "relu"}
    specs = [RunSpec(task="facts", method="parallel_adapter", options=options, steps=3, batch_size=4, train_rows=6,
                     eval_rows=4, seed=seed) for seed in (0, 1)]
    runs = Path(sys.argv[1])
    print(json.dumps(runner.execute(runner.plan(specs, runs), runs, {}, workers=1)))
"""


@pytest.mark.slow
def test_two_commands_at_once_share_the_runs(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(_SHARED)
    command = [sys.executable, str(script), str(tmp_path / "runs")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for out, _ in said:
        done = json.loads(out.splitlines()[-1])
        assert all(state == "ok" for state, _ in done.values())
    logs = list((tmp_path / "runs").glob("*/log.txt"))
    assert len(logs) == 2
    assert all(log.read_text().count(f"run {log.parent.name}:") == 1 for log in logs), "each was trained once"


@pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="needs /proc")
def test_the_fork_server_never_sees_ctrl_c():
    """In a process of its own, where multiprocessing starts its helpers in the order of a real run."""
    code = """
from multiprocessing import forkserver
from meft_bench.harness import runner
runner._start_fork_server()
lines = open(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("SigBlk")))
"""
    blocked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(blocked, 16) & (1 << (signal.SIGINT - 1))


def test_the_fork_server_is_started_with_ctrl_c_held_back(monkeypatch):
    seen = []
    monkeypatch.setattr(
        runner.multiprocessing.forkserver,
        "ensure_running",
        lambda: seen.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    )
    runner._start_fork_server()
    assert seen == [True] and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_what_a_killed_worker_was_writing_goes(tmp_path, monkeypatch):
    from meft_bench.harness import worker

    monkeypatch.setattr(worker, "main_process", lambda spec, places, report: report(("ok", "")))
    (tmp_path / ".writing-abc").write_text("half")
    reader, writer = multiprocessing.Pipe(duplex=False)
    before = signal.getsignal(signal.SIGINT)
    try:
        runner.work(short_spec("full").to_dict(), {"run_dir": str(tmp_path)}, writer, os.getpid())
    finally:
        signal.signal(signal.SIGINT, before)
    assert reader.recv() == ("ok", "") and not (tmp_path / ".writing-abc").exists()


def test_a_finished_run_is_not_made_again_by_a_worker(tmp_path, monkeypatch):
    spec = short_spec("full")
    record = {"state": "oom", "state_reason": "too large", "numerics": numerics(spec.task, spec.method)}
    reader, writer = multiprocessing.Pipe(duplex=False)
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(runner, "read_record", lambda path: json.loads(path.read_text()))
    before = signal.getsignal(signal.SIGINT)
    try:
        runner.work(spec.to_dict(), {"run_dir": str(tmp_path)}, writer, os.getpid())
        assert reader.recv() == ("oom", "too large") and not (tmp_path / "log.txt").exists()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "ctrl-C is its owner's"
        with locked(tmp_path):
            runner.work(spec.to_dict(), {"run_dir": str(tmp_path)}, writer, os.getpid())
        assert reader.recv() == ("taken", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_looks_at_a_lock_takes_no_run_from_anybody(tmp_path, monkeypatch):
    """`meft-bench status` may look at the moment at which a job starts, or at which another one looks."""
    flock, found = runner.fcntl.flock, []

    def begun_meanwhile(file, how):
        flock(file, how)
        if not found:  # the look holds the lock now: a job starts, and somebody else looks
            found.append(None)
            found.append(runner.is_locked(tmp_path))
            begun.start()
            time.sleep(0.02)

    def begin():
        with locked(tmp_path):
            found.append("begun")

    begun = threading.Thread(target=begin)
    (tmp_path / "lock").touch()
    monkeypatch.setattr(runner.fcntl, "flock", begun_meanwhile)
    assert not runner.is_locked(tmp_path)
    begun.join()
    assert found == [None, False, "begun"]


def test_a_folder_that_is_only_read_is_looked_at(tmp_path, monkeypatch):
    with locked(tmp_path):
        assert runner.is_locked(tmp_path)
    opened, modes = open, []

    def noting(path, mode="r", **kind):
        modes.append(mode)
        return opened(path, mode, **kind)

    monkeypatch.setattr("builtins.open", noting)
    assert not runner.is_locked(tmp_path) and modes == ["r"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_before_any_work(tmp_path, monkeypatch, number):
    def missing(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runner.fcntl, "flock", missing)
    said = rf"this file system has no locks \({os.strerror(number)}\)"
    with pytest.raises(ValueError, match=said):
        execute(plan([short_spec("full")], tmp_path), tmp_path, {}, quiet=True)
    with pytest.raises(ValueError, match=said) as refused, locked(tmp_path):
        pass
    assert not isinstance(refused.value, runner.Taken), "nobody would be waited for"
    with pytest.raises(ValueError, match=said):
        runner.is_locked(tmp_path)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_holds_is_taken(tmp_path, monkeypatch, number):
    def held(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runner.fcntl, "flock", held)
    monkeypatch.setattr(runner, "_TRIES_S", ())
    with pytest.raises(runner.Taken), locked(tmp_path):
        pass
    assert runner.is_locked(tmp_path)


def test_a_lock_whose_folder_was_cleared_away_is_no_lock(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flock = runner.fcntl.flock

    def cleared_first(file, how):
        (folder / "lock").unlink()
        (folder / "lock").touch()
        flock(file, how)

    monkeypatch.setattr(runner.fcntl, "flock", cleared_first)
    with pytest.raises(runner.Taken), locked(folder):
        pass


@pytest.mark.slow
@NEEDS_ROOT
def test_a_disk_that_is_really_full(tmp_path):
    with small_disk(tmp_path, "8k"):
        fields = ["--set=steps=2", "--set=eval_rows=4", "--set=batch_size=2", "--set=train_rows=8"]
        command = [sys.executable, "-m", "meft_bench", "run", "--task", "facts", "--method", "lora", "--option=rank=2"]
        done = subprocess.run(
            [*command, "--runs", str(tmp_path / "runs"), *fields], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("meft-bench:")]
        assert "(No space left on device); 0 of 1 runs are finished and kept, 0 more have a checkpoint: free" in line
