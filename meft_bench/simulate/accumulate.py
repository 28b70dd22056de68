"""Steps of any number of micro-batches from recorded steps of one and of three, and what more touched rows cost.

A step of one may go ways of its own (gradients need no sums), and the second micro-batch may sum up what the first
left. So every other number is made of a step of three: its first and second micro-batch, its third as often as it
takes, and its update. Where the last backward pass updates, its second stands for all between the first and the last.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meft_bench.meft.engine.workers import WORKERS
from meft_bench.simulate.blocks import Block, blocks
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import Mark, Operation, Program
from meft_bench.simulate.stretch import queues_of, stretched
from meft_bench.simulate.timeline import Step, Timeline, affine, steady_step

_SUM = 4
"""Bytes that an add reads of an element of the sums, which a row's first gradient overwrites."""


@dataclass(frozen=True)
class TouchedRows:
    """Rows of one layer whose optimizer is on the host: how many there are, and how many of them at least one of A
    micro-batches touches."""

    neurons: int
    after: Callable[[int], float]
    union: int
    """U of a micro-batch, of all rows: what a recorded step of several micro-batches is taken to touch."""
    among: int
    """R, all rows."""

    @property
    def once(self) -> float:
        """Of these rows, those that one micro-batch touches."""
        return self.union if self.neurons == self.among else self.after(1)

    def updated(self, micro_batches: int, recorded: int) -> float:
        """By what an update's rows grow. recorded: the micro-batches of the recorded step."""
        before = self.once if recorded == 1 else self.union
        return self.after(micro_batches) / before if before else 0.0

    def filled(self, micro_batches: int) -> float:
        """Of the rows that later micro-batches bring gradients of, the share that had one before."""
        later = (micro_batches - 1) * self.once
        return 1 - (self.after(micro_batches) - self.once) / later if later else 0.0

    def drifting_keys(self, micro_batches: int) -> float:
        """By what the rows change that the step before did not touch: a step reads the keys of all."""
        recorded = self.neurons - self.once
        return (self.neurons - self.after(micro_batches)) / recorded if recorded else 0.0

    def drifting_values(self, micro_batches: int) -> float:
        """The same for values: a step reads those of the rows that it touches. The recorded step is taken to read of
        all R rows alike."""
        if not self.neurons:
            return 0.0
        read = self.after(micro_batches) / self.union
        return self.drifting_keys(micro_batches) * read * (self.among / self.neurons)


@dataclass(frozen=True)
class Recorded:
    """Programs of a step: of 2 and 4 layers to make `layers` from, or of all of them, twice."""

    programs: tuple[Program, Program]
    """Of one micro-batch."""
    layers: int
    whole: bool
    """Whether both programs are of all layers."""
    threes: tuple[Program, Program] | None = None
    """Of three micro-batches; None makes later ones do what the first does."""
    rows: TouchedRows | None = None
    last_differs: bool = False
    """Whether the last micro-batch's backward pass does what no other does."""


def replay_accumulated(
    recorded: Recorded, card: Card, host: Host, accumulations: Iterable[int], workers: int = WORKERS
) -> dict[int, Timeline]:
    """{A: a steady step of A micro-batches and one update}.

    From the second on, micro-batches take equally long, so A > 3 follows from 2 and 3 micro-batches with the update of
    A. Events are kept for the fewest. Raises ValueError for A < 1.
    """
    found: dict[int, Timeline] = {}
    wanted = list(accumulations)

    @functools.cache
    def step(count: int) -> _Step:
        return _Step(recorded, card, host, count)

    @functools.cache
    def steady(count: int, micro_batches: int, draw: bool) -> Timeline:
        return steady_step(step(count).of(micro_batches), micro_batches, workers, draw=draw)

    for count in wanted:
        if count < 1:
            raise ValueError(f"accumulation {count} must be at least 1")
        # Without rows that are touched, nothing in a step depends on how many micro-batches it has, if several.
        of = min(count, 2) if recorded.rows is None else count
        draw = count == min(wanted)
        if count <= 3:
            found[count] = steady(of, count, draw)
        else:
            found[count] = affine(steady(of, 2, draw), steady(of, 3, False), count - 2)
    return found


class _Step:
    """The blocks of a step of `count` micro-batches."""

    def __init__(self, recorded: Recorded, card: Card, host: Host, count: int) -> None:
        self.recorded, self.card, self.host, self.count = recorded, card, host, count
        alone = count == 1 or recorded.threes is None
        self._recorded = 1 if alone else 3
        self._programs = recorded.programs if alone or recorded.threes is None else recorded.threes
        self._parts = [_parts(program) for program in self._programs]
        few, more = self._programs
        self._queues = queues_of(few), queues_of(more)
        self._made: dict[str, list[Block]] = {}

    def of(self, micro_batches: int) -> Step:
        """The blocks of a replay of so many micro-batches, with the update of `count`."""

        def kind(number: int) -> str:
            if number < 0:
                return "update"
            if self.recorded.last_differs:
                return "later" if number == micro_batches - 1 else ("first", "second")[min(number, 1)]
            return ("first", "second", "later")[min(number, 2)]

        return lambda number: self._of(kind(number))

    def _of(self, kind: str) -> Sequence[Block]:
        if kind not in self._made:
            few, more = (self._blocks(parts[kind], _adds(parts, kind)) for parts in self._parts)
            self._made[kind] = more if self.recorded.whole else stretched(few, more, self.recorded.layers, self._queues)
        return self._made[kind]

    def _blocks(self, program: Program, adds: float) -> list[Block]:
        changed = (self._changed(e, adds) if isinstance(e, Operation) else e for e in program)
        return blocks(changed, self.card, self.host)

    def _changed(self, operation: Operation, adds: float) -> Operation:
        """The operation over as many rows as a step of `count` micro-batches touches or finds left behind. adds: the
        share of summed gradients that are not their row's first if all rows had one."""
        rows = self.recorded.rows
        if adds and operation.name.startswith("accumulate."):
            filled = 1.0 if rows is None else rows.filled(self.count)
            return operation._replace(bytes=operation.bytes + round(_SUM * operation.flops * filled * adds))
        updates = operation.segment.phase == "update"
        if rows is not None and updates and _goes_home(operation):
            return _scaled(operation, rows.updated(self.count, self._recorded))
        if rows is None or operation.place != "host" or not operation.name.startswith(_BY_ROW):
            return operation
        if operation.name.startswith("drift."):  # keys after the update, values when they first move
            return _scaled(operation, rows.drifting_keys(self.count) if updates else rows.drifting_values(self.count))
        return _scaled(operation, rows.updated(self.count, self._recorded)) if updates else operation


def _parts(program: Program) -> dict[str, Program]:
    """The parts "first", "second" and "later" (of micro-batches) and "update"; the last micro-batch stands for what is
    missing."""
    micro: list[Program] = []
    update: Program = []
    phase = ""
    for entry in program:
        if entry.segment.phase == "update":
            update.append(entry)
            continue
        if not micro or (entry.segment.phase, phase) == ("forward", "backward"):
            micro.append([])
        phase = entry.segment.phase
        micro[-1].append(entry)
    micro = micro or [[]]
    return {"first": micro[0], "second": micro[min(1, len(micro) - 1)], "later": micro[-1], "update": update}


def _adds(parts: dict[str, Program], kind: str) -> float:
    """A second micro-batch that also sums up the first's gradients overwrites as many as it adds."""
    if kind not in ("second", "later"):
        return 0.0
    own, later = (sum(_accumulates(e) for e in parts[name]) for name in (kind, "later"))
    return later / own if own else 0.0


def _accumulates(entry: Operation | Mark) -> bool:
    return isinstance(entry, Operation) and entry.name.startswith("accumulate.")


def _goes_home(operation: Operation) -> bool:
    """Whether it brings rows' gradients home, or adds them up there, after the last micro-batch."""
    home = operation.place == "d2h" and operation.part == "gradients"
    return home or (operation.place == "host" and operation.name.startswith("accumulate."))


_BY_ROW = ("advance.", "drift.", "squares.", "zero.")
"""MEFT's host kernels (host_kernels.py) over the rows that a step touched or left behind."""


def _scaled(operation: Operation, factor: float) -> Operation:
    return operation._replace(flops=round(operation.flops * factor), bytes=round(operation.bytes * factor))
