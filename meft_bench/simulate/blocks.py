"""A program on a card and its host, in blocks: what one thread issues in a row, with its seconds.

Kernels that follow one another need no replay of their own. With l the seconds to issue each and k those it runs, all
of them together move the end of the stream from s to max(s + sum of k, now + lag): lag is when the last one ends
if the device was idle, the largest over i of (l of the first i) + (k of the i-th and all after it).
"""

from collections.abc import Iterable
from typing import NamedTuple

from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import PREFETCH, Mark, Operation
from meft_bench.simulate.seconds import operation_seconds

DEVICE, HOST, COPY = "device", "host", "copy"


class Block(NamedTuple):
    """kind: DEVICE, HOST, COPY, PREFETCH or that of a Mark, whose fields it then has."""

    kind: str
    thread: int
    segment: Segment
    part: str
    seconds: float = 0.0
    """On its own lane."""
    issuing: float = 0.0
    """Seconds of the thread."""
    lag: float = 0.0
    place: str = ""
    blocking: bool = False
    number: int = 0
    queue: int = 0
    priority: int = 0


def blocks(program: Iterable[Operation | Mark], card: Card, host: Host) -> list[Block]:
    """The program in blocks, in its order."""
    found: list[Block] = []
    for entry in program:
        block = _of_mark(entry) if isinstance(entry, Mark) else _of_operation(entry, card, host)
        last = found[-1] if found else None
        if last is not None and block.kind in (DEVICE, HOST) and last[:4] == block[:4]:
            found[-1] = _joined(last, block)
        else:
            found.append(block)
    return found


def _of_mark(mark: Mark) -> Block:
    return Block(mark.kind, mark.thread, mark.segment, "", number=mark.number, queue=mark.queue,
                 priority=mark.priority)  # fmt: skip


def _of_operation(operation: Operation, card: Card, host: Host) -> Block:
    seconds, launch = operation_seconds(operation, card, host), card.launch.value
    segment, part, thread = operation.segment, operation.part, operation.thread
    if operation.place == "host":
        return Block(HOST, thread, segment, part, seconds)
    if operation.place == "device":
        return Block(DEVICE, thread, segment, part, seconds, launch, launch + seconds)
    kind, issuing = (PREFETCH, 0.0) if operation.name == PREFETCH else (COPY, launch)
    return Block(kind, thread, segment, part, seconds, issuing, place=operation.place, blocking=operation.blocking,
                 number=operation.copy)  # fmt: skip


def _joined(first: Block, second: Block) -> Block:
    return first._replace(
        seconds=first.seconds + second.seconds,
        issuing=first.issuing + second.issuing,
        lag=max(first.lag + second.seconds, first.issuing + second.lag),
    )
