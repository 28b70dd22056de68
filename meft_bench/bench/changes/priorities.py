"""The order of queued work: what the device waits for first, against first come, first served."""

from collections.abc import Iterator

import torch

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.config import default_experts
from meft_bench.meft.engine import adamw, kernels
from meft_bench.meft.engine.workers import RETRIEVAL, UPDATE, HostQueue

_LAYERS = 4
_PIECE = 256  # rows of an update between which other layers are looked at, as the engine cuts them


def changes(sizes: Sizes) -> Iterator[Change]:
    """How long the next micro-batch waits for the first layer's search, when the step of all layers has been queued."""
    layers = _Layers(sizes)
    yield Change(
        name="a search behind queued updates: by priority, not in the order of submission",
        old=lambda: layers.search_after_step(RETRIEVAL),  # of equal priorities the earlier goes first
        new=lambda: layers.search_after_step(UPDATE),
        sizes={"layers": _LAYERS, "R": sizes.neurons, "T": sizes.tokens, "D": sizes.hidden, "P": sizes.probed},
        counts={"updates that go first": (_LAYERS, 1)},
        before=layers.memory.draw,
        ready=layers.ready,
    )
    layers.ready()


class _Layers:
    """Layers whose rows, a part of one memory each, have an AdamW step queued; the search is of all keys of it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.memory = sizes, sizes.layer()
        self.queues = [HostQueue(f"layer {i}", background=True) for i in range(_LAYERS)]
        self.parts = torch.arange(sizes.neurons).chunk(_LAYERS)
        self.state = self.memory.state(torch.float32)

    def ready(self) -> None:
        """All work is done, and every row is a step behind."""
        for queue in self.queues:
            queue.wait()
        self.memory.done_R.zero_()
        self.memory.still_R.zero_()

    def search_after_step(self, priority: int) -> None:
        """Queue the updates with this priority and then a search of the first layer; return when that is done."""
        for queue, rows_U in zip(self.queues, self.parts, strict=False):
            queue.submit(self._update, rows_U, priority=priority)
        self.queues[0].result(self.queues[0].submit(self._search, priority=RETRIEVAL))

    def _update(self, rows_U: torch.Tensor) -> Iterator[None]:
        for some_U in rows_U.split(_PIECE):
            adamw.advance(self.state, self.memory.grads_R2D[:, 1], some_U, 1, self.memory.steps)
            yield

    def _search(self) -> None:
        memory, sizes = self.memory, self.sizes
        size = sizes.neurons // default_experts(sizes.neurons)
        kernels.search_experts(
            memory.h_TD, memory.rows_R2D[:, 0], None, memory.experts_TP, memory.gates_TP, size, sizes.kept, True
        )
