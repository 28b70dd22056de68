"""What a NeuronStore and its updates ask of those they work with: the optimizer, the adapter, and rows that live on the
device."""

from typing import Any, Protocol

import torch
from torch import Tensor

from meft_bench.meft.engine import adamw


class Optimizer(Protocol):
    """What updates of a store need of the torch optimizer that they are part of (adam.py)."""

    param_groups: list[dict[str, Any]]
    state: Any
    """exp_avg, exp_avg_sq and step of each parameter."""
    moments: torch.dtype
    steps_done: int


class Updates(Protocol):
    """What an optimizer that defers updates offers its stores (adam.py)."""

    def refresh_keys(self, index_U: Tensor | None) -> None:
        """Bring the keys of these rows, or of all, up to date."""

    def refresh(self, index_U: Tensor | None) -> None:
        """Bring keys and values of these rows, or of all, up to date."""


class Source(Protocol):
    """The adapter whose gradients may wait on the device (layer.py)."""

    def collect(self) -> None:
        """Send them home."""

    def stepped(self) -> None:
        """An optimizer has queued a step of the store."""

    def take_optimizer(self, updates: Any) -> None:
        """Gradients were cleared; updates (updates.StoreUpdates) may go to the device, in part."""


class Away(Protocol):
    """Rows whose optimizer is on the device at this moment (engine/device_adam.py), and the router with them: the
    store's memory shows them as they were when they left."""

    def home(self) -> None:
        """Bring back weights, moments and, with the next collect(), gradients."""

    def drop(self) -> None:
        """Forget the gradients."""

    def squares(self) -> Tensor:
        """The sum of the gradients' squares, fp64."""

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""

    def step(self, step: int, steps: adamw.Steps, lr: float, weight_decay: float) -> None:
        """Make an optimizer step."""
