"""Rows of one layer on the device: sent for each micro-batch, or kept within a budget so that none crosses twice.

lend() is the host's part: it brings rows up to date, gathers what the device lacks and sends it. The Loan it returns
gives the device all rows of S, in forward and again in backward, and takes their gradients.

Kept rows (config.device_budget): within an accumulation window a row crosses at most once each way, as its gradients
add up beside it until collect(). A row that no step changed since stays valid. When the budget is spent, the rows used
least make room, their gradients going home first, and rows of too little use pass through as without a budget.
"""

import torch
from torch import Tensor

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import Split, keys_are_int8
from meft_bench.meft.engine.device_adam import DeviceAdam
from meft_bench.meft.engine.device_router import DeviceRouter
from meft_bench.meft.engine.loans import Loan, places_there, send_home, sent_rows
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore

_FADE = 0.5  # of a row's count of uses, per optimizer step


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
        self,
        owner: "KeptRows",
        union_U: Tensor,
        slots_U: Tensor,
        passed: Transfer | None,
        pinned: bool,
        counted: Tensor | None = None,
    ) -> None:
        self.owner, self.union_U, self.slots_U, self._passed, self._pinned = owner, union_U, slots_U, passed, pinned
        self.counted = counted
        here = slots_U >= 0
        self._passing = (~here).nonzero()[:, 0]
        self.sent_rows = union_U[self._passing]
        self._kept = here.nonzero()[:, 0] if self._passing.numel() else None
        send, device = owner.link.to_device, owner.device
        # Slots of all rows, 0 for a passing one, whose place the second list tells.
        self._slots = send(slots_U.clamp(min=0), device, "index", torch.int32).long()
        self._places = send(self._passing, device, "index", torch.int32).long() if self._passing.numel() else None
        self._counted_there: list[tuple[Tensor, Transfer]] = []
        if counted is not None:
            lists = counted[here[counted]], counted[~here[counted]]
            self._counted_there = [(places, places_there(owner.link, places, device)) for places in lists]

    def arrived(self) -> Tensor:
        passed, self._passed = self._passed, None
        rows_CHD = self.owner.rows_CHD
        return rows_CHD.new_empty(0, *rows_CHD.shape[1:]) if passed is None else passed.here()

    def rows(self, sent: Tensor) -> Tensor:
        rows_UHD = self.owner.rows_CHD.index_select(0, self._slots)
        if self._places is not None:
            rows_UHD[self._places] = sent
        return rows_UHD

    def add_gradients(self, grads_UHD: Tensor) -> None:
        owner = self.owner
        if self.counted is not None:
            self._add_counted(grads_UHD)
            return
        if self._places is None or self._kept is None:
            owner.add(self._slots, self.slots_U, grads_UHD)
            owner.link.release(grads_UHD)
            return
        send_home(owner.store, owner.link, self.union_U[self._passing], grads_UHD[self._places], owner.dtype)
        kept = torch.ones(grads_UHD.shape[0], dtype=torch.bool, device=grads_UHD.device)
        kept[self._places] = False
        places = torch.arange(grads_UHD.shape[0], device=grads_UHD.device)[kept]
        owner.add(self._slots[places], self.slots_U[self._kept], grads_UHD[places])
        owner.link.release(grads_UHD)

    def _add_counted(self, grads_UHD: Tensor) -> None:
        owner = self.owner
        (kept, kept_there), (passing, passing_there) = self._counted_there
        if passing.numel():
            some_UHD = grads_UHD.index_select(0, passing_there.here().long())
            send_home(owner.store, owner.link, self.union_U[passing], some_UHD, owner.dtype)
        if kept.numel():
            there = kept_there.here().long()
            owner.add(self._slots[there], self.slots_U[kept], grads_UHD.index_select(0, there))
        owner.link.release(grads_UHD)

    def release(self, sent: Tensor) -> None:
        self._unpin()
        self.owner.link.release(sent)

    def again(self) -> "KeptLoan":
        return self.owner.lend(self.union_U, True, self.counted)

    def _unpin(self) -> None:
        if not self.released and self._pinned:
            self.owner.unpin(self.slots_U)
        self.released = True

    def __del__(self) -> None:
        # A forward pass without its backward (an exception, an early stop) must not hold its slots for ever.
        self._unpin()


class KeptRows:
    """Up to `capacity` rows of one layer on the device, with their gradients in fp32.

    Which row lies where is known on the host alone: slot_R [R] gives a row's slot or -1.
    """

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
        self.grads_CHD = torch.zeros(self.capacity, 2 if store.trains_keys else 1, width, device=device)
        self.slot_R = torch.full((neurons,), -1)
        self._version_R = torch.full((neurons,), -1, dtype=torch.int32)
        self._row_C = torch.full((self.capacity,), -1)
        self._filled_C = torch.zeros(self.capacity, dtype=torch.bool)
        self._pins_C = torch.zeros(self.capacity, dtype=torch.int32)
        self._uses_R = torch.zeros(neurons)

    @property
    def nbytes(self) -> int:
        """Device bytes of rows and gradients."""
        return self.rows_CHD.nbytes + self.grads_CHD.nbytes

    def lend(self, union_U: Tensor, training: bool, counted: Tensor | None = None) -> KeptLoan:
        """Send what is missing of these rows (ascending numbers [U]). Only training admits rows and pins them. counted:
        Loan.counted."""
        store = self.store
        store.refresh(union_U)
        if training:
            self._uses_R[union_U] += 1
            self._admit(union_U)
        slots_U = self.slot_R[union_U]
        valid_U = (slots_U >= 0) & (self._version_R[union_U] >= store.changed_R[union_U])
        # A changed row is sent into its slot again, unless a backward pass still reads the old one there.
        free_U = (slots_U >= 0) & (self._pins_C[slots_U.clamp(min=0)] == 0) if training else torch.zeros_like(valid_U)
        renewed_U, passing_U = ~valid_U & free_U, ~valid_U & ~free_U
        self._renew(union_U[renewed_U])
        passed = self._send(union_U[passing_U]) if bool(passing_U.any()) else None
        loan = KeptLoan(self, union_U, slots_U.masked_fill(passing_U, -1), passed, training, counted)
        if training:
            self._pins_C.index_add_(0, loan.slots_U[loan.slots_U >= 0], self._ones(loan.slots_U))
        return loan

    def add(self, slots: Tensor, host_slots: Tensor, grads_UHD: Tensor) -> None:
        """Add gradients to those that wait in these slots (given on the device and on the host; none twice, so that
        nothing has to be atomic)."""
        self.grads_CHD.index_copy_(0, slots, self.grads_CHD.index_select(0, slots).add_(grads_UHD))
        self._filled_C[host_slots] = True

    def unpin(self, slots_U: Tensor) -> None:
        """A loan of these slots (-1: none) ends."""
        self._pins_C.index_add_(0, slots_U[slots_U >= 0], -self._ones(slots_U))

    def collect(self) -> None:
        """Send all waiting gradients home: the accumulation window ends."""
        filled_C = self._filled_C.nonzero()[:, 0]
        if filled_C.numel():
            self._empty(filled_C)
            self._uses_R *= _FADE

    def _ones(self, slots_U: Tensor) -> Tensor:
        return torch.ones(int((slots_U >= 0).sum()), dtype=torch.int32)

    def _admit(self, union_U: Tensor) -> None:
        """Give slots to rows without one: free slots first, then those of the rows used least, if used less."""
        new_U = union_U[self.slot_R[union_U] < 0]
        if new_U.numel() == 0:
            return
        new_U = new_U[self._uses_R[new_U].argsort(descending=True, stable=True)]
        open_C = (self._row_C < 0).nonzero()[:, 0][: new_U.numel()]
        self._place(new_U[: open_C.numel()], open_C)
        new_U = new_U[open_C.numel() :]
        if new_U.numel() == 0:
            return
        wanted_R = torch.zeros_like(self.slot_R, dtype=torch.bool)
        wanted_R[union_U] = True
        uses_C = self._uses_R[self._row_C]
        uses_C = torch.where(self._version_R[self._row_C] < self.store.changed_R[self._row_C], -1.0, uses_C)
        uses_C = torch.where(wanted_R[self._row_C] | (self._pins_C > 0), torch.inf, uses_C)
        victims_C = uses_C.argsort(stable=True)[: new_U.numel()]
        paired = min(victims_C.numel(), new_U.numel())
        better = uses_C[victims_C[:paired]] < self._uses_R[new_U[:paired]]
        victims_C, new_U = victims_C[:paired][better], new_U[:paired][better]
        self._empty(victims_C[self._filled_C[victims_C]])
        self.slot_R[self._row_C[victims_C]] = -1
        self._place(new_U, victims_C)

    def _place(self, rows_U: Tensor, slots_U: Tensor) -> None:
        self.slot_R[rows_U], self._row_C[slots_U] = slots_U, rows_U
        self._version_R[rows_U] = -1

    def _renew(self, rows_U: Tensor) -> None:
        """Send these rows into their slots."""
        if rows_U.numel() == 0:
            return
        slots_U = self.slot_R[rows_U]
        slots = self.link.to_device(slots_U, self.device, "index", torch.int32).long()
        sent = self._send(rows_U).here()
        self.rows_CHD[slots] = sent
        self.link.release(sent)
        self._version_R[rows_U] = self.store.version

    def _send(self, rows_U: Tensor) -> Transfer:
        return sent_rows(self.store, self.link, rows_U, self.dtype, self.device, self.rows_CHD.shape[1])

    def _empty(self, slots_U: Tensor) -> None:
        """Send the gradients of these slots home and zero them."""
        if slots_U.numel() == 0:
            return
        slots = self.link.to_device(slots_U, self.device, "index", torch.int32).long()
        send_home(self.store, self.link, self._row_C[slots_U], self.grads_CHD.index_select(0, slots), self.dtype)
        self.grads_CHD[slots] = 0.0
        self._filled_C[slots_U] = False


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
    if bought.rows < config.neurons:
        return KeptRows(store, link, device, dtype, bought.rows, halves)
    rows = WholeRows(store, link, device, dtype)
    if bought.moments and store.share is None:  # ranks make the steps of a node's rows where these are
        trained = router if config.trains_router else None
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        host_selects = not bought.keys or keys_are_int8(config)
        rows.adam = DeviceAdam(rows, trained, bought.moments, moments, host_selects)
    return rows
