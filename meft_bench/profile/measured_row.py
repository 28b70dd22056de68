"""A measured variant as a row of a result file, beside the simulated ones."""

import statistics
from typing import Any

from meft_bench.profile.counters import DIRECTIONS, Figure, put
from meft_bench.profile.passes import Measured
from meft_bench.profile.simulated_row import LOOP, not_run
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import KNOWN

_NO_GPU = "no CUDA GPU"
_WIRE_BYTES = 2
"""Width of an element in "units of M", as in simulated_row.py."""
_REST = "activations"
_REST_NOTE = "activations: all that lived at the peak beside weights and moments, gradients and temporaries included"
_UNION_SOURCE = "random initialisation, counted in the timed steps"


def measured_row(m: Measured) -> dict[str, Any]:
    """The row without its practicality. Bytes, seconds; a null has its reason beside it."""
    identity = not_run(m.spec, m.size, "")
    del identity["reason"]
    return {
        **identity,
        "state": "ok",
        "evidence": m.evidence,
        "modelled": "",
        "exact": KNOWN[m.spec.variant].exact,
        "parameters": {
            "trainable": m.trainable,
            "base": m.base,
            "percent_of_base": round(100 * m.trainable / m.base, 3),
        },
        **_union(m),
        "memory": _memory(m),
        "traffic": _traffic(m),
        "time": _time(m),
    }


def skipped_row(spec: ProfileSpec, size: dict[str, Any], state: str, reason: str, evidence: str) -> dict[str, Any]:
    """The row of a variant without figures: "oom", which is a result of its own evidence, or "not-run"."""
    row = not_run(spec, size, reason)
    return {**row, "state": "oom", "evidence": evidence} if state == "oom" else row


def _union(m: Measured) -> dict[str, Any]:
    block: dict[str, Any] = {}
    if not KNOWN[m.spec.variant].is_meft:
        put(block, "union", "not MEFT")
        return block
    rows = statistics.fmean(m.union_by_layer)
    return {
        "union": {
            "kept_share": round(m.size["kept"] / m.spec.neurons, 5),
            "union_share": round(rows / m.spec.neurons, 5),
            "union": round(rows),
            "union_by_layer": [round(u, 2) for u in m.union_by_layer],
            "source": _UNION_SOURCE,
            "evidence": "measured",
        }
    }


def _memory(m: Measured) -> dict[str, Any]:
    block: dict[str, Any] = {"fits": True, "cap": _cap(m), "host_by_category": m.accounted["host"]}
    block["host_peak_bytes"] = _host_peak(m, m.host_peaks)
    block["host_by_phase"] = {phase: {f"{name}_bytes": n for name, n in p.items()} for phase, p in m.host_peaks.items()}
    block["host_note"] = "unique set size at a phase's end, less that of the process before the model was built"
    put(block, "context_bytes", m.context)
    put(block, "after_step", m.after if isinstance(m.after, str) else {"device_bytes": m.after, "loop": LOOP})
    device = m.device_peaks.get(1)
    if device is None:
        for name in ("device_peak_bytes", "device_total_bytes", "by_category", "by_phase"):
            put(block, name, _NO_GPU)
        return {**block, **_accumulated(m)}
    peak = max(p["allocated"] for p in device.values())
    known = m.accounted["device"]
    return {
        **block,
        "device_peak_bytes": peak,
        **_total(m, device),
        "by_category": {**known, _REST: peak - sum(known.values())},
        "by_category_note": _REST_NOTE,
        "by_phase": {phase: p["allocated"] for phase, p in device.items()},
        "by_phase_seen": {phase: {f"{n}_bytes": v for n, v in p.items()} for phase, p in device.items()},
        **_accumulated(m),
        "device_peak_bytes_by_accumulation": {
            str(a): max(p["allocated"] for p in phases.values()) for a, phases in m.device_peaks.items()
        },
    }


def _accumulated(m: Measured) -> dict[str, Any]:
    """Peaks of a step of several micro-batches, of the most that were run (best.memory_at)."""
    most, held = max(m.step_s), dict[str, Any]()
    if most == 1 and not m.lacking:
        return {}
    short = next((f"{a} micro-batches ran out of memory {where}" for a, where in m.lacking.items()), "")
    device = m.device_peaks.get(most, {})
    reason = short or ("" if device else _NO_GPU)
    put(held, "device_peak_bytes", reason or max(p["allocated"] for p in device.values()))
    put(held, "device_total_bytes", reason or _total(m, device)["device_total_bytes"])
    put(held, "host_peak_bytes", short or _host_peak(m, m.host_accumulated))
    return {"accumulated": {**held, "fits": not short}}


def _host_peak(m: Measured, phases: dict[str, dict[str, int]]) -> int:
    """What a row with nothing on the host gives back of earlier ones' memory is no peak below 0."""
    return max(0, max(p["uss"] for p in phases.values()) - m.host_before)


def _total(m: Measured, device: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What the process takes of the card: NVML's word, else the allocator's holdings and the context."""
    if all("process" in p for p in device.values()):
        return {"device_total_bytes": max(p["process"] for p in device.values()), "device_total_source": "NVML"}
    context = 0 if isinstance(m.context, str) else m.context
    return {
        "device_total_bytes": max(p["reserved"] for p in device.values()) + context,
        "device_total_source": f"torch's allocator and the rest in use on the card ({m.process_reason})",
    }


def _cap(m: Measured) -> dict[str, Any]:
    block: dict[str, Any] = {}
    put(block, "bytes", m.cap_bytes if m.cap_bytes is not None else "not capped")
    return block


def _traffic(m: Measured) -> dict[str, Any]:
    block: dict[str, Any] = {"counted_by": m.moved_by, "transfers": m.transfers}
    put(
        block,
        "link_bytes",
        m.link_by_purpose if m.link_by_purpose is not None else "this variant copies without a link",
    )
    for part, name in (("micro_batch", "micro_batch"), ("update", "update")):
        for direction in DIRECTIONS:
            figure: Figure = m.moved if isinstance(m.moved, str) else m.moved[part][direction]
            put(block, f"{direction}_bytes_per_{name}", figure)
    put(block, "by_accumulation", m.moved if isinstance(m.moved, str) else _by_accumulation(m, m.moved))
    return block


def _by_accumulation(m: Measured, moved: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Bytes of one micro-batch and of an update were counted, and other steps are made of them."""
    found = {}
    for accumulation in m.step_s:
        step = {d: accumulation * moved["micro_batch"][d] + moved["update"][d] for d in DIRECTIONS}
        entry: dict[str, Any] = {f"{d}_bytes_per_step": step[d] for d in DIRECTIONS}
        entry["bytes_per_token"] = round(sum(step.values()) / (accumulation * m.spec.tokens), 1)
        entry["in_m"] = round(sum(step.values()) / _WIRE_BYTES / m.trainable, 4) if m.trainable else 0.0
        found[str(accumulation)] = entry
    return found


def _time(m: Measured) -> dict[str, Any]:
    median = {a: statistics.median(s) for a, s in m.step_s.items()}
    block: dict[str, Any] = {
        "evidence": m.evidence,
        "step_s_by_accumulation": {str(a): round(s, 6) for a, s in median.items()},
        "step_s_spread": {str(a): [round(min(s), 6), round(max(s), 6)] for a, s in m.step_s.items()},
        "steps": {str(a): len(s) for a, s in m.step_s.items()},
        "tokens_per_s_by_accumulation": {str(a): round(a * m.spec.tokens / s, 2) for a, s in median.items()},
        "components_s": {},
    }
    if isinstance(m.components_s, str):
        return {**block, "components_s_reason": m.components_s}
    for name, seconds in m.components_s.items():
        put(block["components_s"], name, seconds if isinstance(seconds, str) else round(seconds, 6))
    return block
