"""LOMO (Lv et al. 2023, arXiv 2306.09782): SGD without momentum over all weights, fused into the backward pass.

Each parameter is updated as soon as its gradient exists, and the gradient is dropped, so that one gradient is held at a
time and no optimizer state. Clipping by value is done on the way. Clipping by the global norm takes two passes, as the
norm is known only after a whole backward pass (section 3.3.1): the first measures it and drops gradients, the second
runs forward and backward again and updates. A base with dropout would draw anew in the second pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.train.contract import in_range
from meft_bench.train.methods import Attached, ModelShape, require_choice
from meft_bench.train.own_optimizer import FusedOptimizer
from meft_bench.train.step_bytes import Bytes, Step

TITLE = "LOMO"
NUMERICS = 1
LEARNING_RATES = (0.8, 2.0, 5.0)
CHOICES = {"clipping": ("norm", "value")}
RANGES = {"largest": (0, None)}
TRAINS = "base"
SAVED = "model"


@dataclass(frozen=True, kw_only=True)
class Options:
    clipping: str = "norm"
    """"norm": all gradients are scaled so that their global norm is at most the run's clip, in two passes; "value":
    each number of a gradient is cut to at most `largest`, in one pass, and the run's clip is not used."""
    largest: float = 1.0
    """Used with "value"."""

    def __post_init__(self) -> None:
        require_choice("clipping", self.clipping, CHOICES["clipping"])
        in_range(RANGES["largest"]).check("largest", self.largest)


class Lomo(FusedOptimizer):
    """p = (1 - lr weight_decay) p - lr g, g the clipped gradient. The training loop's backward pass is the first of two
    ("norm") or the only one ("value"); clip() is called after it, and runs the second where there is one."""

    def __init__(self, model: nn.Module, options: Options, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(list(model.parameters()), {"lr": lr, "weight_decay": weight_decay})
        self.model, self.by_value, self.largest = model, options.clipping == "value", options.largest
        self._squares: list[Tensor] = []
        self._seen: list[tuple[dict[str, Any], Tensor]] = []
        """Inputs of every micro-batch of the step, and the gradient of its logits: what the second pass begins with."""
        self._scale: Tensor | None = None
        """In the second pass: what gradients are multiplied with."""
        if not self.by_value:
            model.register_forward_hook(self._note, with_kwargs=True)

    def use(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self._scale is not None:
            self._update(parameter, gradient * self._scale.to(gradient.dtype))
            return
        self._squares.append(gradient.float().square().sum())
        if self.by_value:
            self._update(parameter, gradient.clamp(-self.largest, self.largest))

    def clip(self, most: float) -> Tensor:
        """The global norm before clipping; with "norm", the weights are updated then, unless it is no finite number."""
        norm = torch.stack(self._squares).sum().sqrt()
        seen, self._seen, self._squares = self._seen, [], []
        if self.by_value or not bool(norm.isfinite()):
            return norm
        self._scale = (most / (norm + 1e-6)).clamp(max=1.0)
        try:
            for given, logits_grad in seen[:-1]:
                self.model(**given).logits.backward(logits_grad)
            given, logits_grad = seen[-1]
            with self.last_backward():
                self.model(**given).logits.backward(logits_grad)
        finally:
            self._scale = None
        return norm

    def _update(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        rate, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        parameter.mul_(1 - rate * decay)
        parameter.add_(gradient, alpha=-rate)

    def _note(self, model: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> None:
        first = self._scale is None and model.training and torch.is_grad_enabled()
        if first and output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: self._seen.append((given, gradient)))


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"base": shape.parameters}


def state_bytes(options: Options, step: Step) -> Bytes:
    """One gradient, the largest of a LLaMA-like model's; with several micro-batches all, which wait for the last, and,
    clipped by the norm, the gradients of the earlier ones' logits, which wait for the second pass. No state."""
    d, f, q = step.shape.hidden, step.shape.ffn, step.shape.query
    largest = max(d * f, d * q, *(rows * d for rows in step.tables))
    held = largest if step.accumulation == 1 else step.shape.parameters
    earlier = (step.accumulation - 1) * step.tokens * step.vocabulary if options.clipping == "norm" else 0
    device = {"gradients": step.width * held, "gradients of logits": step.width * earlier, "moments": 0}
    return Bytes(device=device, host={})


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    model.requires_grad_(True)
    parameters, made = list(model.parameters()), list[Lomo]()

    def optimizer(lr: float, weight_decay: float = 0.0, **unused: object) -> Lomo:
        made.append(Lomo(model, options, lr, weight_decay))
        return made[-1]

    def account(optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
        return {
            "device_parameters_bytes": sum(p.nbytes for p in parameters),
            "device_gradients_bytes": max(p.nbytes for p in parameters),
        }

    return Attached(
        model=model,
        groups={"base": parameters},
        optimizer_factory=optimizer,
        clip=lambda most: made[-1].clip(most),
        account=account,
    )
