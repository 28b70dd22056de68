"""`meft-bench train` on several ranks: the steps of one process, one voice, and an end for all when one dies."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from meft_bench import heartbeat
from meft_bench.cli import main
from meft_bench.finetune.train import train
from meft_bench.meft.files import read_safetensors
from meft_bench.train import loop
from tests.launch import free_ports, on_ranks

from .conftest import job

METHODS = ["meft", "lora", "full"]
FLAGS = ["--data", "example", "--batch-size", "8", "--eval-rows", "2", "--device", "cpu", "--checkpoint-steps", "2"]


def quiet(line: str) -> None:
    """Say nothing."""


def commands(lines: Sequence[Sequence[str]], ports: list[int]) -> int:
    """`meft-bench train` with each of lines, one after another; the last one's exit code."""
    code = 0
    for line, port in zip(lines, ports, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        code = main(["train", *FLAGS, *line])
    return code


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(next(folder.glob("*.safetensors")))


def assert_same_training(one: Path, two: Path, tolerance: float) -> None:
    """Losses, scores and weights of two outputs."""
    ours, theirs = (json.loads((folder / "training.json").read_text()) for folder in (one, two))
    for name in ("loss_first", "loss_last"):
        assert ours["training"][name] == pytest.approx(theirs["training"][name], rel=tolerance)
    assert ours["training"]["tokens"] == theirs["training"]["tokens"]
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=tolerance, atol=tolerance)


def test_two_ranks_take_the_steps_of_one(tmp_path):
    """Rows have different lengths, so the mean over a step's tokens is none of means."""
    flags = ["--steps", "4", "--accumulation", "2"]
    ended = on_ranks(
        2,
        tmp_path / "said",
        commands,
        [[*flags, "--method", method, "--output", str(tmp_path / method)] for method in METHODS],
        free_ports(len(METHODS)),
    )
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "dealt to 2 ranks" in ended[0].out and "adapter in" in ended[0].out
    assert ended[1].out == "" and "%" not in ended[1].err
    for method in METHODS:
        alone = train(job(tmp_path / "alone" / method, method=method, accumulation=2, eval_rows=2), say=quiet)
        assert_same_training(tmp_path / method, alone, 0 if method == "meft" else 1e-6)


def _one_dies(line: Sequence[str]) -> int:
    """Rank 1 is killed by the system in its fifth step."""
    step = loop.logged_step

    def deadly(attached, optimizer, batch, clip, log, *rest):
        if os.environ["RANK"] == "1" and len(log.loss) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        step(attached, optimizer, batch, clip, log, *rest)

    loop.logged_step = deadly
    return main(["train", *FLAGS, *line])


def test_a_killed_rank_ends_all_and_one_goes_on_alone(tmp_path):
    flags = ["--steps", "6", "--accumulation", "2", "--output", str(tmp_path / "out")]
    first, second = on_ranks(2, tmp_path / "said", _one_dies, flags)
    assert second.code == -signal.SIGKILL and first.code == 2
    said = [line for line in first.err.splitlines() if line.startswith("meft-bench: ")]
    assert len(said) == 1 and said[0].startswith("meft-bench: one of 2 ranks ended without a word")
    assert said[0].endswith("so all end: go on from the last checkpoint with --resume")
    assert "Traceback" not in first.err
    assert [p.name for p in (tmp_path / "out.partial" / "checkpoints").iterdir()] == ["step-0000004"]
    settings = {"steps": 6, "accumulation": 2, "eval_rows": 2}
    alone = train(job(tmp_path / "alone", **settings), say=quiet)
    assert train(job(tmp_path / "out", **settings), resume=True, say=quiet)
    assert_same_training(tmp_path / "out", alone, 1e-6)


def _one_freezes(line: Sequence[str], folder: Path) -> int:
    """Rank 1 stops in its fifth step, as if its machine had lost its power, and is killed once rank 0 is gone."""
    os.environ[heartbeat.LIMIT] = "2"
    step = loop.logged_step
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))

    def freezing(attached, optimizer, batch, clip, log, *rest):
        if os.environ["RANK"] == "1" and len(log.loss) == 4:
            wait = f"while kill -0 {(folder / '0').read_text()} 2>/dev/null; do sleep 0.1; done; kill -9 {os.getpid()}"
            subprocess.Popen(["sh", "-c", wait])
            os.kill(os.getpid(), signal.SIGSTOP)
        step(attached, optimizer, batch, clip, log, *rest)

    loop.logged_step = freezing
    return main(["train", *FLAGS, *line])


def test_a_rank_whose_machine_is_gone_ends_all(tmp_path):
    """Long before the limit of a wait, which is half an hour; and the last checkpoint is whole."""
    flags = ["--steps", "6", "--accumulation", "2", "--method", "lora", "--output", str(tmp_path / "out")]
    first, second = on_ranks(2, tmp_path / "said", _one_freezes, flags, tmp_path)
    assert second.code == -signal.SIGKILL and first.code == 2
    said = [line for line in first.err.splitlines() if line.startswith("meft-bench: ")]
    assert said == [
        "meft-bench: rank 1 of 2 has been silent for 2 s (MEFT_BENCH_HEARTBEAT_TIMEOUT): its machine or the network is "
        "gone, so all end: go on from the last checkpoint with --resume"
    ]
    assert "Traceback" not in first.err and not second.err.count("meft-bench: ")
    settings = {"method": "lora", "steps": 6, "accumulation": 2, "eval_rows": 2}
    assert train(job(tmp_path / "out", **settings), resume=True, say=quiet)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["training"]["steps"] == 6


def test_three_ranks_go_on_with_the_run_of_one(tmp_path, monkeypatch):
    """Which ran 8 rows in one micro-batch: they are cut into four, and one of the three ranks takes two of these."""
    settings = {"eval_rows": 2, "checkpoint_steps": 2}
    alone = train(job(tmp_path / "alone", **settings), say=quiet)
    check = loop.check_loss

    def stopped(log, steps):
        check(log, steps)
        if len(log.loss) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "check_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "out", **settings), say=quiet)
    line = ["--steps", "4", "--output", str(tmp_path / "out"), "--resume"]
    ended = on_ranks(3, tmp_path / "said", commands, [line], free_ports(1))
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    assert "cut into 4; 4 micro-batches do not go into 3 ranks: some run one more than others" in ended[0].out
    assert_same_training(tmp_path / "out", alone, 1e-3)


def _refused(lines: Sequence[Sequence[str]], ports: list[int]) -> int:
    """All lines, the last one with another seed on each rank; how many were refused with exit code 2."""
    *same, last = lines
    every = [*same, [*last, "--seed", os.environ["RANK"]]]
    return sum(commands([line], [port]) == 2 for line, port in zip(every, ports, strict=True))


def test_what_ranks_cannot_share_is_one_line(tmp_path):
    flags = [["--batch-size", "7"], ["--accumulation", "1"], ["--data", "none.jsonl"], ["--host-memory", "1MB"], []]
    lines = [[*line, "--method", "lora", "--output", str(tmp_path / "out")] for line in flags]
    first, second = on_ranks(2, tmp_path / "said", _refused, lines, free_ports(len(lines)))
    assert first.code == second.code == len(lines), (first, second)
    said = [line for rank in (first, second) for line in rank.err.splitlines() if line.startswith("meft-bench: ")]
    assert len(said) == len(lines)
    assert said[0].endswith("batch_size=7: so many rows a step cannot be dealt evenly to 2 ranks: --batch-size 8")
    assert said[1].endswith("so many micro-batches a step cannot be dealt evenly to 2 ranks: --accumulation 2")
    assert "none.jsonl" in said[2] and "of host memory" in said[3]
    assert said[4].startswith("meft-bench: seed is 1 on rank 1 and 0 on rank 0: start the same command")
    assert not (tmp_path / "out.partial").exists()
