"""prepare(Trainer) on several ranks: the steps of one process, checkpoints for any number of ranks, what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft_bench
from meft_bench.integrations.trainer import STATE_NAME, newest_checkpoint
from tests.integrations.small import rows_of, with_meft
from tests.launch import LIMIT_S, free_ports, on_ranks
from tests.meft.tiny_models import VOCAB

STEPS, MICRO_BATCHES = 6, 4
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lazy": {"adam": "lazy"},
    "union": {"reading": "union", "gate": "none", "frozen_keys": True},
    "kept": {"device_budget": 4000, "moments": "bf16"},
}


def rows(number: int = 96, uneven: int = 6) -> list[dict[str, Tensor]]:
    """Rows of one length of which differently many tokens are learned."""
    ids = torch.randint(2, VOCAB, (number, 8), generator=torch.Generator().manual_seed(0))
    learned = [torch.where(torch.arange(8) < i % uneven, -100, row) for i, row in enumerate(ids)]
    return [
        {"input_ids": row, "labels": labels, "attention_mask": torch.ones_like(row)}
        for row, labels in zip(ids, learned, strict=True)
    ]


def trained(folder: Path, ranks: int, kind: str, resume: Any = None, callbacks: Any = None, **changes: Any) -> Trainer:
    """A run of 4 micro-batches a step, whatever the number of ranks."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES // ranks,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=0.05,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3, **changes},
    )
    model = with_meft(**KINDS[kind])
    trainer = Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(16, 1), callbacks=callbacks)
    meft_bench.prepare(trainer).train(resume_from_checkpoint=resume)
    return trainer


def left(trainer: Trainer) -> dict[str, Any]:
    """What a run came to: its rows, and its losses, norms and evaluations as logged."""
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    logged = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}
    return {"rows": [t.clone() for t in rows_of(trainer.model)], **logged}


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert len(one["loss"]) == STEPS and max(one["grad_norm"]) > 0.05
    assert one["learning_rate"] == two["learning_rate"]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-6)
    # One process clips by torch, whose norm is rounded elsewhere.
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


class Looks(TrainerCallback):
    """Rank 0 alone generates, and reads a parameter, between two steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "0":
            model = kwargs["model"].eval()
            model.generate(input_ids=rows()[0]["input_ids"][None], max_new_tokens=2, do_sample=False)
            assert all(bool(tensor.isfinite().all()) for tensor in rows_of(model))


def _all_kinds(folder: Path) -> int:
    for kind in KINDS:
        found = left(trained(folder / kind, 2, kind, callbacks=[Looks()] if kind == "plain" else None))
        tensors = {str(number): t for number, t in enumerate(found.pop("rows"))}
        save_file(tensors, folder / f"{kind}-{os.environ['RANK']}.safetensors")
        (folder / f"{kind}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    again = left(trained(folder / "resumed", 2, "plain", resume=str(folder / "one" / "checkpoint-4")))
    save_file(
        {str(n): t for n, t in enumerate(again.pop("rows"))}, folder / f"resumed-{os.environ['RANK']}.safetensors"
    )
    (folder / f"resumed-{os.environ['RANK']}.json").write_text(json.dumps(again))
    return _one_dies(folder)


class Death(TrainerCallback):
    """Rank 1 is killed by the system after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _one_dies(folder: Path) -> int:
    try:
        trained(folder / "dies", 2, "plain", save_steps=1, callbacks=[Death()])
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def read(folder: Path, name: str) -> dict[str, Any]:
    tensors = load_file(folder / f"{name}.safetensors")
    ordered = [tensors[str(number)] for number in range(len(tensors))]
    return {"rows": ordered, **json.loads((folder / f"{name}.json").read_text())}


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """With evaluation on all and a look by one in between; either number of ranks goes on with the other's
    checkpoint; and when one is killed, the other one ends."""
    one = {kind: left(trained(tmp_path / ("one" if kind == "plain" else kind), 1, kind)) for kind in KINDS}
    folder = tmp_path
    ended = on_ranks(2, tmp_path / "said", _all_kinds, folder)
    assert [rank.code for rank in ended] == [3, -signal.SIGKILL], ended
    assert "another of 2 ranks has died" in ended[0].err and "train(resume_from_checkpoint=True)" in ended[0].err
    assert newest_checkpoint(tmp_path / "dies") == str(tmp_path / "dies" / "checkpoint-1")
    for kind in KINDS:
        for rank in range(2):
            assert_equal(read(folder, f"{kind}-{rank}"), one[kind])
    assert_equal(read(folder, "resumed-0"), one["plain"])
    assert (tmp_path / "plain" / "checkpoint-4" / STATE_NAME).is_file()
    assert_equal(
        left(trained(tmp_path / "again", 1, "plain", resume=str(tmp_path / "plain" / "checkpoint-4"))), one["plain"]
    )


def test_accelerate_launch_starts_ranks_that_train_as_one(tmp_path: Path) -> None:
    """--multi_gpu is how accelerate starts several processes, also on a processor: with --cpu it starts one, or MPI."""
    port = free_ports(1)[0]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]
    command = [*launch, *options, str(port), "-m", "tests.integrations.launched", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = left(trained(tmp_path / "one", 1, "plain", save_strategy="no", eval_strategy="no"))
    for rank in range(2):
        assert_equal(read(tmp_path, str(rank)), one)
