"""Rows of one layer on the device: sent for each micro-batch, or kept within a budget so that none crosses twice.

lend() is the host's part: it brings rows up to date, gathers what the device lacks and sends it. The Loan it returns
gives the device all rows of S, in forward and again in backward, and takes their gradients.

Kept rows (config.device_budget): within an accumulation window a row crosses at most once each way, as its gradients
add up beside it until collect(). Which rows are kept is decided in slots.py. Where the budget pays for their optimizer
too (device_adam.py), nothing of them crosses.
"""

from typing import Any

import torch
from torch import Tensor

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import Split, keys_are_int8
from meft_bench.meft.engine.device_adam import DeviceAdam
from meft_bench.meft.engine.device_router import DeviceRouter
from meft_bench.meft.engine.loans import InPlace, Loan, places_there, send_home, sent_rows
from meft_bench.meft.engine.products import always_dense
from meft_bench.meft.engine.slots import Pairs, Places, new_slots
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore

USED_IN_PLACE = 0.8
"""Share of the slots that a micro-batch has to use. Gathering a row and adding its gradient takes a GPU about half as
long as the products with one row too many, at 512 tokens; at 2048 a seventh."""


class PassingLoan(Loan):
    """Rows that were sent for this micro-batch alone."""

    def __init__(
        self, owner: "PassingRows", union_U: Tensor, transfer: Transfer, counted: Tensor | None = None
    ) -> None:
        self.owner, self.union_U, self._transfer, self.counted = owner, union_U, transfer, counted
        self.sent_rows = union_U
        self._there = None if counted is None else places_there(owner.link, counted, owner.device)

    def arrived(self) -> Tensor:
        sent = self._transfer.here()
        del self._transfer
        return sent

    def rows(self, sent: Tensor) -> Tensor:
        return sent

    def add_gradients(self, grads_UHD: Tensor) -> None:
        owner = self.owner
        if self.counted is None or self._there is None:
            send_home(owner.store, owner.link, self.union_U, grads_UHD, owner.dtype)
            return
        if self.counted.numel():
            some_UHD = grads_UHD.index_select(0, self._there.here().long())
            send_home(owner.store, owner.link, self.union_U[self.counted], some_UHD, owner.dtype)
        owner.link.release(grads_UHD)

    def release(self, sent: Tensor) -> None:
        self.released = True
        self.owner.link.release(sent)

    def again(self) -> "PassingLoan":
        return self.owner.lend(self.union_U, True, self.counted)


class PassingRows:
    """device_budget = 0, the paper's MEFT: S crosses in every micro-batch, and so do its gradients."""

    def __init__(
        self, store: NeuronStore, link: Link | Resident, device: torch.device, dtype: torch.dtype, halves: int = 2
    ) -> None:
        self.store, self.link, self.device, self.dtype, self.halves = store, link, device, dtype, halves
        self.nbytes = 0

    def lend(self, union_U: Tensor, training: bool, counted: Tensor | None = None) -> PassingLoan:
        sent = sent_rows(self.store, self.link, union_U, self.dtype, self.device, self.halves)
        return PassingLoan(self, union_U, sent, counted)

    def collect(self) -> None:
        """Nothing waits on the device."""


class KeptLoan(Loan):
    """Rows of which some lie in the owner's slots; those are pinned until release()."""

    def __init__(
        self, owner: "KeptRows", places: Places, passed: Transfer | None, counted: Tensor | None = None
    ) -> None:
        self.owner, self.places, self._passed, self.counted = owner, places, passed, counted
        self._rows_CHD = owner.rows_CHD
        owner.readers.add(id(self))
        owner.loans.add(id(self))
        if not places.pinned:
            owner.guests.add(id(self))
        send, device = owner.link.to_device, owner.device
        passing = places.passing
        self.sent_rows = places.union_U[passing]
        self._kept: Transfer | None = None
        self._counted: list[tuple[Tensor, Transfer]] = []
        if owner.used_in_place(places) and counted is None:
            there = places.slots_U.index_copy(0, passing, owner.capacity + torch.arange(passing.numel()))
            where_U = send(there, device, "index", torch.int32).long()
            assert owner.adam is not None
            values_alone = self._rows_CHD.shape[1] == 1
            numbers_P = places_there(owner.link, self.sent_rows, device) if values_alone else None
            self.in_place = InPlace(self._rows_CHD, owner.adam.numbers_there, numbers_P, where_U)
            return
        # Slots of all rows, 0 for a passing one, whose place the second list tells.
        self._slots = send(places.slots_U.clamp(min=0), device, "index", torch.int32).long()
        self._passing = send(passing, device, "index", torch.int32).long() if passing.numel() else None
        if counted is not None:
            here = places.slots_U[counted] >= 0
            self._counted = [(some, places_there(owner.link, some, device)) for some in (counted[here], counted[~here])]
        elif places.pinned and passing.numel() and places.kept.numel():
            self._kept = places_there(owner.link, places.kept, device)

    def arrived(self) -> Tensor:
        passed, self._passed = self._passed, None
        rows_CHD = self._rows_CHD
        return rows_CHD.new_empty(0, *rows_CHD.shape[1:]) if passed is None else passed.here()

    def rows(self, sent: Tensor) -> Tensor:
        rows_UHD = self._rows_CHD.index_select(0, self._slots)
        if self._passing is not None:
            rows_UHD.index_copy_(0, self._passing, sent)
        return rows_UHD

    def settle(self) -> None:
        if self.owner.adam is not None:
            self.owner.store.queue.wait()
        if self.places.pinned:
            self.owner.slots.used(self.places)

    def add_gradients(self, grads_UHD: Tensor) -> None:
        owner, places = self.owner, self.places
        if not places.pinned or places.layout != owner.slots.layout:
            where = self.in_place
            self._add_where_they_lie(grads_UHD if where is None else grads_UHD.index_select(0, where.where_U))
        elif self.in_place is not None:
            owner.add_all(self.in_place.where_U, grads_UHD[: owner.capacity])
            owner.slots.fill(places, places.kept)
            if places.passing.numel():
                # A copy: what waits for its way home must not keep the memory of all.
                passing_UHD = grads_UHD[owner.capacity :].clone()
                send_home(owner.store, owner.link, self.sent_rows, passing_UHD, owner.dtype)
        elif self.counted is not None:
            (kept, kept_there), (passing, passing_there) = self._counted
            self._add(kept, kept_there.here().long(), grads_UHD)
            self._send_home(passing, passing_there.here().long(), grads_UHD)
        elif self._passing is None:
            owner.add(self._slots, grads_UHD)
            owner.slots.fill(places, places.kept)
            self._send_home(places.passing, self._slots[:0], grads_UHD)
        else:
            if self._kept is not None:
                self._add(places.kept, self._kept.here().long(), grads_UHD)
            self._send_home(places.passing, self._passing, grads_UHD)
        owner.link.release(grads_UHD)

    def _add_where_they_lie(self, grads_UHD: Tensor) -> None:
        """Of a loan in evaluation, or from before rows were held: others may have got the slots of its rows."""
        owner = self.owner
        owner.store.queue.wait()  # idle but for a graph made before a step that is still being made
        now = owner.slots.found_again(self.places)
        kept, passing = now.kept, now.passing
        if self.counted is not None:
            kept, passing = (some[torch.isin(some, self.counted)] for some in (kept, passing))
        if kept.numel():
            there = owner.link.to_device(kept, owner.device, "index", torch.int32).long()
            slots = owner.link.to_device(now.slots_U[kept], owner.device, "index", torch.int32).long()
            owner.add(slots, grads_UHD.index_select(0, there))
            owner.slots.fill(now, kept)
        there = owner.link.to_device(passing, owner.device, "index", torch.int32).long()
        self._send_home(passing, there, grads_UHD)

    def _send_home(self, some: Tensor, there: Tensor, grads_UHD: Tensor) -> None:
        """The gradients at these places of the union, given on the host and on the device. Ranks, who add up in turns,
        take one with every micro-batch, so that nobody waits for another's that does not come."""
        owner = self.owner
        if some.numel() or owner.store.share is not None:
            rows_U = self.places.union_U[some]
            send_home(owner.store, owner.link, rows_U, grads_UHD.index_select(0, there), owner.dtype)

    def _add(self, some: Tensor, there: Tensor, grads_UHD: Tensor) -> None:
        """Add those at these places to what waits in their slots."""
        if some.numel():
            self.owner.add(self._slots.index_select(0, there), grads_UHD.index_select(0, there))
            self.owner.slots.fill(self.places, some)

    def release(self, sent: Tensor) -> None:
        self._unpin()
        self.owner.link.release(sent)

    def again(self) -> "KeptLoan":
        return self.owner.lend(self.places.union_U, True, self.counted)

    def _unpin(self) -> None:
        if not self.released and self.places.pinned:
            self.owner.slots.unpin(self.places)
        for known in (self.owner.readers, self.owner.guests, self.owner.loans):
            known.discard(id(self))
        self.released = True

    def __del__(self) -> None:
        # A forward pass without its backward (an exception, an early stop) must not hold its slots for ever.
        self._unpin()


class KeptRows:
    """Up to `capacity` rows of one layer on the device, with their gradients in fp32; which row lies where is known on
    the host alone (slots.py)."""

    def __init__(
        self,
        store: NeuronStore,
        link: Link | Resident,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int,
        halves: int = 2,
    ) -> None:
        self.store, self.link, self.device, self.dtype = store, link, device, dtype
        neurons, _, width = store.rows_R2D.shape
        self.capacity = min(capacity, neurons)
        self.rows_CHD = torch.zeros(self.capacity, halves, width, dtype=dtype, device=device)
        """A new buffer takes its place where a backward pass still reads what is to be written and not pinned."""
        self.grads_CHD = torch.zeros(self.capacity, 2 if store.trains_keys else 1, width, device=device)
        self.marks_2C = torch.zeros(2, self.capacity + 1, dtype=torch.bool, device=device)
        """Slots in which a gradient waits, and those that got one since the last step, as the device's AdamW reads
        them; the last entry is for rows without a slot."""
        self.may_be_in_place = False
        """Whether products may read the slots where they lie."""
        self.slots = new_slots(neurons, self.capacity)
        self.readers: set[int] = set()
        """Loans of this buffer that were not given back."""
        self.guests: set[int] = set()
        """Those among them that pin nothing."""
        self.loans: set[int] = set()
        """All loans that were not given back."""
        self.adam: DeviceAdam | None = None

    @property
    def nbytes(self) -> int:
        """Device bytes of rows and gradients, and, where their optimizer is there, of weights and moments."""
        return self.rows_CHD.nbytes + self.grads_CHD.nbytes + (self.adam.nbytes if self.adam is not None else 0)

    def lend(self, union_U: Tensor, training: bool, counted: Tensor | None = None) -> KeptLoan:
        """Send what is missing of these rows (ascending numbers [U]). Only training admits rows and pins them. counted:
        Loan.counted."""
        store = self.store
        store.refresh(union_U)
        self.slots.in_turns = store.share is not None
        places = self.slots.lend(union_U, store.changed_R, store.version, training)
        try:
            self._empty(places.emptied)
            self._renew(places.renewed)
            passed = self._send(union_U[places.passing]) if places.passing.numel() else None
        except BaseException:  # such as a device without room: a training loop may go on with another batch
            self.slots.undo(places)
            raise
        return KeptLoan(self, places, passed, counted)

    def add(self, slots: Tensor, grads_UHD: Tensor) -> None:
        """Add gradients to those that wait in these slots (given on the device; none twice, so that nothing has to be
        atomic)."""
        if self.adam is not None:
            self.store.queue.wait()  # idle but for a graph made before a step that is still being made
            self.marks_2C.index_fill_(1, slots, True)
        self.grads_CHD.index_copy_(0, slots, self.grads_CHD.index_select(0, slots).add_(grads_UHD))

    def used_in_place(self, places: Places) -> bool:
        """Whether a micro-batch uses these rows where they lie. Only held rows stay where they are, and slots that it
        does not use cost products with rows that no token keeps."""
        all_used = places.kept.numel() >= USED_IN_PLACE * self.capacity
        return self.may_be_in_place and places.pinned and self.slots.held and all_used

    def add_all(self, where_U: Tensor, grads_CHD: Tensor) -> None:
        """Add the gradients of all slots (zeros where the micro-batch has none), of which where_U says those that have
        one (InPlace)."""
        self.store.queue.wait()  # idle but for a graph made before a step that is still being made
        self.marks_2C.index_fill_(1, where_U.clamp(max=self.capacity), True)
        self.grads_CHD.add_(grads_CHD)

    def collect(self) -> None:
        """Send all waiting gradients home, unless their optimizer is here: the accumulation window ends."""
        pairs = self.slots.collect()
        try:
            self._empty(pairs)
        except BaseException:
            self.slots.undo_collect(pairs)
            raise

    def _renew(self, pairs: Pairs) -> None:
        """Send these rows into their slots."""
        if pairs.rows.numel() == 0:
            return
        slots = self.link.to_device(pairs.slots, self.device, "index", torch.int32).long()
        sent = self._send(pairs.rows).here()
        rows_CHD = self.writable() if self.guests else self.rows_CHD
        rows_CHD.index_copy_(0, slots, sent)
        self.link.release(sent)

    def _send(self, rows_U: Tensor) -> Transfer:
        return sent_rows(self.store, self.link, rows_U, self.dtype, self.device, self.rows_CHD.shape[1])

    def _empty(self, pairs: Pairs) -> None:
        """Send the gradients of these slots home and zero them."""
        if pairs.rows.numel() == 0:
            return
        slots = self.link.to_device(pairs.slots, self.device, "index", torch.int32).long()
        send_home(self.store, self.link, pairs.rows, self.grads_CHD.index_select(0, slots), self.dtype)
        with self.store.queue.must_end():
            self.grads_CHD.index_fill_(0, slots, 0.0)
            self.marks_2C.index_fill_(1, slots, False)

    # ---- rows whose optimizer is on the device (device_adam.py) ----

    @property
    def held_grads(self) -> Tensor:
        """Gradients of the rows in the slots [C, H, D]."""
        return self.grads_CHD

    @property
    def held_marks(self) -> Tensor:
        """Which of them have one, and which got one since the last step; bool [2, C]."""
        return self.marks_2C[:, :-1]

    def to_hold(self) -> Tensor | None:
        """The rows whose optimizer is to come here, ascending numbers [C]; None if none may come now."""
        return self.slots.to_hold()

    def hold(self, rows_C: Tensor) -> None:
        """From now on the optimizer of these rows is here, and row i lies in slot i: no gradient of theirs goes home,
        and none is renewed from there."""
        sent = self._send(rows_C).here()
        self.writable().copy_(sent)
        self.link.release(sent)
        self.slots.hold(rows_C)

    def let_go(self) -> None:
        """Their optimizer is on the host again, which has what they were left as; their gradients may go home."""
        # Of a micro-batch that adds to all slots (add_all), 0 times an infinite gradient is NaN.
        self.grads_CHD.masked_fill_(~self.held_marks[0, :, None, None], 0.0)
        self.slots.let_go(self.store.version)

    def writable(self) -> Tensor:
        """The rows, to be written: a copy of them if a backward pass still reads them as they are."""
        if self.readers:
            self.rows_CHD = self.rows_CHD.clone()
            self.readers, self.guests = set(), set()
        return self.rows_CHD

    def mark_all(self) -> None:
        """Each row here has a gradient."""
        self.marks_2C.fill_(True)
        self.slots.fill_all(True)

    def drop(self) -> None:
        """Forget all gradients that wait here."""
        self.grads_CHD.zero_()
        self.marks_2C.zero_()
        self.slots.fill_all(False)

    def __getstate__(self) -> dict[str, Any]:
        self.store.gradients_home()
        self.store.settle()
        return {**self.__dict__, "readers": set(), "guests": set(), "loans": set()}


def may_be_in_place(config: MeftOptions, rows: KeptRows, h_dtype: torch.dtype) -> bool:
    """Whether products of hidden states in this dtype may read the slots as they are: not where rows are cast first,
    nor where products are sparse, or need the union alone."""
    dense = rows.dtype == h_dtype and always_dense(rows.device, h_dtype)
    return dense and config.reading == "per_token" and not config.is_distinctive


def rows_on_device(
    store: NeuronStore,
    link: Link | Resident,
    config: MeftOptions,
    bought: Split,
    router: DeviceRouter | None,
    device: torch.device,
    dtype: torch.dtype,
) -> PassingRows | KeptRows | WholeRows:
    """How this layer's rows reach the device, of which `bought` says how many stay there, and of how many the
    optimizer is there too; dtype is the wire's."""
    # Beside a copy of all keys in the wire's format a row is its value.
    halves = 1 if bought.keys and not keys_are_int8(config) else 2
    if not bought.rows:
        return PassingRows(store, link, device, dtype, halves)
    rows: KeptRows | WholeRows
    if bought.rows < config.neurons:
        rows = KeptRows(store, link, device, dtype, bought.rows, halves)
    else:
        rows = WholeRows(store, link, device, dtype)
    if bought.moments:
        trained = router if store.trains_router else None  # requires_grad_(False) freezes one, too
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        rows.adam = DeviceAdam(rows, trained, moments, host_selects=not bought.keys or keys_are_int8(config))
    return rows
