"""Link: the only way between host and device memory. It makes every copy and counts its bytes.

Without a GPU the "device" is a second arena in the same RAM: the copies are real and the counts are the same. On CUDA
each direction has a stream of its own and copies are from and to page-locked memory, so they overlap with computing and
with each other; nothing waits for the whole device.
"""

import itertools
import threading
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meft_bench import observe
from meft_bench.meft.engine import memory

GPUS = ("cuda", "simgpu")
"""Devices that work beside the host: CUDA's, and their simulation (simulate/device.py)."""
_numbers = itertools.count(1)


@dataclass
class Transfer:
    """A copy on its way. here() returns it once it may be used."""

    tensor: Tensor
    event: Any = None
    """A torch.cuda.Event, or None when the copy is complete."""
    number: int = 0
    """What announcements call it (observe.Work.number); 0 where nothing was copied."""

    def here(self) -> Tensor:
        """The copy: on the device, later work of the current stream waits for it; on the host, the caller does."""
        if not self.number:
            return self._here()
        with observe.wait("copy", self.number):
            return self._here()

    def _here(self) -> Tensor:
        if self.event is not None:
            if self.tensor.device.type == "cuda":
                stream = torch.cuda.current_stream(self.tensor.device)
                stream.wait_event(self.event)
                self.tensor.record_stream(stream)
            else:
                self.event.synchronize()
        return self.tensor


class _Door:
    """What Link and Resident share: one method makes every copy."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()

    def to_device(self, source: Tensor, device: torch.device, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy on device of a host tensor, cast to dtype before it crosses."""
        return self.send_to_device(source, device, purpose, dtype).here()

    def to_host(self, source: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy in host memory of a device tensor, cast to dtype before it crosses."""
        return self.send_to_host(source, purpose, dtype).here()

    def send_to_device(
        self, source: Tensor, device: torch.device, purpose: str, dtype: torch.dtype | None = None
    ) -> Transfer:
        """to_device without waiting. A source from staging() must not be written until it is released."""
        return self._copy(source, device, ("h2d", purpose), dtype)

    def send_to_host(self, source: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Transfer:
        """to_host without waiting."""
        return self._copy(source, torch.device("cpu"), ("d2h", purpose), dtype)

    def _copy(self, source: Tensor, target: torch.device, key: tuple[str, str], dtype: torch.dtype | None) -> Transfer:
        raise NotImplementedError

    def reset(self) -> None:
        """Set all counts to zero."""
        self.bytes.clear()


class Link(_Door):
    """Copies tensors between host and device; bytes[(direction, purpose)] holds the running totals.

    Directions are "h2d" and "d2h". Purposes: "hidden" (T x D, to find the neurons), "rows" (keys and values of S),
    "grads" (their gradients); and the overhead the paper's formula leaves out: "index" (which rows a token uses),
    "score" (router scores and their gradients), "router_hidden" (the router's share of the hidden gradient), and, where
    asked for, "router" (the router and its gradient) and "key_index" (quantised keys).
    """

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[tuple[torch.device, str], Any] = {}
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def _copy(self, source: Tensor, target: torch.device, key: tuple[str, str], dtype: torch.dtype | None) -> Transfer:
        dtype, (direction, purpose) = dtype or source.dtype, key
        nbytes = source.numel() * dtype.itemsize
        with self._lock:  # layers' host work runs side by side
            self.bytes[key] += nbytes
        number = next(_numbers)
        with observe.copy(purpose, direction, nbytes, self, number):
            made = self._made_copy(source, target, dtype)
        made.number = number
        return made

    def _made_copy(self, source: Tensor, target: torch.device, dtype: torch.dtype) -> Transfer:
        wire = source.detach().to(dtype)
        if hasattr(source, "_meft_memory") and wire.dtype == source.dtype:
            return Transfer(source)  # made to be handed over
        if target.type in GPUS:
            return self._copy_up(wire, target)
        if wire.device.type in GPUS:
            return self._copy_down(wire)
        copied = wire.to(target)
        if copied.data_ptr() == source.data_ptr() and source.numel():
            copied = copied.clone()  # same arena and dtype: still a copy, never an alias
        return Transfer(copied)

    def _copy_up(self, wire: Tensor, target: torch.device) -> Transfer:
        if not wire.is_pinned():
            wire = torch.empty(wire.shape, dtype=wire.dtype, pin_memory=True).copy_(wire)
        stream = self._stream(target, "h2d")
        with _issuing_on(stream):
            # torch keeps the page-locked block from being used again before this copy is over.
            copied = wire.to(target, non_blocking=True)
            return Transfer(copied, stream and stream.record_event())

    def _copy_down(self, wire: Tensor) -> Transfer:
        stream = self._stream(wire.device, "d2h")
        copied = torch.empty(wire.shape, dtype=wire.dtype, pin_memory=True)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(wire.device))
            wire.record_stream(stream)
        with _issuing_on(stream):
            copied.copy_(wire, non_blocking=True)
            return Transfer(copied, stream and stream.record_event())

    def send_into(self, target: Tensor, source: Tensor, purpose: str) -> Transfer:
        """Write a host tensor over one of the same shape and dtype on the device, after all that its stream holds."""
        number = next(_numbers)
        with self._lock:
            self.bytes["h2d", purpose] += source.nbytes
        with observe.copy(purpose, "h2d", source.nbytes, self, number):
            stream = self._stream(target.device, "h2d")
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(target.device))
            with _issuing_on(stream):
                target.copy_(source, non_blocking=True)
                if stream is not None:
                    target.record_stream(stream)  # whoever lets go of it early does not get the copy in new memory
                return Transfer(target, stream and stream.record_event(), number)

    def _stream(self, device: torch.device, direction: str) -> Any:
        """None on a device without streams to call: the simulated one, whose simulator gives each direction its own."""
        if device.type != "cuda":
            return None
        key = (device, direction)
        with self._lock:  # two host workers that both make one would copy on two
            if key not in self._streams:
                self._streams[key] = torch.cuda.Stream(device)
            return self._streams[key]

    # ---- memory that is used again ----

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Host memory to write what send_to_device takes next; page-locked for a GPU."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, pin_memory=device.type in GPUS)
        return self._reused(shape, dtype)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Device memory to write what send_to_host takes next."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        return self._reused(shape, dtype)

    def _reused(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Without a GPU both sides are one memory: what was written here is handed over as it is, and comes back
        through release(), as fresh pages cost several times what a copy costs."""
        size = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            fitting = [i for i, free in enumerate(self._free) if free.numel() >= size]
            place = min(fitting, key=lambda i: self._free[i].numel(), default=None)
            flat = None if place is None else self._free.pop(place)
            if flat is None and self._free:
                self._free.pop(0)  # what was too small gives way to what is not
        if flat is None:
            flat = memory.empty((size,), torch.uint8, torch.device("cpu"))
        # .data: with a count of versions of its own, as autograd may still hold what this memory was lent for before.
        tensor = flat.data[:size].view(dtype).view(shape)
        tensor._meft_memory = flat  # type: ignore[attr-defined]
        return tensor

    def release(self, tensor: Tensor) -> None:
        """Give back memory from staging() or scratch() that nobody reads any more."""
        flat = tensor.__dict__.pop("_meft_memory", None)
        if flat is not None:
            with self._lock:
                self._free.append(flat)

    def __reduce__(self) -> tuple:
        """A copy, or what is pickled, has the counts, and streams and memory of its own."""
        return type(self), (), {"bytes": Counter(self.bytes)}


def _issuing_on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Resident(_Door):
    """The link of placement="device": rows and hidden states already share a memory, so nothing is copied."""

    def _copy(self, source: Tensor, target: torch.device, key: tuple[str, str], dtype: torch.dtype | None) -> Transfer:
        return Transfer(source.detach().to(dtype or source.dtype))

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    scratch = staging

    def release(self, tensor: Tensor) -> None:
        pass
