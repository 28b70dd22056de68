"""What one would pick instead of MEFT on many GPUs, by published formulas. None of it is replayed.

The base's compute is the cost model's (train/pieces.py), times the ratio by which the replay of the code that trains is
slower on one GPU (replay.py), as for MEFT. P parameters of the base, A adapter parameters, g
GPUs over which weights are spread, n ranks, W nodes, T tokens of a micro-batch; weights and gradients cross in 2 bytes.

    FSDP + LoRA        base 2 P / g; LoRA (arXiv 2106.09685) 16 A / g. Two gathers of 2 P a micro-batch (2304.11277);
                       gradients of A once a step: 2 (n - 1) / n, as a ring (reduce-scatter, all-gather).
    FSDP + adapter     the same with a Parallel Adapter of MEFT's R, whose weights are gathered with the base's.
    ZeRO-3             all trained: 16 P / n on each GPU, 3 x 2 P a micro-batch (1910.02054, section 7: "3 Psi").
    ZeRO-3, offload    2 P / n on each GPU, 16 P / W in each host: fp32 values, gradients and moments; AdamW there reads
                       and writes 30 bytes a parameter (2104.07857; 2101.06840), 2 P / n cross each way.

A step takes as long as what is busiest, since gathers and reductions run beside the products; AdamW on the host and the
way back of its weights come after it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from meft_bench.profile.scale.point import (
    FABRIC,
    GPU,
    MEMORY,
    NETWORK,
    SWITCH,
    Job,
    Point,
    first_that_fits,
    lacks,
)
from meft_bench.profile.scale.rank import Team
from meft_bench.profile.scale.sharding import Sharding, gathering, step_memory
from meft_bench.simulate.timeline import steady_step
from meft_bench.train.counts import Counted
from meft_bench.train.methods import find_method
from meft_bench.train.pieces import Pieces
from meft_bench.train.step_bytes import STATE_BYTES

LORA_RANK = 64
_ITEM = 2
"""Bytes of a weight or gradient that crosses."""
_ADAM_BYTES = 30
"""That AdamW on the host moves of a parameter: gradient read, value and two moments read and written, bf16 copy."""


def peers(job: Job, team: Team) -> Iterator[Point]:
    """Each on the fewest GPUs that hold it."""
    yield first_that_fits(team, lambda sharding: fsdp_lora(job, team, sharding))
    yield first_that_fits(team, lambda sharding: fsdp_adapter(job, team, sharding))
    yield zero3(job, team)
    yield zero3_offload(job, team)


def lora_parameters(config: Any) -> int:
    """What LoRA of LORA_RANK on all linear layers of a config's model trains. Raises ValueError, in one line, where it
    does not attach."""
    return Counted(config).trainable("lora", find_method("lora").Options(rank=LORA_RANK, targets="all"))


def adapter_parameters(job: Job) -> int:
    """Keys and values of R neurons in every layer."""
    return 2 * job.neurons * job.work.shape.hidden * job.work.shape.layers


def fsdp_lora(job: Job, team: Team, sharding: Sharding) -> Point:
    """FSDP with LoRA of LORA_RANK on all linear layers."""
    return _adapted(job, team, sharding, "fsdp_lora", f"FSDP + LoRA, rank {LORA_RANK}", job.lora)


def fsdp_adapter(job: Job, team: Team, sharding: Sharding) -> Point:
    """FSDP with a Parallel Adapter of as many neurons as MEFT has, resident."""
    return _adapted(job, team, sharding, "fsdp_adapter", "FSDP + Parallel Adapter of the same R",
                    adapter_parameters(job))  # fmt: skip


def _adapted(job: Job, team: Team, sharding: Sharding, method: str, title: str, trained: int) -> Point:
    shape, count = job.work.shape, job.micro_batches
    gathered = gathering(_ITEM * (shape.parameters + trained), sharding, 2 * count)
    reduced = _reduced(_ITEM * trained, team)
    memory = step_memory(job.work, job.units, job.rows, sharding, added=trained // shape.layers)
    memory["adapter, gradients and moments"] = STATE_BYTES * trained // sharding.gpus
    busy = {
        GPU: count * (base_seconds(job) + 6 * job.rows * job.work.length * trained / _rate(job)) * job.ratio(method),
        FABRIC: (gathered.fabric_bytes + reduced[0]) / job.node.wiring.fabric.value,
        NETWORK: (gathered.network_bytes + reduced[1]) / job.node.wiring.network.value,
    }
    return _point(job, team, sharding, method, title, trained, memory, busy, fabric=gathered.fabric_bytes + reduced[0],
                  network=gathered.network_bytes + reduced[1])  # fmt: skip


def zero3(job: Job, team: Team) -> Point:
    """All parameters trained and everything sharded over all ranks."""
    params, everything = job.work.shape.parameters, _all(team)
    moved = gathering(_ITEM * params, everything, 3 * job.micro_batches)
    memory = step_memory(job.work, job.units, job.rows, everything)
    memory["gradients and moments"] = (STATE_BYTES - _ITEM) * params // team.ranks
    busy = _trained_whole(job, team)
    return _point(job, team, everything, "zero3", "ZeRO-3, all parameters", params, memory, busy,
                  fabric=moved.fabric_bytes, network=moved.network_bytes)  # fmt: skip


def zero3_offload(job: Job, team: Team) -> Point:
    """The same with gradients, moments and AdamW on the hosts."""
    params, everything, node = job.work.shape.parameters, _all(team), job.node
    moved = gathering(_ITEM * params, everything, 3 * job.micro_batches)
    memory = step_memory(job.work, job.units, job.rows, everything)
    memory["gradients of a layer"] = _ITEM * job.units.layer
    crossing = _ITEM * params / team.ranks
    link = node.card_of(team.gpus).h2d_pinned.value
    adam = _ADAM_BYTES * params / team.nodes / node.host.bandwidth.value
    busy = {**_trained_whole(job, team), SWITCH: job.micro_batches * crossing / link, MEMORY: adam}
    host = STATE_BYTES * params // team.nodes
    return _point(job, team, everything, "zero3_offload", "ZeRO-3, all parameters, optimizer on the hosts", params,
                  memory, busy, after=adam + crossing / link, host=host, fabric=moved.fabric_bytes,
                  network=moved.network_bytes, link=round((job.micro_batches + 1) * crossing))  # fmt: skip


def _trained_whole(job: Job, team: Team) -> dict[str, float]:
    """Busy seconds where every weight is trained: a product more in backward for each one."""
    params, everything = job.work.shape.parameters, _all(team)
    moved = gathering(_ITEM * params, everything, 3 * job.micro_batches).seconds(job.node)
    own = 2 * job.rows * job.work.length * params / _rate(job)
    compute = job.micro_batches * (base_seconds(job) + own) * job.ratio("zero3")
    return {GPU: compute, FABRIC: moved["fabric"], NETWORK: moved["network"]}


def base_seconds(job: Job) -> float:
    """Forward and backward of a micro-batch through the frozen base, by the cost model."""
    one = replace(job.work, batch=job.rows)
    return steady_step(Pieces(one, job.rows, one.shape.layers).step, 1).step_s


def _rate(job: Job) -> float:
    card = job.node.card
    return card.half_rate.value * card.half_share.value


def _all(team: Team) -> Sharding:
    return Sharding(gpus=team.ranks, nodes=team.nodes)


def _reduced(nbytes: float, team: Team) -> tuple[float, float]:
    """(bytes that a GPU receives in its node, that a node receives from others) to sum gradients over all ranks: a
    ring passes each node once."""
    return tuple(2 * nbytes * (1 - 1 / over) for over in (team.ranks if team.gpus > 1 else 1, team.nodes))  # type: ignore[return-value]


def _point(
    job: Job, team: Team, sharding: Sharding, method: str, title: str, trained: int, memory: dict[str, int],
    busy: dict[str, float], *, after: float = 0.0, host: int = 0, link: int = 0, fabric: float = 0.0,
    network: float = 0.0,
) -> Point:  # fmt: skip
    if not job.node.wiring.nvlink:
        busy[SWITCH] = busy.get(SWITCH, 0.0) + busy.pop(FABRIC) * job.node.sharers(team.gpus)
    beside: Iterable[float] = (s for name, s in busy.items() if name != MEMORY)
    device = sum(memory.values())
    return Point(
        method=method, title=title, team=team, sharding=sharding, trainable=trained, device_bytes=device,
        host_bytes=host, lacks=lacks(job, device, host), step_s=max(beside) + after, busy_s=busy, link_bytes=link,
        fabric_bytes=round(fabric), network_bytes=round(network),
        tokens=job.tokens(team),
    )  # fmt: skip
