"""LSP-Offload (Chen et al. 2024, arXiv 2406.10181): gradients cross the link as d x d, by learned sparse projectors.

Each matrix W [m, n] of attention and FFN has projectors P [m, d] and Q [n, d] with r values a row. Of its gradient G
only P^T G Q crosses to the host, where AdamW's moments lie; what AdamW makes of it, D, crosses back, and W moves by
P D Q^T: 2 d^2 numbers a matrix and step. Every so often P and Q are checked on the gradient at hand. Where the share
that they lose, |P P^T G Q Q^T - G| / |G|, is above a threshold, new ones are drawn and learnt on that gradient until
it is not, or for so many rounds, and the moments are carried over: M by P'^T P and Q^T Q', V by their squares.

Its repository was not read; its pipeline of layers, which hides copies and host work, is not here. Embeddings and
norms stay frozen. Gradients are compressed within a step's last backward pass, so that none is kept.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.fields import Real
from meft_bench.meft.link import Link
from meft_bench.train.methods import Attached, ModelShape, freeze, require_positive
from meft_bench.train.own_optimizer import FusedOptimizer, adam_direction
from meft_bench.train.projections import projections, refuse_experts
from meft_bench.train.step_bytes import Bytes, Step

TITLE = "LSP-Offload"
NUMERICS = 1
LEARNING_RATES = (2.5e-3, 6.3e-3, 1.6e-2)
TRAINS = "base"
SAVED = "model"
_PENALTY = 1e-4
"""On the projectors' norms while they are learnt."""
_LEARNING_RATE = 0.02
"""Of the projectors, by Adam."""
_SIDES = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class Options:
    subspace: int = 64
    """d; of matrices with a smaller side, that side."""
    nonzeros: int = 4
    """r: values in a row of a projector."""
    every: int = 100
    """Steps between two checks of the projectors."""
    threshold: float = 0.5
    """The share of a gradient that projectors may lose before new ones are learnt."""
    rounds: int = 50
    """Most rounds in which new ones are learnt."""

    def __post_init__(self) -> None:
        require_positive(subspace=self.subspace, nonzeros=self.nonzeros, every=self.every, rounds=self.rounds)
        Real().check("threshold", self.threshold)


class LspAdamW(FusedOptimizer):
    """AdamW on the host over compressed gradients; parameters [m, n] on the device. pending holds a step's gradients
    [d, d] in host memory."""

    def __init__(self, parameters: list[nn.Parameter], link: Link, options: Options, seed: int, lr: float,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.link, self.options, self.seed = link, options, seed
        self.index = {parameter: i for i, parameter in enumerate(parameters)}
        self.pending: dict[nn.Parameter, Tensor] = {}

    def state_shapes(self, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
        """Moments [d, d] on the host; values and columns [rows, r] of P ("left") and Q ("right") on the device."""
        (m, n), d = parameter.shape, _subspace(parameter.shape, self.options)
        r = min(self.options.nonzeros, d)
        sides = {"left": (m, r), "right": (n, r), "left_columns": (m, r), "right_columns": (n, r)}
        return {"exp_avg": (d, d), "exp_avg_sq": (d, d), **sides}

    def use(self, parameter: nn.Parameter) -> None:
        """Send the compressed gradient to the host, after the projectors' check if it is due."""
        assert parameter.grad is not None
        gradient, state = parameter.grad.float(), self.state[parameter]
        if not state:
            d = _subspace(parameter.shape, self.options)
            state.update({name: torch.zeros(d, d) for name in ("exp_avg", "exp_avg_sq")}, step=torch.zeros(()))
        if "left" not in state or int(state["step"].item()) % self.options.every == 0:
            self._check(parameter, gradient, state)
        left, right = (self._projector(state, side) for side in _SIDES)
        self.pending[parameter] = self.link.to_host(left.T @ gradient @ right, "grads")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter, gradient in self.pending.items():
            state, group = self.state[parameter], self.param_groups[0]
            moved = self.link.to_device(adam_direction(gradient, state, group), parameter.device, "updates")
            left, right = (self._projector(state, side) for side in _SIDES)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_((left @ moved @ right.T).to(parameter.dtype), alpha=-group["lr"])
        self.pending.clear()

    def clip(self, limit: float) -> Tensor:
        """Scale the compressed gradients to a global norm of at most limit; returns the norm before."""
        norm = torch.stack([g.square().sum() for g in self.pending.values()]).sum().sqrt()
        for gradient in self.pending.values():
            gradient.mul_((limit / (norm + 1e-6)).clamp_max(1.0))
        return norm

    def _check(self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """New projectors, and the moments in them, where there are none or they lose too much of gradient."""
        old = [self._projector(state, side) for side in _SIDES] if "left" in state else []
        if old and lost(gradient, old[0], old[1]) <= self.options.threshold:
            return
        state.update(self._learnt(parameter, gradient, int(state["step"].item())))
        if old:
            left, right = (new.T @ before for new, before in zip(self._both(state), old, strict=True))
            carried = {"exp_avg": (left, right), "exp_avg_sq": (left.square(), right.square())}
            for name, (a, b) in carried.items():
                state[name].copy_(a.cpu() @ state[name] @ b.T.cpu())

    def _learnt(self, parameter: nn.Parameter, gradient: Tensor, step: int) -> dict[str, Tensor]:
        """Values and columns of projectors drawn for this matrix and step, then learnt by Adam on gradient."""
        d, shapes = _subspace(parameter.shape, self.options), self.state_shapes(parameter)
        drawing = random.Random(f"projectors {self.seed} {self.index[parameter]} {step}")
        generator = torch.Generator().manual_seed(drawing.getrandbits(63))
        drawn: dict[str, Tensor] = {}
        for side in _SIDES:
            rows, r = shapes[side]
            values = torch.randn(rows, r, generator=generator) / math.sqrt(r)
            columns = torch.rand(rows, d, generator=generator).argsort(1)[:, :r].contiguous()
            drawn |= {side: values.to(parameter.device), f"{side}_columns": columns.to(parameter.device)}
        learnt = [drawn[side].requires_grad_() for side in _SIDES]
        optimizer = torch.optim.Adam(learnt, lr=_LEARNING_RATE)
        with torch.enable_grad():
            for _ in range(self.options.rounds):
                left, right = (dense(drawn[side], drawn[f"{side}_columns"], d) for side in _SIDES)
                loss = lost(gradient, left, right)
                if loss.item() <= self.options.threshold:
                    break
                optimizer.zero_grad()
                (loss + _PENALTY * (left.norm() + right.norm())).backward()
                optimizer.step()
        return {name: tensor.detach() for name, tensor in drawn.items()}

    def _both(self, state: dict[str, Tensor]) -> list[Tensor]:
        return [self._projector(state, side) for side in _SIDES]

    @staticmethod
    def _projector(state: dict[str, Tensor], side: str) -> Tensor:
        return dense(state[side], state[f"{side}_columns"], state["exp_avg"].shape[0])

    def restored(self, name: str, value: Any) -> Any:
        return value.clone() if name.startswith("exp_avg") else super().restored(name, value)


def dense(values: Tensor, columns: Tensor, d: int) -> Tensor:
    """The projector [rows, d] with values [rows, r] in columns [rows, r]."""
    return torch.zeros(values.shape[0], d, device=values.device).scatter(1, columns, values)


def lost(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """|P P^T G Q Q^T - G| / |G|, Frobenius norms; 0 for a gradient of zeros."""
    back = left @ (left.T @ gradient @ right) @ right.T
    return (back - gradient).norm() / gradient.norm().clamp_min(torch.finfo(torch.float32).tiny)


def _subspace(shape: torch.Size | tuple[int, int], options: Options) -> int:
    return min(options.subspace, *shape)


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"matrices": shape.layers * sum(m * n for m, n in shape.matrices)}


def state_bytes(options: Options, step: Step) -> Bytes:
    """The largest gradient, or all with several micro-batches, which wait for the last, and, fp32, the projectors'
    values with their columns on the device; d x d gradients and moments on the host."""
    matrices, layers = step.shape.matrices, step.shape.layers
    squares = layers * sum(_subspace(shape, options) ** 2 for shape in matrices)
    rows = layers * sum((m + n) * min(options.nonzeros, _subspace((m, n), options)) for m, n in matrices)
    sizes = [m * n for m, n in matrices]
    held = max(sizes) if step.accumulation == 1 else layers * sum(sizes)
    device = {"gradients": step.width * held, "projectors": (4 + 8) * rows}
    return Bytes(device=device, host={"gradients": 4 * squares, "Adam moments": 2 * 4 * squares})


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    """Raises ValueError for a mixture of experts, most of which would not be trained."""
    refuse_experts(model, "LSP-Offload trains matrices of linear layers alone")
    freeze(model)
    found, link = projections(model), Link()
    names = found["attention"] + found["ffn"]
    matrices: list[nn.Parameter] = [model.get_submodule(name).weight for name in names]  # type: ignore[misc]
    made: list[LspAdamW] = []
    for parameter in matrices:
        parameter.requires_grad_(True)

    def optimizer(**settings: Any) -> LspAdamW:
        made[:] = [LspAdamW(matrices, link, options, seed, **settings)]
        return made[0]

    def account(optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
        states = list(optimizer.state.values()) if optimizer else []
        host = sum(state["exp_avg"].nbytes for state in states)
        sides = [t.nbytes for state in states for name, t in state.items() if name.startswith(_SIDES)]
        return {
            "device_parameters_bytes": sum(p.nbytes for p in matrices),
            "device_gradients_bytes": max(p.nbytes for p in matrices),
            "device_projectors_bytes": sum(sides),
            "host_gradients_bytes": host,
            "host_moments_bytes": 2 * host,
        }

    return Attached(
        model=model,
        groups={"matrices": matrices},
        optimizer_factory=optimizer,
        link=link,
        clip=lambda limit: made[0].clip(limit),
        account=account,
    )
