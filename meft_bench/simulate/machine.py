"""The simulated machine: one dispatch mode that sees every operation of a training step, host and device alike.

For each it answers what data would have decided (sizes), follows live bytes (ledger), counts what crosses (transfers)
and notes the work (operations), from which timeline.py makes seconds for any card. One thread does everything in turn;
who would do it in the background, after what and for whom, is noted beside the operations (Mark).
"""

import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from meft_bench.observe import Work
from meft_bench.simulate import device as simulated
from meft_bench.simulate.costs import hidden_bytes, tensors_in, work
from meft_bench.simulate.ledger import Ledger, Segment
from meft_bench.simulate.sizes import Sizes
from meft_bench.simulate.transfers import copies

PREFETCH = "prefetch"
"""Name of an operation that fetches weights on a stream of its own."""
PART_OF_PURPOSE = {"hidden": "retrieval", "index": "retrieval", "score": "retrieval", "rows": "gather",
                   "grads": "gradients", "router_hidden": "gradients", "parameters": "adam", "updates": "adam",
                   "router": "gather", "key_index": "gather", "keys": "gather", "marks": "gradients", "moments": "adam",
                   "masters": "adam", "factor": "adam", "norm": "gradients"}  # fmt: skip
"""What a copy is for, by its purpose."""
CATEGORY = {"load": "base weights", "forward": "activations", "backward": "backward temporaries",
            "update": "optimizer temporaries"}  # fmt: skip


_DEVICE = torch.ops.prim.device.default


class Operation(NamedTuple):
    """Work of one operation. place: "device", "host", "h2d" or "d2h"; a blocking one makes the host wait. part is what
    it is for: "model", or what was announced (retrieval, gather, gradients, adam). thread issued it: 0 the training
    thread, else the task of that number. copy: the number of the copy that it makes, 0 for none with a number."""

    segment: Segment
    part: str
    name: str
    place: str
    flops: int
    bytes: int
    half: bool
    blocking: bool
    thread: int = 0
    copy: int = 0


SUBMIT, PIECE, WAIT_TASK, WAIT_COPY = "submit", "piece", "wait task", "wait copy"


class Mark(NamedTuple):
    """A point in the order of operations at which `thread` hands the task `number` to a queue with a priority
    (SUBMIT), where a task may be put aside for a more urgent one (PIECE), or where `thread` waits: for a task
    (WAIT_TASK; queue is the one that had it) or for a copy (WAIT_COPY; it is the device that waits for a copy to the
    device)."""

    segment: Segment
    kind: str
    thread: int
    number: int
    queue: int = 0
    priority: int = 0


Program = list[Operation | Mark]
"""What a step does, in the order in which one thread would do it: the work of a task follows its SUBMIT."""


class _Here(threading.local):
    """What this thread's work is for, which task and which copy it is."""

    part = "model"
    task = 0
    copy = 0


class Machine(TorchDispatchMode):
    """Follows what runs inside it. Use within simulated_gpu(), or on real CPU tensors (device="cpu" makes all of memory
    the device's) to check it. As a listener (observe.py) it learns what the work is for: a phase is that of all
    threads, as backward runs in one of its own, a part that of the thread which announced it."""

    def __init__(self, sizes: Sizes | None = None, device: str = simulated.NAME) -> None:
        super().__init__()
        self.ledger, self.sizes, self.device = Ledger(device), sizes, device
        self.bytes: dict[Segment, Counter[str]] = {}
        self.program: Program = []
        self._here = _Here()
        self._submitted: set[int] = set()
        self._queues: dict[int, tuple[int, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; keeping the compiler off costs two more calls for every operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _DEVICE:
            return args[0].device  # asked for more often than all operations together
        kwargs = kwargs or {}
        out = NotImplemented if self.sizes is None else self.sizes.answer(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        ledger, crossed = self.ledger, copies(func, args, kwargs, out, self.device)
        category = "transferred rows" if any(c.direction == "h2d" for c in crossed) else CATEGORY[ledger.segment.phase]
        for tensor in tensors_in(out):
            ledger.charge(tensor, category)
        ledger.note_peak(hidden_bytes(func, args) + max((c.temporary_bytes for c in crossed), default=0))
        if ledger.segment.phase != "load":
            self._note(func, args, kwargs, out, crossed)
        return out

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any, crossed: list) -> None:
        segment, name, here = self.ledger.segment, func.__name__, self._here
        for copy in crossed:
            way, moved, waits = copy.direction, copy.bytes, copy.blocking
            self.bytes.setdefault(segment, Counter())[way] += moved
            self.program.append(Operation(segment, here.part, name, way, 0, moved, False, waits, here.task, here.copy))
        if not crossed:
            flops, moved, half, tensor = work(func, args, kwargs, out)
            if moved:
                place = "device" if tensor is not None and tensor.device.type == self.device else "host"
                self.program.append(Operation(segment, here.part, name, place, flops, moved, half, False, here.task))

    def start(self) -> None:
        """Forget peaks, bytes and operations so far; what lives stays counted."""
        self.ledger.reset_peaks()
        self.bytes.clear()
        self.program.clear()
        self._submitted.clear()

    @property
    def operations(self) -> list[Operation]:
        """The program without its marks."""
        return [entry for entry in self.program if isinstance(entry, Operation)]

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
        if work.kind == "wait":
            self._mark(WAIT_TASK if work.name == "task" else WAIT_COPY, self._here.task, work)
            return nullcontext()
        if work.kind == "task":
            self._hand_over(work)
            return self._within(task=work.number)
        if work.kind == "copy":
            return self._within(part=PART_OF_PURPOSE[work.name], copy=work.number)
        return self._within(part=work.name)

    def _hand_over(self, work: Work) -> None:
        """The task's first piece is its submission, as queues run at once here."""
        kind, thread = (PIECE, work.number) if work.number in self._submitted else (SUBMIT, self._here.task)
        self._submitted.add(work.number)
        self._mark(kind, thread, work)

    def _mark(self, kind: str, thread: int, work: Work) -> None:
        queue = 0
        if kind != WAIT_COPY:
            # The queue is kept, so that no other gets its id.
            queue, _ = self._queues.setdefault(id(work.about), (len(self._queues) + 1, work.about))
        self.program.append(Mark(self.ledger.segment, kind, thread, work.number, queue, work.priority))

    @contextmanager
    def _within(self, **now: Any):
        here = self._here
        before = {name: getattr(here, name) for name in now}
        here.__dict__.update(now)
        try:
            yield
        finally:
            here.__dict__.update(before)

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
