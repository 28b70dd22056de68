"""Rows of a device budget in the simulation: which are kept is decided by the engine's own books, over drawn unions.

Where some rows of a layer are kept on the device (meft/engine/slots.py), what crosses depends on which rows each
micro-batch uses. Simulated tensors hold no such numbers. So unions are drawn: every row has a probability of its own,
chosen so that one micro-batch uses U rows and several touch as many as was logged. The books are kept with real
numbers, and the rest of the engine gets lists of the right length.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from meft_bench.meft.engine.slots import Pairs, Places, Slots, standing_in

NUMERICS = 2
"""Raised when a row with a device budget can change and no other does (harness/numerics.py)."""
_WINDOW = 8
"""Micro-batches at which the rows touched are made to agree."""


class Draws:
    """Unions of U of R rows. touched(A): rows that at least one of A micro-batches uses."""

    def __init__(self, neurons: int, union: int, touched: Callable[[int], float], seed: int = 0) -> None:
        self.neurons, self.union, self.seed = neurons, union, seed
        untouched = min(max(1 - touched(_WINDOW) / neurons, 0.0), (1 - union / neurons))
        self.share_R = _shares(neurons, union / neurons, untouched)

    def union_U(self, number: int) -> Tensor:
        """The rows of micro-batch `number`, ascending, int64 [U]; the same for every layer."""
        if self.union >= self.neurons:
            return torch.arange(self.neurons)
        noise = np.random.default_rng((self.seed, number)).logistic(size=self.neurons)
        with np.errstate(divide="ignore"):
            score = np.log(self.share_R) - np.log1p(-self.share_R) + noise
        return torch.from_numpy(np.sort(np.argpartition(-score, self.union)[: self.union]).astype(np.int64))


def _shares(neurons: int, mean: float, untouched: float) -> np.ndarray:
    """Probabilities p of the rows, a beta distribution's, largest first. Their mean is given, and untouched, that of
    (1 - p) ** _WINDOW."""
    if mean >= 1:
        return np.ones(neurons)

    def left(spread: float) -> float:
        a, b = mean * spread, (1 - mean) * spread
        return math.prod((b + i) / (a + b + i) for i in range(_WINDOW))

    low, high = 1e-3, 1e6  # the rows differ most, and hardly
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if left(middle) > untouched else (low, middle)
    drawn = np.random.default_rng(0).beta(mean * low, (1 - mean) * low, size=neurons)
    return np.sort(np.clip(drawn, 1e-9, 1 - 1e-9))[::-1]


class DrawnSlots(Slots):
    """The engine's books over drawn unions, as after many steps of so many micro-batches: the rows used most have the
    slots. After a step every row has changed, as dense AdamW moves all of them."""

    def __init__(self, draws: Draws, micro_batches: int, passes: int, neurons: int, capacity: int) -> None:
        self._draws, self._passes, self._lent = draws, passes, 0
        with unset_fake_temporarily():
            super().__init__(neurons, capacity)
            self._changed_R = torch.zeros(neurons, dtype=torch.int32)
            self.row_C.copy_(torch.arange(capacity))
            self.slot_R[:capacity] = torch.arange(capacity)
            self.uses_R.copy_(torch.from_numpy(draws.share_R * micro_batches))

    def lend(self, union_U: Tensor, changed_R: Tensor, version: int, training: bool) -> Places:
        with unset_fake_temporarily():
            drawn_U = self._draws.union_U(self._lent // self._passes)
            self._lent += 1
            self._changed_R.fill_(version)
            real = super().lend(drawn_U, self._changed_R, version, training)
        made = Places(
            union_U, torch.empty_like(union_U), _absent(real.kept), _absent(real.passing),
            Pairs(*map(_absent, real.emptied)), Pairs(*map(_absent, real.renewed)), training,
        )  # fmt: skip
        made.real = real  # type: ignore[attr-defined]
        return made

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

    def undo(self, places: Places) -> None:
        """Nothing: a simulation that fails is over."""

    def undo_collect(self, pairs: Pairs) -> None:
        """Nothing, as undo()."""


class Crossed(NamedTuple):
    """Rows of one layer in a steady step."""

    sent: int
    """To the device."""
    early: int
    """Gradients that go home before the step's end."""
    late: int
    """Those that waited for it."""


def crossed(draws: Draws, micro_batches: int, passes: int, slots: int) -> Crossed:
    """What crosses by the books alone; passes as in drawn_slots()."""
    books, nothing = DrawnSlots(draws, micro_batches, passes, draws.neurons, slots), torch.empty(0, dtype=torch.int64)
    sent = early = late = 0
    for version, count in enumerate((1, micro_batches)):  # a step before, as in the simulation
        sent = early = 0
        for _ in range(count):
            lent = [books.lend(nothing, nothing, version, training=True) for _ in range(passes)]
            sent += sum(p.renewed.rows.numel() + p.passing.numel() for p in lent)
            early += sum(p.emptied.rows.numel() for p in lent) + lent[0].passing.numel()
            books.fill(lent[0], lent[0].kept)
            for places in lent:
                books.unpin(places)
        late = books.collect().rows.numel()
    return Crossed(sent, early, late)


def _absent(numbers: Tensor) -> Tensor:
    """A list of so many numbers that nobody knows."""
    return torch.empty(numbers.shape, dtype=numbers.dtype)


@contextmanager
def drawn_slots(draws: Draws, micro_batches: int, passes: int) -> Iterator[None]:
    """Inside, rows that are kept on the device are those that drawn unions lead to. passes: forward passes of a micro-
    batch, which all use the same rows: 2 with activation checkpointing."""
    with standing_in(lambda *sizes: DrawnSlots(draws, micro_batches, passes, *sizes)):
        yield
