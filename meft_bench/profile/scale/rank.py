"""A training step of one rank of many, for the replay: the cost model of one GPU with what ranks share.

One set of rows, sums of gradients and moments a node, in host memory that its ranks share. Each rank searches, gathers
and computes for its own micro-batches, and adds its gradients to the node's sums. An owner makes the AdamW step of its
rows, 1/G of the node's. Between nodes the sums of touched rows travel, and each node makes the steps of its own set
(meft/engine/team.py). G GPUs of a node, W nodes, U rows that a step touches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.workers import GRADIENTS, LATER, UPDATE
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import SUBMIT, WAIT_COPY, WAIT_TASK, Mark, Operation
from meft_bench.train.policy import Layers, Workload, queue_of

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks that train together, one a GPU."""

    gpus: int
    """Of each node."""
    nodes: int

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


def wire_bytes(touched: float, hidden: int, layers: int, item: int, nodes: int) -> int:
    """Bytes that a node sends, and receives, in a step for the gradients of touched rows of each layer, keys and
    values: 2 U 2D L item (W - 1) / W, as in a reduce-scatter and an all-gather. 0 for one node."""
    return round(2 * touched * 2 * hidden * layers * item * (nodes - 1) / nodes)


class Rank(Layers):
    """One of a team, with micro-batches of so many rows. work: its own, with its shares of card and host
    (simulate/nodes.py). A team of one is one GPU alone.
    """

    def __init__(self, options: MeftOptions, work: Workload, rows: int, layers: int, team: Team) -> None:
        super().__init__(options, replace(work, ranks=team.ranks > 1), rows, layers)
        self.team, self.own = team, self.touched
        self.touched = self._union(work.batch * team.ranks)

    @property
    def crossing_item(self) -> int:
        """Bytes of a gradient between nodes: fp32 sums unless the wire is narrow."""
        return 2 if self.options.wire == "bf16" else _FP32

    @property
    def network_bytes(self) -> int:
        """Of a node and step, for rows."""
        halves = wire_bytes(self.touched, self.D, self.layers, self.crossing_item, self.team.nodes)
        return halves * self.halves // 2

    @property
    def router_bytes(self) -> int:
        """Of the router's fp32 gradient."""
        experts = self.options.experts or 0
        return experts * self.D * self.layers * _FP32 if self.options.trains_router else 0

    def update(self) -> Iterator[Operation | Mark]:
        if self.team.ranks == 1:
            yield from super().update()
            return
        kept = self.split.rows > 0
        for layer in range(self.layers):
            yield from self._home(layer) if kept else ()
        for layer in range(self.layers):
            here, task = Segment("update", layer), self._next()
            yield Mark(here, SUBMIT, 0, task, queue_of(layer), UPDATE)
            if self.team.nodes > 1:
                yield self._host(here, "reduce", 0, self._reduced, task, "gradients")
            state = self._state + _FP32
            yield from self._in_pieces(here, self.touched * self.D * self.halves * state / self.team.gpus, task)
            if late := self.late * self._state / self.team.gpus:
                after = self._next()
                yield Mark(here, SUBMIT, 0, after, queue_of(layer), LATER)
                yield from self._in_pieces(here, late, after)
            if kept or self.split.keys:
                yield from self._renew(here, layer)

    @property
    def _state(self) -> int:
        """Bytes of a parameter's value and moments, read and written."""
        return 2 * (2 * (2 if self.options.moments == "bf16" else _FP32) + _FP32)

    @property
    def _direct(self) -> bool:
        """Gradients of several ranks are added up, however few micro-batches each has."""
        return self.team.ranks == 1 and super()._direct

    @property
    def _reduced(self) -> float:
        """Bytes of host memory that this rank's share of a layer's exchange between nodes touches: what is sent is
        read, what comes is written and read to be added up."""
        return 3 * self.network_bytes / self.layers / self.team.gpus

    def _home(self, layer: int) -> Iterator[Operation | Mark]:
        """Gradients that waited on the device come home."""
        here, copy, task = Segment("update", layer), self._next(), self._next()
        moved = min(self.split.rows, self.own) * self.D * self.halves
        yield self._crossing(here, "d2h", moved * self.item, copy)
        yield Mark(here, SUBMIT, 0, task, queue_of(layer), GRADIENTS)
        yield Mark(here, WAIT_COPY, task, copy)
        yield self._host(here, "accumulate", 0, moved * (self.item + _FP32), task, "gradients")
        yield Mark(here, WAIT_TASK, 0, task)

    def _renew(self, here: Segment, layer: int) -> Iterator[Operation | Mark]:
        """Rows that any rank's gradient changed cross again to this one, that keeps them."""
        changed = (self.R if self.late else self.touched) * self.D
        moved = changed * (2 if self.split.rows == self.R else 1)
        after, copy = self._next(), self._next()
        yield Mark(here, SUBMIT, 0, after, queue_of(layer), LATER)
        yield self._host(here, "gather", 0, moved * (_FP32 + self.item), after, "gather")
        yield self._crossing(here, "h2d", moved * self.item, copy, after)
