"""A copy of one layer's keys, made for scoring: on the host in bf16 or int8, on the device in the
format of the wire or int8.

The rows that move and compute stay exact; the copy only decides which ones. A row is copied again when a step changed
it, so a copy costs what its changes cost. A copy in the wire's format is also what the adapter computes with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from meft_bench.meft.engine import kernels
from meft_bench.meft.engine.slots import NEVER_STALE
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore

NARROW = {"bf16": torch.bfloat16, "int8": torch.int8}
"""Formats that config.scoring names."""


def quantise(keys_UD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [U, D], fp32 scales [U]): symmetric per row, so that int8 * scale is within half a scale of the key."""
    scales_U = keys_UD.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (keys_UD / scales_U[:, None]).round().to(torch.int8), scales_U


class Changed(NamedTuple):
    """Keys that changed, on their way to the copy."""

    places: Transfer | None
    """Which, int32; None for all of them."""
    keys: Transfer
    scales: Transfer | None
    holds: int
    """How often rows had been held when it was sent."""


class KeyIndex:
    """keys_RD (any float dtype, or int8 with scales_R fp32) of a store; the scales are None but for int8. With a link
    it lies on the device, and what changed crosses that link; without, beside the store.

    On the device a backward pass may still need keys that a step has changed since: `readers` are those who read
    keys_RD. While one of them lives, changes go into a new keys_RD.
    """

    def __init__(
        self, store: NeuronStore, dtype: torch.dtype, device: torch.device, link: Link | Resident | None
    ) -> None:
        self.store, self.link, self.device = store, link, device
        neurons, width = store.handle("keys").shape
        self.keys_RD = torch.zeros(neurons, width, dtype=dtype, device=device)
        self.scales_R = torch.zeros(neurons, device=device) if dtype == torch.int8 else None
        self.readers: WeakSet[Any] = WeakSet()
        self.version = -1
        """The store's version that send() has seen."""
        self._copied_R = torch.full((neurons,), -1, dtype=torch.int32, device=store.changed_R.device)
        self._holds = 0
        self._held: Tensor | None = None
        """Rows whose keys are written on the device, numbered there."""

    @torch.no_grad()
    def refresh(self, index_U: Tensor | None = None) -> None:
        """Copy those of these rows (of all: None) that changed since they were last copied. The store's keys must be up
        to date for them."""
        late_U = self._late(index_U)
        if late_U.numel() == 0:
            return
        with self._or_again(late_U):
            keys_UD = self.store.rows_R2D[:, 0][late_U]
            if self.scales_R is None:
                self.keys_RD[late_U] = keys_UD.to(self.keys_RD.dtype)
            else:
                self.keys_RD[late_U], self.scales_R[late_U] = quantise(keys_UD)

    @torch.no_grad()
    def send(self) -> Changed | None:
        """The host's part of renewing a copy on the device: bring all keys up to date and send those that changed."""
        store = self.store
        store.refresh_keys()
        self.version = store.version
        late_U = self._late(None)
        if late_U.numel() == 0:
            return None
        with self._or_again(late_U):
            return self._sent(late_U)

    def _sent(self, late_U: Tensor) -> Changed:
        link, store = self.link, self.store
        assert link is not None
        staged_UD = link.staging((late_U.shape[0], self.keys_RD.shape[1]), self.keys_RD.dtype, self.device)
        places = scales = None
        if self.scales_R is None:
            kernels.gather(store.rows_R2D[:, 0], late_U, staged_UD)
        else:
            narrow_UD, scales_U = quantise(store.rows_R2D[:, 0][late_U])
            staged_UD.copy_(narrow_UD)
            scales = link.send_to_device(scales_U, self.device, "key_index")
        if late_U.shape[0] < self.keys_RD.shape[0]:
            places = link.send_to_device(late_U, self.device, "key_index", torch.int32)
        return Changed(places, link.send_to_device(staged_UD, self.device, "key_index"), scales, self._holds)

    @torch.no_grad()
    def take(self, changed: Changed) -> None:
        """The device's part: write what send() sent, on the current stream. In the order of sending."""
        assert self.link is not None
        self._make_writable()
        places = None if changed.places is None else changed.places.here().long()
        sent_UD = changed.keys.here()
        held = None if changed.holds == self._holds else self._held
        newer_MD = None if held is None else self.keys_RD.index_select(0, held)
        _write(self.keys_RD, places, sent_UD)
        if held is not None and newer_MD is not None:  # sent before their optimizer came here
            self.keys_RD.index_copy_(0, held, newer_MD)
        self.link.release(sent_UD)
        if self.scales_R is not None:
            assert changed.scales is not None
            _write(self.scales_R, places, changed.scales.here())

    # ---- rows whose optimizer is on the device (device_adam.py) ----

    def hold(self, rows_M: Tensor, places: Tensor, keys_MD: Tensor) -> None:
        """From now on these rows' keys (numbers on the host and on the device) are written there and never sent."""
        self._holds, self._held = self._holds + 1, places
        self.write(places, keys_MD)
        self._copied_R[rows_M] = NEVER_STALE

    def write(self, places: Tensor, keys_MD: Tensor) -> None:
        """Write these keys, which lie on the device too, on the current stream."""
        self._make_writable()
        self.keys_RD.index_copy_(0, places, keys_MD.to(self.keys_RD.dtype))

    def let_go(self, rows_M: Tensor) -> None:
        """These rows' keys are sent again, after what may be on its way from before they were held."""
        self._held = None
        self._copied_R[rows_M] = -1
        self.version = -1

    def _make_writable(self) -> None:
        if len(self.readers):
            self.keys_RD = self.keys_RD.clone()
            self.readers.clear()

    def _late(self, index_U: Tensor | None) -> Tensor:
        """Those of these rows whose copy is behind; from now on they count as copied."""
        changed_R = self.store.changed_R
        late_R = self._copied_R < changed_R
        late_U = late_R.nonzero()[:, 0] if index_U is None else index_U[late_R[index_U]]
        self._copied_R[late_U] = changed_R[late_U]
        return late_U

    @contextmanager
    def _or_again(self, late_U: Tensor) -> Iterator[None]:
        """What raises inside leaves these rows to be copied again."""
        try:
            yield
        except BaseException:
            self._copied_R[late_U], self.version = -1, -1
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, readers=WeakSet())

    @property
    def nbytes(self) -> int:
        return self.keys_RD.nbytes + (self.scales_R.nbytes if self.scales_R is not None else 0)


def _write(into: Tensor, places: Tensor | None, new: Tensor) -> None:
    if places is None:
        into.copy_(new)
    else:
        into.index_copy_(0, places, new)
