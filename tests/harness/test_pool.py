"""The pool of workers: what each has, what it says, and what ends it."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch

from meft_bench.harness import pool, runner, worker
from meft_bench.harness.spec import RunSpec
from tests.methods import short_spec


class FakeProcess:
    """A worker that says what it is told to and ends."""

    def __init__(self, target, args, daemon):
        self.args, self.exitcode = args, 0
        self.spec, self.pipe = RunSpec.from_dict(args[0]), args[2]

    said: dict[str, list[tuple]] = {}

    def start(self):
        self.gpus.append(self.args[4])
        for message in self.said[self.spec.run_key].pop(0):
            self.pipe.send(message)

    def is_alive(self):
        return False

    def join(self, timeout=None):
        pass

    def terminate(self):
        self.ended.append(self.spec.run_key)

    ended: list[str] = []
    gpus: list[str | None] = []


class FakeContext:
    Process = FakeProcess
    Pipe = staticmethod(multiprocessing.Pipe)


def test_a_run_that_another_holds_is_taken_when_it_is_free(tmp_path, monkeypatch, capsys):
    held, free = short_spec("full"), short_spec("full", seed=1)
    locks = iter([True, False])
    monkeypatch.setattr(pool, "is_locked", lambda folder: next(locks))
    FakeProcess.said = {held.run_key: [[("taken", "")], [("ok", "")]], free.run_key: [[("ok", "")]]}
    done = pool.Pool(FakeContext, [held, free], tmp_path, {}, [None], quiet=False).run()
    assert done == {held.run_key: ("ok", ""), free.run_key: ("ok", "")}
    assert list(done) == [free.run_key, held.run_key], "the other one was not kept waiting"
    assert capsys.readouterr().out.count("another process works on it; waiting for its result") == 1
    with pytest.raises(StopIteration):
        next(locks)


def test_a_worker_that_dies_without_a_word_is_told(tmp_path):
    spec, other = short_spec("full"), short_spec("full", seed=1)
    FakeProcess.said = {spec.run_key: [[("progress", 0.5)]], other.run_key: [[("progress", 0.5), ("ok", "")]]}
    done = pool.Pool(FakeContext, [spec, other], tmp_path, {}, [None], quiet=True).run()
    assert done[other.run_key] == ("ok", "") and done[spec.run_key][0] == "killed"
    assert "the worker died (exit code 0); it resumes from its checkpoint when run again" in done[spec.run_key][1]


def test_a_full_disk_ends_the_suite_with_what_is_kept(tmp_path):
    specs = [short_spec("full", seed=seed) for seed in range(4)]
    (tmp_path / specs[2].run_key / "checkpoints" / "step-0000004").mkdir(parents=True)
    FakeProcess.said = {s.run_key: [[("disk", "No space left on device")]] for s in specs}
    FakeProcess.said[specs[0].run_key] = [[("ok", "")]]
    with pytest.raises(ValueError, match=r"No space left on device\); 1 of 4 runs are finished and kept, 1 more have"):
        pool.Pool(FakeContext, specs, tmp_path, {}, [None], quiet=True).run()


def test_the_bar_moves_with_the_steps(tmp_path):
    short, long, later = short_spec("full"), short_spec("full", steps=100), short_spec("full", steps=500, seed=1)
    FakeProcess.said = {s.run_key: [[("progress", 0.5), ("progress", 0.2)]] for s in (short, long, later)}
    made = pool.Pool(FakeContext, runner.in_turn([short, later, long]), tmp_path, {}, [None], quiet=True)
    assert made.waiting == [long, short, later], "seed by seed, and the longest of each first"
    moved = []
    made.bar.update = moved.append
    made.run()
    assert sum(moved) == made.bar.total
    half = round(runner.cost(long) / 2)
    assert moved[:3] == [half, 0, round(runner.cost(long)) - half], "a step back is none"


def test_whatever_ends_the_pool_ends_its_workers(tmp_path, monkeypatch):
    spec = short_spec("full")
    FakeProcess.said, FakeProcess.ended = {spec.run_key: [[("progress", 0.5)]]}, []
    monkeypatch.setattr(FakeProcess, "is_alive", lambda self: True)
    turns = iter([None, KeyboardInterrupt])

    def interrupted():
        if (turn := next(turns)) is not None:
            raise turn

    monkeypatch.setattr(pool, "stop_if_asked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.Pool(FakeContext, [spec], tmp_path, {}, [None], quiet=True).run()
    assert FakeProcess.ended == [spec.run_key]


# ---- how many at a time ----


@pytest.mark.parametrize(
    "device, found, workers, wanted",
    [
        ("cpu", ["0", "1"], None, [None] * 8),
        ("cpu", [], 3, [None] * 3),
        ("cuda", ["0"], None, ["0"]),
        ("cuda", ["1", "GPU-b"], None, ["1", "GPU-b"]),
        ("cuda", ["1", "GPU-b"], 1, ["1"]),
        ("cuda", ["1", "GPU-b"], 3, ["1", "GPU-b", "1"]),
        ("cuda", [], None, [None]),
    ],
)
def test_each_run_on_a_gpu_has_one_of_its_own_unless_more_are_asked_for(monkeypatch, device, found, workers, wanted):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(runner, "visible_gpus", lambda: found)
    assert runner.slots([short_spec("full", device=device)], workers) == wanted


def test_a_gpu_is_given_on_when_its_run_is_over(tmp_path):
    specs = [short_spec("full", seed=seed, device="cuda") for seed in range(4)]
    FakeProcess.said, FakeProcess.gpus = {s.run_key: [[("ok", "")]] for s in specs}, []
    made = pool.Pool(FakeContext, specs, tmp_path, {}, ["0", "GPU-b"], quiet=True)
    made._start(made.waiting.pop(0))
    made._start(made.waiting.pop(0))
    assert FakeProcess.gpus == ["0", "GPU-b"] and not made.free
    assert len(made.run()) == 4 and sorted(FakeProcess.gpus[2:]) == ["0", "GPU-b"] == sorted(made.free)


def test_a_worker_sees_its_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = []
    monkeypatch.setattr(runner.signal, "signal", lambda *given: None)  # ctrl-C stays this process's
    monkeypatch.setattr(runner, "end_with", lambda owner: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(runner, "_made_meanwhile", lambda spec, folder: {"state": "ok"})
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        for gpu in (None, "1"):
            runner.work(short_spec("full").to_dict(), {"run_dir": str(tmp_path)}, writer, os.getpid(), gpu)
            assert reader.recv() == ("ok", "")
    assert seen == ["0,1", "1"]


def test_workers_on_a_gpu_are_no_forks_of_a_process_that_imports(tmp_path, monkeypatch):
    """transformers imports torchao where it is installed, and that starts CUDA: in a fork of it CUDA cannot be used."""
    used = []
    monkeypatch.setattr(pool, "Pool", lambda context, *rest: used.append(context) or FakePool())
    monkeypatch.setattr(runner, "_start_fork_server", lambda: None)
    monkeypatch.setattr(runner, "check_cuda", lambda due: None)
    monkeypatch.setattr(runner, "environment", lambda due, threads: {})
    for device in ("cpu", "cuda"):
        runner.execute([runner.Planned(short_spec("full", device=device), "missing")], tmp_path, {})
    assert [context.get_start_method() for context in used] == ["forkserver", "spawn"]


class FakePool:
    def run(self):
        return {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_that_torch_does_not_see_is_told_once(tmp_path, monkeypatch, device):
    monkeypatch.setattr(runner.subprocess, "run", lambda *given, **more: SimpleNamespace(returncode=3))
    spec = short_spec("full", device=device)
    if device == "cpu":
        runner.check_cuda([spec])
        return
    with pytest.raises(ValueError, match="torch finds no CUDA GPU here; see meft-bench doctor, or use --device cpu"):
        runner.execute([runner.Planned(spec, "missing")], tmp_path, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_in_one_line(tmp_path):
    spec = short_spec("full", device="cuda")
    with pytest.raises(ValueError, match="torch finds no CUDA GPU here"):
        runner.check_cuda([spec])
    with pytest.raises(ValueError, match="torch finds no CUDA GPU here"):
        worker.run(spec, worker.Places(run_dir=tmp_path))
