"""Local jobs: as many at a time as there are slots, a GPU each, none twice; and the whole way through submitit."""

import json
import os
import signal

import pytest

from meft_bench.harness import local_jobs, runner
from meft_bench.harness.cluster import Jobs
from meft_bench.harness.runner import plan, run_dir
from tests.methods import short_spec

pytest.importorskip("submitit")


class FakeJob:
    """A job that is over when it is looked at for the second time; `end` is called then."""

    def __init__(self, end) -> None:
        self.looks, self.end = 0, end

    def done(self) -> bool:
        self.looks += 1
        if self.looks == 2:
            self.end()
        return self.looks > 1


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Starter._start without a process: (spec, GPU) in order, and how many were at work at most. What a run leaves is
    taken from `results`: run key -> state, "ok" by default."""
    order, at_work, most, results = [], [], [0], {}
    states = {}

    def start(self, spec, gpu):
        def end():
            at_work.remove(spec)
            states[spec.run_key] = results.get(spec.run_key, "ok")

        order.append((spec, gpu))
        at_work.append(spec)
        most[0] = max(most[0], len(at_work))
        return FakeJob(end)

    monkeypatch.setattr(local_jobs._Starter, "_start", start)
    monkeypatch.setattr(local_jobs, "_LOOK_S", 0)
    monkeypatch.setattr(
        local_jobs,
        "plan",
        lambda specs, runs: [runner.Planned(s, states.get(s.run_key, "missing")) for s in specs],
    )
    return order, most, results


def _plan(specs):
    return [runner.Planned(spec, "missing") for spec in specs]


def test_no_more_at_a_time_than_asked_for(started, tmp_path, capsys):
    order, most, results = started
    specs = [short_spec("lora", seed=seed, steps=steps) for seed in (1, 0) for steps in (4, 8)]
    assert local_jobs.run(_plan(specs), tmp_path, {}, Jobs(cluster="local"), workers=2)
    assert [spec for spec, _ in order] == specs and most == [2], "in the order of the plan, which may be that of worth"
    assert f"4/4 {specs[-1].run_key} lora facts" in capsys.readouterr().out
    bad = short_spec("lora", seed=7)
    results[bad.run_key] = "failed"
    assert not local_jobs.run(_plan([bad]), tmp_path, {}, Jobs(cluster="local"), 1)


def test_no_two_jobs_share_a_gpu(started, tmp_path, monkeypatch):
    order, most, _ = started
    specs = [short_spec("lora", seed=seed, device="cuda") for seed in range(5)]
    jobs = Jobs(cluster="local", gpus_per_run=1)
    monkeypatch.setattr(local_jobs, "visible_gpus", lambda: [])
    with pytest.raises(ValueError, match="made on a GPU, and none is here: give --device cpu, or --cluster slurm"):
        local_jobs.run(_plan(specs), tmp_path, {}, jobs, None)
    monkeypatch.setattr(local_jobs, "visible_gpus", lambda: ["2", "GPU-5"])
    monkeypatch.setattr(local_jobs, "check_cuda", lambda due: None)
    assert local_jobs.run(_plan(specs), tmp_path, {}, jobs, None)
    assert most == [2] and {gpu for _, gpu in order} == {"2", "GPU-5"}


def test_a_run_that_another_process_makes_is_waited_for(started, tmp_path, monkeypatch):
    order, _, _ = started
    held, free = short_spec("lora"), short_spec("lora", seed=1)
    asked = []

    def is_locked(folder):
        asked.append(folder.name)
        return folder.name == held.run_key and len(order) == 0

    monkeypatch.setattr(local_jobs, "is_locked", is_locked)
    assert local_jobs.run(_plan([held, free]), tmp_path, {}, Jobs(cluster="local"), 1)
    assert [spec.seed for spec, _ in order] == [1, 0]


def test_ctrl_c_asks_the_jobs_to_leave(started, tmp_path, monkeypatch):
    told, looks = [], iter([None, None, KeyboardInterrupt])

    def stop():
        if (error := next(looks)) is not None:
            raise error

    monkeypatch.setattr(local_jobs, "stop_if_asked", stop)
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number)))
    monkeypatch.setattr(FakeJob, "done", lambda self: False)
    monkeypatch.setattr(FakeJob, "job_id", "77", raising=False)
    with pytest.raises(KeyboardInterrupt):
        local_jobs.run(_plan([short_spec("lora")]), tmp_path, {}, Jobs(cluster="local"), 1)
    assert told == [(77, signal.SIGTERM)]


@pytest.mark.slow
def test_jobs_through_submitit_make_the_records(tmp_path, monkeypatch):
    """One that ends well, and one whose rank fits no memory."""
    good = short_spec("lora", steps=2, splits=("validation",), eval_rows=4)
    bad = type(good).from_dict({**good.to_dict(), "options": {**good.options, "rank": 10**8}})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not local_jobs.run(plan([good, bad], tmp_path), tmp_path, {}, Jobs(cluster="local"), workers=2)
    assert [p.state for p in plan([good, bad], tmp_path)] == ["ok", "failed"]
    record = json.loads((run_dir(tmp_path, good) / "record.json").read_text())
    assert record["provenance"]["threads"] == 1 and record["spec"] == good.to_dict()
    assert "GiB" in (run_dir(tmp_path, bad) / "log.txt").read_text()
    assert os.listdir(tmp_path / ".jobs"), "what submitit keeps lies beside the runs"
    assert local_jobs.run(plan([good], tmp_path), tmp_path, {}, Jobs(cluster="local"), workers=1), "nothing is due"
