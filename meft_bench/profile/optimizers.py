"""Optimizers of the cheap alternatives: state in 8 bits, or none at all (host_adamw.py: on the host).

The LOMO family is plain torch and runs on a GPU and in the simulation alike. EightBitAdam stands for
bitsandbytes' AdamW8bit where that cannot run: same state layout, same bytes, its arithmetic is not.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUANTISATION_BLOCK = 256
_SMALLEST_QUANTISED = 4096


class EightBitAdam(torch.optim.Optimizer):
    """The state layout of bitsandbytes' blockwise 8-bit Adam: two bytes a parameter, two fp32 scales a block of 256.

    Small tensors (below 4096 elements) keep fp32 moments, as there. Only for simulated memory and bandwidth.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, **settings: Any) -> None:
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Read and write parameter, gradient and state once each, in place, as the fused kernel does."""
        for parameter in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                state.update(self._fresh(parameter))
            for moment in (state["state1"], state["state2"]):
                moment.zero_()
            parameter.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.numel() < _SMALLEST_QUANTISED:
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
        blocks = -(-parameter.numel() // _QUANTISATION_BLOCK)
        state = {n: torch.zeros_like(parameter, dtype=torch.uint8) for n in ("state1", "state2")}
        return {**state, **{n: parameter.new_zeros(blocks, dtype=torch.float32) for n in ("absmax1", "absmax2")}}


class Lomo(torch.optim.Optimizer):
    """LOMO (Lv et al. 2023): each parameter is updated as soon as its gradient exists, and the gradient is dropped.

    factored=True is AdaLomo (Lv et al. 2024): the second moment is kept as one value per row and per column, and the
    update is scaled by it; otherwise plain SGD. Without gradient clipping, which would need a second backward.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], factored: bool, lr: float, **settings: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        self.factored = factored
        for parameter in parameters:
            if factored:
                self.state[parameter].update(self._fresh(parameter))
            parameter.register_post_accumulate_grad_hook(self._update)

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.dim() < 2:
            return {"second": torch.zeros_like(parameter, dtype=torch.float32)}
        zeros = {"row": parameter.shape[:1], "column": parameter.shape[1:]}
        return {name: torch.zeros(shape, device=parameter.device) for name, shape in zeros.items()}

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self.factored:
            gradient = self._scaled(gradient.float(), self.state[parameter]).to(parameter.dtype)
        parameter.add_(gradient, alpha=-self.param_groups[0]["lr"])
        parameter.grad = None

    @staticmethod
    def _scaled(gradient: Tensor, state: dict[str, Tensor], beta: float = 0.99, eps: float = 1e-8) -> Tensor:
        if "second" in state:
            state["second"].mul_(beta).add_(gradient.square(), alpha=1 - beta)
            return gradient / (state["second"].sqrt() + eps)
        square = gradient.square()
        state["row"].mul_(beta).add_(square.mean(1), alpha=1 - beta)
        state["column"].mul_(beta).add_(square.mean(0), alpha=1 - beta)
        scale = (state["row"] / state["row"].mean().clamp_min(eps)).sqrt_().add_(eps)
        return gradient.div_(scale[:, None]).div_(state["column"].sqrt().add_(eps))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing is left to do: backward has updated everything."""
