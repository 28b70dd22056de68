"""A line of the profile: what one simulated run says of memory, traffic and time, with how it came to be."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import split
from meft_bench.profile import best, deepspeed
from meft_bench.profile.runs import Pair, Runs, memory, runs_of, size_of, trained_by
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated import Run, touched_rows
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import KNOWN, size_options
from meft_bench.simulate.accumulate import Recorded, TouchedRows, replay_accumulated
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import Program
from meft_bench.simulate.timeline import Timeline

_WIRE_BYTES = 2
"""Width of an element in "units of M": the base is in bfloat16, so rows and gradients cross in 16 bits."""
LOOP = "zero_grad(set_to_none=True) after the update; loss and logits dropped"
"""The habits of the training loop that "after the step" is of."""
BETWEEN_STEPS = {
    "device_bytes": LOOP,
    "kept_gradients_bytes": "more in a loop that clears gradients when the next step begins",
    "kept_outputs_bytes": "more in a loop that still holds the last micro-batch's logits and loss",
}
"""What numbers of a row's "after_step" are of."""

Machines = Mapping[str, tuple[Card, Host]]


def simulated_row(
    spec: ProfileSpec, setting: Setting, others: Iterable[Card] = (), machines: Machines | None = None
) -> tuple[dict[str, Any], Timeline]:
    """(the row without its practicality, the timeline of one steady step).

    Under "elsewhere" the same operations on others, cards in the same host, at the stated accumulation (best.py), and
    on machines, at every one. Bytes are the same on all.
    """
    others, machines = tuple(others), dict(machines or {})
    variant, size = KNOWN[spec.variant], size_of(spec, setting.counted)
    trained = trained_by(spec, setting.counted, size)
    runs = runs_of(spec, setting, size, trained)
    whole = runs.whole
    rows = _touched(spec, size, setting)
    recorded = Recorded(
        _programs(runs.small),
        whole.layers,
        runs.small[1].layers == whole.layers,
        None if runs.threes is None else _programs(runs.threes),
        rows,
        whole.last_differs,
    )
    clocks = replay_accumulated(recorded, setting.card, setting.host, setting.accumulations)
    modelled = variant.modelled or deepspeed.MODELLED.get(variant.engine, "")
    row = {
        **_identity(spec, size),
        "state": "ok",
        "evidence": "simulated",
        "modelled": modelled,
        "parameters": {
            "trainable": trained,
            "base": setting.shape.parameters,
            "percent_of_base": round(100 * trained / setting.shape.parameters, 3),
        },
        **union_of(spec),
        "memory": {**memory(whole, setting.card), **_after(spec, whole), **_accumulated(runs, setting.card)},
        "traffic": _traffic(spec, whole, setting),
        "time": _time(spec, clocks),
    }
    if others or machines:
        one = (best.stated_accumulation(setting.accumulations),)
        places: dict[str, tuple[Card, Host, tuple[int, ...]]] = {c.name: (c, setting.host, one) for c in others}
        places |= {name: (*machine, setting.accumulations) for name, machine in machines.items()}
        row["elsewhere"] = {n: _speeds(spec, replay_accumulated(recorded, *place)) for n, place in places.items()}
    return row, clocks[min(setting.accumulations)]


def not_run(spec: ProfileSpec, size: dict[str, Any], reason: str) -> dict[str, Any]:
    """The row of a spec that could not be run, with the reason. size: the method's options, as far as they are
    known."""
    return {**_identity(spec, size), "state": "not-run", "reason": reason, "evidence": "not-run"}


def _programs(runs: Pair) -> tuple[Program, Program]:
    return runs[0].program, runs[1].program


def _identity(spec: ProfileSpec, size: dict[str, Any]) -> dict[str, Any]:
    variant = KNOWN[spec.variant]
    known: dict[str, Any] = {
        "key": spec.key,
        "variant": variant.name,
        "title": variant.title if spec.rank is None else f"{variant.title}, rank {spec.rank}",
        "family": variant.family,
        "size": size,
    }
    known["checkpointing"] = spec.checkpointing
    if variant.option is None:
        return {**known, "neurons": None, "neurons_reason": "this variant has no size"}
    if spec.rank is not None:
        return {**known, "neurons": None, "neurons_reason": "its rank is named"}
    return {**known, "neurons": spec.neurons}


def union_of(spec: ProfileSpec) -> dict[str, Any]:
    """What the row says of U, or why it says nothing."""
    variant = KNOWN[spec.variant]
    if not variant.is_meft:
        return {"union": None, "union_reason": "not MEFT"}
    kept = size_options(variant, spec.neurons, None)["kept"]
    shares = {"kept_share": round(kept / spec.neurons, 5)}
    if spec.union is None:
        moved = {"union_share": 1.0, "union": spec.neurons, "source": "all R rows move", "evidence": "simulated"}
        return {"union": {**shares, **moved}}
    u = spec.union
    return {
        "union": {
            **shares,
            "union_share": round(u.rows / spec.neurons, 5),
            "union": u.rows,
            "source": u.source,
            "evidence": u.evidence,
            **({"model": u.model} if u.model else {}),
            **({"touched_share": {str(a): round(n / spec.neurons, 5) for a, n in u.window}} if u.window else {}),
        }
    }


def _after(spec: ProfileSpec, run: Run) -> dict[str, Any]:
    """Memory after the step, as BETWEEN_STEPS describes it, and what loops of other habits keep."""
    if KNOWN[spec.variant].engine:
        return {"after_step": None, "after_step_reason": "its engine's buffers are modelled at the peak alone"}
    device, host = run.after["device"], run.after["host"]
    after = {
        "device_bytes": device.bytes,
        "by_category": dict(sorted(device.by_category.items())),
        "host_bytes": host.bytes,
        "kept_gradients_bytes": run.kept["gradients"],
        "kept_outputs_bytes": run.kept["outputs"],
    }
    return {"after_step": after}


def _accumulated(runs: Runs, card: Card) -> dict[str, Any]:
    """Peaks of a step of several micro-batches, where one has its own (best.memory_at)."""
    if runs.accumulated is None:
        return {}
    held = memory(runs.accumulated, card)
    told = ("device_peak_bytes", "device_total_bytes", "host_peak_bytes", "fits")
    return {"accumulated": {name: held[name] for name in told}}


def crossed_bytes(spec: ProfileSpec, run: Run, micro_batches: int) -> dict[str, int]:
    """{"h2d", "d2h"} bytes of one optimizer step of so many micro-batches; the run has one."""
    if KNOWN[spec.variant].engine:
        h2d, d2h = deepspeed.accumulated_bytes(run, micro_batches)
        return {"h2d": h2d, "d2h": d2h}
    once = _per_micro_batch(run)
    update = run.crossed.get("update", Counter())
    return {way: micro_batches * once[way] + update[way] for way in ("h2d", "d2h")}


def _per_micro_batch(run: Run) -> dict[str, int]:
    phases = [run.crossed.get(name, Counter()) for name in ("forward", "backward")]
    return {way: sum(p[way] for p in phases) for way in ("h2d", "d2h")}


def _traffic(spec: ProfileSpec, run: Run, setting: Setting) -> dict[str, Any]:
    once, update = _per_micro_batch(run), run.crossed.get("update", Counter())
    by_accumulation = {}
    for count in setting.accumulations:
        moved = crossed_bytes(spec, run, count)
        total = sum(moved.values())
        by_accumulation[str(count)] = {
            "h2d_bytes_per_step": moved["h2d"],
            "d2h_bytes_per_step": moved["d2h"],
            "bytes_per_token": round(total / (count * spec.tokens), 1),
            "in_m": round(total / _WIRE_BYTES / run.parameters, 4) if run.parameters else 0.0,
        }
    traffic: dict[str, Any] = {
        "h2d_bytes_per_micro_batch": once["h2d"],
        "d2h_bytes_per_micro_batch": once["d2h"],
        "h2d_bytes_per_update": update["h2d"],
        "d2h_bytes_per_update": update["d2h"],
        "by_accumulation": by_accumulation,
    }
    if run.link:
        link = {f"{way} {purpose}": n for (way, purpose), n in sorted(run.link.items())}
        return {**traffic, "link_bytes": link}
    return {**traffic, "link_bytes": None, "link_bytes_reason": "this variant copies without a link"}


def _touched(spec: ProfileSpec, size: dict[str, Any], setting: Setting) -> TouchedRows | None:
    """None where no union is."""
    if not KNOWN[spec.variant].is_meft:
        return None
    there = setting.counted.ffns
    bought = split(MeftOptions(**size), there.layers, there.hidden, torch.bfloat16, router_there=True)
    return touched_rows(spec, bought)


def _time(spec: ProfileSpec, clocks: dict[int, Timeline]) -> dict[str, Any]:
    first = min(clocks)
    return {
        "evidence": "simulated",
        "step_s_by_accumulation": {str(a): round(c.step_s, 6) for a, c in clocks.items()},
        **_speeds(spec, clocks),
        "components_s": {name: round(s, 6) for name, s in clocks[first].components_s.items()},
    }


def _speeds(spec: ProfileSpec, clocks: dict[int, Timeline]) -> dict[str, Any]:
    return {"tokens_per_s_by_accumulation": {str(a): round(a * spec.tokens / c.step_s, 2) for a, c in clocks.items()}}


def add_practicality(rows: list[dict[str, Any]]) -> None:
    """time.practicality: the resident method's step time (the same neurons and checkpointing, all on the device) over
    this row's; above 1 is faster."""
    resident = {
        (r["neurons"], r["checkpointing"]): _first_step_s(r)
        for r in rows
        if r["variant"] == best.RESIDENT and r["state"] == "ok"
    }
    for row in (r for r in rows if r["state"] == "ok"):
        peer = resident.get((row["neurons"], row["checkpointing"]))
        row["time"].pop("practicality_reason", None)  # of a time when there were fewer rows
        if peer is None:
            row["time"]["practicality"] = None
            row["time"]["practicality_reason"] = "no resident Parallel Adapter of this size"
        else:
            row["time"]["practicality"] = round(peer / _first_step_s(row), 4)


def _first_step_s(row: dict[str, Any]) -> float:
    """Seconds of a step of the fewest micro-batches."""
    seconds = row["time"]["step_s_by_accumulation"]
    return seconds[min(seconds, key=int)]
