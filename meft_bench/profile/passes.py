"""What is done with a session, pass by pass, and what it shows: a watched step, timed ones, serialised ones, a traced
one."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from meft_bench import observe
from meft_bench.host_memory import is_out_of_memory
from meft_bench.meft.engine.slots import Slots
from meft_bench.profile.counters import (
    DIRECTIONS,
    Figure,
    Nvml,
    PcieMeter,
    Trace,
    compared,
    copied_bytes,
    link_bytes,
    traced,
)
from meft_bench.profile.session import Session
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.watch import AtUpdate, Clock, Peaks, accounted, host_bytes
from meft_bench.train.methods import ModelShape
from meft_bench.train.own_optimizer import FusedOptimizer

PARTS = ("retrieval", "gather", "h2d", "d2h", "gradients", "adam")
_SERIALISED_STEPS = 3
_SHORT = "not taken in a short row"
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one variant's steps showed. Bytes and seconds; keys of by-accumulation figures are micro-batches a step."""

    spec: ProfileSpec
    shape: ModelShape
    size: dict[str, Any]
    """The method's options."""
    evidence: str
    """"capped" under an allocator cap, else "measured"."""
    gpu: str
    cap_bytes: int | None
    trainable: int
    base: int
    device_peaks: dict[int, dict[str, dict[str, int]]]
    """accumulation -> phase -> Peaks.device; empty on the CPU."""
    host_peaks: dict[str, dict[str, int]]
    """phase -> Peaks.host."""
    host_accumulated: dict[str, dict[str, int]]
    """phase -> Peaks.host of the most micro-batches; empty where no step had several."""
    host_before: int
    """USS of the process before the model was built."""
    lacking: dict[int, str]
    """accumulation -> where a step of so many micro-batches ran out of memory; those of more were not tried."""
    process_reason: str
    """Why device_peaks lacks "process"; "" if it does not."""
    context: Figure
    """Bytes of the card in use beside torch's allocator."""
    after: Figure
    """Bytes that torch's allocator has given out when the watched step is over."""
    accounted: dict[str, dict[str, int]]
    """"device" and "host" -> category -> exact bytes of the tensors that outlive a step."""
    step_s: dict[int, list[float]]
    components_s: dict[str, Figure] | str
    """"serialised_step", and the parts that add up to it; or why they were not taken."""
    moved: dict[str, dict[str, int]] | str
    """"micro_batch" and "update" -> direction -> bytes, or why there are none."""
    moved_by: str
    """Who counted them: "kineto", or "link" where Kineto sees nothing."""
    link_by_purpose: dict[str, int] | None
    """The link's bytes of one micro-batch by "<direction> <purpose>"."""
    transfers: dict[str, Any]
    """The three counts side by side."""
    union_by_layer: list[float]
    """Mean U of the timed steps; empty without a union."""


class Passes:
    """What is done with a session, pass by pass."""

    def __init__(
        self,
        session: Session,
        cap_bytes: int | None,
        go_on: Callable[[], None] = lambda: None,
        whole: bool = True,
    ) -> None:
        self.go_on, self.whole = go_on, whole
        self.session, self.cap_bytes, self.cuda = session, cap_bytes, session.device == "cuda"
        self.nvml = None
        if self.cuda:
            properties = torch.cuda.get_device_properties(0)
            _cap(cap_bytes, properties.total_memory)
            self.nvml = Nvml(str(properties.uuid))
        self.pcie = PcieMeter(self.nvml)
        self.peaks = Peaks(self.cuda, self.nvml, self.pcie)
        self.at_update = AtUpdate(session.linked)
        self.host_before = host_bytes()["uss"]
        self.after: Figure = "no CUDA GPU"

    def all(self, steps: int, warmup: int, accumulations: list[int], later_steps: int | None = None) -> Measured:
        """Every pass, one micro-batch a step first."""
        session = self.session
        if session.attached is None:
            accumulations = [1]  # a forward pass has no micro-batches
        device_peaks: dict[int, dict[str, dict[str, int]]] = {}
        step_s: dict[int, list[float]] = {}
        self.watched(1, warmup)
        device_peaks[1], host_peaks, link, nvml = (
            self.peaks.device,
            self.peaks.host,
            session.linked(),
            self.pcie.figures(),
        )
        after, in_update = self.after, self.updated()
        step_s[1] = self.timed(1, steps)
        unions = [statistics.fmean(rows for _, rows in layer) for layer in session.usage]
        host_accumulated: dict[str, dict[str, int]] = {}
        lacking: dict[int, str] = {}
        for accumulation in accumulations[1:]:
            try:
                self.watched(accumulation, warmup=0)  # all is warm, and the watched step comes before the timed ones
                peaks = self.peaks.device, self.peaks.host
                step_s[accumulation] = self.timed(accumulation, later_steps or steps)
            except (MemoryError, RuntimeError) as error:  # what fits is no worse for what does not
                if (asked := memory_asked(error)) is None:
                    raise
                lacking[accumulation] = f"in {self.peaks.now}: {asked}"
                break
            device_peaks[accumulation], host_accumulated = peaks
        # A step that broke off leaves gradients behind, which no pass after it should find.
        why_not = f"a step of {max(lacking)} micro-batches ran out of memory before" if lacking else _SHORT
        whole = self.whole and not lacking
        serialised = self.serialised() if whole else why_not
        trace, own, extra = self.traced(1) if whole else (why_not, None, {})
        copied = copied_bytes(trace.copies) if not isinstance(trace, str) else None
        if copied is not None:
            in_update = self.updated()
        watched_bytes = link_bytes(link) if link is not None else copied
        moved, moved_by = self.moved(link_bytes(link) if link is not None else None, in_update, trace)
        return Measured(
            spec=session.spec,
            shape=session.shape,
            size=session.size,
            evidence="measured" if self.cap_bytes is None else "capped",
            gpu=torch.cuda.get_device_name(0) if self.cuda else "none",
            cap_bytes=self.cap_bytes,
            trainable=session.trainable,
            base=session.shape.parameters,
            device_peaks=device_peaks if self.cuda else {},
            host_peaks=host_peaks,
            host_accumulated=host_accumulated,
            host_before=self.host_before,
            lacking=lacking,
            process_reason=self.peaks.process_reason,
            context=self.context(),
            after=after,
            accounted=accounted(session.model, session.attached, session.optimizer, session.variant.trains_base),
            step_s=step_s,
            components_s=why_not if isinstance(serialised, str) else components(serialised, trace, link is not None),
            moved=moved,
            moved_by=moved_by,
            link_by_purpose={" ".join(k): n for k, n in sorted(link.items())} if link is not None else None,
            transfers=compared(own, trace, extra, watched_bytes, nvml),
            union_by_layer=unions,
        )

    def step(self, accumulation: int) -> None:
        self.go_on()
        self.session.step(accumulation)

    def _whole_step(self, accumulation: int) -> None:
        """A step and what it leaves to the background."""
        self.step(accumulation)
        self.session.wait()

    def watched(self, accumulation: int, warmup: int) -> None:
        """Warm-up steps, then one with peaks, the link's count and NVML's."""
        with observe.listening(self.peaks):
            for micro_batches in self._warmup(accumulation, warmup):
                self.step(micro_batches)
        self.peaks.device, self.peaks.host = {}, {}
        self.session.wait()  # what a step leaves to the background is counted with it, and not with the next
        self.session.clear()
        self.pcie.start()
        with observe.listening(self.peaks, self.at_update):
            self.step(accumulation)
        self.session.wait()
        self.pcie.read()
        if self.cuda:
            self.after = torch.cuda.memory_allocated()

    def _warmup(self, accumulation: int, steps: int) -> list[int]:
        """Micro-batches of each warm-up step. A budget holds rows, those used most, after a second step."""
        if not (steps and self.session.variant.budget):
            return [accumulation] * steps
        return [max(accumulation, Slots.known_after), *[accumulation] * max(1, steps - 1)]

    def timed(self, accumulation: int, steps: int) -> list[float]:
        """Seconds of each whole step. What a step leaves to do in the background is done beside the next one; what the
        last leaves is waited for, and shared by all."""
        seconds = []
        self.session.clear()
        self.session.settle()
        for _ in range(steps):
            start = time.perf_counter()
            self.step(accumulation)
            self.session.synchronize()
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        self.session.settle()
        rest = (time.perf_counter() - start) / steps
        return [s + rest for s in seconds]

    def serialised(self) -> dict[str, float]:
        """Mean seconds by part of steps in which nothing overlaps; they add up to the whole."""
        clock = Clock(self.session.synchronize, self.session.part_of)
        self.session.settle()
        with self.session.serial():
            for _ in range(_SERIALISED_STEPS):
                with clock.running():
                    self.step(1)
        return {part: clock.seconds[part] / _SERIALISED_STEPS for part in (*PARTS, Clock.REST)}

    def traced(self, accumulation: int) -> tuple[Trace | str, Any, dict[str, dict[str, int]]]:
        """(Kineto's trace of a step, the link's count of it, what crossed beside the link)."""
        if not self.cuda:
            return "no CUDA GPU", None, {}
        self.session.wait()
        self.session.clear()
        with observe.listening(self.at_update):
            trace = traced(lambda: self._whole_step(accumulation))
        return trace, self.session.linked(), self.session.uncounted(accumulation)

    def updated(self) -> dict[str, int] | None:
        """The link's bytes since the last step's update began, by direction; None without a link. A step that was
        waited for has let everything cross."""
        now = self.session.linked()
        if now is None:
            return None
        # Where gradients are used within backward, all that crosses belongs to the update.
        fused = isinstance(self.session.optimizer, FusedOptimizer)
        return link_bytes(now if fused else now - self.at_update.before)

    def moved(
        self, own: dict[str, int] | None, update: dict[str, int] | None, one: Trace | str
    ) -> tuple[dict[str, dict[str, int]] | str, str]:
        """(bytes of a micro-batch and of an update, who counted): Kineto, which sees every copy, else the link. own:
        the link's of a step of one micro-batch. update: the link's of that step's update, or of the traced one's.

        What a link does not count of an update are scalars, so that it tells the two apart; without a link, two
        micro-batches less one leave one.
        """
        if isinstance(one, str):
            if own is not None and update is not None:
                return _split(own, update), "link"
            return f"nothing but Kineto counts here: {one}", "kineto"
        first = copied_bytes(one.copies)
        if self.session.attached is None:
            return _split(first, dict.fromkeys(DIRECTIONS, 0)), "kineto"
        if update is not None:
            return _split(first, update), "kineto"
        two = self.traced(2)[0]
        if isinstance(two, str):
            return f"nothing but Kineto counts here: {two}", "kineto"
        second = copied_bytes(two.copies)
        return _split(first, {d: 2 * first[d] - second[d] for d in DIRECTIONS}), "kineto"

    def context(self) -> Figure:
        """Bytes of the card in use beside torch's allocator: by this process, or, where NVML does not tell, by all."""
        if self.nvml is None:
            return "no CUDA GPU"
        process = self.nvml.process_bytes()
        free, total = torch.cuda.mem_get_info()
        return (total - free if isinstance(process, str) else process) - torch.cuda.memory_reserved()


def memory_asked(error: BaseException) -> str | None:
    """What was asked for when memory ran out, the message's first two sentences (the rest names processes); None for
    another error."""
    if not is_out_of_memory(error):
        return None
    return ". ".join((str(error).splitlines() or ["unknown size"])[0].split(". ")[:2]).rstrip(".")


def _split(step: dict[str, int], update: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes of a micro-batch and of an update, from those of a step of one micro-batch and of its update."""
    return {"micro_batch": {d: step[d] - update[d] for d in DIRECTIONS}, "update": update}


def _cap(cap_bytes: int | None, total: int) -> None:
    if cap_bytes is None:
        return
    if not 0 < cap_bytes <= total:
        raise ValueError(f"a cap of {cap_bytes / _GIB:.2f} GiB does not fit a card of {total / _GIB:.2f} GiB")
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total, 0)


def components(serialised: dict[str, float], trace: Trace | str, has_link: bool) -> dict[str, Figure]:
    """PARTS, "gpu", "other_host" and "serialised_step", seconds. What no part covers is split by what Kineto saw:
    kernels, copies that no link made, and the rest, which is the host's."""
    found: dict[str, Figure] = {part: serialised[part] for part in PARTS}
    found["serialised_step"] = sum(serialised.values())
    rest = serialised[Clock.REST]
    if isinstance(trace, str):
        return {**found, "gpu": rest, "other_host": f"within gpu: {trace}"}
    if not has_link:
        for direction in DIRECTIONS:
            seconds = sum(c.seconds for c in trace.copies if c.direction == direction)
            found[direction] = seconds
            rest -= seconds
    return {**found, "gpu": trace.busy_s, "other_host": max(0.0, rest - trace.busy_s)}
