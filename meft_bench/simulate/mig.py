"""Slices of a GPU (NVIDIA's MIG), for simulation: which there are, which go together, and a card as a slice sees it.

Nothing here touches a GPU. Profiles and placements are those of A100 and H100 with 80 GB (NVIDIA's MIG user guide,
"Supported MIG Profiles"): eight slices of memory in a row, of which a profile takes some from certain places on, and
seven of compute.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from meft_bench.simulate.cards import GIB, Card, Constant, Host

COMPUTE, MEMORY = 7, 8
"""Slices of a whole GPU."""
_GUIDE = "NVIDIA MIG user guide: A100 and H100 with 80 GB"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A kind of slice."""

    name: str
    compute: int
    """Sevenths of the SMs."""
    memory: int
    """Eighths of memory, of its bandwidth and of the L2."""
    starts: tuple[int, ...]
    """Slices of memory at which it may begin."""
    usable_gib: float
    """About what nvidia-smi lists for an A100 with 80 GB."""


PROFILES = {
    p.name: p
    for p in (
        Profile(name="1g.10gb", compute=1, memory=1, starts=(0, 1, 2, 3, 4, 5, 6), usable_gib=9.5),
        Profile(name="1g.20gb", compute=1, memory=2, starts=(0, 2, 4, 6), usable_gib=19.5),
        Profile(name="2g.20gb", compute=2, memory=2, starts=(0, 2, 4), usable_gib=19.5),
        Profile(name="3g.40gb", compute=3, memory=4, starts=(0, 4), usable_gib=39.25),
        Profile(name="4g.40gb", compute=4, memory=4, starts=(0,), usable_gib=39.25),
        Profile(name="7g.80gb", compute=7, memory=8, starts=(0,), usable_gib=78.75),
    )
}
Partition = tuple[str, ...]
"""Names of the slices of one GPU, sorted."""


@cache
def partitions() -> tuple[Partition, ...]:
    """Every way to cut up a GPU to which no slice can be added."""
    every = {tuple(sorted(names)) for names in _placed(0, frozenset(), 0)}
    return tuple(sorted(p for p in every if not any(_within(p, other) for other in every if other != p)))


def one_size() -> dict[str, Partition]:
    """Profile -> a GPU cut into as many of it as go."""
    return {name: max(_alone(name), key=len) for name in PROFILES}


def slice_of(card: Card, profile: Profile) -> Card:
    """The card as one of its slices: its part of compute, memory and bandwidth, and of the link, which all slices use
    at the same time."""
    compute, memory = profile.compute / COMPUTE, profile.memory / MEMORY
    parts: dict[str, Any] = {
        name: rate._replace(value=rate.value * share)
        for name, share in (
            ("half_rate", compute), ("full_rate", compute), ("bandwidth", memory), ("h2d_pinned", compute),
            ("d2h_pinned", compute), ("h2d_pageable", compute), ("d2h_pageable", compute), ("memory_bytes", memory),
        )
        if isinstance(rate := getattr(card, name), Constant)
    }  # fmt: skip
    usable = Constant(profile.usable_gib * GIB, "bytes", _GUIDE)
    return dataclasses.replace(card, name=f"{card.name}-{profile.name}", title=f"{card.title}, slice {profile.name}",
                               usable_bytes=usable, **parts)  # fmt: skip


def host_of(host: Host, profile: Profile) -> Host:
    """The host as the job of one slice sees it, when the other slices have jobs too."""
    share = profile.compute / COMPUTE
    rates: dict[str, Any] = {
        name: rate._replace(value=rate.value * share)
        for name in ("product_rate", "dot_rate", "search_rate", "element_rate", "bandwidth", "fresh_bandwidth")
        if isinstance(rate := getattr(host, name), Constant)
    }
    return dataclasses.replace(host, **rates)


def _placed(place: int, taken: frozenset[int], compute: int) -> Iterator[tuple[str, ...]]:
    """What can be placed from a slice of memory on, beside what is there."""
    yield ()
    for start in range(place, MEMORY):
        for name, profile in PROFILES.items():
            own = frozenset(range(start, start + profile.memory))
            if start in profile.starts and not own & taken and compute + profile.compute <= COMPUTE:
                for rest in _placed(start + 1, taken | own, compute + profile.compute):
                    yield (name, *rest)


def _alone(name: str) -> Iterator[Partition]:
    return (p for p in {tuple(sorted(n)) for n in _placed(0, frozenset(), 0)} if p and set(p) == {name})


def _within(small: Partition, large: Partition) -> bool:
    """Whether all slices of one are among those of the other."""
    left = list(large)
    for name in small:
        if name not in left:
            return False
        left.remove(name)
    return True
