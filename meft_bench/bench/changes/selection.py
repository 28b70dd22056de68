"""Neurons selected where the hidden states are, with Key-Experts, so that these do not cross.

No GPU is at work: the device is this processor's memory, and a copy to it is a copy. Old and new do the same products
on the same cores, so the times say what the way of working costs beside them; the bytes are those of any device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore


def changes(sizes: Sizes) -> Iterator[Change]:
    """The forward pass of one layer: select, send rows, multiply."""
    host, device = _Layer(sizes, "host"), _Layer(sizes, "device")
    generator, inputs = torch.Generator().manual_seed(0), [torch.empty(0)]

    def draw() -> None:
        inputs[0] = torch.randn(sizes.tokens, sizes.hidden, generator=generator)

    draw()
    yield Change(
        name="selection with Key-Experts: on the device (a processor), not on the host",
        old=lambda: host(inputs[0]),
        new=lambda: device(inputs[0]),
        sizes={"R": sizes.neurons, "T": sizes.tokens, "D": sizes.hidden, "K": sizes.kept, "P": sizes.probed},
        counts={"bytes at the link": (host.crossing(inputs[0]), device.crossing(inputs[0]))},
        before=draw,
    )


class _Layer:
    """An adapter whose rows cross in bf16; retrieval as in EngineConfig."""

    def __init__(self, sizes: Sizes, retrieval: str) -> None:
        config = MeftOptions(
            neurons=sizes.neurons, kept=sizes.kept, probed=sizes.probed, wire="bf16", retrieval=retrieval
        )
        store = NeuronStore(config, sizes.hidden, torch.Generator().manual_seed(0), torch.device("cpu"))
        self.link = Link()
        self.adapter = MeftAdapter(config, store, self.link, BatchInfo()).eval()

    @torch.no_grad()
    def __call__(self, h_TD: Tensor) -> Tensor:
        return self.adapter(h_TD)

    def crossing(self, h_TD: Tensor) -> int:
        """Bytes that cross in one pass when the keys are there."""
        self(h_TD)
        self.link.reset()
        self(h_TD)
        return sum(self.link.bytes.values())
