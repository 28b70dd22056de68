"""Optimizers of the cheap alternatives: state on the host, in 8 bits, or none at all.

HostAdamW and the LOMO family are plain torch and run on a GPU and in the simulation alike. EightBitAdam stands for
bitsandbytes' AdamW8bit where that cannot run: same state layout, same bytes, its arithmetic is not.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench import observe

_QUANTISATION_BLOCK = 256
_SMALLEST_QUANTISED = 4096


class HostAdamW(torch.optim.Optimizer):
    """AdamW whose fp32 weights and moments lie in host memory; the device keeps the parameters in half precision.

    return_gradients=False: gradients are summed over micro-batches on the device and cross at the step, so a step moves
    2 M elements whatever the accumulation (M the trainable parameters). True: each micro-batch's gradients cross as
    backward makes them and are summed on the host, so the device holds one at a time; A micro-batches move (A + 1) M.
    The second is the schedule of torchao's CPUOffloadOptimizer(offload_gradients=True), which allows one micro-batch
    only, and of ZeRO-Offload. Copies are asynchronous, from and to pinned memory where there is a GPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], return_gradients: bool, lr: float, **settings: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        self.return_gradients = return_gradients
        self.pairs: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []
        self._landed: set[int] = set()
        for number, parameter in enumerate(parameters):
            master = nn.Parameter(parameter.detach().to("cpu", torch.float32))
            master.grad = torch.zeros_like(master)
            staging = torch.empty_like(parameter, device="cpu", pin_memory=parameter.device.type == "cuda")
            self.pairs.append((parameter, master, staging))
            if return_gradients:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._return, number))
        self.inner = torch.optim.AdamW([master for _, master, _ in self.pairs], lr=lr, fused=True, **settings)

    def _return(self, number: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._collect(number)
        self.pairs[number][2].copy_(parameter.grad, non_blocking=True)
        self._landed.add(number)
        parameter.grad = None

    def _collect(self, number: int) -> None:
        """Add what lies in the staging buffer to the host's gradient; its copy ended with the micro-batch before."""
        _, master, staging = self.pairs[number]
        if number in self._landed:
            assert master.grad is not None
            master.grad.add_(staging)
            self._landed.discard(number)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fetch waiting gradients, update on the host, send the new parameters to the device."""
        for number, (parameter, _, _) in enumerate(self.pairs):
            if parameter.grad is not None:
                self._return(number, parameter)
        _wait_for(self.pairs[0][0].device)
        for number in range(len(self.pairs)):
            self._collect(number)
        with observe.part("adam", self.inner):
            self.inner.step()
        for parameter, master, staging in self.pairs:
            staging.copy_(master)
            parameter.copy_(staging, non_blocking=True)
            assert master.grad is not None
            master.grad.zero_()

    def masters(self) -> list[nn.Parameter]:
        """Where the gradients are when backward is over: the host's parameters, or the device's own."""
        if not self.return_gradients:
            return [parameter for parameter, _, _ in self.pairs]
        _wait_for(self.pairs[0][0].device)
        for number in range(len(self.pairs)):
            self._collect(number)
        return [master for _, master, _ in self.pairs]

    def host_state(self) -> dict[str, list[Tensor]]:
        """Host tensors by what they are."""
        masters = [master for _, master, _ in self.pairs]
        moments = [v for s in self.inner.state.values() for v in s.values() if isinstance(v, Tensor)]
        return {
            "adapter parameters": list(masters),
            "gradients": [m.grad for m in masters if m.grad is not None],
            "moments": moments,
            "staging": [staging for _, _, staging in self.pairs],
        }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
