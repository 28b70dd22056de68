"""Which processes train together (ranks), which of them share a machine (a node), and how they talk.

torch.distributed starts them (torchrun, accelerate). here() is None where it did not, or for a world of one: then
nothing of the engine knows of ranks. Otherwise RowAdamW joins the ranks (engine/team.py): every rank makes its
optimizer, its clipping and its steps together with the others, and what it adds up are sums over all ranks, as if one
process had accumulated all micro-batches. The caller divides the loss, as for accumulation.

Two variables of the environment, the same on all ranks:

    MEFT_BENCH_RANKS_TIMEOUT    seconds that one rank waits for another (600)
    MEFT_BENCH_RANKS_PER_NODE   take so many consecutive ranks for one node, with one set of neurons each, whatever
                                machine they run on; unset, ranks that can share memory are one node
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meft_bench.fields import seconds

TIMEOUT, PER_NODE = "MEFT_BENCH_RANKS_TIMEOUT", "MEFT_BENCH_RANKS_PER_NODE"
USUAL_S = 600.0
_TEXT_BYTES = 8192
_SHOWN = 60  # letters of a value that a message may show


class RankFailure(RuntimeError):
    """Another rank has died, stopped, or does something else than this one; the message says which and what."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this process stands among those that train together; ranks and nodes are numbered from 0."""

    rank: int
    world: int
    """How many ranks there are."""
    node: int
    nodes: int
    place: int
    """The number of this rank among those of its node."""
    beside: int
    """How many ranks this node has, this one included; every node has as many."""
    timeout_s: float
    """Seconds that one rank waits for another."""
    everyone: Any
    """gloo group of all ranks."""
    across: Any
    """gloo group of the ranks with this place on every node; None with one node."""

    @property
    def leads_node(self) -> bool:
        return self.place == 0

    def texts(self, text: str, what: str) -> list[str]:
        """What each rank says, in their order; at most 8 KB each."""
        return _texts(self.everyone, self.world, text, what)

    def agree(self, values: dict[str, Any], what: str) -> None:
        """Raises ValueError, the same on all ranks, that names the first of values that is not the same on all."""
        shown = {name: _digest(value) for name, value in values.items()}
        said = [json.loads(text) for text in self.texts(json.dumps(shown), what)]
        for rank, others in enumerate(said):
            for name in dict.fromkeys([*said[0], *others]):
                first, here = said[0].get(name), others.get(name)
                if first != here:
                    raise ValueError(
                        f"ranks disagree in {what}: {name} is {first} on rank 0 and {here} on rank {rank}; start all "
                        "ranks with the same arguments, seed and files"
                    )


def here() -> Topology | None:
    """The ranks that torch.distributed has started, or None for a process alone. Collective at its first call: raises
    ValueError for settings that cannot be, the same on all ranks."""
    global _known
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    if _known is None or _known[0] is not world:
        _known = world, _found()
    return _known[1]


_known: tuple[Any, Topology] | None = None


def _found() -> Topology:
    rank, world, timeout_s = dist.get_rank(), dist.get_world_size(), seconds(TIMEOUT, USUAL_S)
    timeout = timedelta(seconds=timeout_s)
    with collective("meeting the other ranks"):
        everyone = dist.new_group(backend="gloo", timeout=timeout)
    said = _texts(everyone, world, json.dumps([_machine(rank), os.environ.get(TIMEOUT)]), "which ranks share a node")
    machines = [json.loads(text)[0] for text in said]
    if len(set(said)) > 1 and len({json.loads(text)[1] for text in said}) > 1:
        raise ValueError(f"ranks disagree in {TIMEOUT}: start all of them with the same environment")
    members: dict[str, list[int]] = {}
    for number, machine in enumerate(machines):
        members.setdefault(machine, []).append(number)
    nodes = list(members.values())
    sizes = [len(node) for node in nodes]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"nodes with {', '.join(map(str, sizes))} ranks: MEFT divides the rows of a node among as many ranks on "
            f"each; start the same number everywhere, or set {PER_NODE}=1 for one set of neurons per rank"
        )
    across = None
    for place in range(sizes[0]) if len(nodes) > 1 else ():
        with collective("meeting the ranks of other nodes"):
            group = dist.new_group([node[place] for node in nodes], backend="gloo", timeout=timeout)
        across = group if rank in [node[place] for node in nodes] else across
    mine = next(number for number, node in enumerate(nodes) if rank in node)
    return Topology(
        rank=rank, world=world, node=mine, nodes=len(nodes), place=nodes[mine].index(rank), beside=sizes[0],
        timeout_s=timeout_s, everyone=everyone, across=across,
    )  # fmt: skip


def _machine(rank: int) -> str:
    """The same on ranks that can share memory: one machine and one table of processes (a container has its own)."""
    given = os.environ.get(PER_NODE)
    if given is not None:
        if not given.isdigit() or int(given) < 1:
            raise ValueError(f"{PER_NODE}={given!r} is no positive whole number: unset it, or say how many ranks")
        return f"node {rank // int(given)}"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()} rank {rank}"  # no Linux: nothing to share memory with


def _texts(group: Any, world: int, text: str, what: str) -> list[str]:
    data = text.encode()
    assert len(data) <= _TEXT_BYTES, f"too much said about {what}"
    mine = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    all_of_them = [torch.zeros_like(mine) for _ in range(world)]
    with collective(what):
        dist.all_gather(all_of_them, mine, group=group)
    return [bytes(one.tolist()).rstrip(b"\0").decode() for one in all_of_them]


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Raises RankFailure when torch.distributed could not finish what is done inside."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankFailure(
            f"rank {dist.get_rank()} of {dist.get_world_size()} could not go on with {what}: another rank has died or "
            f"did not come within {seconds(TIMEOUT, USUAL_S):g} s ({TIMEOUT}); its own output says why, go on from "
            f"the last checkpoint ({why})"
        ) from error


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
    text = str(value)
    return text if len(text) <= _SHOWN else hashlib.sha256(text.encode()).hexdigest()[:12]
