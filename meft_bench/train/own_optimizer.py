"""What optimizers of our own share: state of any shape that checkpoints keep, Adam, gradients used within backward.

Optimizers whose state is AdamW's need none of this.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class OwnOptimizer(torch.optim.Optimizer):
    """An optimizer whose state tensors have shapes of their own, and load as they were saved, in their own dtype."""

    def state_shapes(self, parameter: nn.Parameter) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor that the optimizer keeps of a parameter, by its name in state; step counts aside."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, which would cast floats to the parameter's dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            self.state[parameters[index]] = {name: self.restored(name, value) for name, value in saved.items()}

    def restored(self, name: str, value: Any) -> Any:
        """A saved value where this optimizer keeps it: by default on the parameters' device, step counts aside."""
        there = self.param_groups[0]["params"][0].device
        return value.to(there).clone() if isinstance(value, Tensor) and name != "step" else value


class FusedOptimizer(OwnOptimizer):
    """An optimizer that uses each gradient as soon as the backward pass has made it, and drops it.

    Within last_backward() alone: gradients of a step's earlier micro-batches add up as ever, so that accumulation
    changes nothing but memory. What that pass made no gradient for, and an earlier one did, is used at its end. Outside
    of it gradients stay, and step() does nothing.
    """

    def __init__(self, parameters: list[nn.Parameter], defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        self._armed = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._made)

    def use(self, parameter: nn.Parameter) -> None:
        """Take parameter.grad, which is whole."""
        raise NotImplementedError

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing is left to do."""

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the backward pass of a step's last micro-batch."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self._use(parameter)

    def _made(self, parameter: nn.Parameter) -> None:
        if self._armed:
            self._use(parameter)

    @torch.no_grad()
    def _use(self, parameter: nn.Parameter) -> None:
        self.use(parameter)
        parameter.grad = None


def adam_direction(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """What Adam (arXiv 1412.6980) subtracts at learning rate 1, in the shape and dtype of gradient.

    state: exp_avg and exp_avg_sq like gradient, and step [], which are moved on in place. group: betas and eps.
    """
    first, second = group["betas"]
    state["step"] += 1
    step = state["step"].item()
    mean = state["exp_avg"].lerp_(gradient, 1 - first)
    square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    return mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + group["eps"])
