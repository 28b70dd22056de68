"""Bytes between host and GPU by three independent means: the link's own count, Kineto's copy events, NVML's counters.

A figure that the machine does not give is a string: the reason. `put` writes it into a record as null beside it.
"""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from meft_bench.provenance import device_of

Figure = float | str
"""A number, or why there is none."""

DIRECTIONS = ("h2d", "d2h")
NVML_LOW, NVML_HIGH, NVML_SLACK = 0.98, 1.30, 64 * 2**20
"""NVML counts packets with their headers and everything else on the bus (commands, completions, other processes): its
count must lie between NVML_LOW times the copies' bytes, and NVML_HIGH times them plus NVML_SLACK bytes. Reported by
others for a copy of 400 MB: 430 MB."""
_SMALL = 64
"""Copies up to this size are scalars: a loss, a count that nonzero waits for, a flag."""
_PCIE_FIELDS = {"d2h": 197, "h2d": 198}
"""NVML_FI_DEV_PCIE_COUNT_TX_BYTES and _RX_BYTES (nvml.h): what the GPU transmits, and what it receives."""


def put(block: dict[str, Any], name: str, figure: Any) -> None:
    """block[name] = figure, or null and its reason."""
    block[name] = None if isinstance(figure, str) else figure
    if isinstance(figure, str):
        block[f"{name}_reason"] = figure


# ---- NVML ----


class Nvml:
    """What the driver says of one GPU, given by CUDA's UUID of it; reason is "" where it answers."""

    def __init__(self, uuid: str) -> None:
        self.reason, self._nvml, self._handle = "", None, None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, device_of(pynvml, uuid)
        except ImportError:
            self.reason = "NVML needs a package: pip install nvidia-ml-py"
        except Exception as error:  # NVML raises its own kinds
            self.reason = f"NVML does not answer ({_first_line(error)})"

    def process_bytes(self) -> int | str:
        """Device memory that this process holds, context and libraries included."""
        if self._nvml is None:
            return self.reason
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except Exception as error:
            return f"NVML lists no processes ({_first_line(error)})"
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        if not own:
            return "NVML lists no process of this number: a container numbers its processes differently"
        return own[0] if own[0] is not None else "the driver does not tell a process's memory"

    def pcie(self) -> dict[str, int] | str:
        """direction -> bytes since the driver started; the counters may begin again at 2^32 (nvml.h)."""
        if self._nvml is None:
            return self.reason
        try:
            values = self._nvml.nvmlDeviceGetFieldValues(self._handle, list(_PCIE_FIELDS.values()))
        except Exception as error:
            return f"NVML gives no PCIe counters ({_first_line(error)})"
        found = {}
        for direction, value in zip(_PCIE_FIELDS, values, strict=True):
            if value.nvmlReturn != self._nvml.NVML_SUCCESS:
                return f"NVML gives no PCIe counters (field {_PCIE_FIELDS[direction]}: code {value.nvmlReturn})"
            number = _unsigned(self._nvml, value)
            if number is None:
                return f"NVML gives PCIe counters of an unknown type {value.valueType}"
            found[direction] = number
        return found


def _unsigned(nvml: Any, value: Any) -> int | None:
    kinds = {
        nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    }
    return int(getattr(value.value, kinds[value.valueType])) if value.valueType in kinds else None


class PcieMeter:
    """Adds up NVML's PCIe counters from reading to reading. Where they begin again at 4 GiB, less than that may cross
    between two readings; they are taken at every phase."""

    def __init__(self, nvml: Nvml | None) -> None:
        self.nvml, self.bytes, self.reason = nvml, Counter[str](), ""
        self._last: dict[str, int] = {}

    def start(self) -> None:
        """Begin at zero."""
        self.bytes.clear()
        self._last = {}
        self.read()

    def read(self) -> None:
        """Add what crossed since the last reading."""
        now = self.nvml.pcie() if self.nvml is not None else "no CUDA GPU"
        if isinstance(now, str):
            self.reason = now
            return
        for direction, count in now.items():
            last = self._last.get(direction, count)
            self.bytes[direction] += count - last if count >= last else count - last + 2**32
        self._last = now

    def figures(self) -> dict[str, int] | str:
        """Bytes by direction."""
        if self.reason:
            return self.reason
        if not any(self.bytes.values()):
            return "NVML's PCIe counters did not move"
        return {direction: self.bytes[direction] for direction in DIRECTIONS}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- Kineto ----


class Memcpy(NamedTuple):
    """One copy between host and device as CUPTI saw it."""

    direction: str
    host: str
    """"pinned" or "pageable"."""
    bytes: int
    seconds: float


class Trace(NamedTuple):
    """What Kineto recorded of one step."""

    copies: list[Memcpy]
    busy_s: float
    """Seconds in which at least one kernel ran."""


_MEMCPY = re.compile(r"Memcpy (HtoD|DtoH)(?: \((\w+) -> (\w+)\))?")


def traced(step: Callable[[], None]) -> Trace | str:
    """Run step under torch.profiler on the current CUDA device; the reason when it saw nothing of the GPU, or failed:
    what was measured without it is no worse for that."""
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return "this torch is built without Kineto's CUDA activities"
    try:
        trace = _traced(step)
    except (RuntimeError, ValueError, OSError) as error:  # CUPTI needs memory of its own, and may be refused
        return f"Kineto gave no trace ({_first_line(error)})"
    return trace if trace.busy_s else "Kineto recorded no kernel: CUPTI is missing or not permitted"


def _traced(step: Callable[[], None]) -> Trace:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    # Else some versions take CUPTI down after a profile, beside what follows: the next one, at once, would be empty, or
    # crash. What stays slows later steps, so none is timed in a process that was traced.
    os.environ["TEARDOWN_CUPTI"] = "0"
    with torch.profiler.profile(activities=activities):
        torch.zeros(1, device="cuda").add_(1)  # CUPTI starts up here, not in the step
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(encoding="utf-8")))


def read_trace(trace: Mapping[str, Any]) -> Trace:
    """Copies and busy seconds of a Chrome trace as torch.profiler writes it. Raises ValueError for a copy between host
    and device without its bytes."""
    copies, spans = [], []
    for event in trace["traceEvents"]:
        category = event.get("cat")
        if event.get("ph") != "X" or category not in ("gpu_memcpy", "kernel", "gpu_memset"):
            continue
        if category != "gpu_memcpy":
            spans.append((event["ts"], event["ts"] + event["dur"]))
        elif (copy := _memcpy(event)) is not None:
            copies.append(copy)
    return Trace(copies, _covered(spans) / 1e6)


def _memcpy(event: Mapping[str, Any]) -> Memcpy | None:
    found = _MEMCPY.match(event["name"])
    if found is None:
        return None  # within the device, or within the host
    bytes_ = event.get("args", {}).get("bytes")
    if bytes_ is None:
        raise ValueError(f"the trace does not say how many bytes {event['name']!r} moved: use a newer torch")
    way, source, target = found.groups()
    host = (source if way == "HtoD" else target) or "unknown"
    return Memcpy("h2d" if way == "HtoD" else "d2h", host.lower(), int(bytes_), event["dur"] / 1e6)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def copied_bytes(copies: Iterable[Memcpy]) -> dict[str, int]:
    """Bytes by direction."""
    totals = Counter({d: 0 for d in DIRECTIONS})
    for copy in copies:
        totals[copy.direction] += copy.bytes
    return dict(totals)


# ---- side by side ----


def link_bytes(link: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """A link's count by direction."""
    return {d: sum(n for (way, _), n in link.items() if way == d) for d in DIRECTIONS}


def compare_link(
    link: Mapping[tuple[str, str], int], copies: Iterable[Memcpy], uncounted: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Any]]:
    """The link's count against Kineto's of the same step, by direction.

    uncounted[direction] names what crosses beside the link, with its bytes: token ids, masks. Copies of at most 64
    bytes are scalars and are added to it. They agree when nothing is left unexplained.
    """
    copies, own, result = list(copies), link_bytes(link), {}
    seen = copied_bytes(copies)
    for direction in DIRECTIONS:
        small = sum(c.bytes for c in copies if c.direction == direction and c.bytes <= _SMALL)
        explained = {**uncounted.get(direction, {}), **({"scalars": small} if small else {})}
        difference = seen[direction] - own[direction]
        left = difference - sum(explained.values())
        result[direction] = {
            "link_bytes": own[direction],
            "kineto_bytes": seen[direction],
            "difference_bytes": difference,
            "explained_bytes": explained,
            "unexplained_bytes": left,
            "agrees": left == 0,
        }
    return result


def compare_nvml(copied: Mapping[str, int], nvml: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """NVML's count against the copies' bytes of the same stretch, by direction, with the bound it must lie in."""
    result = {}
    for direction in DIRECTIONS:
        low, high = round(NVML_LOW * copied[direction]), round(NVML_HIGH * copied[direction]) + NVML_SLACK
        result[direction] = {
            "copied_bytes": copied[direction],
            "nvml_bytes": nvml[direction],
            "low_bytes": low,
            "high_bytes": high,
            "within": low <= nvml[direction] <= high,
        }
    return result


def compared(
    own: Mapping[tuple[str, str], int] | None,
    trace: Trace | str,
    uncounted: Mapping[str, Mapping[str, int]],
    watched: Mapping[str, int] | None,
    nvml: Mapping[str, int] | str,
) -> dict[str, Any]:
    """The three counts side by side, each a comparison or null with its reason: "kineto" and "link_and_kineto" of the
    traced step (own and trace), "nvml" of the watched one (watched: its bytes by direction, nvml: NVML's)."""
    block: dict[str, Any] = {}
    put(block, "kineto", trace if isinstance(trace, str) else _kinds(trace))
    if isinstance(trace, str):
        put(block, "link_and_kineto", trace)
    elif own is None:
        put(block, "link_and_kineto", "the method has no link: only Kineto tells its copies apart")
    else:
        put(block, "link_and_kineto", compare_link(own, trace.copies, uncounted))
    if isinstance(nvml, str):
        put(block, "nvml", nvml)
    else:
        put(block, "nvml", "no other count of the same step" if watched is None else compare_nvml(watched, nvml))
    return block


def _kinds(trace: Trace) -> dict[str, dict[str, float]]:
    """Copies by "<direction> <kind of host memory>": how many, bytes, seconds."""
    found: dict[str, dict[str, float]] = {}
    for copy in trace.copies:
        entry = found.setdefault(f"{copy.direction} {copy.host}", {"copies": 0, "bytes": 0, "seconds": 0.0})
        entry["copies"] += 1
        entry["bytes"] += copy.bytes
        entry["seconds"] = round(entry["seconds"] + copy.seconds, 9)
    return found
