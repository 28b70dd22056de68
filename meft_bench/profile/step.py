"""The training step that is profiled, the same on a GPU and in the simulation."""

from typing import Any

import torch

from meft_bench import observe
from meft_bench.profile.host_adamw import HostAdamW
from meft_bench.profile.spec import ProfileSpec
from meft_bench.train.loop import one_step, token_loss
from meft_bench.train.methods import Attached

CLIP = 1.0


def prepare(model: Any, spec: ProfileSpec, training: bool = True) -> None:
    """Training mode, and activation checkpointing where the spec asks for it."""
    model.train(training)
    if spec.checkpointing and training:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # A frozen embedding gives no gradient, and a checkpoint without one would not be run again.
        model.enable_input_require_grads()


def random_batch(spec: ProfileSpec, vocabulary: int, device: str | torch.device) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels [B, length] of uniformly random tokens, made on the host; none is padding."""
    ids = torch.randint(vocabulary, (spec.batch, spec.seq)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def training_step(
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    spec: ProfileSpec,
    vocabulary: int,
    device: str | torch.device,
) -> None:
    """One optimizer step of spec.accumulation micro-batches of fresh random tokens."""

    def loss() -> torch.Tensor:
        batch = random_batch(spec, vocabulary, device)
        return token_loss(attached.model, batch) / (spec.batch * (spec.seq - 1) * spec.accumulation)

    def clip() -> None:
        if isinstance(optimizer, HostAdamW):
            optimizer.clip_gradients(CLIP)
        # A method that clips by itself is not asked for .grad: who looks at it makes MEFT keep it right from then on.
        elif attached.clip is not None or any(p.grad is not None for p in attached.parameters()):  # some drop them
            attached.clip_gradients(CLIP)

    one_step(optimizer, [loss] * spec.accumulation, clip)


@torch.no_grad()
def inference_step(model: Any, spec: ProfileSpec, vocabulary: int, device: str | torch.device) -> None:
    """One forward pass of the base model on a micro-batch."""
    with observe.phase("forward"):
        batch = random_batch(spec, vocabulary, device)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
