"""Full fine-tuning by GaLore (Zhao et al. 2024, arXiv 2403.03507): AdamW's moments in a subspace of each gradient.

For the gradient G [m, n] of an attention or FFN matrix, m <= n, and every T steps a fresh P [m, r] of G's first left
singular vectors, AdamW runs on R = P^T G and the weight moves by alpha P N, N what AdamW made of R; for m > n the same
from the right. Moments stay when P changes, as in the paper. All other parameters have AdamW as it is.

Own code: the package galore-torch needs bitsandbytes to be imported, and its projectors are Python objects that no
safetensors checkpoint can hold.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.fields import Real
from meft_bench.train.methods import Attached, ModelShape, require_positive
from meft_bench.train.own_optimizer import OwnOptimizer, adam_direction
from meft_bench.train.projections import projections
from meft_bench.train.step_bytes import Bytes, Step

TITLE = "GaLore"
NUMERICS = 1
LEARNING_RATES = (1e-3, 2.5e-3, 6.3e-3)
TRAINS = "base"
SAVED = "model"


@dataclass(frozen=True, kw_only=True)
class Options:
    rank: int = 32
    """r; matrices whose smaller side is no larger have AdamW as it is."""
    every: int = 200
    """T: steps between two projectors."""
    scale: float = 0.25
    """alpha: the factor on what a projected matrix moves by, on top of the learning rate."""

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, every=self.every)
        Real().check("scale", self.scale)


class GaLoreAdamW(OwnOptimizer):
    """AdamW over parameters, in the subspace for those whose id is in projected."""

    def __init__(self, parameters: list[nn.Parameter], projected: set[int], options: Options, lr: float,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.projected, self.options = projected, options

    def state_shapes(self, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
        """Moments [r, n] and the projector [m, r], or [m, r] and [r, n] where m > n; else both moments whole."""
        if not self._projects(parameter):
            return {"exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
        (m, n), r = parameter.shape, self.options.rank
        left, right = (m, r), (r, n)
        moment, projector = (left, right) if m > n else (right, left)
        return {"projector": projector, "exp_avg": moment, "exp_avg_sq": moment}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            zeros = {name: parameter.new_zeros(shape) for name, shape in self.state_shapes(parameter).items()}
            state.update(zeros, step=torch.zeros(()))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if not self._projects(parameter):
            parameter.add_(adam_direction(gradient, state, group), alpha=-group["lr"])
            return
        # A gradient that is not finite has no singular vectors: the loop ends a run by its norm, and says so.
        if state["step"].item() % self.options.every == 0 and bool(gradient.isfinite().all()):
            state["projector"].copy_(projector_of(gradient, self.options.rank))
        basis, wide = state["projector"], parameter.shape[0] <= parameter.shape[1]
        moved = adam_direction(basis.T @ gradient if wide else gradient @ basis.T, state, group)
        parameter.add_(basis @ moved if wide else moved @ basis, alpha=-group["lr"] * self.options.scale)

    def _projects(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.projected and min(parameter.shape) > self.options.rank


def projector_of(gradient: Tensor, rank: int) -> Tensor:
    """The first singular vectors of gradient [m, n]: left [m, rank], or right [rank, n] where m > n.

    Each with its largest entry positive. An SVD leaves signs to chance, and moments outlive a projector: rounding
    would decide what they mean.
    """
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    tall = gradient.shape[0] > gradient.shape[1]
    vectors = right[:rank].T if tall else left[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    return vectors.T if tall else vectors


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"base": shape.parameters}


def state_bytes(options: Options, step: Step) -> Bytes:
    """Gradients whole; of a projected matrix two moments and the projector, of the rest two moments."""
    shape, r = step.shape, options.rank
    projected = [(m, n) for m, n in shape.matrices if min(m, n) > r]
    saved = shape.layers * sum(2 * m * n - 2 * r * max(m, n) - r * min(m, n) for m, n in projected)
    state = 2 * shape.parameters - saved
    return Bytes(device={"gradients": step.width * shape.parameters, "moments": step.width * state}, host={})


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    model.requires_grad_(True)
    found, parameters = projections(model), list(model.parameters())
    projected = {id(model.get_submodule(name).weight) for name in found["attention"] + found["ffn"]}

    def optimizer(**settings: Any) -> GaLoreAdamW:
        return GaLoreAdamW(parameters, projected, options, **settings)

    return Attached(model=model, groups={"base": parameters}, optimizer_factory=optimizer)
