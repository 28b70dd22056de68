"""MEFT and what one would pick instead on so many GPUs: does it fit, how fast, what is moved, what is the wall.

MEFT by the replay of a rank's step (rank.py), the others by published formulas (peers.py). Everything is
simulated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import budget
from meft_bench.profile.scale.rank import Rank, Team
from meft_bench.profile.scale.sharding import Gathering, Sharding, Units, gathering, shardings, step_memory
from meft_bench.simulate.machine import Operation
from meft_bench.simulate.nodes import Node
from meft_bench.train.contract import OURS, describe
from meft_bench.train.policy import Workload, steady
from meft_bench.train.step_bytes import WIDTH, Step, step_bytes

GPU, HOST, MEMORY, SWITCH, FABRIC, NETWORK = "gpu", "host", "host memory", "link", "fabric", "network"
"""What a step may occupy."""
ROWS_KEPT = "meft_rows_kept"
"""Point.method of MEFT with all rows on each GPU."""
MEFT_GPU = "meft gpu"
"""Job.ratios: of the GPU's work in a step of MEFT."""


def of_gpus(gpus: int) -> str:
    """Job.ratios: of a step of MEFT on so many GPUs of a node."""
    return f"meft {gpus}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what kind of node. work: a rank's own step, with the whole node's card and host."""

    work: Workload
    units: Units
    lora: int
    """Parameters of the LoRA that one would pick instead (peers.py)."""
    rows: int
    """Of a micro-batch."""
    node: Node
    host_room: int
    """Bytes of a node's memory."""
    neurons: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """MEFT's."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """What the replay of the code that trains takes, over what the cost model or a formula says of it on one node
    (replay.py); 1 where it is not known."""

    def ratio(self, name: str) -> float:
        return self.ratios.get(name, 1.0)

    @property
    def micro_batches(self) -> int:
        return self.work.batch // self.rows

    def tokens(self, team: Team) -> int:
        """Of a step of all ranks."""
        return team.ranks * self.work.batch * self.work.length

    def share(self, team: Team) -> Workload:
        """A rank's step with its shares of link and host."""
        gpus = team.gpus
        return replace(self.work, card=self.node.card_of(gpus), host=self.node.host_of(gpus))


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method on a team. Bytes are of one optimizer step."""

    method: str
    title: str
    team: Team
    sharding: Sharding
    """Of the base; of everything for ZeRO-3."""
    trainable: int
    device_bytes: int
    """Of a GPU, context included."""
    host_bytes: int
    """Of a node."""
    lacks: str
    """What it needs beyond what there is; "" where it fits."""
    step_s: float
    busy_s: Mapping[str, float]
    """By what is occupied."""
    link_bytes: int
    """A GPU's with the host, both ways."""
    fabric_bytes: int
    """That a GPU receives from others of its node."""
    network_bytes: int
    """That a node sends, and receives."""
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens / self.step_s

    @property
    def wall(self) -> str:
        """What is busiest."""
        return max(self.busy_s, key=lambda name: self.busy_s[name])

    def row(self) -> dict[str, Any]:
        """As JSON."""
        gpus = self.team.ranks
        fits = not self.lacks
        return {
            "method": self.method,
            "title": self.title,
            "gpus": self.team.gpus,
            "nodes": self.team.nodes,
            "state": "ok" if fits else "does not fit",
            "lacks": self.lacks,
            "evidence": "simulated",
            "base_on_gpus": self.sharding.gpus,
            "trainable": self.trainable,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "step_s": round(self.step_s, 6),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "tokens_per_s_per_gpu": round(self.tokens_per_s / gpus, 2),
            "wall": self.wall,
            "busy_s": {name: round(s, 6) for name, s in self.busy_s.items()},
            "link_bytes": self.link_bytes,
            "fabric_bytes": self.fabric_bytes,
            "network_bytes": self.network_bytes,
        }


class Fitting(Protocol):
    """What lacks nothing where it fits."""

    @property
    def lacks(self) -> str: ...


T = TypeVar("T", bound=Fitting)


def first_that_fits(team: Team, made: Callable[[Sharding], T]) -> T:
    """With the base spread over as few GPUs as it takes; over all of them where it fits nowhere."""
    point = None
    for sharding in shardings(team):
        point = made(sharding)
        if not point.lacks:
            return point
    assert point is not None
    return point


def lacks(job: Job, device: int, host: int) -> str:
    """What a point needs beyond what there is, in words."""
    room = int(job.node.card.usable_bytes.value)
    if device > room:
        return f"{_gib(device)} on a GPU of {_gib(room)}"
    return f"{_gib(host)} in a host of {_gib(job.host_room)}" if host > job.host_room else ""


def meft(job: Job, team: Team, kept: bool) -> Point:
    """MEFT with nothing kept on the device, as in the paper, or with rows there: all of them, with their optimizer on
    the host, where ranks train together; on one GPU a third of them, with their optimizer."""
    options = MeftOptions(neurons=job.neurons, **job.options)
    if kept:
        options = replace(options, device_budget=rows_budget(options, job.work))
    name, title = (ROWS_KEPT, "MEFT, rows kept on each GPU") if kept else (OURS, "MEFT")
    held = _held(job, team, options)
    sharding = held.sharding
    rank = Rank(options, job.share(team), job.rows, job.work.shape.layers, team)
    busy, step_s, link = _seconds(job, rank, sharding)
    gathered = _gathers(job, sharding)
    trainable = sum(options.parameter_groups(job.work.shape.hidden, job.work.shape.layers).values())
    return Point(
        method=name, title=title, team=team, sharding=sharding, trainable=trainable,
        device_bytes=held.device_bytes, host_bytes=held.host_bytes, lacks=held.lacks, step_s=step_s, busy_s=busy,
        link_bytes=link, fabric_bytes=round(gathered.fabric_bytes), tokens=job.tokens(team),
        network_bytes=round(gathered.network_bytes + _exchanged(rank)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Held:
    """Where the base lies, what a GPU and a node hold, and what they lack for it."""

    sharding: Sharding
    device_bytes: int
    host_bytes: int
    lacks: str


def meft_memory(job: Job, team: Team) -> Held:
    """Of MEFT with nothing kept on the device."""
    return _held(job, team, MeftOptions(neurons=job.neurons, **job.options))


def rows_budget(options: MeftOptions, work: Workload) -> int:
    """The device_budget that keeps router, keys and, of a rank among others, all rows."""
    price = budget.prices(options, work.shape.hidden, getattr(torch, work.dtype), router_there=True)
    keys = (
        price.keys + options.neurons * price.value
        if price.keys_are_rows and price.keys
        else options.neurons * price.row
    )
    return work.shape.layers * (price.router + keys)


def _held(job: Job, team: Team, options: MeftOptions) -> Held:
    """With the base over as few GPUs as it takes."""

    def made(sharding: Sharding) -> Held:
        device, host = _memory(job, options, sharding, team.ranks > 1)
        return Held(sharding=sharding, device_bytes=device, host_bytes=host, lacks=lacks(job, device, host))

    return first_that_fits(team, made)


def _memory(job: Job, options: MeftOptions, sharding: Sharding, ranks: bool) -> tuple[int, int]:
    """(device bytes of a GPU, host bytes of a node): step_bytes with the base as it lies here. The host holds one set
    of rows, sums and moments, however many ranks there are."""
    work, shape = job.work, job.work.shape
    trainable = sum(options.parameter_groups(shape.hidden, shape.layers).values())
    step = Step(
        shape=shape, tokens=job.rows * work.length, dtype=work.dtype, vocabulary=work.vocabulary, cuda=True,
        union_share=1 - (1 - work.union_share) ** job.rows, ranks=ranks,
    )  # fmt: skip
    need = step_bytes(describe(OURS), options, trainable, step)
    device = {**need.device, **step_memory(work, job.units, job.rows, sharding)}
    return sum(device.values()), sum(need.host.values())


def _gathers(job: Job, sharding: Sharding) -> Gathering:
    nbytes = job.work.shape.parameters * WIDTH[job.work.dtype]
    return gathering(nbytes, sharding, 2 * job.micro_batches)


def _exchanged(rank: Rank) -> float:
    """Bytes a node sends in a step: rows and the router's gradient."""
    across = 1 - 1 / rank.team.nodes
    return rank.network_bytes + 2 * rank.router_bytes * across


def _seconds(job: Job, rank: Rank, sharding: Sharding) -> tuple[dict[str, float], float, int]:
    """(busy seconds, the step's, bytes of a GPU's link): the replayed step times its ratio, and never less than what
    any one thing is occupied. The exchange between nodes follows it, since a step's norm is known only when all
    gradients are there."""
    made, node = steady(rank), job.node
    link, memory = _moved(rank)
    gather = _gathers(job, sharding).seconds(node)
    exchange = _exchanged(rank) / node.wiring.network.value
    busy = {
        GPU: made.busy_s["gpu"] * job.ratio(MEFT_GPU),
        HOST: made.busy_s["workers"],
        MEMORY: memory * rank.team.gpus / node.host.bandwidth.value,
        SWITCH: max(made.busy_s["h2d"], made.busy_s["d2h"]),
        FABRIC: gather["fabric"],
        NETWORK: gather["network"] + exchange,
    }
    if not node.wiring.nvlink:
        busy[SWITCH] += busy.pop(FABRIC) * node.sharers(rank.team.gpus)
    longest = max(
        made.step_s * job.ratio(of_gpus(rank.team.gpus)),
        *(s for name, s in busy.items() if name != NETWORK),
        gather["network"],
    )
    return busy, longest + exchange, link


def _moved(rank: Rank) -> tuple[int, float]:
    """(bytes of the rank's link, bytes of host memory that it reads and writes, copies included) in a step."""
    count = rank.work.batch // rank.rows
    link = memory = 0.0
    for program, times in ((rank.micro_batch(), count), (rank.update(), 1)):
        for entry in program:
            if isinstance(entry, Operation) and entry.place != "device":
                link += times * entry.bytes * (entry.place != "host")
                memory += times * entry.bytes
    return round(link), memory


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
