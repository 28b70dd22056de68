"""All rows of one layer on the device: row i lies in slot i, so nobody keeps lists of what lies where.

Rows are renewed in place after the host's AdamW; a graph whose backward pass is still to come keeps the buffer that its
forward pass read, and the renewal goes into a new one. Gradients add up beside the rows, and which rows have one is
marked on the device, so that where neurons are selected on the device too, a micro-batch needs nothing of the host.
At the end of a window marks, then the gradients of marked rows, go home.
"""

from typing import Any

import torch
from torch import Tensor

from meft_bench.meft.engine.device_adam import DeviceAdam
from meft_bench.meft.engine.loans import Loan, places_there, sent_rows
from meft_bench.meft.engine.slots import NEVER_STALE
from meft_bench.meft.engine.workers import GRADIENTS, RETRIEVAL
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.store import NeuronStore


class WholeLoan(Loan):
    """What one micro-batch uses: the rows of a union, or the buffer of all rows as it is."""

    def __init__(
        self,
        owner: "WholeRows",
        union_U: Tensor | None,
        used: Tensor,
        counted: Tensor | None = None,
        counted_R: Tensor | None = None,
    ) -> None:
        """union_U: the rows' numbers on the host; used: the same on the device. With None all rows are lent, and used
        holds, on the device, the numbers of those with a gradient (-1: none); counted_R marks there, in place of
        counted, those whose gradients count."""
        self.owner, self.union_U, self._used, self.counted, self._counted_R = owner, union_U, used, counted, counted_R
        self._there = None if counted is None else places_there(owner.link, counted, owner.device)
        self._rows_R2D = owner.rows_R2D
        self.sent_rows = torch.empty(0, dtype=torch.int64)
        owner.readers.add(id(self))
        owner.loans.add(id(self))

    def arrived(self) -> Tensor:
        return self._rows_R2D.new_empty(0, *self._rows_R2D.shape[1:])

    def rows(self, sent: Tensor) -> Tensor:
        return self._rows_R2D if self.union_U is None else self._rows_R2D.index_select(0, self._used)

    def settle(self) -> None:
        if self.owner.adam is not None:
            self.owner.store.queue.wait()

    def add_gradients(self, grads_UHD: Tensor) -> None:
        union_U, used, some_UHD = self.union_U, self._used, grads_UHD
        if union_U is not None and self._there is not None:
            there = self._there.here().long()
            union_U, used, some_UHD = union_U[self.counted], used[there], grads_UHD.index_select(0, there)
        self.owner.add(union_U, used, some_UHD, self._counted_R)
        self.owner.link.release(grads_UHD)

    def release(self, sent: Tensor) -> None:
        self.released = True
        self._forget()

    def again(self) -> "WholeLoan":
        if self.union_U is None:
            return self.owner.lend_all(self._used, self._counted_R)
        return self.owner.lend(self.union_U, True, self.counted)

    def __del__(self) -> None:
        # A forward pass without its backward (an exception, an early stop).
        self._forget()

    def _forget(self) -> None:
        self.owner.readers.discard(id(self))
        self.owner.loans.discard(id(self))


class WholeRows:
    """All R rows of one layer on the device, with their gradients in fp32."""

    def __init__(self, store: NeuronStore, link: Link | Resident, device: torch.device, dtype: torch.dtype) -> None:
        self.store, self.link, self.device, self.dtype = store, link, device, dtype
        neurons, _, width = store.rows_R2D.shape
        self.rows_R2D = torch.zeros(neurons, 2, width, dtype=dtype, device=device)
        """A new buffer takes its place where a backward pass still reads the old one."""
        self.grads_RHD = torch.zeros(neurons, 2 if store.trains_keys else 1, width, device=device)
        self.marks_2R = torch.zeros(2, neurons + 1, dtype=torch.bool, device=device)
        """Rows that have a gradient here, and those that got one since the last step; the last entry collects empty
        places."""
        self.readers: set[int] = set()
        """Loans of this buffer that were not given back."""
        self.loans: set[int] = set()
        """All loans that were not given back."""
        self._filled_R = torch.zeros(neurons, dtype=torch.bool)
        self._only_marked = False
        """Whether the host does not know all rows that have a gradient."""
        self._waiting = False
        self._version_R = torch.full((neurons,), -1, dtype=torch.int32)
        self._version = -1
        self._held = False
        """Whether the rows' optimizer is on the device at this moment."""
        self.adam: DeviceAdam | None = None

    @property
    def nbytes(self) -> int:
        """Device bytes of rows and gradients, and, where their optimizer is there, of weights and moments."""
        return self.rows_R2D.nbytes + self.grads_RHD.nbytes + (self.adam.nbytes if self.adam is not None else 0)

    @property
    def capacity(self) -> int:
        """R."""
        return self.grads_RHD.shape[0]

    # ---- rows ----

    def lend(self, union_U: Tensor, training: bool, counted: Tensor | None = None) -> WholeLoan:
        """The rows of a union that the host knows (ascending numbers [U]), renewed where they changed; counted as in
        Loan. The host's part."""
        self.store.refresh(union_U)
        self._renew(union_U[self._version_R[union_U] < self.store.changed_R[union_U]])
        used = self.link.to_device(union_U, self.device, "index", torch.int32).long()
        return WholeLoan(self, union_U, used, counted)

    def lend_all(self, used: Tensor, counted_R: Tensor | None = None) -> WholeLoan:
        """All rows, of which those numbered in used (int64 on the device, -1: none), or marked in counted_R, will get a
        gradient. On the training loop's thread, after ready(); waits for nothing."""
        return WholeLoan(self, None, used, counted_R=counted_R)

    def ready(self) -> None:
        """Return when all rows are as the last step, or somebody's hand, left them. In all but the first micro-batch
        of a window there is nothing to wait for. On the training loop's thread."""
        store = self.store
        store.queue.wait()
        store.watch()
        if self._version != store.version:
            store.queue.result(store.queue.submit(self.renew, priority=RETRIEVAL))

    def renew(self) -> None:
        """Send every row that changed. The host's part, after a step."""
        store = self.store
        store.refresh(None)
        self._renew((self._version_R < store.changed_R).nonzero()[:, 0])
        self._version = store.version

    def _renew(self, rows_U: Tensor) -> None:
        if rows_U.numel() == 0:
            return
        sent = sent_rows(self.store, self.link, rows_U, self.dtype, self.device).here()
        rows_R2D = self.writable()
        if rows_U.numel() == rows_R2D.shape[0]:
            rows_R2D.copy_(sent)
        else:
            slots = self.link.to_device(rows_U, self.device, "index", torch.int32).long()
            rows_R2D.index_copy_(0, slots, sent)
        self.link.release(sent)
        self._version_R[rows_U] = self.store.version

    def writable(self) -> Tensor:
        """The rows, to be written: a copy of them if a backward pass still reads them as they are."""
        if self.readers:
            self.rows_R2D = self.rows_R2D.clone()
            self.readers = set()
        return self.rows_R2D

    # ---- gradients ----

    def add(self, union_U: Tensor | None, used: Tensor, grads_UHD: Tensor, counted_R: Tensor | None = None) -> None:
        """Add gradients of these rows (WholeLoan) to those that wait."""
        self.store.queue.wait()  # idle but for a graph made before a step that is still being made
        if union_U is None and counted_R is not None:
            self.grads_RHD.add_(grads_UHD.masked_fill(~counted_R[:, None, None], 0.0))
            self.marks_2R[:, :-1].logical_or_(counted_R)
            self._only_marked = True
        elif union_U is None:
            self.grads_RHD.add_(grads_UHD)
            self.marks_2R.index_fill_(1, used.masked_fill(used < 0, self.capacity).flatten(), True)
            self._only_marked = True
        else:
            # Numbers do not repeat, so nothing has to be atomic.
            self.grads_RHD.index_copy_(0, used, self.grads_RHD.index_select(0, used).add_(grads_UHD))
            self._mark(union_U, used)
        self._waiting = True

    def collect(self) -> None:
        """Send gradients home, unless the rows' optimizer is here: the accumulation window ends."""
        if self._waiting and not self._held:
            self._waiting = False
            self.store.queue.submit(self._send_home, priority=GRADIENTS)

    def _send_home(self) -> None:
        """The host's part of collect()."""
        added_to_all = self._only_marked
        if self._only_marked:
            self._filled_R |= self.link.to_host(self.marks_2R[0, :-1], "index")
            self._only_marked = False
        rows_U = self._filled_R.nonzero()[:, 0]
        if rows_U.numel() == self._filled_R.numel():
            self.store.add_gradients(rows_U, self.link.to_host(self.grads_RHD, "grads", self.dtype))
            self.drop()
        elif rows_U.numel():
            slots = self.link.to_device(rows_U, self.device, "index", torch.int32).long()
            home_UHD = self.link.to_host(self.grads_RHD.index_select(0, slots), "grads", self.dtype)
            self.store.add_gradients(rows_U, home_UHD)
            self.grads_RHD.index_fill_(0, slots, 0.0)
            self.marks_2R.index_fill_(1, slots, False)
            self._filled_R[rows_U] = False
        if added_to_all:  # 0 times an infinite gradient is NaN: rows without one may hold it, and must not keep it
            self.grads_RHD.zero_()

    def drop(self) -> None:
        """Forget all gradients that wait here."""
        self.grads_RHD.zero_()
        self.marks_2R.zero_()
        self._filled_R.zero_()
        self._only_marked = self._waiting = False

    # ---- rows whose optimizer is on the device (device_adam.py) ----

    @property
    def held_grads(self) -> Tensor:
        """Gradients of all rows [R, H, D]."""
        return self.grads_RHD

    @property
    def held_marks(self) -> Tensor:
        """Which rows have one, and which got one since the last step; bool [2, R]."""
        return self.marks_2R[:, :-1]

    def to_hold(self) -> Tensor:
        """The rows whose optimizer is to come here: all of them."""
        return torch.arange(self._filled_R.shape[0])

    def hold(self, rows_R: Tensor) -> None:
        """From now on the optimizer of all rows is here: no gradient goes home, and nothing is renewed from there."""
        self._renew(rows_R[self._version_R < self.store.changed_R])
        self._held = True
        self._version_R.fill_(NEVER_STALE)

    def let_go(self) -> None:
        """The optimizer is on the host again, which has what the rows were left as; gradients may go home."""
        self._held = False
        self._version_R.fill_(self.store.version)
        self._waiting = True

    def mark_all(self) -> None:
        """Each row here has a gradient."""
        self.marks_2R.fill_(True)
        self._filled_R.fill_(True)

    def _mark(self, rows_U: Tensor, slots: Tensor) -> None:
        """These rows (numbers on the host and on the device) have a gradient."""
        self._filled_R[rows_U] = True
        self.marks_2R.index_fill_(1, slots, True)

    def __getstate__(self) -> dict[str, Any]:
        self.store.gradients_home()
        self.store.settle()
        return {**self.__dict__, "readers": set(), "loans": set()}
