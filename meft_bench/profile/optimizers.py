"""EightBitAdam stands for bitsandbytes' AdamW8bit where that cannot run: same state layout, same bytes, its arithmetic
is not."""

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
