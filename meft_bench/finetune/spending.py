"""What `--gpu-memory` is spent on: for a method whose rows may stay on the device, the budget and the micro-batch that
the cost model (train/policy.py) finds fastest. On a CPU it is said for the card asked for, and nothing changes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meft_bench.finetune.settings import in_gb, memory_bytes
from meft_bench.text import counted
from meft_bench.train.methods import find_method, parse_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from meft_bench.finetune.plan import Job
    from meft_bench.meft.config import MeftOptions
    from meft_bench.simulate.cards import Card, Host
    from meft_bench.train.policy import Layers, Policy, Workload

_OPTION = "device_budget"
_CALIBRATION = Path("results/profile/calibration.json")


def chosen(job: Job, options: dict[str, Any]) -> tuple[Policy, str] | None:
    """(the fastest policy at these options under --gpu-memory, what a reader is told of it); None where the memory is
    not named, the method keeps nothing on the device, or the user has decided it."""
    settings = job.settings
    method = find_method(settings.method)
    allowed = memory_bytes(settings.gpu_memory)
    given = settings.method_options()
    if allowed is None or _OPTION not in getattr(method, "KINDS", {}) or _OPTION in given:
        return None
    if options.get("placement") == "device":
        return None
    from meft_bench.train import policy

    parsed = parse_options(settings.method, {**options, _OPTION: 0})
    card, host, where = _machine(allowed, job)
    work = policy.Workload(
        shape=job.shape,
        vocabulary=job.vocabulary,
        length=job.longest,
        batch=settings.batch_size // job.shares,
        card=card,
        host=host,
        dtype=job.dtype,
        # A token uses K neurons at most.
        union_share=min(1.0, job.longest * parsed.kept / parsed.neurons),
        ranks=job.shares > 1,
    )
    work, pieces = _as_one_of(job, work)
    room = allowed if job.free_device is None else min(allowed, job.free_device)
    fixed = settings.batch_size // settings.accumulation if settings.accumulation else None
    found = [p for p in policy.policies(parsed, work, room, pieces=pieces) if fixed in (None, p.rows)]
    best = policy.fastest(found)
    return None if best is None else (best, _told(best, found, where, job))


def _as_one_of(job: Job, work: Workload) -> tuple[Workload, Callable[[MeftOptions, Workload, int, int], Layers] | None]:
    """(the work with a rank's shares of card and host, the pieces of its step); as it is for one process. What crosses
    between machines is left out."""
    if job.shares == 1:
        return work, None
    from meft_bench.profile.scale.rank import Rank, Team
    from meft_bench.simulate.nodes import node

    gpus = job.ranks.local_count
    around, team = node(work.card, work.host), Team(gpus=gpus, nodes=job.ranks.count // gpus)
    return replace(work, card=around.card_of(gpus), host=around.host_of(gpus)), partial(Rank, team=team)


def _told(best: Policy, found: list[Policy], where: str, job: Job) -> str:
    plain = max((p.tokens_per_s for p in found if not p.device_budget), default=math.nan)
    spent, gain = "0 (none that fits is faster)", ""
    if best.device_budget:
        spent = f"{best.device_budget} ({in_gb(best.device_budget)}) buys {best.bought}"
        gain = f"; {best.tokens_per_s / plain:.2f} times what a budget of 0 reaches" if plain == plain else ""
    each = " on each rank" if job.shares > 1 else ""
    shared = f", which {gpus} ranks share" if each and (gpus := job.ranks.local_count) > 1 else ""
    said = (
        f"{_OPTION} {spent}, "
        f"{counted(best.accumulation, 'micro-batch')} of {best.rows}{each}: "
        f"predicted {best.tokens_per_s:,.0f} tokens/s{' a rank' if each else ''} on {where}{shared}, "
        f"{best.wall} busiest{gain} "
        "(by a cost model, not measured)"
    )
    return said if job.device == "cuda" else f"{said}; a plan for that card, nothing changes on this machine"


def _machine(allowed: int, job: Job) -> tuple[Card, Host, str]:
    """The card, by its name where one is here, else the class of that memory; the host, calibrated where it was."""
    from meft_bench.simulate import cards

    host = cards.host("desktop")
    if _CALIBRATION.is_file():
        from meft_bench.profile.calibrate import from_calibration

        host = from_calibration(_CALIBRATION)[1]
    card = cards.nearest(_gpu_name() if job.device == "cuda" else "", allowed)
    return card, host, f"{card.title} with {host.title}"


def _gpu_name() -> str:
    from meft_bench.provenance import gpu

    return str(gpu().get("gpu") or "")
