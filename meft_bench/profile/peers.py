"""Optimizers of other packages, which only run on a GPU; the simulation has stand-ins (optimizers.py)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.profile.host_adamw import HostAdamW


class CpuAdam(HostAdamW):
    """HostAdamW with gradients that return, stepped by DeepSpeed's CPUAdam: the schedule and the kernel of ZeRO-Offload
    without the engine around them. Raises ValueError where DeepSpeed is missing."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, **settings: Any) -> None:
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError:
            raise ValueError("DeepSpeed's CPUAdam needs deepspeed: pip install 'meft-bench[deepspeed]'") from None
        super().__init__(parameters, return_gradients=True, lr=lr, **settings)
        masters = [master for _, master in self.pairs]
        self.inner = DeepSpeedCPUAdam(masters, lr=lr, adamw_mode=True, **settings)

    def update(self, number: int, gradient: Tensor, out: Tensor) -> None:
        master = self.pairs[number][1]
        master.grad = gradient.float() if self.factor == 1 else gradient.float() * self.factor
        self.inner.step()  # of those that have a gradient
        out.copy_(master.detach())
        master.grad = None


def torchao_offload(parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """torchao's CPUOffloadOptimizer as documented: fused AdamW on the host, each gradient on its way there as soon as
    backward has made it; they stay on the device as well, since it drops them there (offload_gradients) for one micro-
    batch only. Parameters keep their fp32, so 4 bytes each cross both ways. Clipping on the device comes too late for
    what has left. Raises ValueError where torchao is missing or sees no GPU."""
    try:
        from torchao.optim import CPUOffloadOptimizer
    except ImportError:
        raise ValueError("CPUOffloadOptimizer needs torchao: pip install 'meft-bench[peers]'") from None
    try:
        return CPUOffloadOptimizer(list(parameters), torch.optim.AdamW, **settings)
    except AssertionError as error:
        raise ValueError(f"torchao refuses: {error}") from None


def host_state(optimizer: torch.optim.Optimizer | None) -> dict[str, list[Tensor]]:
    """Host tensors of an optimizer that works in host memory, by what they are; none of another."""
    if isinstance(optimizer, HostAdamW):
        return optimizer.host_state()
    masters = getattr(optimizer, "param_d2h_map", None)  # torchao's, which is no whole Optimizer: it has no state
    if masters is None:
        return {}
    states = [s for one in optimizer.optim_dict.values() for s in one.state.values()]  # type: ignore[union-attr]
    return {
        "adapter parameters": list(masters.values()),
        "gradients": [master.grad for master in masters.values() if master.grad is not None],
        "moments": [t for state in states for t in state.values() if isinstance(t, Tensor)],
    }


def adam8bit(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit. Raises ValueError where it is missing."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError("8-bit Adam on a GPU needs bitsandbytes: pip install 'meft-bench[peers]'") from None
    return bnb.optim.AdamW8bit(list(parameters), lr=lr, weight_decay=0.0)
