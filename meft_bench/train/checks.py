"""What ends a training: a loss or a parameter that is no finite number, and ranks that have come apart."""

import math

import torch

from meft_bench.ranks import ALONE, Ranks
from meft_bench.train.checkpoints import StepLog
from meft_bench.train.methods import Attached


class Diverged(Exception):
    """The loss or a parameter became infinite or not a number; the message names the step."""


def check_loss(log: StepLog, steps: int) -> None:
    """Raises Diverged unless the newest loss and gradient norm are finite."""
    for what, series in (("loss", log.loss), ("gradient's norm", log.gradient_norm)):
        if not math.isfinite(series[-1]):
            raise Diverged(f"the {what} is {series[-1]} at step {len(series)} of {steps}")


def check_parameters(
    attached: Attached, optimizer: torch.optim.Optimizer, step: int, steps: int, ranks: Ranks = ALONE
) -> None:
    """Raises Diverged unless all trained parameters are finite: no loss is computed after the last update. Raises
    ValueError where ranks have come to different ones."""
    if hasattr(optimizer, "settle"):
        optimizer.settle()  # rows whose updates were deferred
    extremes: dict[str, list[float]] = {}
    for name, group in attached.groups.items():
        found = [torch.aminmax(parameter.detach()) for parameter in group if parameter.numel()]
        extremes[name] = [extreme.item() for pair in found for extreme in pair]
        if not all(map(math.isfinite, extremes[name])):
            raise Diverged(f"the {name} hold a value that is no finite number after step {step} of {steps}")
    for rank, theirs in enumerate(everyone := ranks.gather(extremes)):
        if theirs != everyone[0]:
            raise ValueError(
                f"rank {rank} has come to other parameters than rank 0 after step {step}: start one process"
            )
