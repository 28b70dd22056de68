"""A step over gradients that are touched once, against one that zeroes, adds up, multiplies and updates in passes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import adamw, kernels
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.store import NeuronStore

_NORM = 1e-3  # below that of the gradients: clipping bites


class _Step:
    """Optimizer steps of one layer, U of whose rows have a bf16 gradient. keeps: it may be kept as it arrived."""

    def __init__(self, sizes: Sizes, keeps: bool = True) -> None:
        config = MeftOptions(neurons=sizes.neurons, kept=sizes.kept, key_experts=False)
        self.generator = torch.Generator().manual_seed(0)
        self.store = NeuronStore(config, sizes.hidden, self.generator, torch.device("cpu"))
        self.optimizer = DenseRowAdamW([self.store], lr=1e-3)
        self.grads_U2D = torch.randn(sizes.touched, 2, sizes.hidden, generator=self.generator).bfloat16()
        self.index_U = torch.randperm(sizes.neurons, generator=self.generator)[: sizes.touched].sort().values
        self.release = (lambda: None) if keeps else None

    def __call__(self, clip: Callable[[], Any] = lambda: None) -> None:
        self.store.add_gradients(self.index_U, self.grads_U2D, self.release)
        clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clip(self) -> None:
        clip_grad_norm([self.store], _NORM)

    def clip_by_torch(self) -> None:
        nn.utils.clip_grad_norm_(list(self.store.parameters()), _NORM)


def changes(sizes: Sizes) -> Iterator[Change]:
    """Clipping, zeroing, adding up and calls of an AdamW step, each alone."""
    about = {"R": sizes.neurons, "U": sizes.touched, "D": sizes.hidden}
    U2D, R2D = 2 * sizes.touched * sizes.hidden, 2 * sizes.neurons * sizes.hidden
    ours, theirs = _Step(sizes), _Step(sizes)
    yield Change(
        name="step: clipped by the engine, not by torch",
        old=lambda: theirs(theirs.clip_by_torch),
        new=lambda: ours(ours.clip),
        sizes=about,
        counts={"bytes read to measure": (4 * R2D, 2 * U2D), "bytes multiplied in place": (8 * R2D, 0)},
    )
    yield Change(
        name="step: clipped, against one that is not",
        old=lambda: ours(),
        new=lambda: ours(ours.clip),
        sizes=about,
        counts={"bytes read to measure": (0, 2 * U2D)},
    )
    yield from _kept(sizes, about, U2D)


def _kept(sizes: Sizes, about: dict[str, int], U2D: int) -> Iterator[Change]:
    kept, added = _Step(sizes), _Step(sizes, keeps=False)
    yield Change(
        name="step: gradients read as they arrived, not added up",
        old=lambda: added(),
        new=lambda: kept(),
        sizes=about,
        counts={"bytes of gradients": ((2 + 4 + 4) * U2D, 2 * U2D)},
    )
    sums_RX, index_U = added.store.gradients().flatten(1), added.index_U

    def zeroed() -> None:
        added()
        kernels.zero(sums_RX, index_U)

    yield Change(
        name="step: gradients overwritten, not zeroed",
        old=zeroed,
        new=lambda: added(),
        sizes=about,
        counts={"bytes zeroed": (4 * U2D, 0)},
    )
    yield _calls(added, about)


def _calls(step: _Step, about: dict[str, int]) -> Change:
    """AdamW of keys and values; every call makes the same step, of rows that are behind."""
    step()
    updates, grads_U2D, index_U = step.optimizer.updates[0], step.grads_U2D, step.index_U
    rows, constants = updates.rows(), updates.constants
    assert constants is not None

    def behind() -> None:
        rows.done_R.zero_()
        rows.still_R.zero_()

    def once() -> None:
        adamw.advance(rows, grads_U2D, index_U, 1, constants, listed=True)

    def twice() -> None:
        for half in range(2):
            adamw.advance(rows.half(half), grads_U2D[:, half], index_U, 1, constants, listed=True)

    return Change(
        name="AdamW: keys and values in one call",
        old=twice,
        new=once,
        sizes=about,
        counts={"calls": (2, 1)},
        ready=behind,
    )
