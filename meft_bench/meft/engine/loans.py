"""A loan: the rows of one micro-batch on the device, wherever they come from, and their gradients' way home."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_bench.meft.engine.workers import GRADIENTS
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore


@dataclass(frozen=True)
class InPlace:
    """Rows that need not be brought together: those in slots are used where they lie, with what else lies there, and
    below them come those that were sent."""

    slots_CHD: Tensor
    """All slots, in the wire's dtype."""
    numbers_C: Tensor
    """Which neurons lie there, int64 on the device."""
    numbers_P: Transfer | None
    """Which ones were sent, int32; None where their keys were sent too."""
    where_U: Tensor
    """Each row's place in the slots, or C and more for one that was sent; int64 on the device."""


class Loan:
    """The rows of one micro-batch, to be released after its backward pass (or when forgotten).

    sent is what crossed for this micro-batch alone: rows [.., 2 or 1, D] in the wire's dtype. It is not kept here:
    whoever needs it again in backward saves it, so that activation checkpointing can drop it.
    """

    released = False
    sent_rows: Tensor
    """The neurons that were sent, int64 on the host."""
    counted: Tensor | None = None
    """Places of the rows whose gradients count (int64, ascending, on the host); None: those of all."""

    in_place: InPlace | None = None
    """Where the rows lie, if they are used in place: then nobody asks for rows(), and add_gradients takes the gradients
    of [C + P, 2, D] in that order."""

    def arrived(self) -> Tensor:
        """sent, once; it may be used on the current stream."""
        raise NotImplementedError

    def rows(self, sent: Tensor) -> Tensor:
        """Keys and values of S [U, 2, D] on the device, in the wire's dtype; values alone [U, 1, D] where a copy of all
        keys is there."""
        raise NotImplementedError

    def settle(self) -> None:
        """The backward pass begins, and nothing else is queued: wait for a step that was made since, if its optimizer
        may be on the device, and count the rows as used."""

    def add_gradients(self, grads_UHD: Tensor) -> None:
        """Take the gradients of rows(), [U, 2, D] ([U, 1, D] when keys are frozen), of which those that do not count go
        nowhere; memory from link.scratch() goes back to it."""
        raise NotImplementedError

    def release(self, sent: Tensor) -> None:
        """The rows are not needed any more."""

    def again(self) -> "Loan":
        """The same rows once more, after release(), for a second backward pass. Waits for what is on its way."""
        raise NotImplementedError


def sent_rows(
    store: NeuronStore, link: Link | Resident, rows_U: Tensor, dtype: torch.dtype, device: torch.device, halves: int = 2
) -> Transfer:
    """These rows [U, 2, D], or their values alone [U, 1, D], brought up to date, on their way to the device."""
    staged = link.staging((rows_U.shape[0], halves, store.hidden_size), dtype, device)
    return link.send_to_device(store.gather(rows_U, dtype, staged), device, "rows")


def places_there(link: Link | Resident, places: Tensor, device: torch.device) -> Transfer:
    """A list of places on its way to the device: int32, to be made long there."""
    return link.send_to_device(places, device, "index", torch.int32)


def send_home(store: NeuronStore, link: Link | Resident, rows_U: Tensor, grads_UHD: Tensor, dtype: torch.dtype) -> None:
    """Send these rows' gradients home, where they are added up after what is queued there."""
    home = link.send_to_host(grads_UHD, "grads", dtype)
    store.queue.submit(_add, store, link, rows_U, home, grads_UHD, priority=GRADIENTS)


def _add(store: NeuronStore, link: Link | Resident, rows_U: Tensor, home: Transfer, grads_UHD: Tensor) -> None:
    arrived = home.here()
    if arrived is not grads_UHD:
        link.release(grads_UHD)  # that memory was read when it was sent
    store.add_gradients(rows_U, arrived, functools.partial(link.release, arrived))
