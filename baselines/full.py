"""Full fine-tuning: every parameter of the base is trained."""

from dataclasses import dataclass

from torch import nn

from meft_bench.train.methods import Attached, ModelShape

TITLE = "Full fine-tuning"
NUMERICS = 1
LEARNING_RATES = (4e-4, 1e-3, 2.5e-3)
TRAINS = "base"
SAVED = "model"


@dataclass(frozen=True, kw_only=True)
class Options:
    """No settings."""


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"base": shape.parameters}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    model.requires_grad_(True)
    return Attached(model=model, groups={"base": list(model.parameters())})
