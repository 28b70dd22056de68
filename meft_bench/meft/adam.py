"""AdamW over the rows of neuron stores, its moments beside the rows in host memory.

"dense" is torch's own AdamW over all rows: untouched rows have a zero gradient, their moments decay and they drift.
"lazy" updates the rows of S alone, each with its own step count; the rest neither decay nor move.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.meft.store import NeuronStore


class DenseRowAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (fused) over every parameter of the stores; without weight decay unless given, as the paper."""

    def __init__(self, stores: Iterable[NeuronStore], weight_decay: float = 0.0, **settings: Any) -> None:
        self.stores = list(stores)
        for store in self.stores:
            store.prepare_gradients()
        super().__init__(_trainable(self.stores), weight_decay=weight_decay, fused=True, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero in place: the gradient buffers are part of the store."""
        for store in self.stores:
            store.clear_gradients()


class LazyRowAdamW(torch.optim.Optimizer):
    """AdamW on touched rows only (routers, touched by every token, are updated whole).

    State per parameter: exp_avg, exp_avg_sq [R, D] fp32 and step [R] fp32, the number of updates of each row.
    """

    def __init__(
        self,
        stores: Iterable[NeuronStore],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.stores = list(stores)
        for store in self.stores:
            store.prepare_gradients()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(_trainable(self.stores), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every touched row; closure is not supported."""
        assert closure is None, "row-wise AdamW takes no closure"
        for store in self.stores:
            rows_U = store.touched_R.nonzero()[:, 0]
            for parameter in (store.keys, store.values):
                if parameter.requires_grad:
                    self._update(parameter, rows_U)
            if store.router is not None and store.router.requires_grad:
                self._update(store.router, torch.arange(store.router.shape[0], device=store.router.device))

    def _update(self, parameter: nn.Parameter, rows_U: Tensor) -> None:
        group = self.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(parameter.shape[0], device=parameter.device)
        assert parameter.grad is not None
        grad_UD = parameter.grad[rows_U]
        first_UD = state["exp_avg"][rows_U].lerp_(grad_UD, 1 - beta1)
        second_UD = state["exp_avg_sq"][rows_U].mul_(beta2).addcmul_(grad_UD, grad_UD, value=1 - beta2)
        state["exp_avg"][rows_U], state["exp_avg_sq"][rows_U] = first_UD, second_UD
        state["step"][rows_U] += 1
        steps_U1 = state["step"][rows_U][:, None]
        scale_UD = (second_UD / (1 - beta2**steps_U1)).sqrt_().add_(group["eps"])
        rows_UD = parameter[rows_U] * (1 - lr * group["weight_decay"])
        parameter[rows_U] = rows_UD - lr / (1 - beta1**steps_U1) * first_UD / scale_UD

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero in place: the gradient buffers are part of the store."""
        for store in self.stores:
            store.clear_gradients()


ROW_ADAM = {"dense": DenseRowAdamW, "lazy": LazyRowAdamW}


def _trainable(stores: list[NeuronStore]) -> list[nn.Parameter]:
    return [p for store in stores for p in store.parameters() if p.requires_grad]
