"""A step of many layers from steps of 2 and 4: decoder layers repeat, so those in the middle are repeated.

Sums of seconds over a step are affine in the number of layers, but a step's time is not: a head that hides two layers'
host work does not hide thirty-two layers'. So it is the program that grows, and the replay that says what it takes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from meft_bench.simulate.blocks import COPY, DEVICE, HOST, Block
from meft_bench.simulate.machine import SUBMIT, WAIT_TASK, Mark, Operation

_TEMPLATES = (1, 2)
"""Layers of four that are neither first nor last, two of them as layers may alternate."""
_CLONE = 1 << 44
"""Between the numbers of a layer's tasks, copies and queues and those of its copies."""
_MARKS = (SUBMIT, WAIT_TASK)


Queues = dict[int, int]
"""The layer of each queue."""


def stretched(
    two: Sequence[Block], four: Sequence[Block], layers: int, queues: tuple[Queues, Queues] | None = None
) -> list[Block]:
    """The blocks of that many layers, at least 4. queues: of both steps, where these are parts of them (queues_of).
    Raises ValueError for fewer layers."""
    if layers < 4:
        raise ValueError(f"layers={layers} must be at least 4: run fewer as they are")
    of_two, of_four = queues or (queues_of(two), queues_of(four))
    labels, turns = _layers_of(four, of_four), list(range(layers - 4))
    of_chunk: dict[tuple[str, int], list[Block]] = defaultdict(list)
    for block in four:
        of_chunk[block.segment].append(block)
    growth = _growth(_sums(two, of_two), _sums(four, of_four), layers)
    made: list[Block] = []
    for segment, chunk in groupby(zip(four, labels, strict=True), key=lambda pair: pair[0].segment):
        phase, layer = segment
        inside = phase in ("forward", "backward") and layer in _TEMPLATES
        if phase == "backward" and layer == _TEMPLATES[-1]:
            for turn in reversed(turns):
                made += _clones(of_chunk[phase, _template(turn)], turn, of_four)
        for block, label in chunk:
            if inside:
                made.append(block)
                continue
            made.append(growth.of(block) if phase == "update" and label < 0 else block)
            made += [_clone(block, turn, of_four) for turn in turns if _template(turn) == label]
        if phase == "forward" and layer == _TEMPLATES[-1]:
            for turn in turns:
                made += _clones(of_chunk[phase, _template(turn)], turn, of_four)
    return made


def _template(turn: int) -> int:
    return _TEMPLATES[turn % len(_TEMPLATES)]


def _clones(chunk: Sequence[Block], turn: int, of_queue: Queues) -> Iterator[Block]:
    return (_clone(block, turn, of_queue) for block in chunk)


def _clone(block: Block, turn: int, of_queue: Queues) -> Block:
    shift = (turn + 1) * _CLONE
    return block._replace(
        thread=block.thread + shift if block.thread else 0,
        number=block.number + shift if block.number else 0,
        queue=block.queue + shift if block.queue in of_queue else block.queue,
    )


def queues_of(made: Iterable[Block | Mark | Operation]) -> Queues:
    """The layer whose forward pass first gave a queue something to do. Where no forward pass does, as all rows are on
    the device, an update turns to one layer's queue after the other. A single queue that several layers give work, as
    a host optimizer's, is none of theirs."""
    of_queue: Queues = {}
    others: dict[int, None] = {}
    givers: set[int] = set()
    layers = 0
    for entry in made:
        layers = max(layers, entry.segment.layer + 1)
        if not isinstance(entry, Block | Mark) or entry.kind != SUBMIT:
            continue
        if entry.segment.layer >= 0:
            of_queue.setdefault(entry.queue, entry.segment.layer)
            givers.add(entry.segment.layer)
        elif entry.segment.phase == "update":
            others[entry.queue] = None
    if len(of_queue) == 1 and len(givers) > 1:
        return {}
    if not of_queue and len(others) == layers:
        of_queue = {queue: layer for layer, queue in enumerate(others)}
    return of_queue


def _layers_of(made: Sequence[Block | Mark | Operation], of_queue: Queues) -> list[int]:
    """The layer of each block or entry of a program, -1 for none. A task's is that of its queue; what the training
    thread does in an update belongs to the layer whose queue it turns to next, but for what comes before it turns to
    one layer after the other: that may be of all of them, as gradients' norms are."""
    marks = [b for b in made if isinstance(b, Block | Mark)]
    of_task = {b.number: of_queue.get(b.queue, -1) for b in marks if b.kind == SUBMIT}
    labels: list[int] = []
    pending: list[int] = []
    last = len(made)  # beyond every layer: the first turn begins a round
    for place, block in enumerate(made):
        if block.thread:
            labels.append(of_task.get(block.thread, -1))
        elif isinstance(block, Block | Mark) and block.kind in _MARKS and block.queue in of_queue:
            labels.append(of_queue[block.queue])
            for earlier in pending if labels[-1] >= last else ():
                labels[earlier] = labels[-1]
            if block.segment.phase == "update":
                last = labels[-1]
            pending.clear()
        else:
            labels.append(block.segment.layer)
            if block.segment.phase == "update":
                pending.append(place)
    return labels


Sums = dict[tuple[str, str], float]


class _Growth:
    """By what the sums of an update grow that belong to no layer's queue: an optimizer on the device, a peer's."""

    def __init__(self, sums: Sums, grown: Sums) -> None:
        self.factors = {key: grown[key] / total if total else 1.0 for key, total in sums.items()}

    def of(self, block: Block) -> Block:
        if block.kind not in (DEVICE, HOST, COPY):
            return block
        seconds = self.factors[block.kind + block.place, "seconds"]
        issuing = self.factors[block.kind + block.place, "issuing"]
        return block._replace(
            seconds=seconds * block.seconds, issuing=issuing * block.issuing, lag=max(seconds, issuing) * block.lag
        )


def _growth(few: Sums, more: Sums, layers: int) -> _Growth:
    grown = {key: total + (total - few.get(key, 0.0)) * (layers - 4) / 2 for key, total in more.items()}
    return _Growth(more, grown)


def _sums(made: Sequence[Block], of_queue: Queues) -> Sums:
    sums: Sums = defaultdict(float)
    for block, label in zip(made, _layers_of(made, of_queue), strict=True):
        if block.segment.phase == "update" and label < 0:
            sums[block.kind + block.place, "seconds"] += block.seconds
            sums[block.kind + block.place, "issuing"] += block.issuing
    return sums
