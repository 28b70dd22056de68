"""LOMO (Lv et al. 2023, arXiv 2306.09782): SGD without momentum over all weights, fused into the backward pass.

Each parameter is updated as soon as its gradient exists, and the gradient is dropped, so that one gradient is held at a
time and no optimizer state. Clipping by value is done on the way. Clipping by the global norm takes two passes, as the
norm is known only after a whole backward pass (section 3.2): the first measures it and drops every gradient, the second
runs forward and backward again and updates. Gradients cannot be accumulated over micro-batches. A base with dropout
would draw anew in the second pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.fields import Real
from meft_bench.train.methods import Attached, ModelShape, require_choice

TITLE = "LOMO"
NUMERICS = 1
LEARNING_RATES = (0.8, 2.0, 5.0)
CHOICES = {"clipping": ("norm", "value")}
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
        Real(above=0).check("largest", self.largest)


class Lomo(torch.optim.Optimizer):
    """p -= lr (g + weight_decay p), g the clipped gradient. The loop's backward pass is the first of two ("norm") or
    the only one ("value"); clip() is called after it, and runs the second where there is one."""

    def __init__(self, model: nn.Module, options: Options, lr: float, weight_decay: float = 0.0, **_: Any) -> None:
        self.model, self.by_value, self.largest = model, options.clipping == "value", options.largest
        super().__init__(list(model.parameters()), {"lr": lr, "weight_decay": weight_decay})
        self._use: Callable[[nn.Parameter, Tensor], None] = self._measure
        self._given: dict[str, Any] | None = None
        self._logits_grad: Tensor | None = None
        self._squares: list[Tensor] = []
        model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        model.register_forward_hook(self._note_logits)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._drop)

    def clip(self, most: float) -> Tensor:
        """The global norm before clipping; the weights are updated when it returns, unless it is no finite number."""
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares = []
        if not self.by_value and bool(norm.isfinite()):
            assert self._given is not None and self._logits_grad is not None
            scale = (most / (norm + 1e-6)).clamp(max=1.0)
            self._use = lambda parameter, gradient: self._update(parameter, gradient * scale.to(gradient.dtype))
            try:
                self.model(**self._given).logits.backward(self._logits_grad)
            finally:
                self._use = self._measure
        self._given = self._logits_grad = None
        return norm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Everything is updated already."""
        self._given = None

    @torch.no_grad()
    def _drop(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._use(parameter, gradient)

    def _measure(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """What the loop's own backward pass does with a gradient."""
        self._squares.append(gradient.float().square().sum())
        if self.by_value:
            self._update(parameter, gradient.clamp(-self.largest, self.largest))

    def _update(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        rate, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        if decay:
            parameter.mul_(1 - rate * decay)
        parameter.add_(gradient, alpha=-rate)

    def _note_inputs(self, model: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        if self._use == self._measure and model.training and torch.is_grad_enabled():
            if self._given is not None:
                raise ValueError("LOMO updates in the backward pass and cannot accumulate: set accumulation to 1")
            self._given = given

    def _note_logits(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._use == self._measure and not self.by_value and self._given is not None:
            output.logits.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: Tensor) -> None:
        self._logits_grad = gradient


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"base": shape.parameters}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    model.requires_grad_(True)
    made: list[Lomo] = []

    def optimizer(**settings: Any) -> Lomo:
        made.append(Lomo(model, options, **settings))
        return made[-1]

    return Attached(
        model=model,
        groups={"base": list(model.parameters())},
        optimizer_factory=optimizer,
        clip=lambda most: made[-1].clip(most),
        fused=True,
    )
