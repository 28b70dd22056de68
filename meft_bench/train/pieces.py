"""The coarse pieces of a training step that every method shares, by closed formula: the frozen base on the device.

What a method adds is its own: policy.py is MEFT's. Symbols: T tokens of a micro-batch, D hidden size.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from meft_bench.simulate.blocks import Block, blocks
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import Mark, Operation

if TYPE_CHECKING:
    from meft_bench.train.policy import Workload

_FP32 = 4


class Pieces:
    """The pieces of a step on so many decoder layers, with micro-batches of so many rows."""

    def __init__(self, work: "Workload", rows: int, layers: int) -> None:
        self.work, self.rows, self.layers, self.count = work, rows, layers, 0
        self.D, self.T = work.shape.hidden, rows * work.length

    def step(self, number: int) -> Sequence[Block]:
        """As timeline.Step: all micro-batches are alike."""
        return self._update if number < 0 else self._micro_batch

    @cached_property
    def _micro_batch(self) -> Sequence[Block]:
        return blocks(self.micro_batch(), self.work.card, self.work.host)

    @cached_property
    def _update(self) -> Sequence[Block]:
        return blocks(self.update(), self.work.card, self.work.host)

    def micro_batch(self) -> Iterator[Operation | Mark]:
        """Forward and backward of the base alone."""
        for layer in range(self.layers):
            at = Segment("forward", layer)
            yield from self._attention(at)
            yield from self._ffn(at)
        yield from self._head()
        for layer in reversed(range(self.layers)):
            yield from self._through_base(Segment("backward", layer))

    def update(self) -> Iterator[Operation | Mark]:
        """Nothing is trained."""
        return iter(())

    # ---- the base: element-wise passes over [T, D] as transformers' Llama makes them, normalisation in fp32; those of
    # the narrower keys and values and of the FFN in proportion ----

    def _attention(self, at: Segment) -> Iterator[Operation]:
        shape, D, T = self.work.shape, self.D, self.T
        linear = D * shape.query * 2 + 2 * D * shape.value
        flops = 2 * T * linear + 4 * T * self.work.length * shape.query
        return self._device(at, flops, 2 * linear, kernels=33, passes=52 + 10 * shape.value / D)

    def _ffn(self, at: Segment) -> Iterator[Operation]:
        shape, D, T = self.work.shape, self.D, self.T
        return self._device(at, 2 * T * 3 * D * shape.ffn, 2 * 3 * D * shape.ffn, kernels=5, passes=5 * shape.ffn / D)

    def _head(self) -> Iterator[Operation]:
        for phase in ("forward", "backward"):
            yield from self._device(Segment(phase, -1), 2 * self.T * self.D * self.work.vocabulary, 0)

    def _through_base(self, at: Segment) -> Iterator[Operation]:
        """Backward through a frozen layer: gradients of its input alone."""
        shape, D, T = self.work.shape, self.D, self.T
        linear = D * shape.query * 2 + 2 * D * shape.value + 3 * D * shape.ffn
        attention = 10 * T * self.work.length * shape.query
        passes = 114 + 16 * shape.value / D + 9 * shape.ffn / D
        return self._device(at, 2 * T * linear + attention, 2 * linear, kernels=62, passes=passes)

    # ---- operations ----

    def _next(self) -> int:
        self.count += 1
        return self.count

    def _device(
        self, at: Segment, flops: float, moved: float, kernels: int = 1, passes: float = 0
    ) -> Iterator[Operation]:
        """The products of a piece with its element-wise passes over [T, D], in so many kernels of equal length: each
        takes the training thread the time to issue it."""
        card = self.work.card
        rate = card.half_rate.value * card.half_share.value if self._half else (
            card.full_rate.value * card.full_share.value
        )  # fmt: skip
        bandwidth = card.bandwidth.value * card.bandwidth_share.value
        by_element = passes * self.T * self.D * (2 if self._half else _FP32) / bandwidth
        seconds = max(flops / rate, moved / bandwidth) + by_element
        each = Operation(at, "model", "mm.", "device", 0, int(seconds / kernels * bandwidth), self._half, False)
        for _ in range(kernels):
            yield each

    @property
    def _half(self) -> bool:
        return self.work.dtype == "bfloat16"

    def _host(self, at: Segment, name: str, flops: float, moved: float, task: int, part: str) -> Operation:
        return Operation(at, part, name, "host", int(flops), int(moved), False, False, task)

    def _crossing(self, at: Segment, way: str, moved: float, number: int, task: int = 0) -> Operation:
        return Operation(at, "gather", "copy", way, 0, int(moved), False, False, task, number)
