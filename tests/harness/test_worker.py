"""What one run in one process records when its numbers stop being numbers, or the disk is full."""

import contextlib
import errno
import json
from dataclasses import replace

import pytest
import torch

from meft_bench.harness import worker
from meft_bench.harness.record import read_record
from tests.methods import short_spec


@pytest.mark.parametrize("name", ["meft", "lora"])
def test_a_last_update_that_diverges_is_a_result(tmp_path, name, overflowing_update):
    record = worker.run(short_spec(name, steps=1), worker.Places(run_dir=tmp_path))
    assert record["state"] == "diverged" and record["quality"] is None
    assert "no finite number after step 1 of 1" in record["state_reason"]
    assert read_record(tmp_path / "record.json")["quality_reason"] == record["state_reason"]


def test_scores_that_are_no_numbers_are_divergence(tmp_path, monkeypatch):
    found = {"n": 1, "ids": ["a"], "metrics": {"contains": {"mean": float("nan")}}, "examples": []}
    monkeypatch.setattr(worker, "_quality", lambda scores: found)
    record = worker.run(short_spec("lora", steps=1, eval_rows=2), worker.Places(run_dir=tmp_path))
    assert record["state"] == "diverged" and record["quality"] is None and record["curve"] is not None
    assert record["state_reason"] == "quality.test.metrics.contains.mean is no finite number"
    read_record(tmp_path / "record.json")


@pytest.mark.parametrize("name", ["meft", "lora"])
def test_the_seed_reaches_initialisation_and_order(tmp_path, monkeypatch, name):
    found = {}
    for key, seed in (("a", 0), ("b", 0), ("c", 1)):
        orders = found[key] = []

        def note(attached, spec, batches, orders=orders, **_):
            orders.append([p.detach().clone() for p in attached.parameters()])
            orders.append(batches(0))
            orders.append(torch.rand(3))
            raise worker.loop.Diverged("seen enough")

        monkeypatch.setattr(worker.loop, "train", note)
        monkeypatch.setattr(worker.loop, "batch_of", lambda model, rows, *_: [row.ids for row in rows])
        worker.run(short_spec(name, seed=seed), worker.Places(run_dir=tmp_path))
    same, other = zip(found["a"][0], found["b"][0], strict=True), zip(found["a"][0], found["c"][0], strict=True)
    assert all(torch.equal(a, b) for a, b in same) and not all(torch.equal(a, c) for a, c in other)
    assert found["a"][1] == found["b"][1] != found["c"][1]
    # What is drawn from torch's own generator, such as dropout, follows the seed too.
    assert torch.equal(found["a"][2], found["b"][2]) and not torch.equal(found["a"][2], found["c"][2])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory. Tried to"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "DefaultCPUAllocator: can't allocate memory",
        ),
        (MemoryError(), "out of memory: host"),
    ],
)
def test_no_memory_is_a_result_wherever_it_runs_out(tmp_path, monkeypatch, error, said):
    def train(*_, **__):
        raise error

    monkeypatch.setattr(worker.loop, "train", train)
    worker.run(short_spec("lora", steps=1), worker.Places(run_dir=tmp_path))
    record = read_record(tmp_path / "record.json")
    assert record["state"] == "oom" and said in record["state_reason"] and record["parameters"] is not None


def test_another_runtime_error_is_a_failure(tmp_path, monkeypatch):
    def train(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(worker.loop, "train", train)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        worker.run(short_spec("lora", steps=1), worker.Places(run_dir=tmp_path))
    assert not (tmp_path / "record.json").exists()


def test_no_row_left_to_recall_is_told_before_training(tmp_path, monkeypatch):
    """Three rows are drawn to ask for recall; at 10 tokens other rows fit, and none of these."""
    spec = short_spec("lora", train_rows=600, eval_rows=3, max_length=10, overlong="drop", splits=("test", "recall"))

    class Trained(Exception):
        pass

    def train(*_, **__):
        raise Trained

    monkeypatch.setattr(worker.loop, "train", train)
    with pytest.raises(ValueError, match="none of the 3 rows drawn to ask for recall was short enough"):
        worker.run(spec, worker.Places(run_dir=tmp_path))
    with pytest.raises(Trained):
        worker.run(replace(spec, splits=("test",)), worker.Places(run_dir=tmp_path))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("disk", "No space left on device")),
        (OSError(errno.EFBIG, "File too large"), ("disk", "File too large")),
        (FileNotFoundError(errno.ENOENT, "No such file"), ("failed", "FileNotFoundError: [Errno 2] No such file")),
        (ValueError("one line"), ("failed", "one line")),
        (RuntimeError("odd"), ("failed", "RuntimeError: odd")),
    ],
)
def test_the_last_words_of_a_worker(tmp_path, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(worker, "run", fail)
    monkeypatch.setattr(worker.os, "dup2", lambda *_: None)
    reports = []
    with contextlib.suppress(OSError):
        worker.main_process(short_spec("lora").to_dict(), {"run_dir": str(tmp_path)}, reports.append)
    assert reports == [said]


def test_a_log_that_cannot_be_opened_is_told(tmp_path):
    reports = []
    worker.main_process(short_spec("lora").to_dict(), {"run_dir": str(tmp_path / "missing")}, reports.append)
    assert reports[0][0] == "failed" and "missing" in json.dumps(reports)


def test_safetensors_own_errors_are_known():
    from safetensors import SafetensorError

    from meft_bench.write import disk_error

    assert disk_error(SafetensorError("I/O error: No space left on device (os error 28)")) == "No space left on device"
    assert disk_error(SafetensorError("invalid header")) is None
    assert disk_error(RuntimeError("(os error 28)")) is None


def test_cuda_is_there_before_the_record_names_the_card(tmp_path, monkeypatch):
    """NVML may number the cards of a machine otherwise than CUDA, which then says which one is in use."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: done.append("started"))

    def record(spec):
        done.append("named")
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_empty_record", record)
    with pytest.raises(KeyboardInterrupt):
        worker.run(short_spec("lora", device="cuda"), worker.Places(run_dir=tmp_path))
    assert done == ["started", "named"]
