"""The engine's own code, replayed as one rank of a node: what the cost model of many GPUs is held against.

One step is recorded as for any profile; its link and host are a rank's shares, and the host's AdamW is an owner's: over
the rows that any rank of the node touched, divided by the ranks. With several micro-batches a rank adds its gradients
up as ranks do together.
"""

import functools
from typing import Any

from meft_bench.profile.scale.peers import LORA_RANK
from meft_bench.profile.scale.point import Job
from meft_bench.profile.scale.rank import Team
from meft_bench.profile.simulated import simulate
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.variants import KNOWN, PLAIN
from meft_bench.simulate.accumulate import Recorded, TouchedRows, replay_accumulated
from meft_bench.simulate.machine import Mark, Operation, Program
from meft_bench.simulate.timeline import Timeline

_STEPS, _DRIFT = "advance.", "drift."
"""MEFT's kernels that move rows by AdamW, with a gradient and without."""


def replayed_rank(model: str, config: Any, job: Job, team: Team) -> Timeline:
    """A step of one rank of a node, with nothing kept on the device."""
    work, neurons = job.work, job.neurons

    def touched(micro_batches: int) -> float:
        return neurons * (1 - (1 - work.union_share) ** (micro_batches * job.rows))

    union = Union(rows=round(touched(1)), source="assumed", evidence="assumed")
    alone, threes = _recorded(model, config, neurons, job.rows, work.length, union)
    count, everyone = job.micro_batches, touched(job.micro_batches * team.gpus)
    stepped = everyone / touched(count) / team.gpus
    late = (neurons - everyone) / max(1.0, neurons - touched(count)) / team.gpus
    programs = [[_scaled(entry, stepped, late) for entry in program] for program in (*alone, *threes)]
    recorded = Recorded(
        (programs[0], programs[1]), work.shape.layers, work.shape.layers <= 4, (programs[2], programs[3]),
        TouchedRows(neurons, touched, union.rows, neurons),
    )  # fmt: skip
    share = job.share(team)
    return replay_accumulated(recorded, share.card, share.host, (count,))[count]


def replayed_peer(model: str, config: Any, job: Job, variant: str) -> Timeline:
    """A step of a variant without MEFT, alone on a GPU; LoRA has the rank that peers.py takes."""
    work, rank = job.work, LORA_RANK if KNOWN[variant].option == "rank" else None
    spec = ProfileSpec(model=model, variant=variant, neurons=job.neurons, batch=job.rows, seq=work.length, rank=rank)
    whole, runs = simulate(spec, config)
    recorded = Recorded((runs[0].program, runs[1].program), whole.layers, runs[1].layers == whole.layers)
    return replay_accumulated(recorded, work.card, work.host, (job.micro_batches,))[job.micro_batches]


Pair = tuple[Program, Program]


@functools.cache
def _programs(key: tuple[Any, ...]) -> dict[str, Any]:
    """Recorded steps by what they are of; filled in by _recorded."""
    return {}


def _recorded(model: str, config: Any, neurons: int, rows: int, length: int, union: Union) -> tuple[Pair, Pair]:
    """Programs of a step of one micro-batch and of three."""
    kept = _programs((model, neurons, rows, length, union))
    if not kept:
        for count in (1, 3):
            spec = ProfileSpec(model=model, variant=PLAIN, neurons=neurons, batch=rows, seq=length,
                               accumulation=count, union=union)  # fmt: skip
            _, runs = simulate(spec, config)
            kept[str(count)] = (runs[0].program, runs[1].program)
    return kept["1"], kept["3"]


def _scaled(entry: Operation | Mark, stepped: float, late: float) -> Operation | Mark:
    if not isinstance(entry, Operation) or entry.place != "host":
        return entry
    factor = stepped if entry.name.startswith(_STEPS) else late if entry.name.startswith(_DRIFT) else 1.0
    return entry._replace(flops=round(entry.flops * factor), bytes=round(entry.bytes * factor))
