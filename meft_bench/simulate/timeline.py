"""A program -> the timeline of a training step on a card and its host.

threads.py says who runs what when; here are steps that follow one another, micro-batches that repeat, layers that
repeat, and the sums and spans that come of it. An optimizer's host work may run on beside the next step's forward pass,
so a step is what lies between the ends of two that follow one another.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft_bench.meft.engine.workers import WORKERS
from meft_bench.simulate.blocks import COPY, DEVICE, HOST, Block, blocks
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import PREFETCH
from meft_bench.simulate.threads import STEP, Replay

LANES = ("host", "workers", "gpu", "h2d", "d2h")
COMPONENTS = ("gpu", "retrieval", "gather", "h2d", "d2h", "gradients", "adam", "other_host")
STRIDE = 1 << 32
"""Between the numbers of what is repeated."""

# Idle stretches shorter than this within one part, layer and phase are not drawn.
_MERGE_GAP_S = 50e-6


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Seconds of one step."""

    step_s: float
    """From the end of the step before until training thread and device are done with this one; of a single program,
    until everything is done."""
    busy_s: dict[str, float]
    """By lane; "host" is the training thread, "workers" host tasks."""
    components_s: dict[str, float]
    """By COMPONENTS: what the step would take if nothing overlapped, in parts; "gpu" is all device work, "other_host"
    what the host does for no named part, issuing operations included."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """{"lane", "name", "layer", "phase", "start_s", "end_s"}, in order of start; name is the part."""


Step = Callable[[int], Sequence[Block]]
"""The blocks of the micro-batch of that number (from 0) of a step; of the update for -1."""


def replay(program: Iterable[Any], card: Card, host: Host, workers: int = WORKERS) -> Timeline:
    """One program, from an idle machine until all is done. Raises ValueError for one that waits for ever."""
    made = blocks(program, card, host)
    spans = _Events()
    run = Replay(made, workers, spans.add)
    return _timeline(made, run.end, spans.sorted())


def steady_step(step: Step, micro_batches: int, workers: int = WORKERS, steps: int = 2, draw: bool = False) -> Timeline:
    """The last of so many steps. Its events start where the step does."""
    own = [b for i in range(micro_batches) for b in _renumbered(step(i), i)]
    own += _renumbered(step(-1), micro_batches - 1)  # the update waits for what the last one left
    whole: list[Block] = []
    for turn in range(steps):
        whole += _renumbered(own, turn * micro_batches)
        whole.append(_END)
    spans = _Events()
    run = Replay(whole, workers, spans.add if draw else None)
    start = run.ends[-2] if steps > 1 else 0.0
    return _timeline(own, run.ends[-1] - start, spans.sorted(start))


_END = Block(STEP, 0, Segment("update", -1), "")


def _renumbered(made: Iterable[Block], turn: int) -> list[Block]:
    """Blocks of another turn: tasks and copies of their own, the same queues."""
    shift = turn * STRIDE
    return [_shifted(b, shift) for b in made] if shift else list(made)


def _shifted(block: Block, shift: int) -> Block:
    return block._replace(
        thread=block.thread + shift if block.thread else 0, number=block.number + shift if block.number else 0
    )


def _timeline(made: Sequence[Block], step_s: float, events: list[dict[str, Any]]) -> Timeline:
    busy, parts = dict.fromkeys(LANES, 0.0), dict.fromkeys(COMPONENTS, 0.0)
    for block in made:
        own = "workers" if block.thread else "host"
        busy[own] += block.issuing
        parts["other_host"] += block.issuing
        if block.kind == HOST:
            busy[own] += block.seconds
            parts[block.part if block.part in parts else "other_host"] += block.seconds
        elif block.kind in (DEVICE, COPY, PREFETCH):
            lane = "gpu" if block.kind == DEVICE else block.place
            busy[lane] += block.seconds
            parts[lane] += block.seconds
    return Timeline(step_s=step_s, busy_s=busy, components_s=parts, events=events)


class _Events:
    """Collects spans, joining those that follow one another on a lane for the same part, layer and phase."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.last: dict[str, dict[str, Any]] = {}

    def add(self, lane: str, name: str, block: Block, start_s: float, end_s: float) -> None:
        phase, layer = block.segment
        last = self.last.get(lane)
        same = last is not None and (last["name"], last["layer"], last["phase"]) == (name, layer, phase)
        if last is not None and same and start_s - last["end_s"] <= _MERGE_GAP_S:
            last["end_s"] = end_s
            return
        event = {"lane": lane, "name": name, "layer": layer, "phase": phase, "start_s": start_s, "end_s": end_s}
        self.last[lane] = event
        self.found.append(event)

    def sorted(self, since_s: float = 0.0) -> list[dict[str, Any]]:
        """What ended after since_s, by when it began, counted from there."""
        late = [event for event in self.found if event["end_s"] > since_s or not since_s]
        for event in late:
            event["start_s"] = round(max(0.0, event["start_s"] - since_s), 9)
            event["end_s"] = round(event["end_s"] - since_s, 9)
        return sorted(late, key=lambda e: (e["start_s"], LANES.index(e["lane"])))


def affine(first: Timeline, second: Timeline, steps: float) -> Timeline:
    """The timeline so many steps beyond the first, where each adds what the second adds to the first."""

    def along(a: float, b: float) -> float:
        return a + (b - a) * steps

    return Timeline(
        step_s=along(first.step_s, second.step_s),
        busy_s={k: along(v, second.busy_s[k]) for k, v in first.busy_s.items()},
        components_s={k: along(v, second.components_s[k]) for k, v in first.components_s.items()},
        events=first.events,
    )


def chrome_trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """events in the Trace Event Format, one thread per lane, microseconds; Perfetto and chrome://tracing open it."""
    events = list(events)
    lanes = [*LANES, *sorted({e["lane"] for e in events} - set(LANES))]
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": lane}}
        for number, lane in enumerate(lanes)
    ]
    spans = [
        {
            "ph": "X",
            "name": e["name"],
            "cat": e["phase"],
            "pid": 0,
            "tid": lanes.index(e["lane"]),
            "ts": round(e["start_s"] * 1e6, 3),
            "dur": round((e["end_s"] - e["start_s"]) * 1e6, 3),
            "args": {"phase": e["phase"], "layer": e["layer"]},
        }
        for e in events
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *spans]}
