"""Which rows of one layer lie in the slots of its device budget, and which make room: numbers alone, on the host.

KeptRows (residency.py) sends rows and gradients as these numbers say. A row that no step changed since it was sent
stays valid; a row that a backward pass still reads is pinned. Where slots run out, the rows used least make room, and
rows of too little use pass through as without a budget. While the optimizer of the rows is on the device too
(device_adam.py), they are held: they neither make room nor go stale. Symbols are those of config.py; C slots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NEVER_STALE = torch.iinfo(torch.int32).max
"""A version above all others."""
FADE = 0.9
"""What an optimizer step leaves of a row's count of uses."""


class Pairs(NamedTuple):
    """Rows and the slots in which they lie; int64, in the same order."""

    rows: Tensor
    slots: Tensor


@dataclass(eq=False)
class Places:
    """Where the rows of one union lie; numbers are int64 on the host."""

    union_U: Tensor
    slots_U: Tensor
    """Each row's slot; -1 for one that passes through."""
    kept: Tensor
    """Places in the union of the rows that have a slot, ascending."""
    passing: Tensor
    """Those of the others."""
    emptied: Pairs
    """Rows that had to make room and whose gradients wait in their slots: these go home before anything is sent."""
    renewed: Pairs
    """Rows of the union that have to be sent into their slots."""
    pinned: bool
    layout: int
    """Of Slots, when these were lent."""


class Slots:
    """slot_R [R] gives a row's slot or -1, row_C [C] a slot's row or -1."""

    known_after = 8
    """Backward passes after which the counts of uses tell which rows to hold."""

    def __init__(self, neurons: int, capacity: int) -> None:
        self.slot_R = torch.full((neurons,), -1)
        self.row_C = torch.full((capacity,), -1)
        self.version_R = torch.full((neurons,), -1, dtype=torch.int32)
        """The store's version that a kept row was sent in."""
        self.filled_C = torch.zeros(capacity, dtype=torch.bool)
        """Slots in which a gradient waits."""
        self.pins_C = torch.zeros(capacity, dtype=torch.int32)
        """Backward passes still to come that read the slot."""
        self.uses_R = torch.zeros(neurons)
        self.held = False
        """Whether the rows in the slots are held."""
        self.in_turns = False
        """Whether ranks add up in turns: then no gradient leaves its slot before the window ends."""
        self._counted = 0
        self.layout = 0
        """Counts how often all slots were given out anew: where rows lay before says nothing any more."""

    def lend(self, union_U: Tensor, changed_R: Tensor, version: int, training: bool) -> Places:
        """Places of these rows (ascending numbers [U]). changed_R: the version at which each row last changed, which is
        `version` now. Only training admits rows and pins them."""
        nothing = union_U[:0]
        emptied = Pairs(nothing, nothing)
        if training:
            emptied = self._admit(union_U, changed_R)
        slots_U = self.slot_R[union_U]
        valid_U = (slots_U >= 0) & (self.version_R[union_U] >= changed_R[union_U])
        # A changed row is sent into its slot again, unless a backward pass still reads the old one there.
        free_U = (slots_U >= 0) & (self.pins_C[slots_U.clamp(min=0)] == 0) if training else torch.zeros_like(valid_U)
        renewed_U, passing_U = ~valid_U & free_U, ~valid_U & ~free_U
        renewed = Pairs(union_U[renewed_U], slots_U[renewed_U])
        self.version_R[renewed.rows] = version
        slots_U = slots_U.masked_fill(passing_U, -1)
        kept, passing = ((slots_U >= 0).nonzero()[:, 0], passing_U.nonzero()[:, 0])
        places = Places(union_U, slots_U, kept, passing, emptied, renewed, training, self.layout)
        if training:
            self._pin(places, 1)
        return places

    def used(self, places: Places) -> None:
        """A backward pass uses these rows. Not lend() counts: activation checkpointing lends twice for one micro-batch,
        and has to find the same rows admitted."""
        self.uses_R[places.union_U] += 1
        self._counted += 1

    def unpin(self, places: Places) -> None:
        """The loan of these rows ends."""
        if places.layout == self.layout:
            self._pin(places, -1)

    def found_again(self, places: Places) -> Places:
        """Where these rows lie now: other rows may have their slots."""
        slots_U = self.slot_R[places.union_U]
        kept, passing = (slots_U >= 0).nonzero()[:, 0], (slots_U < 0).nonzero()[:, 0]
        nothing = Pairs(places.union_U[:0], places.union_U[:0])
        return Places(places.union_U, slots_U, kept, passing, nothing, nothing, False, self.layout)

    def _pin(self, places: Places, count: int) -> None:
        slots = places.slots_U[places.kept]
        self.pins_C.index_add_(0, slots, torch.full(slots.shape, count, dtype=torch.int32))

    def undo(self, places: Places) -> None:
        """Not all of what lend() said was done. The old rows' gradients wait in their slots; what lies there is not
        known."""
        if places.pinned:
            self._pin(places, -1)
        emptied = places.emptied
        self.slot_R[self.row_C[emptied.slots]] = -1
        self._place(*emptied)
        self.filled_C[emptied.slots] = True
        self.version_R[places.renewed.rows] = -1

    def fill(self, places: Places, some: Tensor) -> None:
        """Gradients of the rows at some places of the union, all of which have a slot, wait there."""
        self.filled_C[places.slots_U[some]] = True

    def collect(self) -> Pairs:
        """All rows of which gradients wait, which go home unless they are held: the accumulation window ends."""
        slots = self.filled_C.nonzero()[:, 0]
        if self.held:
            slots = slots[:0]
        if slots.numel():
            self.filled_C[slots] = False
            self.uses_R *= FADE
        return Pairs(self.row_C[slots], slots)

    def undo_collect(self, pairs: Pairs) -> None:
        """They did not go home: the window goes on."""
        if pairs.slots.numel():
            self.filled_C[pairs.slots] = True
            self.uses_R /= FADE

    # ---- rows whose optimizer is on the device ----

    def to_hold(self) -> Tensor | None:
        """As many rows as there are slots, those used most, ascending; None while too little is known of their use, or
        gradients wait in slots."""
        if self._counted < self.known_after or self.filled_C.any():
            return None
        return self.uses_R.argsort(descending=True, stable=True)[: self.row_C.shape[0]].sort().values

    def hold(self, rows_C: Tensor) -> None:
        """Slot i has the i-th of these rows, until let_go()."""
        self.held = True
        self.layout += 1
        self.pins_C.zero_()
        self.slot_R.fill_(-1)
        self._place(rows_C, torch.arange(rows_C.shape[0]))
        self.version_R[rows_C] = NEVER_STALE

    def let_go(self, version: int) -> None:
        """The rows in the slots, of this version, are like others again."""
        self.held = False
        self.version_R[self.row_C] = version

    def fill_all(self, waiting: bool) -> None:
        """A gradient waits in each slot, or in none: the accumulation window ends."""
        if not waiting and self.filled_C.any():
            self.uses_R *= FADE
        self.filled_C.fill_(waiting)

    def _admit(self, union_U: Tensor, changed_R: Tensor) -> Pairs:
        """Give slots to rows without one: free slots first, then those of the rows used least, if used less, this time
        counted in. Returns those of whom a gradient waits."""
        new_U = union_U[self.slot_R[union_U] < 0]
        nothing = Pairs(new_U[:0], new_U[:0])
        if self.held or new_U.numel() == 0:
            return nothing
        uses_R = self.uses_R.index_add(0, union_U, torch.ones(union_U.shape))
        new_U = new_U[uses_R[new_U].argsort(descending=True, stable=True)]
        open_C = (self.row_C < 0).nonzero()[:, 0][: new_U.numel()]
        self._place(new_U[: open_C.numel()], open_C)
        new_U = new_U[open_C.numel() :]
        if new_U.numel() == 0:
            return nothing
        wanted_R = torch.zeros_like(self.slot_R, dtype=torch.bool)
        wanted_R[union_U] = True
        uses_C = uses_R[self.row_C]
        uses_C = torch.where(self.version_R[self.row_C] < changed_R[self.row_C], -1.0, uses_C)
        stay_C = wanted_R[self.row_C] | (self.pins_C > 0)
        uses_C = torch.where(stay_C | self.filled_C if self.in_turns else stay_C, torch.inf, uses_C)
        victims_C = uses_C.argsort(stable=True)[: new_U.numel()]
        paired = min(victims_C.numel(), new_U.numel())
        better = uses_C[victims_C[:paired]] < uses_R[new_U[:paired]]
        victims_C, new_U = victims_C[:paired][better], new_U[:paired][better]
        waiting_C = victims_C[self.filled_C[victims_C]]
        emptied = Pairs(self.row_C[waiting_C], waiting_C)
        self.filled_C[waiting_C] = False
        self.slot_R[self.row_C[victims_C]] = -1
        self._place(new_U, victims_C)
        return emptied

    def _place(self, rows_U: Tensor, slots_U: Tensor) -> None:
        self.slot_R[rows_U], self.row_C[slots_U] = slots_U, rows_U
        self.version_R[rows_U] = -1


_make: Callable[[int, int], Slots] = Slots


def new_slots(neurons: int, capacity: int) -> Slots:
    """The books of one layer; other ones within standing_in()."""
    return _make(neurons, capacity)


@contextmanager
def standing_in(make: Callable[[int, int], Slots]) -> Iterator[None]:
    """Inside, make(neurons, capacity) gives new books: a simulation, whose tensors hold no numbers, keeps its own."""
    global _make
    before, _make = _make, make
    try:
        yield
    finally:
        _make = before
