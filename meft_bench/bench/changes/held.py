"""Rows whose optimizer is on the device: used where they lie, and stepped in few passes.

No GPU is at work: the device is this processor's memory. What is timed is the moving of rows and gradients beside the
adapter's own products, and AdamW; both wait for memory, here as on a GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import adamw, device_step
from meft_bench.meft.engine.device_adam import DeviceAdam
from meft_bench.meft.engine.residency import KeptLoan, KeptRows
from meft_bench.meft.engine.schedule import step_constants
from meft_bench.meft.engine.slots import Slots
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore

_WIRE = torch.bfloat16


def changes(sizes: Sizes) -> Iterator[Change]:
    """A micro-batch whose union holds all held rows, half of U, and as many others; a step of lazy rows in bf16."""
    gathered, in_place = _Layer(sizes, False), _Layer(sizes, True)
    held, row = sizes.touched // 2, 2 * sizes.hidden
    yield Change(
        name="held rows: used where they lie, not gathered",
        old=gathered,
        new=in_place,
        sizes={"U": sizes.touched, "held": held, "D": sizes.hidden},
        # Rows in forward and in backward; gradients chosen, sums fetched, added to, written back.
        counts={"bytes of rows and gradients": (2 * sizes.touched * row * 4 + held * row * 30, held * row * 10)},
    )
    rows = _Rows(sizes)
    yield Change(
        name="AdamW on the device, lazy rows, bf16 moments: in few passes, with noise by row and column",
        old=rows.by_the_hosts_rule,
        new=rows.in_few_passes,
        sizes={"rows": sizes.touched, "D": sizes.hidden},
        counts={"hashes": (2 * sizes.touched * sizes.hidden, 2 * (2 * sizes.touched + sizes.hidden))},
    )


class _Layer:
    """A layer that holds half of U rows and, in each call, lends them with as many others, which pass through."""

    def __init__(self, sizes: Sizes, in_place: bool) -> None:
        config = MeftOptions(neurons=sizes.neurons, kept=sizes.kept, gate="none")
        store = NeuronStore(config, sizes.hidden, torch.Generator().manual_seed(0), torch.device("cpu"))
        self._optimizer = DenseRowAdamW([store], lr=1e-3)
        self._union_U, held = torch.arange(sizes.touched), sizes.touched // 2
        self._rows = KeptRows(store, Link(), torch.device("cpu"), _WIRE, held)
        self._rows.may_be_in_place = in_place
        self._rows.adam = DeviceAdam(self._rows, None, torch.float32, host_selects=False)
        for _ in range(Slots.known_after):
            loan = self._lent(self._union_U[:held])
            loan.settle()
            loan.release(torch.empty(0))
        store.add_gradients(self._union_U, torch.zeros(sizes.touched, 2, sizes.hidden))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._rows.adam.take(self._optimizer.updates[0])
        self._grads_UHD = torch.zeros(sizes.touched, 2, sizes.hidden, dtype=_WIRE)

    def _lent(self, rows_U: Tensor) -> KeptLoan:
        return self._rows.lend(rows_U, True)

    def __call__(self) -> None:
        loan = self._lent(self._union_U)
        sent = loan.arrived()
        if loan.in_place is None:
            loan.rows(sent)
            loan.rows(sent)
        loan.add_gradients(self._grads_UHD)
        loan.release(sent)


class _Rows:
    """Weights, moments and gradients of rows that count their own steps."""

    def __init__(self, sizes: Sizes) -> None:
        shape = sizes.touched, sizes.hidden
        self._weights, self._grads = torch.zeros(shape), torch.ones(shape)
        self._first, self._second = (torch.zeros(shape, dtype=_WIRE) for _ in range(2))
        self._numbers, self._taken = torch.arange(shape[0]), torch.ones(shape[0], dtype=torch.int32)
        self._marked = torch.ones(shape[0], dtype=torch.bool)
        self._steps = adamw.Steps(torch.empty(0, 3), 0, 0.9, 0.999, 1e-8, 1.0)
        rate, scale, decay = step_constants(1, 1e-3, (0.9, 0.999), 0.0)
        self._rates = torch.full((shape[0], 1), rate), torch.full((shape[0], 1), scale), decay

    def by_the_hosts_rule(self) -> None:
        values = self._weights, self._first.float(), self._second.float()
        rate, scale, decay = self._rates
        constants = rate, scale, torch.full_like(rate, decay)
        made = adamw.made_step(values, self._grads, constants, self._taken, self._numbers, 0, True, self._steps)
        old = self._weights, self._first, self._second
        for mine, new in zip(old, made, strict=True):
            mine.copy_(torch.where(self._marked[:, None], new, mine))

    def in_few_passes(self) -> None:
        device_step.advance(
            self._weights, self._first, self._second, self._grads, self._steps, self._taken, self._rates, self._marked,
            self._numbers, 0,
        )  # fmt: skip
