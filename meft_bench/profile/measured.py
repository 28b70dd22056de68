"""One profiled step on a real GPU: the same code as simulated.py runs, measured.

Passes over one model after a warm-up: watched (peaks by phase, NVML's counters), timed (whole steps, nothing but
the step's own waits), serialised (seconds by part, nothing overlaps), traced (Kineto). Weights are random: memory,
bytes and speed do not depend on them, U does. device "cpu" runs the same passes without the figures of a GPU; it is for
tests.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from meft_bench.profile.base import Base
from meft_bench.profile.passes import Measured, Passes, memory_asked
from meft_bench.profile.session import Session
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.variants import KNOWN

NO_GPU = "torch sees no CUDA GPU: without one, meft-bench profile simulates"


class OutOfMemory(Exception):
    """The step does not fit; the message says where and what was asked for."""


def counted_by_run(neurons: int) -> Union:
    """What stands for U in the spec of a measured run, which counts its own."""
    return Union(rows=neurons, source="counted by the run itself", evidence="measured")


def check_device(device: str) -> None:
    """Raises ValueError unless torch can run there."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; known: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(NO_GPU)


def measure(
    spec: ProfileSpec,
    config: Any,
    *,
    device: str = "cuda",
    cap_bytes: int | None = None,
    steps: int = 10,
    warmup: int = 3,
    accumulations: Iterable[int] = (1,),
    host_bytes: int | None = None,
) -> Measured:
    """Run spec's variant at the size of config, with 1 and each other of accumulations micro-batches a step.

    cap_bytes caps what torch's allocator may hold on the device; host_bytes replaces what the system says the host has
    free. Raises OutOfMemory when a step of one micro-batch does not fit (of more: Measured.lacking), and ValueError for
    a missing GPU or package, too little host memory, or a cap above the card's memory.
    """
    check_device(device)
    if KNOWN[spec.variant].engine:
        raise ValueError(f"{KNOWN[spec.variant].title}: its engine is modelled by formula, not run")
    passes = Passes(Session(spec, device, host_bytes), cap_bytes)
    with _memory_said(passes):
        passes.session.build(config)
        return passes.all(steps, warmup, sorted({1, *accumulations}))


def measure_on(
    base: Base,
    spec: ProfileSpec,
    *,
    steps: int,
    warmup: int,
    later_steps: int | None = None,
    vocabulary: int | None = None,
    accumulations: Iterable[int] = (1,),
    host_bytes: int | None = None,
    go_on: Callable[[], None] = lambda: None,
    whole: bool = True,
) -> Measured:
    """measure() on a base that is there, which is left as it was. later_steps: timed steps with more than one
    micro-batch, where they should be fewer. vocabulary: tokens
    to draw from; None draws from all. whole=False leaves out the serialised and the traced pass. go_on is called
    before every step, and may raise to end the measurement.

    Raises ValueError as well for a variant that changes the base.
    """
    variant = KNOWN[spec.variant]
    if variant.engine or variant.trains_base or variant.quantised:
        raise ValueError(f"{variant.title}: changes the base, or is modelled by formula; it cannot share one")
    with base.lent():
        passes = Passes(Session(spec, base.device, host_bytes), None, go_on, whole)
        try:
            with _memory_said(passes):
                before = base.drawn.nbytes
                with base.drawn:
                    passes.session.attach(base)
                passes.host_before += base.drawn.nbytes - before  # kept for later rows
                passes.session.vocabulary = vocabulary or base.vocabulary
                return passes.all(steps, warmup, sorted({1, *accumulations}), later_steps)
        finally:
            passes.session.close()


@contextmanager
def _memory_said(passes: Passes) -> Iterator[None]:
    """Raises OutOfMemory for whatever ran out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (asked := memory_asked(error)) is not None:
            raise OutOfMemory(f"in {passes.peaks.now}: {asked}") from None
        raise
