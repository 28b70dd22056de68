"""`make profile GPUS=8`: MEFT and what one would pick instead on many GPUs and machines. Everything is simulated.

First the cost model and the formulas are held against the replay of the code that trains, on one GPU and on one rank of
a node. Then a grid of teams (1 to GPUS of a node, 1 to 16 nodes) with a point for each method on each, multiplied by
what the replay takes longer, and the largest adapter that each way of keeping it holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from meft_bench.harness.numerics import scale_numerics
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.sites import parallel_ffns
from meft_bench.profile import shapes
from meft_bench.profile.best import RESIDENT
from meft_bench.profile.limits import check_sizes
from meft_bench.profile.scale.peers import fsdp_adapter, fsdp_lora, lora_parameters, peers, zero3
from meft_bench.profile.scale.point import MEFT_GPU, Job, Point, first_that_fits, meft, meft_memory, of_gpus
from meft_bench.profile.scale.rank import Rank, Team
from meft_bench.profile.scale.replay import replayed_peer, replayed_rank
from meft_bench.profile.scale.sharding import Sharding, units_of
from meft_bench.provenance import provenance
from meft_bench.simulate.cards import constants
from meft_bench.simulate.nodes import Node
from meft_bench.train.contract import OURS
from meft_bench.train.models import shape_of
from meft_bench.train.policy import Workload, steady

SCHEMA = 1
NODES = (1, 2, 4, 8, 16)
_STEP = 64
"""Neurons between two sizes that the search for the largest tries."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    model: str
    node: Node
    network: str
    """Between nodes, by name."""
    gpus: int
    """The most of a node."""
    host_gib: float
    batch: int
    """Sequences of a micro-batch."""
    seq: int
    accumulation: int
    """Micro-batches of a rank's step."""
    neurons: int
    union: float
    """U / R of a micro-batch."""
    why: str
    """Where that is from."""


def counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most itself."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*powers, most]


def job_of(request: Request) -> tuple[Job, Any]:
    """(the job, the base's config). Raises ValueError in one line for a base or sizes that make no step."""
    config = shapes.model_config(request.model)
    check_sizes(config, request.batch, request.seq, (request.neurons,))
    empty = shapes.build(config, "meta", torch.bfloat16, random=False)
    parallel_ffns(empty)
    one = 1 - (1 - request.union) ** (1 / request.batch)
    work = Workload(
        shape=shape_of(empty), vocabulary=config.get_text_config().vocab_size, length=request.seq,
        batch=request.batch * request.accumulation, card=request.node.card, host=request.node.host, union_share=one,
    )  # fmt: skip
    job = Job(
        work=work, units=units_of(empty), lora=lora_parameters(config), rows=request.batch, node=request.node,
        host_room=int(request.host_gib * 2**30), neurons=request.neurons,
    )  # fmt: skip
    return at_size(job, request.neurons), config


def points(job: Job, team: Team) -> Iterator[Point]:
    """Every method on a team."""
    yield meft(job, team, kept=False)
    yield meft(job, team, kept=True)
    yield from peers(job, team)


def make_plan(request: Request, on_team: Any = None) -> dict[str, Any]:
    """The whole result. on_team: called with the points of each team as they are made."""
    job, config = job_of(request)
    replayed, ratios = held_against_replay(request, job, config)
    job = replace(job, ratios=ratios)
    rows: list[dict[str, Any]] = []
    for nodes in NODES:
        for gpus in counts(request.gpus):
            made = [point.row() for point in points(job, Team(gpus=gpus, nodes=nodes))]
            rows += made
            if on_team is not None:
                on_team(made)
    return {
        "schema": SCHEMA,
        "evidence": "simulated",
        "settings": settings(request, job),
        "points": rows,
        "largest": [largest(job, gpus) for gpus in counts(request.gpus)],
        "replayed": replayed,
        "numerics": scale_numerics(),
        "provenance": provenance(1),
    }


def settings(request: Request, job: Job) -> dict[str, Any]:
    """What every point rests on."""
    node, work = request.node, job.work
    wiring = {f"node.{name}": value._asdict() for name, value in vars(node.wiring).items() if name != "nvlink"}
    return {
        "model": shapes.short_name(request.model),
        "shape": vars(work.shape),
        "card": node.card.name,
        "card_title": node.card.title,
        "usable_bytes": int(node.card.usable_bytes.value),
        "host": node.host.name,
        "host_title": node.host.title,
        "host_memory_bytes": job.host_room,
        "nvlink": node.wiring.nvlink,
        "network": request.network,
        "gpus": request.gpus,
        "batch": request.batch,
        "seq": request.seq,
        "accumulation": request.accumulation,
        "neurons": request.neurons,
        "union_share": request.union,
        "union_source": request.why,
        "constants": {**constants(node.card, node.host), **wiring},
    }


def largest(job: Job, gpus: int) -> dict[str, Any]:
    """The largest R, a multiple of 64, that fits one node with so many GPUs, and its speed: MEFT with nothing kept on
    the device, and a resident adapter over FSDP. None where no size fits."""
    team = Team(gpus=gpus, nodes=1)

    def resident(neurons: int) -> Point:
        sized = replace(job, neurons=neurons)
        return first_that_fits(team, lambda sharding: fsdp_adapter(sized, team, sharding))

    found: dict[str, Any] = {"gpus": gpus, "evidence": "simulated", OURS: None, "fsdp_adapter": None}
    if most := _STEP * _last(lambda n: not meft_memory(at_size(job, _STEP * n), team).lacks):
        found[OURS] = {"neurons": most, **meft(at_size(job, most), team, kept=False).row()}
    if most := _STEP * _last(lambda n: not resident(_STEP * n).lacks):
        found["fsdp_adapter"] = {"neurons": most, **resident(most).row()}
    return found


def at_size(job: Job, neurons: int) -> Job:
    """The job with MEFT of so many neurons; K is 64, or what Key-Experts offer where that is less."""
    return replace(job, neurons=neurons, options={"kept": min(64, MeftOptions(neurons=neurons, kept=1).candidates)})


def _last(fits: Callable[[int], bool]) -> int:
    """The largest number that fits; 0 if 1 does not."""
    high = 1
    while fits(high) and high < 2**24:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def held_against_replay(request: Request, job: Job, config: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(the cost model and the formulas beside the replay of the code that trains, with a whole base; the ratios that
    every point is multiplied by): MEFT alone on a GPU and as one rank of a node with the same shares, and what one
    would pick instead on one GPU."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    options = MeftOptions(neurons=job.neurons, **job.options)
    for gpus in counts(request.gpus):
        team = Team(gpus=gpus, nodes=1)
        modelled = steady(Rank(options, job.share(team), job.rows, job.work.shape.layers, team))
        replayed = replayed_rank(request.model, config, job, team)
        ratios[of_gpus(gpus)] = replayed.step_s / modelled.step_s
        ratios.setdefault(MEFT_GPU, replayed.busy_s["gpu"] / modelled.busy_s["gpu"])
        rows.append(_beside("MEFT", gpus, modelled.step_s, replayed.step_s, job))
    alone, whole = Team(gpus=1, nodes=1), Sharding(gpus=1)
    points = {"lora_all": fsdp_lora(job, alone, whole), RESIDENT: fsdp_adapter(job, alone, whole),
              "full": zero3(job, alone)}  # fmt: skip
    for variant, point in points.items():
        step_s = replayed_peer(request.model, config, job, variant).step_s
        ratios[point.method] = step_s / point.step_s
        rows.append(_beside(point.title, 1, point.step_s, step_s, job))
    return rows, ratios


def _beside(title: str, gpus: int, modelled_s: float, replayed_s: float, job: Job) -> dict[str, Any]:
    tokens = job.work.batch * job.work.length
    return {
        "title": title,
        "gpus": gpus,
        "evidence": "simulated",
        "modelled_tokens_per_s_per_gpu": round(tokens / modelled_s, 2),
        "replayed_tokens_per_s_per_gpu": round(tokens / replayed_s, 2),
        "difference": round(replayed_s / modelled_s - 1, 4),
    }
