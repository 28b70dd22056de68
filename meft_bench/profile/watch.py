"""What follows a measured step: peaks of memory by phase, and seconds by part when nothing may overlap."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from meft_bench.meft.store import NeuronStore
from meft_bench.profile.counters import Nvml, PcieMeter
from meft_bench.profile.optimizers import HostAdamW
from meft_bench.train.methods import Attached


class Silent:
    """A watcher that watches nothing: for steps that are timed as a whole."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


class Peaks:
    """Peaks of the phases of one or more steps, in bytes.

    device[phase]: the most that torch's allocator had given out ("allocated") and held ("reserved") within the phase,
    and what NVML ("process") and the driver's free memory ("used", of the whole card) show at its end; the allocator
    gives nothing back within a step, so both are the peak. host[phase]: "rss" and "uss" of this process at its end, and
    the page-locked ("pinned") bytes of torch's host allocator. Empty without CUDA where CUDA is asked.
    """

    def __init__(self, cuda: bool, nvml: Nvml | None, pcie: PcieMeter) -> None:
        self.cuda, self.nvml, self.pcie = cuda, nvml, pcie
        self.device: dict[str, dict[str, int]] = {}
        self.host: dict[str, dict[str, int]] = {}
        self.process_reason = "" if cuda else "no CUDA GPU"
        self.now = "load"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.now = name
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        self._note(self.host, name, self._host())
        if self.cuda:
            self._note(self.device, name, self._device())
        self.pcie.read()

    def _device(self) -> dict[str, int]:
        free, total = torch.cuda.mem_get_info()
        found = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "used": total - free,
        }
        process = self.nvml.process_bytes() if self.nvml is not None else "NVML was not asked"
        if isinstance(process, str):
            self.process_reason = process
            return found
        return {**found, "process": process}

    def _host(self) -> dict[str, int]:
        memory = psutil.Process().memory_full_info()
        pinned = torch.cuda.host_memory_stats().get("active_bytes.current", 0) if self.cuda else 0
        return {"rss": memory.rss, "uss": memory.uss, "pinned": pinned}

    @staticmethod
    def _note(table: dict[str, dict[str, int]], name: str, found: dict[str, int]) -> None:
        before = table.setdefault(name, {})
        for key, value in found.items():
            before[key] = max(value, before.get(key, 0))


class Clock:
    """Seconds by part. Every change of part first waits for the device, so parts do not overlap and add up to the
    whole; what no wrapped method covers is the part "rest". A wrapped call inside another counts for itself alone."""

    REST = "rest"

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = [self.REST]
        self._at = 0.0
        self._wrapped: list[tuple[Any, str, Any]] = []

    def wrap(self, target: Any, method: str, part: str | Callable[..., str]) -> None:
        """Time target.method, on this instance only; part may be a function of the call's arguments."""
        inner: Callable = getattr(target, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(part if isinstance(part, str) else part(*args, **kwargs))
            try:
                return inner(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        self._wrapped.append((target, method, vars(target).get(method)))
        setattr(target, method, timed)

    def unwrap(self) -> None:
        """Give every instance its own methods back."""
        for target, method, own in reversed(self._wrapped):
            delattr(target, method)
            if own is not None:
                setattr(target, method, own)
        self._wrapped.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count within."""
        self.synchronize()
        self._at = time.perf_counter()
        yield
        self._switch()

    def _switch(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._at
        self._at = now


def accounted(
    model: nn.Module, attached: Attached | None, optimizer: torch.optim.Optimizer | None, full: bool
) -> dict[str, dict[str, int]]:
    """Exact bytes of the tensors that outlive a step: "device" and "host" -> category -> bytes. full: the base itself
    is trained. A device's gradients do not outlive a step; a host's do."""
    found = {"device": Counter[str](), "host": Counter[str]()}
    trained = {id(p) for p in attached.parameters()} if attached else set()
    hosted = {id(p) for m in model.modules() if isinstance(m, NeuronStore) for p in m.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        place = "host" if id(tensor) in hosted else "device"
        own = id(tensor) in trained and not full
        found[place]["adapter parameters" if own or place == "host" else "base weights"] += tensor.nbytes
        if place == "host" and tensor.grad is not None:
            found[place]["gradients"] += tensor.grad.nbytes
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        found[place]["moments"] += sum(v.nbytes for v in state.values() if isinstance(v, Tensor))
    if isinstance(optimizer, HostAdamW):
        for category, tensors in optimizer.host_state().items():
            found["host"][category] += sum(t.nbytes for t in tensors)
    return {place: {c: n for c, n in counts.items() if n} for place, counts in found.items()}
