"""What the ranks of a node share of one store: rows, gradients, moments, their books, and whose turn it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meft_bench.meft.engine import memory
from meft_bench.meft.engine.exchange import Part
from meft_bench.meft.engine.gradients import RowGradients
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.shared import Array, Board
from meft_bench.meft.engine.turns import RanksGradient, SharedGradients, Turns
from meft_bench.meft.engine.workers import UPDATE

if TYPE_CHECKING:
    from meft_bench.meft.store import NeuronStore

_STEPPED, _WROTE, _ROWS, _ROUTER = 0, 1, 2, 2 + Turns.COUNTERS


class StoreShare:
    """What the ranks of a node share of one store. mine_R marks the rows that this rank owns."""

    COUNTERS = 2 + 2 * Turns.COUNTERS
    """On the board, of each store."""

    def __init__(self, board: Board, number: int, tensors: dict[str, Tensor]) -> None:
        self.board, self.number, self.tensors = board, number, tensors
        self._first = Board.SLOTS + number * self.COUNTERS
        place, beside = board.topology.place, board.topology.beside
        rows_R2D = tensors["rows"]
        self.mine_R = torch.arange(rows_R2D.shape[0]) % beside == place
        self.grads = SharedGradients(
            tensors["gradients"], tensors["filled"], tensors["squares"], board, self._first + _ROWS, self.mine_R
        )
        self.router_turns: Turns | None = None
        self.router_factor = 1.0
        """What the router's gradient is to be multiplied by, as RowGradients.factor."""
        if "router" in tensors:
            self.mine_N = torch.arange(place, tensors["router"].shape[0], beside)
            first = self._first + _ROUTER
            self.router_turns = Turns(board, first, self._clear_router, "gradients of a router")
        self._stepped = self._written = self._seen_written = 0

    @property
    def sums(self) -> list[Turns]:
        return [self.grads.turns, *([] if self.router_turns is None else [self.router_turns])]

    def own(self, rows_U: Tensor) -> Tensor:
        """Those of these rows that this rank owns."""
        return rows_U[self.mine_R[rows_U]]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Among the ranks of the node, with this store's late rows."""
        with self.board.lock(self.number):
            yield

    # ---- who has them ----

    @engine
    def enter(self, store: "NeuronStore") -> None:
        """From now on the store's rows, gradients and books are these. Its rows must be here already."""
        tensors = self.tensors
        store.share, store.grads = self, self.grads
        _put_rows(store, tensors["rows"])
        if store.trains_router:
            store.put_router(tensors["router"], tensors["router gradient"])
        store.mark_changed()

    @engine
    def leave(self, store: "NeuronStore") -> None:
        """The process is alone: the store's rows go into memory of its own, and gradients start anew."""
        rows_R2D = store.rows_R2D
        own_R2D = memory.empty(rows_R2D.shape, rows_R2D.dtype, rows_R2D.device).copy_(rows_R2D)
        store.share, store.team = None, None
        store.grads = RowGradients(own_R2D.shape[0], own_R2D.device)
        _put_rows(store, own_R2D)
        if store.trains_router:
            store.put_router(store.router_ND.clone(), None)
        store.mark_changed()

    # ---- steps ----

    def stepped(self) -> None:
        """This rank has made a step of all its rows."""
        self._stepped += 1
        self.board.put(self._first + _STEPPED, self._stepped)

    def wait(self) -> None:
        """Return when all ranks of the node have made the steps that this one has made."""
        counter = self._first + _STEPPED
        if self.board.least(counter) < self._stepped:
            self.board.until(lambda: self.board.least(counter) >= self._stepped, "a step of their rows")

    def wrote(self) -> None:
        """Somebody has, or may have, written into parameters on this rank."""
        self._written += 1
        self.board.put(self._first + _WROTE, self._written)

    def _others_written(self) -> int:
        """How often the other ranks have said so."""
        topology = self.board.topology
        return sum(self.board.get(self._first + _WROTE, p) for p in range(topology.beside) if p != topology.place)

    def is_told(self) -> bool:
        """Whether another rank has said so since watch() last asked."""
        return self._others_written() != self._seen_written

    def watch(self, store: "NeuronStore", written: bool) -> None:
        """Wait for the steps of other ranks; tell them what was written here, and notice what was there."""
        self.wait()
        if written:
            self.wrote()
        others = self._others_written()
        if others != self._seen_written:
            self._seen_written = others
            store.mark_changed()

    # ---- gradients ----

    def prepare(self, store: "NeuronStore") -> None:
        """NeuronStore.prepare_gradients(): .grad says that there is one, and whether somebody cleared it. Raises
        ValueError for a gradient of somebody else's."""
        trained = store.trained()
        if trained and all(parameter.grad is None for parameter in trained):
            store.queue.submit(self.clear, priority=UPDATE)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = RanksGradient.like(parameter)
            elif not isinstance(parameter.grad, RanksGradient):
                raise ValueError("a gradient was put into .grad of rows that ranks share: let backward() make it")

    def add_router_gradient(self, router_ND: Tensor) -> None:
        """Add to the router's gradient at this rank's turn."""
        assert self.router_turns is not None

        def make() -> None:
            self.tensors["router gradient"].add_(router_ND)

        self.router_turns.add(make, lambda: None)

    def _clear_router(self) -> None:
        self.tensors["router gradient"].zero_()

    def multiply(self) -> None:
        """Multiply the gradients of what this rank owns by the factor that was left to AdamW, before anybody measures
        them again; all ranks do so for theirs."""
        self.grads.multiply()
        if self.router_factor != 1.0:
            self.tensors["router gradient"][self.mine_N] *= self.router_factor
            self.router_factor = 1.0

    def clear(self) -> None:
        """Forget all gradients of this window, as the other ranks do."""
        self.grads.clear(False)
        if self.router_turns is not None:
            self.router_turns.clear()
            self.router_factor = 1.0

    def parts(self, narrow: bool) -> list[Part]:
        """What is summed over nodes."""
        grads = self.grads
        assert grads.buffer_RHD is not None
        made = [Part("gradients", grads.buffer_RHD.flatten(1), grads.filled_R, self.tensors["squares"], narrow)]
        if self.router_turns is not None:
            router_ND = self.tensors["router gradient"]
            every_N = torch.ones(router_ND.shape[0], dtype=torch.bool)
            made.append(Part("router", router_ND, every_N, None, narrow))
        return made


def arrays(store: "NeuronStore", moments: torch.dtype, counted: bool) -> dict[str, Array]:
    """What is shared of one store, by name."""
    neurons, _, width = store.rows_R2D.shape
    halves = 2 if store.trains_keys else 1
    made = {
        "rows": Array((neurons, 2, width), torch.float32),
        "gradients": Array((neurons, halves, width), torch.float32),
        "moments": Array((neurons, halves, 2, width), moments),
        "done": Array((neurons, halves), torch.int32),
        "still": Array((neurons, halves), torch.bool),
        "read": Array((neurons,), torch.bool),
        "filled": Array((neurons,), torch.bool),
        "squares": Array((neurons,), torch.float64),
    }
    if counted:
        made |= {f"{half} steps": Array((neurons,), torch.float32) for half in ("keys", "values")[2 - halves :]}
    if store.trains_router:
        shape = tuple(store.handle("router").shape)
        made |= {name: Array(shape, torch.float32) for name in ("router", "router gradient")}
        made |= {name: Array(shape, moments) for name in ("router first", "router second")}
    return made


def _put_rows(store: "NeuronStore", rows_R2D: Tensor) -> None:
    keys, values = store.handle("keys"), store.handle("values")
    keys.data, values.data = rows_R2D[:, 0], rows_R2D[:, 1]
    keys.grad = values.grad = None
    store.put_rows(rows_R2D)
