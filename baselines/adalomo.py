"""Full fine-tuning by AdaLomo (Lv et al. 2024, arXiv 2310.10195): no gradients are kept, and little state.

Each parameter is updated within the backward pass, as soon as its gradient exists, and the gradient is dropped (LOMO,
arXiv 2306.09782). The second moment of a matrix is kept as one value per row and per column, and an update is scaled to
the size of what it changes. For g of theta, at step t:

    r = b r + (1 - b) g^2 1,  c = b c + (1 - b) 1^T g^2,  v = r c / (1^T r),  u = g / sqrt(v)
    theta = theta - lr u / max(1, RMS(u)) max(eps, RMS(theta))

The paper leaves b open; as in Adafactor, from which r and c come, b = 1 - t^-0.8. A vector keeps its v whole. Gradients
are not clipped: their global norm would need a second backward pass, and u is scaled by its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_bench.train.methods import Attached, ModelShape
from meft_bench.train.own_optimizer import FusedOptimizer
from meft_bench.train.step_bytes import Bytes, Step

TITLE = "AdaLomo"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
TRAINS = "base"
SAVED = "model"
_DECAY = 0.8
_LEAST_SQUARE, _LEAST_SIZE = 1e-30, 1e-3
"""Added to g^2; and the least size (RMS) that a parameter is taken to have: eps of the paper."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """No settings."""


class AdaLomo(FusedOptimizer):
    """Updates in the last backward pass; squares collects the squared norm of every gradient of a step."""

    def __init__(self, parameters: list[nn.Parameter], squares: list[Tensor], lr: float, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.squares = squares
        for parameter in parameters:
            shapes = self.state_shapes(parameter)
            zeros = {n: torch.zeros(s, dtype=torch.float32, device=parameter.device) for n, s in shapes.items()}
            self.state[parameter] = {**zeros, "step": torch.zeros(())}

    def state_shapes(self, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
        """A matrix's row [m] and column [n]; whole [m] of a vector. Of a stack of matrices, one of each per matrix."""
        shape = tuple(parameter.shape)
        return {"whole": shape} if len(shape) < 2 else {"row": shape[:-1], "column": shape[:-2] + shape[-1:]}

    def use(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, state, group = parameter.grad.float(), self.state[parameter], self.param_groups[0]
        self.squares.append(gradient.square().sum())
        state["step"] += 1
        update = _scaled(gradient, state, 1 - state["step"].item() ** -_DECAY)
        update.div_(_size(update).clamp_min(1.0)).mul_(_size(parameter.float()).clamp_min(_LEAST_SIZE))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def _scaled(gradient: Tensor, state: dict[str, Tensor], decay: float) -> Tensor:
    """g / sqrt(v), and r and c, or v, moved on in place. r c / (1^T r) is the same of means as of sums."""
    square = gradient.square().add_(_LEAST_SQUARE)
    if "whole" in state:
        return gradient * state["whole"].lerp_(square, 1 - decay).rsqrt()
    row, column = state["row"].lerp_(square.mean(-1), 1 - decay), state["column"].lerp_(square.mean(-2), 1 - decay)
    shares = row / row.mean(-1, keepdim=True)
    return gradient * shares.rsqrt()[..., :, None] * column.rsqrt()[..., None, :]


def _size(tensor: Tensor) -> Tensor:
    """Root of the mean square."""
    return tensor.square().mean().sqrt()


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"base": shape.parameters}


def state_bytes(options: Options, step: Step) -> Bytes:
    """One gradient, the largest, or all with several micro-batches, which wait for the last; and fp32 rows and columns
    of a LLaMA-like model's matrices, its norms whole."""
    shape, tables, d = step.shape, step.tables, step.shape.hidden
    kept = shape.layers * (sum(m + n for m, n in shape.matrices) + 2 * d) + d + sum(rows + d for rows in tables)
    largest = max(*(m * n for m, n in shape.matrices), *(rows * d for rows in tables))
    held = largest if step.accumulation == 1 else shape.parameters
    return Bytes(device={"gradients": step.width * held, "moments": 4 * kept}, host={})


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    model.requires_grad_(True)
    parameters, squares = list(model.parameters()), list[Tensor]()

    def norm(limit: float) -> Tensor:
        """The global norm of the step's gradients, which are gone."""
        total = torch.stack(squares).sum().sqrt()
        squares.clear()
        return total

    def optimizer(lr: float, weight_decay: float = 0.0, **unused: object) -> AdaLomo:
        return AdaLomo(parameters, squares, lr, weight_decay)

    def account(optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
        states = optimizer.state.values() if optimizer else ()
        return {
            "device_parameters_bytes": sum(p.nbytes for p in parameters),
            "device_gradients_bytes": max(p.nbytes for p in parameters),
            "device_moments_bytes": sum(t.nbytes for state in states for n, t in state.items() if n != "step"),
        }

    groups = {"base": parameters}
    return Attached(model=model, groups=groups, optimizer_factory=optimizer, clip=norm, account=account)
