"""Parallel Adapter on a base that was made smaller without training (train/shrink.py), after arXiv 2409.17372: what the
frozen base no longer takes of the device's memory can be spent on neurons that train.
"""

from dataclasses import dataclass

from meft_bench.baselines.parallel_adapter import Options as DenseOptions
from meft_bench.baselines.parallel_adapter import attach as attach_dense
from meft_bench.baselines.parallel_adapter import count as count_dense
from torch import nn

from meft_bench.train.contract import in_range
from meft_bench.train.methods import Attached, ModelShape, require_choice, require_positive
from meft_bench.train.shrink import shrink_ffns

TITLE = "Parallel Adapter on a shrunk base"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "neurons"
CHOICES = {"activation": ("relu", "silu")}
RANGES = {"share": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Options:
    neurons: int = 64
    """R: key-value pairs per layer."""
    activation: str = "relu"
    share: float = 0.9
    """Of the base's parameters, what is left of it, about."""

    def __post_init__(self) -> None:
        require_positive(neurons=self.neurons)
        require_choice("activation", self.activation, CHOICES["activation"])
        in_range(RANGES["share"]).check("share", self.share)


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return count_dense(_dense(options), shape)


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    shrink_ffns(model, options.share)
    return attach_dense(model, _dense(options), seed)


def _dense(options: Options) -> DenseOptions:
    return DenseOptions(neurons=options.neurons, activation=options.activation)
