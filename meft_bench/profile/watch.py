"""What follows a measured step: peaks of memory by phase, and seconds by part when nothing may overlap."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft.store import NeuronStore
from meft_bench.profile.counters import Nvml, PcieMeter
from meft_bench.profile.held import held_by
from meft_bench.profile.peers import host_state
from meft_bench.train.methods import Attached


def host_bytes() -> dict[str, int]:
    """ "rss" and "uss" of this process; where the system does not tell what is its own, both are the first."""
    memory = psutil.Process().memory_full_info()
    return {"rss": memory.rss, "uss": getattr(memory, "uss", memory.rss)}


class Peaks:
    """A listener that takes the peaks of the phases of one or more steps, in bytes.

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

    def during(self, work: observe.Work) -> AbstractContextManager[None]:
        return self._phase(work.name) if work.kind == "phase" else nullcontext()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
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
        pinned = torch.cuda.host_memory_stats().get("active_bytes.current", 0) if self.cuda else 0
        return {**host_bytes(), "pinned": pinned}

    @staticmethod
    def _note(table: dict[str, dict[str, int]], name: str, found: dict[str, int]) -> None:
        before = table.setdefault(name, {})
        for key, value in found.items():
            before[key] = max(value, before.get(key, 0))


class AtUpdate:
    """A listener that keeps what a link had counted when a step's update began."""

    def __init__(self, linked: Callable[[], Counter[tuple[str, str]] | None]) -> None:
        """linked: gives the link's count; None without a link."""
        self.linked = linked
        self.before = Counter[tuple[str, str]]()

    def during(self, work: observe.Work) -> AbstractContextManager[None]:
        if work.kind == "phase" and work.name == "update":
            self.before = self.linked() or Counter()
        return nullcontext()


class Clock:
    """A listener that adds up seconds by part. Every change of part first waits for the device, so parts do not overlap
    and add up to the whole; what is no part is "rest". A part within another counts for itself alone; of parts that
    several threads have open, time is counted for the one that began last."""

    REST = "rest"

    def __init__(self, synchronize: Callable[[], None], part_of: Callable[[observe.Work], str | None]) -> None:
        """part_of: the part that announced work is timed as; None leaves it to what is around it."""
        self.synchronize, self.part_of = synchronize, part_of
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._open: list[tuple[object, str]] = []
        self._at = 0.0

    def during(self, work: observe.Work) -> AbstractContextManager[None]:
        part = self.part_of(work)
        return nullcontext() if part is None else self._within(part)

    @contextmanager
    def _within(self, part: str) -> Iterator[None]:
        own = object(), part
        with self._lock:
            self._count()
            self._open.append(own)
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._open.remove(own)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Listen and count within."""
        self.synchronize()
        with self._lock:
            self._at = time.perf_counter()
        with observe.listening(self):
            yield
        with self._lock:
            self._count()

    def _count(self) -> None:
        """Add the time since the last change to the part that is at work."""
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self._open[-1][1] if self._open else self.REST] += now - self._at
        self._at = now


def accounted(
    model: nn.Module, attached: Attached | None, optimizer: torch.optim.Optimizer | None, full: bool
) -> dict[str, dict[str, int]]:
    """Exact bytes of the tensors that outlive a step: "device" and "host" -> category -> bytes. full: the base itself
    is trained. A device's gradients do not outlive a step, unless MEFT keeps room for them there; a host's do."""
    found = {"device": Counter[str](), "host": Counter[str]()}
    trained = {id(p) for p in attached.parameters()} if attached else set()
    hosted = {id(p) for m in model.modules() if isinstance(m, NeuronStore) for p in m.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        place = "host" if id(tensor) in hosted else "device"
        own = id(tensor) in trained and not full
        found[place]["adapter parameters" if own or place == "host" else "base weights"] += tensor.nbytes
        with torch._C.DisableTorchFunctionSubclass():  # whoever looks at MEFT's gradients brings rows home first
            gradient = tensor.grad
        if place == "host" and gradient is not None:
            found[place]["gradients"] += gradient.nbytes
        state = getattr(optimizer, "state", {}).get(tensor, {})
        found[place]["moments"] += sum(v.nbytes for v in state.values() if isinstance(v, Tensor))
    for category, tensors in held_by(m for m in model.modules() if isinstance(m, NeuronStore)).items():
        found["device"][category] += sum(t.nbytes for t in tensors)
    for category, tensors in host_state(optimizer).items():
        found["host"][category] += sum(t.nbytes for t in tensors)
    return {place: {c: n for c, n in counts.items() if n} for place, counts in found.items()}
