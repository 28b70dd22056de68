"""Steps of any number of micro-batches from recorded steps of one and of two, and what the update of more touched rows
costs. A step of one may go ways of its own (gradients need no sums), so every other number is made of a step of two:
its first micro-batch, its second as often as it takes, and its update."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meft_bench.meft.engine.workers import WORKERS
from meft_bench.simulate.blocks import Block, blocks
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import Operation, Program
from meft_bench.simulate.stretch import queues_of, stretched
from meft_bench.simulate.timeline import Timeline, affine, steady_step

_SUM = 4
"""Bytes that an add reads of an element of the sums, which a row's first gradient overwrites."""


@dataclass(frozen=True)
class TouchedRows:
    """Rows of one layer: R, U of a micro-batch, and how many at least one of A micro-batches touches."""

    neurons: int
    union: int
    after: Callable[[int], float]

    def updated(self, micro_batches: int) -> float:
        """By what an update's rows grow."""
        return self.after(micro_batches) / self.union

    def filled(self, micro_batches: int) -> float:
        """Of the rows that later micro-batches bring gradients of, the share that had one before."""
        later = (micro_batches - 1) * self.union
        return 1 - (self.after(micro_batches) - self.union) / later if later else 0.0

    def drifting_keys(self, micro_batches: int) -> float:
        """By what the rows change that the step before did not touch: a step reads the keys of all."""
        recorded = self.neurons - self.union
        return (self.neurons - self.after(micro_batches)) / recorded if recorded else 0.0

    def drifting_values(self, micro_batches: int) -> float:
        """The same for values: a step reads those of the rows that it touches."""
        return self.drifting_keys(micro_batches) * self.updated(micro_batches)


@dataclass(frozen=True)
class Recorded:
    """Programs of a step: of 2 and 4 layers to make `layers` from, or of all of them, twice."""

    programs: tuple[Program, Program]
    """Of one micro-batch."""
    layers: int
    whole: bool
    """Whether both programs are of all layers."""
    pairs: tuple[Program, Program] | None = None
    """Of two micro-batches; None makes a second one do what the first does."""
    rows: TouchedRows | None = None


def replay_accumulated(
    recorded: Recorded, card: Card, host: Host, accumulations: Iterable[int], workers: int = WORKERS
) -> dict[int, Timeline]:
    """{A: a steady step of A micro-batches and one update}.

    From the second on, micro-batches take equally long, so A > 3 follows from 2 and 3 micro-batches with the update of
    A. Events are kept for the fewest. Raises ValueError for A < 1.
    """
    found: dict[int, Timeline] = {}
    wanted = list(accumulations)
    for count in wanted:
        if count < 1:
            raise ValueError(f"accumulation {count} must be at least 1")
        step = _Step(recorded, card, host, count)
        draw = count == min(wanted)
        if count <= 3:
            found[count] = steady_step(step.blocks, count, workers, draw=draw)
            continue
        two, three = (steady_step(step.blocks, a, workers, draw=draw and a == 2) for a in (2, 3))
        found[count] = affine(two, three, count - 2)
    return found


class _Step:
    """The blocks of a step of `count` micro-batches."""

    def __init__(self, recorded: Recorded, card: Card, host: Host, count: int) -> None:
        self.recorded, self.card, self.host, self.count = recorded, card, host, count
        alone = count == 1 or recorded.pairs is None
        self._programs = recorded.programs if alone or recorded.pairs is None else recorded.pairs
        self._parts = [_parts(program) for program in self._programs]
        few, more = self._programs
        self._queues = queues_of(few), queues_of(more)
        self._made: dict[str, list[Block]] = {}

    def blocks(self, micro_batch: int) -> Sequence[Block]:
        """Of a micro-batch, or with -1 of the update."""
        kind = "update" if micro_batch < 0 else "first" if micro_batch == 0 else "later"
        if kind not in self._made:
            few, more = (self._blocks(parts[kind], kind == "later") for parts in self._parts)
            self._made[kind] = more if self.recorded.whole else stretched(few, more, self.recorded.layers, self._queues)
        return self._made[kind]

    def _blocks(self, program: Program, later: bool) -> list[Block]:
        changed = (self._changed(e, later) if isinstance(e, Operation) else e for e in program)
        return blocks(changed, self.card, self.host)

    def _changed(self, operation: Operation, later: bool) -> Operation:
        """The operation over as many rows as a step of `count` micro-batches touches or finds left behind."""
        rows = self.recorded.rows
        if later and operation.name.startswith("accumulate."):
            filled = 1.0 if rows is None else rows.filled(self.count)
            return operation._replace(bytes=operation.bytes + round(_SUM * operation.flops * filled))
        if rows is None or operation.place != "host" or not operation.name.startswith(_BY_ROW):
            return operation
        if operation.segment.phase == "update":
            return _scaled(operation, rows.updated(self.count))
        if not operation.name.startswith(_DRIFT):
            return operation
        keys = operation.part == "retrieval"
        return _scaled(operation, rows.drifting_keys(self.count) if keys else rows.drifting_values(self.count))


def _parts(program: Program) -> dict[str, Program]:
    """ "first" and "later" micro-batch and "update"; the first is the later one, too, where there is one alone."""
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
    return {"first": micro[0] if micro else [], "later": micro[-1] if micro else [], "update": update}


_DRIFT = "advance"
_BY_ROW = (_DRIFT, "squares", "zero")
"""MEFT's host kernels (host_kernels.py) over the rows that a step touched or left behind."""


def _scaled(operation: Operation, factor: float) -> Operation:
    return operation._replace(flops=round(operation.flops * factor), bytes=round(operation.bytes * factor))
