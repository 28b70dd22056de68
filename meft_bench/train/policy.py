"""How to spend a card's memory on MEFT: budget, micro-batch and accumulation from one cost model, by enumeration.

A training step is written down in coarse pieces by closed formula (what the device computes, what crosses, what the
host does for whom), and replayed by the simulator's own replay (simulate/timeline.py) with its host threads, priorities
and copy streams. The few choices are tried one and all, which FlexGen (arXiv 2303.06865) does by linear programming for
inference. Nothing here is measured. T tokens of a micro-batch, D hidden size, R neurons, U rows of the union.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import budget
from meft_bench.meft.engine.residency import USED_IN_PLACE
from meft_bench.meft.engine.workers import GRADIENTS, LATER, RETRIEVAL, UPDATE
from meft_bench.simulate.blocks import Block, blocks
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.drawn import shares
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import PIECE, SUBMIT, WAIT_COPY, WAIT_TASK, Mark, Operation
from meft_bench.simulate.timeline import Timeline, affine, steady_step
from meft_bench.train.contract import OURS, describe
from meft_bench.train.methods import ModelShape
from meft_bench.train.pieces import Pieces
from meft_bench.train.step_bytes import Step, step_bytes

_REPLAYED = (7, 8)
"""Micro-batches that more are made of."""
_SHARES = tuple(n / 8 for n in range(9))
_FP32 = 4
_MORE_PASSES = {("dense", "fp32"): 0, ("lazy", "fp32"): 13, ("dense", "bf16"): 58, ("lazy", "bf16"): 64}
"""fp32 numbers read and written for each that AdamW updates on the device, beyond torch's fused kernel
(engine/device_step.py)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained on what."""

    shape: ModelShape
    vocabulary: int
    length: int
    """Tokens of a row."""
    batch: int
    """Rows of an optimizer step."""
    card: Card
    host: Host
    dtype: str = "bfloat16"
    union_share: float = 1.0
    """U / R of one row's tokens; a micro-batch of more rows uses more, as if rows drew their neurons independently."""
    touched: int | None = None
    """Neurons that the whole step uses, where that was logged."""
    ranks: bool = False
    """This process is one of several that train together."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A choice and what the cost model says of it."""

    device_budget: int
    rows: int
    """Of a micro-batch."""
    accumulation: int
    tokens_per_s: float
    device_bytes: int
    host_bytes: int
    wall: str
    """What is busiest: "the GPU", "the host", "the link"."""
    bought: str
    """What the budget buys, in words."""


def best(options: MeftOptions, work: Workload, device_room: int, host_room: int | None = None) -> Policy | None:
    """The fastest policy that fits device_room bytes (context included); None if none does. Of equally fast ones, that
    with the smaller budget."""
    return fastest(policies(options, work, device_room, host_room))


def fastest(found: Iterable[Policy]) -> Policy | None:
    """best() among these."""
    return max(found, key=lambda p: (round(p.tokens_per_s, 1), -p.device_budget), default=None)


def policies(
    options: MeftOptions,
    work: Workload,
    device_room: int,
    host_room: int | None = None,
    pieces: "Callable[[MeftOptions, Workload, int, int], Layers] | None" = None,
) -> Iterator[Policy]:
    """Every policy that fits, predicted. pieces: of a step, in place of Layers."""
    for rows in (r for r in range(1, work.batch + 1) if work.batch % r == 0):
        for spent in _budgets(options, work):
            chosen = replace(options, device_budget=spent)
            device, host = need(chosen, work, rows)
            if device <= device_room and (host_room is None or host <= host_room):
                yield predict(chosen, work, rows, pieces)


def predict(
    options: MeftOptions,
    work: Workload,
    rows: int,
    pieces: "Callable[[MeftOptions, Workload, int, int], Layers] | None" = None,
) -> Policy:
    """What the cost model says of options with micro-batches of so many rows. pieces: of a step, in place of Layers."""
    made = steady((pieces or Layers)(options, work, rows, work.shape.layers))
    busy = made.busy_s
    link = max(busy["h2d"], busy["d2h"])
    device_bytes, host_bytes = need(options, work, rows)
    return Policy(
        device_budget=options.device_budget,
        rows=rows,
        accumulation=work.batch // rows,
        tokens_per_s=work.batch * work.length / made.step_s,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        wall=max((busy["gpu"], "the GPU"), (busy["workers"], "the host"), (link, "the link"))[1],
        bought=Layers(options, work, rows, 1).bought,
    )


def timeline(options: MeftOptions, work: Workload, rows: int) -> Timeline:
    """A steady step of the whole model. All layers are replayed, for a step's time is not affine in them
    (simulate/stretch.py), and up to 8 micro-batches. More of them lie on a straight line if no host work of the update
    still holds up the eighth; so a step is never shorter than what the busiest of GPU, host and link has to do."""
    return steady(Layers(options, work, rows, work.shape.layers))


def steady(pieces: Pieces) -> Timeline:
    """timeline() of these pieces."""
    step, accumulation = pieces.step, pieces.work.batch // pieces.rows
    few, many = _REPLAYED
    if accumulation <= many:
        return steady_step(step, accumulation)
    made = affine(steady_step(step, few), steady_step(step, many), accumulation - few)
    return replace(made, step_s=max(made.step_s, *made.busy_s.values()))


def _budgets(options: MeftOptions, work: Workload) -> list[int]:
    """0, what buys the keys, and those with shares of the rows."""
    dtype, width, layers = getattr(torch, work.dtype), work.shape.hidden, work.shape.layers
    price = budget.prices(options, width, dtype, router_there=True)
    keys = price.router + price.keys
    levels = {0, keys if price.keys else 0, *(keys + s * (price.everything - keys) for s in _SHARES)}
    return sorted({layers * math.ceil(level) for level in levels})


def need(options: MeftOptions, work: Workload, rows: int) -> tuple[int, int]:
    """(device, host) bytes that options take with micro-batches of so many rows."""
    shape = work.shape
    trainable = sum(options.parameter_groups(shape.hidden, shape.layers).values())
    step = Step(
        shape=shape,
        tokens=rows * work.length,
        dtype=work.dtype,
        vocabulary=work.vocabulary,
        cuda=True,
        ranks=work.ranks,
    )
    need = step_bytes(describe(OURS), options, trainable, step)
    return sum(need.device.values()), sum(need.host.values())


def queue_of(layer: int) -> int:
    """The number of a layer's queue; 0 would be none."""
    return layer + 1


class Layers(Pieces):
    """The pieces of a step of MEFT on so many decoder layers."""

    def __init__(self, options: MeftOptions, work: Workload, rows: int, layers: int) -> None:
        super().__init__(work, rows, layers)
        dtype, shape = getattr(torch, work.dtype), work.shape
        self.options, self.R = options, options.neurons
        self.split = budget.split(options, shape.layers, self.D, dtype, router_there=True, host_optimizer=work.ranks)
        self.U = self._union(rows)
        self.touched = self._union(work.batch) if work.touched is None else work.touched
        self.item = budget.wire_dtype(options, getattr(torch, work.dtype)).itemsize
        self.halves = 1 if options.frozen_keys else 2

    def _union(self, rows: int) -> int:
        share = 1 - (1 - self.work.union_share) ** rows if self.work.union_share < 1 else 1.0
        return max(1, round(self.R * share))  # tokens that are there use a neuron

    @property
    def bought(self) -> str:
        split = self.split
        parts = [name for name, there in (("router", split.router), ("keys", split.keys)) if there]
        if split.rows:
            rows = "all rows" if split.rows == self.R else f"{split.rows} of {self.R} rows"
            parts.append(f"{rows} with their optimizer" if split.moments else rows)
        return ", ".join(parts) or "nothing"

    @cached_property
    def _use_M(self) -> np.ndarray:
        """How likely a micro-batch is to use each of the rows whose optimizer is on the device, which are those used
        most."""
        micro_batches = self.work.batch // self.rows
        left = (1 - self.U / self.R) ** micro_batches if self.work.touched is None else 1 - self.touched / self.R
        return shares(self.R, self.U / self.R, left, micro_batches)[: self.split.moments]

    @cached_property
    def passing(self) -> float:
        """Rows of a union that have no place on the device, and whose gradients have none."""
        if self.split.moments:
            return max(0.0, self.U - float(self._use_M.sum()))
        return max(0, self.U - self.split.rows)

    @cached_property
    def host_touched(self) -> float:
        """Rows that the step uses and the host updates."""
        if not self.split.moments:
            return self.touched
        micro_batches = self.work.batch // self.rows
        there = float((1 - (1 - self._use_M) ** micro_batches).sum())
        return min(max(0.0, self.touched - there), self.R - self.split.moments)

    @property
    def _waits(self) -> bool:
        """Whether gradients wait on the device for the step's end, and rows come anew after it."""
        return self.split.rows > 0 and not self.split.moments

    @property
    def _host_selects(self) -> bool:
        """Whether the host needs the keys of rows whose optimizer is on the device, to search them or to narrow them
        for the search there."""
        return not self.options.frozen_keys and (not self.split.keys or budget.keys_are_int8(self.options))

    @cached_property
    def missing(self) -> float:
        """Share of the union's rows that cross in a micro-batch that is not a step's first: those used most are kept,
        and cross when the step first uses them."""
        if self.split.moments:
            return self.passing / max(1, self.U)
        if not self.split.rows or self.split.rows == self.R:
            return float(not self.split.rows)
        later = max(1, self.work.batch // self.rows - 1)
        new = max(0.0, self.touched - self.U) / later
        return min(1.0, max(self.U - self.split.rows, new) / max(1, self.U))

    @property
    def _direct(self) -> bool:
        return self.work.batch == self.rows and not self._waits

    @property
    def on_host(self) -> float:
        """Share of rows whose optimizer is on the host."""
        return 1 - self.split.moments / self.R

    @property
    def late(self) -> float:
        """Parameters of a layer that get a step without a gradient: the keys of all rows that the step does not use, as
        they are searched, and the values of those that the next micro-batch then uses. Others are put off."""
        if self.options.adam != "dense":
            return 0.0
        behind = self.R - self.split.moments - self.host_touched
        return (behind * (self.halves - 1) + behind / self.R * self.passing) * self.D

    # ---- programs ----

    def step(self, number: int) -> Sequence[Block]:
        """As timeline.Step. A step's first micro-batch finds all kept rows changed, unless their optimizer is there or
        the host has sent them."""
        return self._first if number == 0 and self._waits and self.split.rows < self.R else super().step(number)

    @cached_property
    def _first(self) -> Sequence[Block]:
        return blocks(self.micro_batch(all_missing=True), self.work.card, self.work.host)

    def micro_batch(self, all_missing: bool = False) -> Iterator[Operation | Mark]:
        missing = 1.0 if all_missing else self.missing
        for layer in range(self.layers):
            yield from self._forward(Segment("forward", layer), layer, missing)
        head = Segment("forward", -1)
        yield from self._head()
        waits = []
        for layer in reversed(range(self.layers)):
            made = list(self._backward(Segment("backward", layer), layer))
            waits += [m.number for m in made if isinstance(m, Mark) and m.kind == SUBMIT]
            yield from made
        yield from (Mark(head, WAIT_TASK, 0, number) for number in waits)

    def _forward(self, at: Segment, layer: int, missing: float) -> Iterator[Operation | Mark]:
        D, T = self.D, self.T
        yield from self._attention(at)
        task = self._next()
        if self.split.keys:
            # What the last step changed has to be here: keys, and all rows where all are kept.
            yield Mark(at, WAIT_TASK, 0, 0, queue_of(layer))
            # Scores of all keys, their best, and, unless all rows are here, which rows are lacking.
            yield from self._device(at, 2 * T * self.R * D, self.R * D * self.item + 12 * T * self.R, kernels=12)
            if self.split.rows < self.R:
                index = self._next()
                yield self._crossing(at, "d2h", self.R, index)
                yield from self._fetch(at, layer, task, index, missing, half=True)
        else:
            hidden = self._next()
            yield self._crossing(at, "d2h", T * D * self.item, hidden)
            yield from self._fetch(at, layer, task, hidden, missing, half=False)
        yield from self._ffn(at)
        if not self.split.keys or self.split.rows < self.R:
            yield Mark(at, WAIT_TASK, 0, task)
            yield Mark(at, WAIT_COPY, 0, self._rows_copy)
        width = self.width
        moved = 2 * width * D * self.item + self._put_together(at)
        yield from self._device(at, 4 * T * width * D, moved + 8 * T * width, kernels=14)

    @property
    def width(self) -> int:
        """Rows of the adapter's products."""
        if self._in_place:
            return self.split.moments + round(self.passing)
        return self.R if self.split.keys and self.split.rows == self.R else self.U

    @cached_property
    def _in_place(self) -> bool:
        """Whether held rows are used where they lie, with those that the micro-batch does not use."""
        some = 0 < self.split.moments < self.R and self.options.reading == "per_token"
        some = some and self.item == getattr(torch, self.work.dtype).itemsize
        return some and float(self._use_M.sum()) >= USED_IN_PLACE * self.split.moments

    def _put_together(self, at: Segment) -> float:
        """Bytes that bring a micro-batch's rows from where they lie into one piece: out of their slots, and keys, where
        a copy of all is there, for the backward pass alone."""
        if not self.split.rows or (self.width == self.R and not self._in_place):
            return 0.0
        keys = self.split.keys and at.phase == "backward" and not budget.keys_are_int8(self.options)
        copies = 0 if self._in_place else 2 if self.split.keys else 4
        return 2 * (copies + keys) * self.width * self.D * self.item

    def _fetch(
        self, at: Segment, layer: int, task: int, arriving: int, missing: float, half: bool
    ) -> Iterator[Operation | Mark]:
        """The host's part of a layer: search unless the device does, gather, send."""
        options, D = self.options, self.D
        yield Mark(at, SUBMIT, 0, task, queue_of(layer), RETRIEVAL)
        yield Mark(at, WAIT_COPY, task, arriving)
        if not half:
            flops = 2 * self.T * options.candidates * D
            name = "search." if options.key_experts else "mm."
            yield self._host(at, name, flops, self.R * D * _FP32, task, "retrieval")
        moved = missing * self.U * D * (1 if half else 2)
        yield self._host(at, "gather", 0, moved * (_FP32 + self.item), task, "gather")
        self._rows_copy = self._next()
        yield self._crossing(at, "h2d", moved * self.item, self._rows_copy, task)

    def _backward(self, at: Segment, layer: int) -> Iterator[Operation | Mark]:
        D, T = self.D, self.T
        width = self.width
        # Gradients are added to those that wait: all of them as they lie, or each at its row's slot.
        at_once = self._in_place or width == self.R
        added = (2 * _FP32 + self.item) if at_once else (7 * _FP32 + self.item)
        waiting = self.split.rows if at_once else self.U - self.passing
        kept = waiting * D * self.halves * added if self.split.rows else 0
        moved = 4 * width * D * self.item + self._put_together(at) + kept
        yield from self._device(at, 8 * T * width * D, moved + 16 * T * width, kernels=20)
        home = self.passing * D * self.halves  # others wait in their slots
        if home:
            copy, task = self._next(), self._next()
            yield self._crossing(at, "d2h", home * self.item, copy)
            yield Mark(at, SUBMIT, 0, task, queue_of(layer), GRADIENTS)
            yield Mark(at, WAIT_COPY, task, copy)
            # One micro-batch's gradients are read where they arrived; more are added up.
            summed = 0 if self._direct else 1.5 * _FP32
            yield self._host(at, "accumulate", 0, home * (self.item + summed), task, "gradients")
        yield from self._through_base(at)

    def update(self) -> Iterator[Operation | Mark]:
        at, D = Segment("update", -1), self.D
        state = 2 * (2 * (2 if self.options.moments == "bf16" else _FP32) + _FP32)
        owned = self.split.moments * D * self.halves * self.layers
        if owned:
            # AdamW; its gradients made one piece, measured and clipped; weights in the wire's format.
            passes = 17 + _MORE_PASSES[self.options.adam, self.options.moments]
            yield from self._device(at, 12 * owned, owned * (passes * _FP32 + 3 * self.item), kernels=12)
            norm = self._next()
            yield self._crossing(at, "d2h", 8, norm)
            yield Mark(at, WAIT_COPY, 0, norm)
            if self._host_selects:
                for layer in range(self.layers):
                    here, keys = Segment("update", layer), self._next()
                    yield self._crossing(here, "d2h", self.split.moments * D * _FP32, keys)
        if not self.on_host:
            return
        touched = self.host_touched * D * self.halves
        late = self.late * state
        kept = self._waits
        for layer in range(self.layers):
            here = Segment("update", layer)
            if kept:  # gradients that waited on the device
                copy, task = self._next(), self._next()
                share = min(1.0, self.split.rows / max(1, self.touched))
                yield self._crossing(here, "d2h", share * touched * self.item, copy)
                yield Mark(here, SUBMIT, 0, task, queue_of(layer), GRADIENTS)
                yield Mark(here, WAIT_COPY, task, copy)
                yield self._host(here, "accumulate", 0, share * touched * (self.item + _FP32), task, "gradients")
                yield Mark(here, WAIT_TASK, 0, task)
        for layer in range(self.layers):
            here, task = Segment("update", layer), self._next()
            yield Mark(here, SUBMIT, 0, task, queue_of(layer), UPDATE)
            yield from self._in_pieces(here, touched * (state + (self.item if self._direct else _FP32)), task)
            if late:
                after = self._next()
                yield Mark(here, SUBMIT, 0, after, queue_of(layer), LATER)
                yield from self._in_pieces(here, late, after)
            if kept or self.split.keys:
                changed = (self.on_host * self.R if late else self.host_touched) * D
                if self._host_selects:  # the keys of held rows too, quantised on the host
                    changed += self.split.moments * D
                moved = changed * (2 if self.split.rows == self.R else 1)
                after, copy = self._next(), self._next()
                yield Mark(here, SUBMIT, 0, after, queue_of(layer), LATER)
                yield self._host(here, "gather", 0, moved * (_FP32 + self.item), after, "gather")
                yield self._crossing(here, "h2d", moved * self.item, copy, after)

    def _in_pieces(self, at: Segment, moved: float, task: int, pieces: int = 8) -> Iterable[Operation | Mark]:
        for piece in range(pieces):
            if piece:
                yield Mark(at, PIECE, task, task)
            yield self._host(at, "advance", 0, moved / pieces, task, "adam")
