"""All rows kept on the device: lent as they lie, or gathered by a union that the host keeps account of."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.residency import KeptRows
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore

_WIRE = torch.bfloat16


def changes(sizes: Sizes) -> Iterator[Change]:
    """What a micro-batch does with rows and gradients beside the adapter's own products."""
    layer = _Layer(sizes)
    yield Change(
        name="all rows kept: lent whole, against a union of slots",
        old=layer.by_slots,
        new=layer.as_they_lie,
        sizes={"R": sizes.neurons, "U": sizes.touched, "D": sizes.hidden},
        counts={"bytes at the link": (layer.crossing(layer.by_slots), layer.crossing(layer.as_they_lie))},
        before=layer.draw,
    )


class _Layer:
    """One layer whose rows are all on a device that is the same memory, once with slots and once without."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.link, self.generator = sizes, Link(), torch.Generator().manual_seed(0)
        config = MeftOptions(neurons=sizes.neurons, kept=sizes.kept, gate="none")
        self.store = NeuronStore(config, sizes.hidden, self.generator, torch.device("cpu"))
        place = self.store, self.link, torch.device("cpu"), _WIRE
        self._kept, self._whole = KeptRows(*place, sizes.neurons), WholeRows(*place)
        self._grads_RHD = torch.zeros(sizes.neurons, 2, sizes.hidden, dtype=_WIRE)
        self._kept.lend(torch.arange(sizes.neurons), True).release(self._grads_RHD)
        self.draw()

    def draw(self) -> None:
        """Another round: other rows."""
        numbers = torch.randperm(self.sizes.neurons, generator=self.generator)
        self._union_U = numbers[: self.sizes.touched].sort().values
        self._grads_UHD = self._grads_RHD[self._union_U]

    def by_slots(self) -> Tensor:
        """A union, its slots, a copy of its rows, and its gradients into their slots."""
        loan = self._kept.lend(self._union_U, True)
        rows_U2D = loan.rows(loan.arrived())
        loan.add_gradients(self._grads_UHD)
        loan.release(loan.arrived())
        return rows_U2D

    def as_they_lie(self) -> Tensor:
        """The rows themselves, and the gradients of all of them."""
        self._whole.ready()
        loan = self._whole.lend_all(self._union_U)
        rows_R2D = loan.rows(loan.arrived())
        loan.add_gradients(self._grads_RHD)
        loan.release(loan.arrived())
        return rows_R2D

    def crossing(self, work: Callable[[], Tensor]) -> int:
        """Bytes that cross when all rows are current."""
        work()
        self.link.reset()
        work()
        return sum(self.link.bytes.values())
