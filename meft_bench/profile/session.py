"""One variant on one device: its model, its optimizer, and the steps that the passes of a measurement run."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from meft_bench import host_memory, observe
from meft_bench.meft.adam import RowAdamW
from meft_bench.meft.engine.host_part import HostPart
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore
from meft_bench.profile.base import Base
from meft_bench.profile.host_adamw import HostAdamW
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.step import inference_step, prepare, training_step
from meft_bench.profile.variants import KNOWN, Variant, attach, make_optimizer, size_options
from meft_bench.train.methods import Attached, find_method
from meft_bench.train.step_bytes import LEAST_STATE_BYTES, STATE_BYTES

_STAGING_BYTES = 2
"""Of a parameter that a host optimizer updates: its value in half precision, on its way."""
_GIB = 2**30


class Session:
    """Made empty, so that a watcher can be there before the model; build() fills it."""

    def __init__(self, spec: ProfileSpec, device: str, host_bytes: int | None = None) -> None:
        """host_bytes: what the host has for this; None asks the system, which is too low on a virtual machine that
        starts with little memory and grows."""
        self.variant, self.spec, self.device = KNOWN[spec.variant], dataclasses.replace(spec, accumulation=1), device
        self.host_bytes = host_bytes
        self.attached: Attached | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.size: dict[str, Any] = {}

    def build(self, config: Any) -> None:
        """A random model of its own, and attach(). Raises ValueError as attach does."""
        self.attach(Base(config, self.device))

    def attach(self, base: Base) -> None:
        """Adapter and optimizer on a base. Raises ValueError for options that do not fit, a missing package, or too
        little host memory."""
        torch.manual_seed(0)
        self.model, self.vocabulary, self.shape = base.model, base.vocabulary, base.shape
        if self.variant.untrained:
            prepare(self.model, self.spec, training=False)
            return
        self.size = size_options(self.variant, self.spec.neurons, base.counted, self.spec.rank)
        options = find_method(self.variant.method).Options(**self.size)
        check_host_memory(self.variant, base.counted.trainable(self.variant.method, options), self.host_bytes)
        self.attached = attach(self.variant, self.size, self.model, simulated=False)
        self.optimizer = make_optimizer(self.variant, self.attached, simulated=False)
        prepare(self.model, self.spec)

    @property
    def link(self) -> Link | None:
        return self.attached.link if self.attached is not None else None

    @property
    def usage(self) -> list[list[tuple[int, int]]]:
        """Per layer, (tokens, U) of the micro-batches since clear()."""
        return self.attached.usage if self.attached is not None else []

    @property
    def stores(self) -> list[NeuronStore]:
        """MEFT's, one a layer; none of another method."""
        return [module for module in self.model.modules() if isinstance(module, NeuronStore)]

    @property
    def trainable(self) -> int:
        return sum(self.attached.parameter_groups().values()) if self.attached is not None else 0

    def step(self, accumulation: int) -> None:
        """One optimizer step, or one forward pass of the base model; observers hear its phases and parts."""
        spec = dataclasses.replace(self.spec, accumulation=accumulation)
        if self.attached is None or self.optimizer is None:
            inference_step(self.model, spec, self.vocabulary, self.device)
        else:
            training_step(self.attached, self.optimizer, spec, self.vocabulary, self.device)

    @contextmanager
    def serial(self) -> Iterator[None]:
        """Within, the host's work is done by the caller and at once, whatever the engine's option says: the same bits,
        and nothing runs beside anything."""
        host = self.optimizer.queue if isinstance(self.optimizer, HostAdamW) else None
        was = host is not None and host.background
        parts = [module for module in self.model.modules() if isinstance(module, HostPart)]
        before = [part.config for part in parts]
        try:
            for part in parts:
                part.config = dataclasses.replace(part.config, overlap=False)
            if host is not None:
                host.turn(False, host.device)
            yield
        finally:
            if host is not None:
                host.turn(was, host.device)
            for part, config in zip(parts, before, strict=True):
                part.config = config

    def settle(self) -> None:
        """Make updates that were put off, and wait(). What a budget keeps on the device stays there: bringing it home
        is no part of a step, and the steps after it would be those of another budget."""
        if isinstance(self.optimizer, RowAdamW):
            self.optimizer.catch_up()
        self.wait()

    def wait(self) -> None:
        """Wait for what the host does in the background, and for the device."""
        for store in self.stores:
            store.queue.wait()
        self.synchronize()

    def close(self) -> None:
        """Let go of what was attached."""
        self.attached = self.optimizer = None

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Forget what link and adapters have counted."""
        if self.link is not None:
            self.link.reset()
        for layer in self.usage:
            layer.clear()

    def linked(self) -> Counter[tuple[str, str]] | None:
        """The link's count since clear(); None without a link."""
        return Counter(self.link.bytes) if self.link is not None else None

    def uncounted(self, accumulation: int) -> dict[str, dict[str, int]]:
        """Bytes that crossed beside the link in the step since clear(), by direction and name: int64 token ids; MEFT's
        look at the int64 attention mask, once a micro-batch."""
        ids = 8 * self.spec.tokens * accumulation
        h2d, d2h = {"token ids": ids}, {}
        if self.variant.is_meft:
            d2h["attention mask"] = ids
        return {"h2d": h2d, "d2h": d2h}

    def part_of(self, work: observe.Work) -> str | None:
        """The part of a step that announced work is timed as: a copy by its direction. An optimizer that runs on the
        device is device work, as in the simulation."""
        if work.kind == "copy":
            return work.direction
        if work.kind != "part":  # a task is timed as the parts that it announces
            return None
        if work.name == "adam":
            inner = self.optimizer.inner if isinstance(self.optimizer, HostAdamW) else None
            on_host = self.link is not None or (inner is not None and work.about is inner)
            return "adam" if on_host else None
        return work.name


def check_host_memory(variant: Variant, trainable: int, free: int | None = None) -> None:
    """Raises ValueError when a variant's fp32 parameters, gradients and two moments (of 16 bits where it keeps such;
    and a host optimizer's half-precision staging) exceed what the host has free: the bytes given, or what the system
    says."""
    host_optimizer = variant.optimizer.startswith(("host", "torchao"))
    if not (host_optimizer or variant.on_host):
        return
    state = LEAST_STATE_BYTES if variant.options.get("moments") == "bf16" else STATE_BYTES
    need = (state + _STAGING_BYTES * host_optimizer) * trainable
    free = host_memory.available_bytes() if free is None else free
    if need > free:
        raise ValueError(
            f"needs {need / _GIB:.1f} GiB of host memory for {trainable:,} trainable parameters, "
            f"{free / _GIB:.1f} GiB are free: take a smaller R, or say how much there is (--host-memory)"
        )
