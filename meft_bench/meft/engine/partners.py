"""What a NeuronStore asks of those it works with: the optimizer, the adapter, and rows that live on the device."""

from collections.abc import Callable
from typing import Protocol

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


class Elsewhere(Protocol):
    """Rows of a store whose optimizer lies on the device (NeuronStore.elsewhere): their fp32 master rows, moments and
    gradients are there, and AdamW, sums and norm of the host pass them by.

    An optimizer lets it take rows at the end of a step. Whoever looks at parameters, at .grad or at the optimizer's
    state has everything given back first and finds it on the host; it goes there again at the end of the next step. All
    of it runs in the order of the store's queue.
    """

    owned_R: Tensor
    """bool [R] in the store's memory: the rows that are there now."""

    def wanted_U(self) -> Tensor:
        """The rows that take() should be called for, int64: to be there and not owned. Empty in a steady step."""

    def take(self, rows_U: Tensor, state: Callable[[], kernels.RowState]) -> None:
        """Own these rows from now on: copy their master rows and moments, which are up to date. state() gives those of
        all rows, [R, H, D]; ask it anew at every use. Their gradients of steps made are not needed."""

    def give_back(self) -> None:
        """Write master rows and moments of what is owned into state(), with the step they are current to in done_R and
        not still; add their gradients to the store's (add_gradients). Nothing is owned any more."""

    def squares(self) -> Tensor:
        """The sum of squares of each owned row's gradient (kernels.squares), fp64 [R] in the store's memory; else 0."""

    def scale(self, factor: float) -> None:
        """Multiply the gradients by factor, rounded to fp32; at once, or when they are read."""

    def step(self, step: int, constants: kernels.Steps) -> None:
        """AdamW (kernels.advance) of all owned rows; the gradient of a row that got none is zero. The gradients stay
        until clear()."""

    def clear(self) -> None:
        """Forget the gradients."""
