"""Optimizers of the cheap alternatives: state on the host, in 8 bits, or none at all.

HostAdamW and the LOMO family are plain torch and run on a GPU and in the simulation alike. EightBitAdam stands for
bitsandbytes' AdamW8bit where that cannot run: same state layout, same bytes, its arithmetic is not.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUANTISATION_BLOCK = 256
_SMALLEST_QUANTISED = 4096


class HostAdamW(torch.optim.Optimizer):
    """AdamW whose fp32 weights and moments lie in host memory; the device keeps the parameters in half precision.

    return_gradients=False: gradients wait on the device, summed over micro-batches, and cross at the step (2 M a step
    in all, M the trainable parameters). True: each micro-batch's gradients cross as backward makes them and are summed
    on the host, so the device holds one at a time; the schedule of torchao's CPUOffloadOptimizer(offload_gradients) and
    of ZeRO-Offload.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], return_gradients: bool, lr: float, **settings: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        self.return_gradients = return_gradients
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for parameter in parameters:
            master = nn.Parameter(parameter.detach().to("cpu", torch.float32))
            master.grad = torch.zeros_like(master)
            self.pairs.append((parameter, master))
            if return_gradients:
                parameter.register_post_accumulate_grad_hook(self._returner(master))
        self.inner = torch.optim.AdamW([master for _, master in self.pairs], lr=lr, fused=True, **settings)

    def _returner(self, master: nn.Parameter):
        def give_back(parameter: Tensor) -> None:
            assert parameter.grad is not None and master.grad is not None
            master.grad.add_(parameter.grad.to("cpu").float())
            parameter.grad = None

        return give_back

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fetch waiting gradients, update on the host, send the new parameters to the device."""
        for parameter, master in self.pairs:
            if parameter.grad is not None:
                assert master.grad is not None
                master.grad.add_(parameter.grad.to("cpu").float())
                parameter.grad = None
        self.inner.step()
        for parameter, master in self.pairs:
            parameter.copy_(master)
            assert master.grad is not None
            master.grad.zero_()

    def masters(self) -> list[nn.Parameter]:
        """Where the gradients are when backward is over: the host's parameters, or the device's own."""
        return [pair[1 if self.return_gradients else 0] for pair in self.pairs]

    def host_state(self) -> dict[str, list[Tensor]]:
        """Host tensors by what they are."""
        masters = [master for _, master in self.pairs]
        moments = [v for s in self.inner.state.values() for v in s.values() if isinstance(v, Tensor)]
        return {
            "adapter parameters": list(masters),
            "gradients": [m.grad for m in masters if m.grad is not None],
            "moments": moments,
        }


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
