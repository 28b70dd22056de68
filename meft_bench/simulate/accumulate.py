"""Steps of any number of micro-batches from a recorded step of one: what later ones do otherwise, and what the update
of more touched rows costs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meft_bench.meft.engine.workers import WORKERS
from meft_bench.simulate.blocks import Block, blocks
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import Operation, Program
from meft_bench.simulate.stretch import stretched
from meft_bench.simulate.timeline import Timeline, affine, steady_step

_SUM = 4
"""Bytes that an add reads of an element of the sums, which the first gradient of a row overwrites."""


@dataclass(frozen=True)
class TouchedRows:
    """Rows of one layer: R, U of a micro-batch, and how many at least one of A micro-batches touches."""

    neurons: int
    union: int
    after: Callable[[int], float]

    def updated(self, micro_batches: int) -> float:
        """By what an update's rows grow."""
        return self.after(micro_batches) / self.union

    def drifting_keys(self, micro_batches: int) -> float:
        """By what the rows change that the step before did not touch: a step reads the keys of all."""
        recorded = self.neurons - self.union
        return (self.neurons - self.after(micro_batches)) / recorded if recorded else 0.0

    def drifting_values(self, micro_batches: int) -> float:
        """The same for values: a step reads those of the rows that it touches."""
        return self.drifting_keys(micro_batches) * self.updated(micro_batches)


@dataclass(frozen=True)
class Recorded:
    """Programs of a step of one micro-batch: of 2 and 4 layers to make `layers` from, or of all of them, twice."""

    programs: tuple[Program, Program]
    layers: int
    whole: bool
    """Whether both programs are of all layers."""
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
        self._made: dict[str, list[Block]] = {}

    def blocks(self, micro_batch: int) -> Sequence[Block]:
        """Of a micro-batch, or with -1 of the update."""
        kind = "update" if micro_batch < 0 else "first" if micro_batch == 0 else "later"
        if kind not in self._made:
            few, more = (self._blocks(program, kind) for program in self.recorded.programs)
            whole = more if self.recorded.whole else stretched(few, more, self.recorded.layers)
            updates = kind == "update"
            self._made[kind] = [b for b in whole if (b.segment.phase == "update") == updates]
        return self._made[kind]

    def _blocks(self, program: Program, kind: str) -> list[Block]:
        changed = (self._changed(e, kind) if isinstance(e, Operation) else e for e in program)
        return blocks((e for e in changed if e is not None), self.card, self.host)

    def _changed(self, operation: Operation, kind: str) -> Operation | None:
        """The operation as it is in this kind of micro-batch; None where it is not."""
        rows, name = self.recorded.rows, operation.name
        updates = operation.segment.phase == "update"
        if kind == "later" and name.startswith("accumulate.") and not updates:
            return operation._replace(bytes=operation.bytes + _SUM * operation.flops)
        if not name.startswith(("advance", "zero.")) or operation.place != "host":
            return operation
        if updates:
            return operation if rows is None else _scaled(operation, rows.updated(self.count))
        if kind == "later":
            return None  # rows are caught up once in a step
        if rows is None:
            return operation
        keys = operation.part == "retrieval"
        return _scaled(operation, rows.drifting_keys(self.count) if keys else rows.drifting_values(self.count))


def _scaled(operation: Operation, factor: float) -> Operation:
    return operation._replace(flops=round(operation.flops * factor), bytes=round(operation.bytes * factor))
