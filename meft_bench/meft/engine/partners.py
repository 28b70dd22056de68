"""What a NeuronStore asks of those it works with: the optimizer, the adapter, and rows that live on the device."""

from typing import Any, Protocol

from torch import Tensor

from meft_bench.meft.engine import kernels


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

    def step(self, step: int, steps: kernels.Steps, lr: float, weight_decay: float) -> None:
        """Make an optimizer step."""
