"""The simulated machine: one dispatch mode that sees every operation of a training step, host and device alike.

For each it answers what data would have decided (sizes), follows live bytes (ledger), counts what crosses (transfers)
and notes the work (operations), from which timeline.py makes seconds for any card.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meft_bench.observe import Work
from meft_bench.simulate import device as simulated
from meft_bench.simulate.costs import hidden_bytes, work
from meft_bench.simulate.ledger import Ledger, Segment
from meft_bench.simulate.sizes import Sizes
from meft_bench.simulate.transfers import copies

PREFETCH = "prefetch"
"""Name of an operation that fetches weights on a stream of its own."""
PART_OF_PURPOSE = {"hidden": "retrieval", "index": "retrieval", "score": "retrieval", "rows": "gather",
                   "grads": "gradients", "router_hidden": "gradients"}  # fmt: skip
"""What a copy is for, by its purpose."""
CATEGORY = {"load": "base weights", "forward": "activations", "backward": "backward temporaries",
            "update": "optimizer temporaries"}  # fmt: skip


class Operation(NamedTuple):
    """Work of one operation. place: "device", "host", "h2d" or "d2h"; a blocking one makes the host wait. part is what
    it is for: "model", or what was announced (retrieval, gather, gradients, adam)."""

    segment: Segment
    part: str
    name: str
    place: str
    flops: int
    bytes: int
    half: bool
    blocking: bool


class _Part(threading.local):
    """What this thread's work is for."""

    name = "model"


class Machine(TorchDispatchMode):
    """Follows what runs inside it. Use within simulated_gpu(), or on real CPU tensors (device="cpu" makes all of memory
    the device's) to check it. As a listener (observe.py) it learns what the work is for: a phase is that of all
    threads, as backward runs in one of its own, a part that of the thread which announced it."""

    def __init__(self, sizes: Sizes | None = None, device: str = simulated.NAME) -> None:
        super().__init__()
        self.ledger, self.sizes, self.device = Ledger(device), sizes, device
        self.bytes: dict[Segment, Counter[str]] = {}
        self.operations: list[Operation] = []
        self._part = _Part()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        out = NotImplemented if self.sizes is None else self.sizes.answer(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        ledger, crossed = self.ledger, copies(func, args, kwargs, out, self.device)
        category = "transferred rows" if any(c.direction == "h2d" for c in crossed) else CATEGORY[ledger.segment.phase]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                ledger.charge(tensor, category)
        ledger.note_peak(hidden_bytes(func, args) + max((c.temporary_bytes for c in crossed), default=0))
        if ledger.segment.phase != "load":
            self._note(func, args, kwargs, out, crossed)
        return out

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any, crossed: list) -> None:
        segment = self.ledger.segment
        for copy in crossed:
            self.bytes.setdefault(segment, Counter())[copy.direction] += copy.bytes
            self.operations.append(
                Operation(segment, self._part.name, func.__name__, copy.direction, 0, copy.bytes, False, copy.blocking)
            )
        if not crossed:
            flops, moved, half, tensor = work(func, args, kwargs, out)
            if moved:
                place = "device" if tensor is not None and tensor.device.type == self.device else "host"
                self.operations.append(
                    Operation(segment, self._part.name, func.__name__, place, flops, moved, half, False)
                )

    def start(self) -> None:
        """Forget peaks, bytes and operations so far; what lives stays counted."""
        self.ledger.reset_peaks()
        self.bytes.clear()
        self.operations.clear()

    @contextmanager
    def phase(self, name: str):
        """Work inside belongs to this phase, outside any layer until follow_layers says otherwise."""
        before = self.ledger.segment
        self.ledger.segment = Segment(name, -1)
        self.ledger.note_peak()
        try:
            yield
        finally:
            self.ledger.segment = before

    def during(self, work: Work) -> AbstractContextManager[None]:
        if work.kind == "phase":
            return self.phase(work.name)
        return self._within(PART_OF_PURPOSE[work.name] if work.kind == "copy" else work.name)

    @contextmanager
    def _within(self, part: str):
        before, self._part.name = self._part.name, part
        try:
            yield
        finally:
            self._part.name = before

    def follow_layers(self, layers: Iterable[nn.Module]) -> None:
        """Mark, in forward and in backward, which decoder layer is at work."""
        for number, layer in enumerate(layers):

            def enter(*_: Any, number: int = number) -> None:
                self._at(number)

            def leave(module: nn.Module, args: Any, out: Any, number: int = number) -> None:
                self._at(-1)
                output = out[0] if isinstance(out, tuple) else out
                if output.requires_grad:
                    # The gradient of a layer's output arrives just before its turn in backward.
                    output.register_hook(lambda gradient: self._at(number))

            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)

    def _at(self, layer: int) -> None:
        phase = self.ledger.segment.phase
        # Activation checkpointing runs a layer's forward within backward.
        if phase == "backward" and layer < 0:
            return
        self.ledger.segment = Segment(phase, layer)
        self.ledger.note_peak()
