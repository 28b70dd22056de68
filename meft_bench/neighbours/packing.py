"""Jobs on slices of GPUs, in the manner of PARIS and ELSA: which partition, which job where; and small cases exactly.

PARIS chooses a partition of each GPU for the work at hand, with slices of several sizes. Here: from the best of some
whole GPUs and others cut up alike, one GPU at a time is cut up otherwise as long as that shortens the whole. ELSA gives
work to the slice that ends it first, knowing how fast each size is for it. Here: jobs in the order of their least time,
the longest first, each to the slice where it ends earliest.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meft_bench.simulate.mig import COMPUTE, MEMORY, PROFILES, Partition, partitions


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run."""

    name: str
    nbytes: float
    """Of the device, at the peak."""
    seconds: Mapping[str, float]
    """By profile; a profile that cannot hold it is left out."""

    @property
    def least(self) -> float:
        return min(self.seconds.values(), default=math.inf)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where each job runs."""

    layout: tuple[Partition, ...]
    """Of each GPU."""
    makespan: float
    placed: tuple[tuple[int, str], ...]
    """(number of the slice over all GPUs, its profile) of each job."""


def schedule(jobs: Sequence[Job], layout: Sequence[Partition]) -> Schedule | None:
    """Jobs on the slices of the GPUs; None where one fits no slice."""
    slices = [name for partition in layout for name in partition]
    ends = [0.0] * len(slices)
    placed: list[tuple[int, str]] = [(0, "")] * len(jobs)
    for number in sorted(range(len(jobs)), key=lambda n: (-jobs[n].least, n)):
        seconds = jobs[number].seconds
        able = [i for i, name in enumerate(slices) if name in seconds]
        if not able:
            return None
        chosen = min(able, key=lambda i: (ends[i] + seconds[slices[i]], i))
        ends[chosen] += seconds[slices[chosen]]
        placed[number] = (chosen, slices[chosen])
    return Schedule(layout=tuple(layout), makespan=max(ends, default=0.0), placed=tuple(placed))


def packed(jobs: Sequence[Job], gpus: int) -> Schedule | None:
    """The shortest schedule that the search finds; None where a job fits no slice at all."""
    made = (schedule(jobs, layout) for layout in _starts(gpus))
    best = min((s for s in made if s), key=lambda s: s.makespan, default=None)
    while best is not None:
        nearer = min(_changed(jobs, best), key=lambda s: s.makespan, default=None)
        if nearer is None or nearer.makespan >= best.makespan * (1 - 1e-12):
            return best
        best = nearer
    return None


def _starts(gpus: int) -> Iterator[list[Partition]]:
    """Some whole GPUs, and all others cut up alike."""
    for partition in partitions():
        for whole in range(gpus + 1):
            yield [("7g.80gb",)] * whole + [partition] * (gpus - whole)


def _changed(jobs: Sequence[Job], from_: Schedule) -> list[Schedule]:
    """Schedules with one GPU cut up otherwise; GPUs that are alike are tried once."""
    found = []
    for place in {partition: i for i, partition in enumerate(from_.layout)}.values():
        for partition in partitions():
            layout = [*from_.layout[:place], partition, *from_.layout[place + 1 :]]
            if partition != from_.layout[place] and (made := schedule(jobs, layout)):
                found.append(made)
    return found


def exact(jobs: Sequence[Job], gpus: int) -> float:
    """The least makespan of all partitions and all assignments, by trying every one: for a few jobs. inf where none
    holds them all."""
    best = math.inf
    for layout in itertools.combinations_with_replacement(partitions(), gpus):
        slices = [name for partition in layout for name in partition]
        best = min(best, _assigned(sorted(jobs, key=lambda j: -j.least), slices, [0.0] * len(slices), best))
    return best


def _assigned(jobs: Sequence[Job], slices: Sequence[str], ends: list[float], best: float) -> float:
    """The least makespan below best of what is left; slices that are alike and end alike are tried once."""
    if not jobs:
        return max(ends, default=0.0)
    first, rest, tried = jobs[0], jobs[1:], set()
    for i, name in enumerate(slices):
        if name not in first.seconds or (name, ends[i]) in tried:
            continue
        tried.add((name, ends[i]))
        end = ends[i] + first.seconds[name]
        if end < best:
            best = min(best, _assigned(rest, slices, [*ends[:i], end, *ends[i + 1 :]], best))
    return best


def bound(jobs: Sequence[Job], gpus: int) -> float:
    """No schedule is shorter: the longest job on its fastest slice, and all jobs where they take least of a GPU's
    compute, and of its memory."""
    of = [
        sum(min(s * getattr(PROFILES[name], part) / whole for name, s in j.seconds.items()) for j in jobs) / gpus
        for part, whole in (("compute", COMPUTE), ("memory", MEMORY))
    ]
    return max(*of, *(j.least for j in jobs))


def unused_memory(jobs: Sequence[Job], made: Schedule, gpu_bytes: float) -> float:
    """Share of memory times time that no job holds while the schedule runs."""
    held = sum(j.nbytes * j.seconds[name] for j, (_, name) in zip(jobs, made.placed, strict=True))
    return 1 - held / (gpu_bytes * len(made.layout) * made.makespan) if made.makespan else 0.0
