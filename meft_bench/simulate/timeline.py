"""Operations -> seconds on a card and its host: the step's event timeline, replayed as CUDA would run it.

The host issues operations in program order. Device kernels and non-blocking copies join one stream and the host goes
on; a blocking copy makes the host wait for all that the stream holds and for the copy. So host work overlaps device
work exactly where the program lets it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import Operation

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
_ROW_COPIES = ("index_select.", "index.", "gather.", "embedding.", "index_put", "_index_put", "index_add", "index_copy")


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
    rate = host.product_rate if operation.name.startswith(_PRODUCTS) else host.scalar_rate
    rows = operation.name.startswith(_ROW_COPIES)
    bandwidth = host.gather_bandwidth if rows else host.bandwidth
    return host.overhead.value + max(operation.flops / rate.value, operation.bytes / bandwidth.value)


def replay(operations: Iterable[Operation], card: Card, host: Host) -> Timeline:
    """Run operations, in program order, on host and card."""
    now = stream = 0.0  # host clock; when the stream has done all that it holds
    busy, parts, events = dict.fromkeys(LANES, 0.0), dict.fromkeys(COMPONENTS, 0.0), _Events()
    for operation in operations:
        seconds = operation_seconds(operation, card, host)
        if operation.place == "host":
            events.add("host", operation.part, operation, now, now + seconds)
            busy["host"] += seconds
            parts[operation.part if operation.part in parts else "other_host"] += seconds
            now += seconds
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
