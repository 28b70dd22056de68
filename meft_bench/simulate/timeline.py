"""Operations -> seconds on a card and its host: the step's event timeline, replayed as CUDA would run it.

The host issues operations in program order. Device kernels and non-blocking copies join one stream and the host goes
on; a blocking copy makes the host wait for all that the stream holds and for the copy. So host work overlaps device
work exactly where the program lets it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import PREFETCH, Operation

LANES = ("host", "gpu", "h2d", "d2h")
COMPONENTS = ("gpu", "retrieval", "gather", "h2d", "d2h", "gradients", "adam", "other_host")
LAUNCH = "launch"

# Idle stretches shorter than this within one part, layer and phase are not drawn.
_MERGE_GAP_S = 50e-6
_PRODUCTS = (
    "mm.",
    "addmm.",
    "bmm.",
    "baddbmm.",
    "addbmm.",
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_att",
)
_COPIES = ("index_select.", "index.", "embedding.", "_to_copy.", "clone.", "cat.", "zeros_like.")
# glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger blocks are new pages each time.
_FRESH_BYTES = 32 * 2**20
_ROW_DOTS = ("_embedding_bag", "embedding_bag")
_BY_ELEMENT = ("topk.", "sort.", "masked_fill", "index_put", "_index_put", "nonzero")


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Seconds of one replay."""

    step_s: float
    """Until both host and device are done."""
    busy_s: dict[str, float]
    """By lane."""
    components_s: dict[str, float]
    """By COMPONENTS: what the step would take if nothing overlapped, in parts; "gpu" is all device work, "other_host"
    what the host does for no named part, issuing operations included."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """{"lane", "name", "layer", "phase", "start_s", "end_s"}, in order of start; name is the part."""


def operation_seconds(operation: Operation, card: Card, host: Host) -> float:
    """Seconds that one operation occupies its lane: the longer of its arithmetic and its bytes, plus overhead."""
    if operation.place == "host":
        return _host_seconds(operation, host)
    if operation.place == "device":
        rate, share = (card.half_rate, card.half_share) if operation.half else (card.full_rate, card.full_share)
        if not operation.name.startswith(_PRODUCTS):  # tensor cores serve products alone
            rate, share = card.full_rate, card.full_share
        moving = operation.bytes / (card.bandwidth.value * card.bandwidth_share.value)
        return max(operation.flops / (rate.value * share.value), moving, card.kernel.value)
    # Only page-locked memory can be copied without waiting; code that waits usually copies from pageable memory.
    kind = "pageable" if operation.blocking else "pinned"
    return card.copy_latency.value + operation.bytes / getattr(card, f"{operation.place}_{kind}").value


def _host_seconds(operation: Operation, host: Host) -> float:
    rate, bandwidth = math.inf, host.bandwidth.value  # element-wise work is bound by memory
    if operation.name.startswith(_PRODUCTS):
        rate = host.product_rate.value
    elif operation.name.startswith(_ROW_DOTS):
        rate = host.dot_rate.value
    elif operation.name.startswith(_BY_ELEMENT):
        rate = host.element_rate.value
    elif operation.name.startswith(_COPIES) and _written_bytes(operation) > _FRESH_BYTES:
        bandwidth = host.fresh_bandwidth.value
    return host.overhead.value + max(operation.flops / rate, operation.bytes / bandwidth)


def _written_bytes(copy: Operation) -> float:
    """A copy writes half of its bytes; a cast between fp32 and a half type a third or two."""
    if copy.name.startswith("_to_copy."):
        return copy.bytes / 3 if copy.half else copy.bytes * 2 / 3
    return copy.bytes / 2


def replay(operations: Iterable[Operation], card: Card, host: Host) -> Timeline:
    """Run operations, in program order, on host and card."""
    now = stream = fetched = 0.0  # host clock; when the stream, and the stream of prefetches, have done all they hold
    busy, parts, events = dict.fromkeys(LANES, 0.0), dict.fromkeys(COMPONENTS, 0.0), _Events()
    for operation in operations:
        seconds = operation_seconds(operation, card, host)
        if operation.place == "host":
            events.add("host", operation.part, operation, now, now + seconds)
            busy["host"] += seconds
            parts[operation.part if operation.part in parts else "other_host"] += seconds
            now += seconds
            continue
        if operation.name == PREFETCH:
            # Its own stream, as far ahead as the host issues; what follows on the device waits for it.
            start = max(now, fetched)
            fetched = start + seconds
            stream = max(stream, fetched)
            events.add("h2d", operation.part, operation, start, fetched)
            busy["h2d"] += seconds
            parts["h2d"] += seconds
            continue
        issued = now + card.launch.value
        events.add("host", LAUNCH, operation, now, issued)
        busy["host"] += card.launch.value
        parts["other_host"] += card.launch.value
        lane = "gpu" if operation.place == "device" else operation.place
        start = max(issued, stream)
        stream = start + seconds
        events.add(lane, operation.part, operation, start, stream)
        busy[lane] += seconds
        parts[lane] += seconds
        now = stream if operation.blocking else issued
    return Timeline(step_s=max(now, stream), busy_s=busy, components_s=parts, events=events.sorted())


class _Events:
    """Collects spans, joining those that follow one another on a lane for the same part, layer and phase."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.last: dict[str, dict[str, Any]] = {}

    def add(self, lane: str, name: str, operation: Operation, start_s: float, end_s: float) -> None:
        phase, layer = operation.segment
        last = self.last.get(lane)
        same = last is not None and (last["name"], last["layer"], last["phase"]) == (name, layer, phase)
        if last is not None and same and start_s - last["end_s"] <= _MERGE_GAP_S:
            last["end_s"] = end_s
            return
        event = {"lane": lane, "name": name, "layer": layer, "phase": phase, "start_s": start_s, "end_s": end_s}
        self.last[lane] = event
        self.found.append(event)

    def sorted(self) -> list[dict[str, Any]]:
        for event in self.found:
            event["start_s"], event["end_s"] = round(event["start_s"], 9), round(event["end_s"], 9)
        return sorted(self.found, key=lambda e: (e["start_s"], LANES.index(e["lane"])))


def replay_accumulated(
    operations: Sequence[Operation], card: Card, host: Host, accumulations: Iterable[int]
) -> dict[int, Timeline]:
    """{A: a step of A micro-batches and one update} from the operations of one micro-batch and its update.

    From the second on, micro-batches take equally long, so A > 2 follows from 1 and 2. Events are kept for A = 1 and 2.
    Raises ValueError for A < 1.
    """
    micro = [o for o in operations if o.segment.phase != "update"]
    one, two = replay(operations, card, host), replay([*micro, *operations], card, host)
    found = {}
    for count in accumulations:
        if count < 1:
            raise ValueError(f"accumulation {count} must be at least 1")
        found[count] = one if count == 1 else two if count == 2 else _affine(one, two, count - 1)
    return found


def extrapolate(two: Timeline, four: Timeline, layers: int) -> Timeline:
    """The timeline of that many decoder layers from those of 2 and 4: layers repeat, so every sum is affine in their
    number. Events stay those of 2 layers. Raises ValueError for fewer than 1 layer."""
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    return _affine(two, four, (layers - 2) / 2)


def _affine(first: Timeline, second: Timeline, steps: float) -> Timeline:
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
