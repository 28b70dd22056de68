"""MEFT as a method of the harness: sparse Parallel Adapters with neurons and Adam state in host memory."""

from torch import nn

from meft_bench.meft import model as meft_model
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.link import Link
from meft_bench.train.methods import Attached, ModelShape

TITLE = "MEFT"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)

Options = MeftConfig


def count(options: MeftConfig, shape: ModelShape) -> dict[str, int]:
    return options.parameter_groups(shape.hidden, shape.layers)


def attach(model: nn.Module, options: MeftConfig, seed: int) -> Attached:
    meft = meft_model.attach(model, options, seed)
    return Attached(
        model=model,
        groups=meft.parameters_by_group(),
        optimizer_factory=meft.make_optimizer,
        link=meft.link if isinstance(meft.link, Link) else None,
        usage=[adapter.usage for adapter in meft.adapters],
        save=meft.save,
        clip=meft.clip_grad_norm_,
    )
