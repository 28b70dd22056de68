"""What clipping adds to a whole training step of one layer: forward and backward pass, norm, AdamW."""

from collections.abc import Callable, Iterator

import torch

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore


def changes(sizes: Sizes) -> Iterator[Change]:
    """Old and new train the same adapter, on the same tokens of a round."""
    config = MeftOptions(neurons=sizes.neurons, kept=sizes.kept, probed=sizes.probed)
    store = NeuronStore(config, sizes.hidden, torch.Generator().manual_seed(0), torch.device("cpu"))
    torch.nn.init.normal_(store.values, std=0.02)
    adapter, optimizer = MeftAdapter(config, store, Link(), BatchInfo()).train(), DenseRowAdamW([store], lr=1e-4)
    generator, inputs = torch.Generator().manual_seed(1), [torch.empty(0)]

    def draw() -> None:
        inputs[0] = torch.randn(sizes.tokens, sizes.hidden, generator=generator)

    def step(clip: Callable[[], object] = lambda: None) -> None:
        adapter(inputs[0]).sum().backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()

    draw()
    step()
    yield Change(
        name="a layer's whole step: clipped, against one that is not",
        old=step,
        new=lambda: step(lambda: clip_grad_norm([store], 1e-3)),
        sizes={"R": sizes.neurons, "T": sizes.tokens, "D": sizes.hidden, "K": sizes.kept},
        counts={"passes over gradients for the norm": (0, 1)},
        before=draw,
    )
