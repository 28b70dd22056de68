"""The base model as it is: nothing is trained."""

from dataclasses import dataclass

from torch import nn

from meft_bench.train.methods import Attached, ModelShape, freeze

TITLE = "Base model"
NUMERICS = 1
LEARNING_RATES = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """No settings."""


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    freeze(model)
    return Attached(model=model, groups={})
