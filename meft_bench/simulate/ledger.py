"""Live bytes by device and category, followed storage by storage: what the allocator would hand out.

Each storage counts when an operation first returns it and until Python lets go of it. Device sizes are rounded up to
512 bytes, CUDACachingAllocator's smallest block. Not followed: the CUDA context, library workspaces, fragmentation.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 512
"""CUDACachingAllocator's smallest block, bytes."""


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def device_bytes(tensor: Tensor) -> int:
    """What the allocator hands out for a tensor's storage."""
    return _in_blocks(tensor.untyped_storage().nbytes())


class Segment(NamedTuple):
    """A stretch of a training step: its phase ("load", "forward", "backward", "update") and the decoder layer at work
    (-1: none)."""

    phase: str
    layer: int


@dataclass
class Peak:
    """The most bytes that lived at once, and what they were."""

    bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


@dataclass
class _Held:
    storage: weakref.ref
    place: str
    category: str
    bytes: int


class Ledger:
    """live[place] bytes now; peaks[place][segment] the most within each segment since reset_peaks.

    place is "host" or "device"; categories are the caller's words.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.live: Counter[str] = Counter()
        self.by_category: dict[str, Counter[str]] = {"host": Counter(), "device": Counter()}
        self.peaks: dict[str, dict[Segment, Peak]] = {"host": {}, "device": {}}
        self.segment = Segment("load", -1)
        self._held: dict[int, _Held] = {}

    def charge(self, tensor: Tensor, category: str, rename: bool = False) -> None:
        """Count tensor's storage unless it is counted already; rename moves a counted one to category."""
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, held = storage._cdata, self._held.get(storage._cdata)
        place = "device" if tensor.device.type == self.device else "host"
        size = storage.nbytes()
        if place == "device":
            size = _in_blocks(size)
        if held is not None and held.storage() is storage:
            if rename and held.category != category:
                self._change(place, held.category, -held.bytes)
                held.category = category
                self._change(place, category, held.bytes)
            if held.bytes != size:  # resized in place
                self._change(place, held.category, size - held.bytes)
                held.bytes = size
            return
        reference = weakref.ref(storage, functools.partial(self._free, key))
        self._held[key] = _Held(reference, place, category, size)
        self._change(place, category, size)

    def name(self, tensors: Iterable[Tensor], category: str) -> None:
        """Put these tensors under category, counted before or not."""
        for tensor in tensors:
            self.charge(tensor, category, rename=True)
        self.note_peak()

    def note_peak(self, hidden_bytes: int = 0) -> None:
        """Compare what lives now with the present segment's peak; hidden_bytes live on the device within a kernel."""
        for place, extra in (("device", hidden_bytes), ("host", 0)):
            peak = self.peaks[place].setdefault(self.segment, Peak())
            total = self.live[place] + extra
            if total > peak.bytes:
                peak.bytes = total
                peak.by_category = {c: n for c, n in self.by_category[place].items() if n}
                if extra:
                    peak.by_category["kernel workspace"] = extra

    def reset_peaks(self) -> None:
        """Forget all peaks; what lives stays counted."""
        self.peaks = {"host": {}, "device": {}}

    def _change(self, place: str, category: str, difference: int) -> None:
        self.live[place] += difference
        self.by_category[place][category] += difference

    def _free(self, key: int, dead: weakref.ref) -> None:
        held = self._held.get(key)
        if held is not None and held.storage is dead:
            del self._held[key]
            self._change(held.place, held.category, -held.bytes)
