"""MEFT as a method of the harness: sparse Parallel Adapters with neurons and Adam state in host memory.

torch is imported when a model is adapted: options and plans are checked before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from meft_bench.meft import config
from meft_bench.meft.config import MeftOptions
from meft_bench.train.methods import Attached, ModelShape

if TYPE_CHECKING:
    from torch import nn

TITLE = "MEFT"
NUMERICS = 2
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "neurons"
SHOWN = ("neurons", "experts", "probed", "kept")
PLACE = "host"
SAVED = "peft"
EXACT_COUNT = True

Options = MeftOptions
KINDS = config.FIELDS
_KEPT = 64  # the paper's K at every size


def count(options: MeftOptions, shape: ModelShape) -> dict[str, int]:
    return options.parameter_groups(shape.hidden, shape.layers)


def sizes(limit: int) -> list[int]:
    """R = (4j)^2 up to limit, ascending: the sizes at which N = 4 sqrt(R) divides R, like the paper's 8464."""
    return [(4 * j) ** 2 for j in range(1, math.isqrt(limit) // 4 + 1)]


def options_at(neurons: int, given: dict[str, Any]) -> dict[str, Any]:
    """R with N, P, K after the paper (N = 4 sqrt(R), P = 8, K = 64); at small R, K is half of the P m candidates."""
    if "kept" in given or not given.get("key_experts", True):
        return {**given, "neurons": neurons, "kept": given.get("kept", min(_KEPT, max(1, neurons // 2)))}
    candidates = MeftOptions(**{**given, "neurons": neurons, "kept": 1}).candidates
    return {**given, "neurons": neurons, "kept": min(_KEPT, max(1, candidates // 2))}


def attach(model: nn.Module, options: MeftOptions, seed: int) -> Attached:
    from meft_bench.meft import model as meft_model
    from meft_bench.meft.background import background_of
    from meft_bench.meft.link import Link

    meft = meft_model.attach(model, options, seed)
    return Attached(
        model=model,
        groups=meft.parameters_by_group(),
        optimizer_factory=meft.make_optimizer,
        link=meft.link if isinstance(meft.link, Link) else None,
        usage=[adapter.usage for adapter in meft.adapters],
        save=meft.save,
        clip=meft.clip_grad_norm_,
        adds_gradients=True,
        background=background_of(model, meft.adapters),
    )
