"""Rows whose optimizer is on the device: their fp32 master weights, their moments and their AdamW (device_budget).

At zero_grad, after a first step on the host, they are handed over: all their steps are made, weights and moments cross
once, and from then on the host leaves them alone. If not all rows fit, they are those used most, once that is known
(slots.py). Their gradients stay where they are made, and each step renews their copies in the wire's format. So nothing
of them crosses in training but, for clipping, one number a step and, where the host selects neurons, their keys. The
update is the host's (adamw.made_step), to the bit on a processor; on CUDA fp32 dense AdamW is torch's fused one, equal
to rounding.

Whoever looks at a parameter, a gradient or the optimizer's state brings them home first (home()), where everything is
as if they had never left; they are handed over again after a window in which nobody looked. M rows, others as in
config.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from meft_bench.meft.engine import adamw, device_step
from meft_bench.meft.engine.device_router import DeviceRouter
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.index import KeyIndex
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.store import NeuronStore

if TYPE_CHECKING:
    from meft_bench.meft.engine.updates import StoreUpdates

ELSEWHERE = torch.iinfo(torch.int32).max
"""The step that a row is current for, in the host's books, while its optimizer is on the device."""
_ROWS_AT_ONCE = 2048


class Residency(Protocol):
    """Where the rows lie on the device: KeptRows (residency.py) or WholeRows (whole.py)."""

    store: NeuronStore
    link: Link | Resident
    device: torch.device

    @property
    def capacity(self) -> int:
        """M."""

    @property
    def held_grads(self) -> Tensor:
        """Their gradients, fp32 [M, H, D]."""

    @property
    def held_marks(self) -> Tensor:
        """Which have one, and which got one since the last step; bool [2, M]."""

    def to_hold(self) -> Tensor | None:
        """The rows whose optimizer is to come here, ascending numbers [M]; None if none may come now."""

    def hold(self, rows_M: Tensor) -> None:
        """From now on the optimizer of these rows is here, and the i-th lies in slot i: no gradient of theirs goes
        home, and none is renewed from there."""

    def let_go(self) -> None:
        """Their optimizer is on the host again, which has what they were left as; their gradients may go home."""

    def writable(self) -> Tensor:
        """The rows [M, 2, D] ([M, 1, D], values alone) in the wire's format, to be written."""

    def mark_all(self) -> None:
        """Each row here has a gradient."""

    def drop(self) -> None:
        """Forget all gradients that wait here."""

    def collect(self) -> None:
        """Send all gradients home that wait here, unless their optimizer is here too."""


@dataclass
class _Part:
    """One parameter: some rows of the keys or values, or the whole router."""

    name: str
    weights: Tensor
    """fp32 [M, D], and so are the moments, or bf16."""
    first: Tensor
    second: Tensor
    counts: Tensor
    """int32 [M]: each row's steps, used where rows count their own (adam="lazy")."""


class DeviceAdam:
    """AdamW on the device for M rows of one layer, and for its router."""

    def __init__(
        self, residency: Residency, router: DeviceRouter | None, moments: torch.dtype, host_selects: bool
    ) -> None:
        """host_selects: the host needs the keys after every step."""
        self.residency, self.router, self.host_selects, self._moments = residency, router, host_selects, moments
        self.index: KeyIndex | None = None
        """The device's copy of all keys, where the rows there are values alone."""
        self.numbers_M = torch.empty(0, dtype=torch.int64)
        """The rows that are here, while they are."""
        self.numbers_there = self.numbers_M
        """The same on the device."""
        self._halves = ["keys", "values"] if residency.store.trains_keys else ["values"]
        self.parts = [self._part(name, residency.capacity, residency.store.hidden_size) for name in self._halves]
        if router is not None:
            self.parts.append(self._part("router", *router.router_ND.shape))
        self._updates: StoreUpdates | None = None

    def _part(self, name: str, rows: int, width: int) -> _Part:
        device = self.residency.device
        weights = torch.zeros(rows, width, device=device)
        first, second = (torch.zeros(rows, width, dtype=self._moments, device=device) for _ in range(2))
        return _Part(name, weights, first, second, torch.zeros(rows, dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        """Device bytes of weights and moments."""
        return sum(t.nbytes for part in self.parts for t in (part.weights, part.first, part.second))

    @property
    def is_away(self) -> bool:
        """Whether the device's weights and moments are the true ones."""
        return self._updates is not None

    # ---- there and back ----

    @torch.no_grad()
    def take(self, updates: "StoreUpdates") -> None:
        """Take weights and moments over, unless somebody looked at them since the last window. The host's part, when
        gradients were cleared."""
        residency, store = self.residency, self.residency.store
        looked_at, store.looked_at = store.looked_at, False
        if self.is_away or looked_at or updates.optimizer.moments != self._moments:
            return
        if [part.name for part in self.parts] != updates.trained:
            return  # something was frozen, or set free, since that optimizer was made or rows last came here
        numbers_M = residency.to_hold()
        if numbers_M is None:
            return
        self.numbers_M = numbers_M
        try:
            self._fetch(updates)
            if self.index is not None and store.trains_keys:
                self.index.hold(numbers_M, self.numbers_there, self.parts[0].weights)
            residency.hold(numbers_M)
        except torch.OutOfMemoryError:  # perhaps after another step there is room
            if self.index is not None:
                self.index.let_go(numbers_M)
            return
        for half in self._halves:
            updates.state(half).done_R[numbers_M] = ELSEWHERE
        if self.router is not None:
            self.router.router_ND.copy_(self.parts[-1].weights)
            self.router.hold(True)
        self._updates, store.away = updates, self

    def _fetch(self, updates: "StoreUpdates") -> None:
        """Bring weights and moments here, all their steps made."""
        residency, numbers_M = self.residency, self.numbers_M
        self.numbers_there = residency.link.to_device(numbers_M, residency.device, "index", torch.int32).long()
        updates.hand_over(numbers_M)
        for part in self.parts:
            state, index = updates.state(part.name), self._index(part)
            for mine, theirs in _pairs(part, state):
                mine.copy_(self._send(theirs if index is None else theirs.index_select(0, index)))
            if updates.counted and index is not None:
                part.counts.copy_(self._send(updates.counts(part.name)[index]))

    @torch.no_grad()
    @engine
    def home(self) -> None:
        """Bring everything home. The store's queue must be idle."""
        updates, residency, store = self._updates, self.residency, self.residency.store
        if updates is None:
            return
        counts: dict[str, Tensor | None] = {}
        for part in self.parts:
            state, index = updates.state(part.name), self._index(part)
            for mine, theirs in _pairs(part, state):
                arrived = residency.link.to_host(mine, "moments")
                theirs.copy_(arrived) if index is None else theirs.index_copy_(0, index, arrived)
            if index is not None:
                counts[part.name] = residency.link.to_host(part.counts, "moments") if updates.counted else None
        waiting = residency.link.to_host(residency.held_marks, "index") if updates.counted else None
        # Only now: until all has arrived, what is on the device is the truth.
        self._updates = store.away = None
        for name in self._halves:
            updates.take_back(name, self.numbers_M, counts[name])
        store.wrote()
        store.changed_R[self.numbers_M] = store.version
        residency.let_go()
        if self.index is not None:
            self.index.let_go(self.numbers_M)
        if self.router is not None:
            self.router.hold(False)
        if waiting is not None and (waiting[0] & ~waiting[1]).any():
            # Gradients that a step has used go home like others, and their rows were not touched since.
            residency.collect()
            store.queue.wait()
            store.touched_R[self.numbers_M[waiting[0] & ~waiting[1]]] = False

    def _index(self, part: _Part) -> Tensor | None:
        """The rows' numbers in the host's matrix; None for the whole router."""
        return None if part.name == "router" else self.numbers_M

    def _send(self, source: Tensor) -> Tensor:
        return self.residency.link.to_device(source.contiguous(), self.residency.device, "moments")

    # ---- gradients ----

    def _gradients(self, part: _Part) -> Tensor:
        """fp32 [M, D], or the router's [N, D]."""
        if part.name == "router":
            assert self.router is not None
            return self.router.grad_ND
        return self.residency.held_grads[:, self._halves.index(part.name)]

    def squares(self) -> Tensor:
        """The sum of the squares of all gradients here, one fp64 number on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.residency.device)
        for part in self.parts:
            for grads, _ in self._blocks(part):
                total += torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64).square().sum()
        return total

    def scale(self, factor: float) -> None:
        """Multiply all gradients here. A factor of NaN makes each of them NaN."""
        for part in self.parts:
            self._gradients(part).mul_(factor)
        if factor != factor:
            self.residency.mark_all()

    def drop(self) -> None:
        """Forget all gradients here."""
        self.residency.drop()
        if self.router is not None:
            self.router.drop()

    def _blocks(self, part: _Part) -> Any:
        """(gradients of some rows [m, D], which of part's rows they are), until all were given."""
        grads = self._gradients(part)
        for start in range(0, part.weights.shape[0], _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            yield grads[some], some

    # ---- the step ----

    @torch.no_grad()
    def step(self, step: int, steps: adamw.Steps, lr: float, weight_decay: float) -> None:
        """One step of all rows here, or, where rows count their own, of those with a gradient. The host's part, after
        that of the other rows; waits for nothing."""
        assert self._updates is not None
        counted = self._updates.counted
        for part in self.parts:
            lazy = counted and part.name != "router"
            for grads_MD, some in self._blocks(part):
                if lazy:
                    self._lazy_step(part, some, grads_MD, steps, lr, weight_decay)
                else:
                    self._dense_step(part, some, grads_MD, step, steps, lr, weight_decay)
            if part.name == "router":
                assert self.router is not None
                self.router.router_ND.copy_(part.weights)
        self.residency.held_marks[1].zero_()
        rows_M2D = self.residency.writable()
        rows_M2D[:, -1].copy_(self.parts[len(self._halves) - 1].weights)
        if self._halves[0] == "keys" and self.index is not None:
            self.index.write(self.numbers_there, self.parts[0].weights)
        elif self._halves[0] == "keys":
            rows_M2D[:, 0].copy_(self.parts[0].weights)
        if self.host_selects:
            self._show_host()

    def _show_host(self) -> None:
        """Send home what neurons are searched with, in fp32. (Experts are found where the router is.)"""
        store, keys = self.residency.store, self.parts[0]
        if keys.name == "keys":
            home_MD = self.residency.link.to_host(keys.weights, "keys")
            store.rows_R2D[:, 0].index_copy_(0, self.numbers_M, home_MD)
            store.changed_R[self.numbers_M] = store.version
            store.wrote()

    def _dense_step(
        self, part: _Part, some: slice, grads_MD: Tensor, step: int, steps: adamw.Steps, lr: float, decay: float
    ) -> None:
        if grads_MD.is_cuda and self._moments == torch.float32:
            count = torch.full((), float(step), device=grads_MD.device)
            grads_MD = grads_MD.contiguous()
            torch._fused_adamw_(
                [part.weights[some]], [grads_MD], [part.first[some]], [part.second[some]], [], [count], amsgrad=False,
                lr=lr, beta1=steps.beta1, beta2=steps.beta2, weight_decay=decay, eps=steps.eps, maximize=False,
            )  # fmt: skip
            return
        rate, scale, keep = steps.table[step - steps.first - 1].tolist()
        taken = torch.full((grads_MD.shape[0],), step, dtype=torch.int32, device=grads_MD.device)
        if grads_MD.is_cuda:
            self._advance(part, some, grads_MD, steps, taken, (rate, scale, keep), None)
            return
        constants = tuple(torch.full((1, 1), x, device=grads_MD.device) for x in (rate, scale, keep))
        self._write(part, some, self._made(part, some, grads_MD, constants, taken, steps))

    def _lazy_step(
        self, part: _Part, some: slice, grads_MD: Tensor, steps: adamw.Steps, lr: float, decay: float
    ) -> None:
        marked_M = self.residency.held_marks[1, some]
        taken_M = part.counts[some].add_(marked_M)
        t_M1 = taken_M.clamp(min=1).double()[:, None]
        rate = lr / (1 - steps.beta1**t_M1)
        scale = 1 / (1 - steps.beta2**t_M1).sqrt()
        if grads_MD.is_cuda:
            rates = rate.float(), scale.float(), 1 - lr * decay
            self._advance(part, some, grads_MD, steps, taken_M, rates, marked_M)
            return
        decay_M1 = torch.full_like(t_M1, 1 - lr * decay)
        constants = tuple(t.float() for t in (rate, scale, decay_M1))
        made = self._made(part, some, grads_MD, constants, taken_M, steps)
        old = part.weights[some], part.first[some], part.second[some]
        self._write(part, some, tuple(torch.where(marked_M[:, None], n, o) for n, o in zip(made, old, strict=True)))

    def _advance(
        self,
        part: _Part,
        some: slice,
        grads_MD: Tensor,
        steps: adamw.Steps,
        taken_M: Tensor,
        rates: tuple,
        marked_M: Tensor | None,
    ) -> None:
        """The step in place, on a GPU."""
        assert self._updates is not None
        state = part.weights[some], part.first[some], part.second[some]
        numbers_M, salt = self._numbers(part)[some], self._updates.salt(part.name)
        device_step.advance(*state, grads_MD, steps, taken_M, rates, marked_M, numbers_M, salt)

    def _numbers(self, part: _Part) -> Tensor:
        """Which row each is, on the device."""
        if part.name == "router":
            return torch.arange(part.weights.shape[0], device=part.weights.device)
        return self.numbers_there

    def _made(
        self, part: _Part, some: slice, grads_MD: Tensor, constants: tuple, taken: Tensor, steps: adamw.Steps
    ) -> tuple:
        assert self._updates is not None
        values = part.weights[some], part.first[some].float(), part.second[some].float()
        numbers = self._numbers(part)
        narrow, salt = self._moments == torch.bfloat16, self._updates.salt(part.name)
        return adamw.made_step(values, grads_MD, constants, taken, numbers[some], salt, narrow, steps)

    def _write(self, part: _Part, some: slice, made: tuple) -> None:
        for mine, new in zip((part.weights, part.first, part.second), made, strict=True):
            mine[some] = new

    def __getstate__(self) -> dict[str, Any]:
        self.residency.store.gradients_home()
        self.residency.store.settle()
        return self.__dict__


def _pairs(part: _Part, state: adamw.RowState) -> tuple[tuple[Tensor, Tensor], ...]:
    """What lies here beside what lies on the host."""
    return (part.weights, state.rows_RX), (part.first, state.first_RX), (part.second, state.second_RX)


def squares_elsewhere(away: list[Any]) -> Tensor:
    """The sum of the squares of all gradients that these DeviceAdams hold: one fp64 number that crosses."""
    sums = [rows.squares() for rows in away]
    total = torch.stack([one.to(sums[0].device) for one in sums]).sum()
    return away[0].residency.link.to_host(total, "norm")
