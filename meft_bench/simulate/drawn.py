"""Rows of a device budget in the simulation: which are held is decided by the engine's own books, over drawn unions.

Where some rows of a layer and their optimizer are on the device (meft/engine/slots.py), what crosses depends on which
rows each micro-batch uses. Simulated tensors hold no such numbers. So unions are drawn: every row has a probability of
its own, chosen so that one micro-batch uses U rows and several touch as many as was logged. The books are kept with
real numbers, and the rest of the engine gets lists of the right length.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from meft_bench.meft.engine.slots import FADE, Pairs, Places, Slots, standing_in

NUMERICS = 5
"""Raised when a row with a device budget can change and no other does (harness/numerics.py)."""
_WINDOW = 8
"""Micro-batches at which the rows touched are made to agree."""
_BEFORE = 1 << 20
"""The number of the first micro-batch of those that came before the simulation."""


class Draws:
    """Unions of U of R rows. touched(A): rows that at least one of A micro-batches uses."""

    def __init__(self, neurons: int, union: int, touched: Callable[[int], float], seed: int = 0) -> None:
        self.neurons, self.union, self.touched, self.seed = neurons, union, touched, seed
        self.share_R = shares(neurons, union / neurons, 1 - touched(_WINDOW) / neurons, _WINDOW)
        """How likely each row is to be used, largest first."""
        self._drawn = functools.cache(self._draw)
        self.on_host = functools.cache(self._on_host)
        """(held, micro_batches) -> rows touched that are not among so many that the engine holds."""

    def union_U(self, number: int) -> Tensor:
        """The rows of micro-batch `number`, ascending, int64 [U]; the same for every layer."""
        if self.union >= self.neurons:
            return torch.arange(self.neurons)
        return torch.from_numpy(self._drawn(number).copy())

    def _draw(self, number: int) -> np.ndarray:
        noise = np.random.default_rng((self.seed, number)).logistic(size=self.neurons)
        with np.errstate(divide="ignore"):
            score = np.log(self.share_R) - np.log1p(-self.share_R) + noise
        return np.sort(np.argpartition(-score, self.union)[: self.union]).astype(np.int64)

    def used_R(self, micro_batches: int, least: int) -> Tensor:
        """How often the engine counts each row as used when it is to say which to hold: after at least so many micro-
        batches, in steps of `micro_batches`. fp32 [R]."""
        uses_R = torch.zeros(self.neurons)
        for number in range(-(-least // micro_batches) * micro_batches):
            uses_R[self.union_U(_BEFORE + number)] += 1
            if (number + 1) % micro_batches == 0:
                uses_R *= FADE
        return uses_R

    def _on_host(self, held: int, micro_batches: int) -> float:
        if not held:
            return float(self.touched(micro_batches))
        with unset_fake_temporarily():
            rows = self.used_R(min(micro_batches, 3), Slots.known_after).argsort(descending=True, stable=True)[:held]
            there = 1 - (1 - self.share_R[rows.numpy()]) ** micro_batches
        return float(min(max(self.touched(micro_batches) - there.sum(), 0.0), self.neurons - held))


def shares(neurons: int, mean: float, untouched: float, window: int) -> np.ndarray:
    """Probabilities p of the rows, a beta distribution's, largest first. Their mean is given, and untouched, that of
    (1 - p) ** window, which is taken as far as one exists; a window of 1 says nothing, and rows are taken as alike."""
    if mean >= 1 or window == 1:
        return np.full(neurons, mean)
    untouched = min(max(untouched, 0.0), 1 - mean)

    def left(spread: float) -> float:
        a, b = mean * spread, (1 - mean) * spread
        return math.prod((b + i) / (a + b + i) for i in range(window))

    low, high = 1e-3, 1e6  # the rows differ most, and hardly
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if left(middle) > untouched else (low, middle)
    drawn = np.random.default_rng(0).beta(mean * low, (1 - mean) * low, size=neurons)
    return np.sort(np.clip(drawn, 1e-9, 1 - 1e-9))[::-1]


class DrawnSlots(Slots):
    """The engine's books over drawn unions, when as many micro-batches have gone by as it takes to know which rows to
    hold. After a step every row has changed, as dense AdamW moves all of them."""

    def __init__(self, draws: Draws, micro_batches: int, passes: int, neurons: int, capacity: int) -> None:
        self._draws, self._passes, self._lent = draws, passes, 0
        with unset_fake_temporarily():
            super().__init__(neurons, capacity)
            self._changed_R = torch.zeros(neurons, dtype=torch.int32)
            self.uses_R.copy_(draws.used_R(micro_batches, self.known_after))
        self._to_hold = self.row_C
        self.known_after = 0

    def lend(self, union_U: Tensor, changed_R: Tensor, version: int, training: bool) -> Places:
        with unset_fake_temporarily():
            drawn_U = self._draws.union_U(self._lent // self._passes)
            self._lent += 1
            self._changed_R.fill_(version)
            real = super().lend(drawn_U, self._changed_R, version, training)
        made = Places(
            union_U, torch.empty_like(union_U), _absent(real.kept), _absent(real.passing),
            Pairs(*map(_absent, real.emptied)), Pairs(*map(_absent, real.renewed)), training, real.layout,
        )  # fmt: skip
        made.real = real  # type: ignore[attr-defined]
        return made

    def used(self, places: Places) -> None:
        with unset_fake_temporarily():
            super().used(places.real)  # type: ignore[attr-defined]

    def unpin(self, places: Places) -> None:
        with unset_fake_temporarily():
            super().unpin(places.real)  # type: ignore[attr-defined]

    def fill(self, places: Places, some: Tensor) -> None:
        real: Places = places.real  # type: ignore[attr-defined]
        with unset_fake_temporarily():
            super().fill(real, real.kept)

    def collect(self) -> Pairs:
        with unset_fake_temporarily():
            real = super().collect()
        return Pairs(*map(_absent, real))

    def to_hold(self) -> Tensor | None:
        with unset_fake_temporarily():
            real = super().to_hold()
        if real is None:
            return None
        self._to_hold = real
        return _absent(real)

    def hold(self, rows_C: Tensor) -> None:
        with unset_fake_temporarily():
            super().hold(self._to_hold)

    def fill_all(self, waiting: bool) -> None:
        with unset_fake_temporarily():
            super().fill_all(waiting)

    def undo(self, places: Places) -> None:
        """Nothing: a simulation that fails is over."""

    def undo_collect(self, pairs: Pairs) -> None:
        """Nothing, as undo()."""


def _absent(numbers: Tensor) -> Tensor:
    """A list of so many numbers that nobody knows."""
    return torch.empty(numbers.shape, dtype=numbers.dtype)


@contextmanager
def drawn_slots(draws: Draws, micro_batches: int, passes: int) -> Iterator[None]:
    """Inside, rows that are kept on the device are those that drawn unions lead to. passes: forward passes of a micro-
    batch, which all use the same rows: 2 with activation checkpointing."""
    with standing_in(lambda *sizes: DrawnSlots(draws, micro_batches, passes, *sizes)):
        yield
