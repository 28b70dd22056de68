"""MEFT with a device budget in the profile: its simulated row without one, changed by formula.

Which rows a budget keeps, and how many come home, is decided by data that a simulation does not have. So bytes are
those of engine/budget.py, and seconds are the simulated ones of budget 0 times what the cost model (train/policy.py)
says that the budget changes. The row says so.
"""

import dataclasses
from typing import Any

import torch

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import budget
from meft_bench.profile.formula import workload
from meft_bench.profile.setting import Setting
from meft_bench.profile.spec import ProfileSpec
from meft_bench.simulate.cards import Card, Host
from meft_bench.train import policy
from meft_bench.train.methods import ModelShape

MODELLED = "by formula: the simulated row without a budget, times what the cost model says that the budget changes"
_KEPT, _PASSING = "kept on the device", "transferred rows"


def with_budget(
    row: dict[str, Any],
    spec: ProfileSpec,
    options: MeftOptions,
    setting: Setting,
    machines: dict[str, tuple[Card, Host]],
) -> dict[str, Any]:
    """row, of the same spec at budget 0, as it is with options. machines: "" is the profiled card with its host, other
    names those of row["elsewhere"]."""
    plain = dataclasses.replace(options, device_budget=0)

    def work(name: str, accumulation: int) -> policy.Workload:
        return workload(spec, setting, accumulation, *machines[name])

    def faster(name: str, accumulation: int) -> float:
        there = work(name, accumulation)
        return policy.timeline(plain, there, spec.batch).step_s / policy.timeline(options, there, spec.batch).step_s

    own, elsewhere = row["time"], row.get("elsewhere") or {}
    gains = {a: faster("", int(a)) for a in own["step_s_by_accumulation"]}
    first = min(own["step_s_by_accumulation"], key=int)
    changed = {
        **row,
        "modelled": MODELLED,
        "memory": budget_memory(row["memory"], options, setting.shape, machines[""][0]),
        "traffic": _traffic(row, spec, policy.crossing(options, work("", 1), spec.batch)),
        "time": {
            **own,
            "step_s_by_accumulation": {a: round(s / gains[a], 6) for a, s in own["step_s_by_accumulation"].items()},
            "tokens_per_s_by_accumulation": _times(own["tokens_per_s_by_accumulation"], gains),
            "components_s": {
                name: round(s, 6)
                for name, s in policy.timeline(options, work("", int(first)), spec.batch).components_s.items()
            },
        },
    }
    if elsewhere:
        changed["elsewhere"] = {
            name: {"tokens_per_s_by_accumulation": _times(
                speeds["tokens_per_s_by_accumulation"],
                {a: faster(name, int(a)) for a in speeds["tokens_per_s_by_accumulation"]},
            )}
            for name, speeds in elsewhere.items()
        }  # fmt: skip
    return changed


def _times(speeds: dict[str, float], gains: dict[str, float]) -> dict[str, float]:
    return {a: round(v * gains[a], 2) for a, v in speeds.items()}


def budget_memory(memory: dict[str, Any], options: MeftOptions, shape: ModelShape, card: Card) -> dict[str, Any]:
    """A row's memory with a budget: what is kept comes on top. With all rows kept, those of the layer at work are all
    that passes by."""
    split = budget.split(options, shape.layers, shape.hidden, torch.bfloat16, router_there=True)
    held = {**memory["by_category"], _KEPT: split.nbytes}
    if split.rows == options.neurons and _PASSING in held:
        held[_PASSING] //= shape.layers
    peak = memory["device_peak_bytes"] - sum(memory["by_category"].values()) + sum(held.values())
    total = peak + int(card.context_bytes.value)
    grown = peak - memory["device_peak_bytes"]
    return {
        **memory,
        "device_peak_bytes": peak,
        "device_total_bytes": total,
        "by_category": dict(sorted(held.items())),
        "by_phase": {phase: n + grown for phase, n in memory["by_phase"].items()},
        "fits": total <= int(card.usable_bytes.value),
        "after_step": None,
        "after_step_reason": "a budget's row is made by formula",
    }


def _traffic(row: dict[str, Any], spec: ProfileSpec, moved: dict[str, dict[str, int]]) -> dict[str, Any]:
    once, update = moved["micro_batch"], moved["update"]
    by_accumulation = {}
    for count in row["traffic"]["by_accumulation"]:
        steps = int(count)
        h2d, d2h = (steps * once[way] + update[way] for way in ("h2d", "d2h"))
        by_accumulation[count] = {
            "h2d_bytes_per_step": h2d,
            "d2h_bytes_per_step": d2h,
            "bytes_per_token": round((h2d + d2h) / (steps * spec.tokens), 1),
            "in_m": round((h2d + d2h) / 2 / row["parameters"]["trainable"], 4),
        }
    return {
        "h2d_bytes_per_micro_batch": once["h2d"],
        "d2h_bytes_per_micro_batch": once["d2h"],
        "h2d_bytes_per_update": update["h2d"],
        "d2h_bytes_per_update": update["d2h"],
        "by_accumulation": by_accumulation,
        "link_bytes": None,
        "link_bytes_reason": "a budget's row is made by formula",
    }
