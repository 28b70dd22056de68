"""Memory that the ranks of one node share, and the counters in it by which they wait for one another.

The memory is a file without a name (memfd), which its ranks open through /proc. It is no part of /dev/shm, whose size a
container often limits to 64 MB; it counts as the processes' own memory and goes when the last of them does, however
that ends. Pages are taken when they are first written.
"""

import json
import math
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from meft_bench.meft.engine import memory
from meft_bench.meft.engine.topology import PER_NODE, TIMEOUT, RankFailure, Topology

_PAGE = 1 << 21  # arrays start at huge pages, should the system lend them
_LINE = 64
_LOOK_S = 0.5  # between two looks whether the others live


class Array(NamedTuple):
    """A tensor to be shared."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SharedMemory:
    """Zeros that all ranks of this node read and write. Collective over all ranks. Raises ValueError, the same on all,
    where the system cannot share memory or a node has less than is needed."""

    def __init__(self, topology: Topology, arrays: Sequence[Array], freed: int = 0) -> None:
        """freed: bytes that this rank will give back once the arrays are there."""
        self.places = _placed(arrays)
        self.nbytes = self.places[-1] + _LINE
        self.file, alone = -1, topology.beside == 1
        refused, offered = _refused(self.nbytes, freed * topology.beside, alone), dict[str, int]()
        if not refused and topology.leads_node and not alone:
            self.file = os.memfd_create("meft-rows", os.MFD_CLOEXEC)
            os.ftruncate(self.file, self.nbytes)
            offered = {"node": topology.node, "process": os.getpid(), "file": self.file}
        said = [json.loads(text) for text in topology.texts(json.dumps([refused, offered]), "shared memory")]
        _raise_first([text for text, _ in said])
        if not topology.leads_node:
            leader = next(one for _, one in said if one and one["node"] == topology.node)
            try:
                self.file = os.open(f"/proc/{leader['process']}/fd/{leader['file']}", os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                refused = (
                    f"rank {topology.rank} cannot open the memory of process {leader['process']} on its node "
                    f"({error}): start the ranks of a node as one user in one container, or set {PER_NODE}=1 for one "
                    "set of neurons per rank"
                )
        if self.file >= 0:
            weakref.finalize(self, os.close, self.file)
        _raise_first(topology.texts(refused, "shared memory"))
        self._map = mmap.mmap(self.file, self.nbytes)  # of no file, where there is nobody to share with
        self.tensors = [self._tensor(array, place) for array, place in zip(arrays, self.places, strict=False)]

    def _tensor(self, array: Array, place: int) -> Tensor:
        count = math.prod(array.shape)
        if not count:
            return torch.zeros(array.shape, dtype=array.dtype)
        tensor = torch.frombuffer(self._map, dtype=array.dtype, count=count, offset=place).view(array.shape)
        memory.advise(tensor)
        return tensor

    def numbers(self, which: int) -> memoryview:
        """An int64 array as numbers that are read and written one by one, each in one go."""
        array = self.tensors[which]
        place = self.places[which]
        return memoryview(self._map)[place : place + array.nbytes].cast("q")


def _placed(arrays: Sequence[Array]) -> list[int]:
    """Where each array begins; last, where all end."""
    places, end = [], 0
    for array in arrays:
        unit = _PAGE if array.nbytes >= _PAGE else _LINE
        begin = -(-end // unit) * unit
        places.append(begin)
        end = begin + array.nbytes
    return [*places, end]


def _refused(nbytes: int, freed: int, alone: bool) -> str:
    """Why this rank cannot have nbytes of shared memory; nothing if it can."""
    from meft_bench import host_memory  # here, as the method imports torch alone

    if not alone and not hasattr(os, "memfd_create"):
        return f"ranks of one node share memory on Linux only: set {PER_NODE}=1, or start one rank per machine"
    free = host_memory.available_bytes() + freed
    if free < nbytes:
        return (
            f"the rows, gradients and moments of a node take {nbytes / 2**30:.2f} GiB of memory, and "
            f"{free / 2**30:.2f} GiB are free: use fewer neurons or moments='bf16', or free memory"
        )
    return ""


def _raise_first(refusals: list[str]) -> None:
    for text in refusals:
        if text:
            raise ValueError(text)


class Board:
    """Counters of the ranks of a node: each is written by one rank and read by all."""

    BARRIER, KIND, PROCESS, SETTING = 0, 1, 3, 4
    SLOTS = 8
    """Of counters that are the board's own; the first ones."""

    def __init__(self, topology: Topology, shared: SharedMemory, which: int) -> None:
        """which: the int64 array [counters, ranks of the node]."""
        self.topology, self._numbers, self._memory = topology, shared.numbers(which), shared
        self.put(self.PROCESS, os.getpid())

    def put(self, counter: int, value: int) -> None:
        """Show the others a value of this rank's. All that was written to shared memory before is seen before it."""
        memory.fence()
        self._numbers[counter * self.topology.beside + self.topology.place] = value
        memory.fence()

    def get(self, counter: int, place: int) -> int:
        """What the rank at this place of the node shows."""
        value = self._numbers[counter * self.topology.beside + place]
        memory.fence()
        return value

    def least(self, counter: int) -> int:
        """The smallest over the node's ranks."""
        return min(self.get(counter, place) for place in range(self.topology.beside))

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until ready(). Raises RankFailure when a rank of the node dies meanwhile, or after the time-out."""
        began = looked = time.monotonic()
        pause = 0.0
        while not ready():
            time.sleep(pause)
            pause = min(1e-3, pause * 1.5 + 1e-5)
            now = time.monotonic()
            if now - looked > _LOOK_S:
                self._look(what)
                looked = now
            if now - began > self.topology.timeout_s and not ready():
                raise RankFailure(
                    f"rank {self.topology.rank} timed out: it has waited {self.topology.timeout_s:g} s ({TIMEOUT}) "
                    f"for the other ranks of its node ({what}); one of them hangs or left the loop; go on from the "
                    "last checkpoint"
                )

    def _look(self, what: str) -> None:
        for place in range(self.topology.beside):
            process = self.get(self.PROCESS, place)
            if process and not _lives(process):
                raise RankFailure(
                    f"another rank has died (process {process}, while rank {self.topology.rank} waited for it: "
                    f"{what}): its own output says why; go on from the last checkpoint"
                )

    def barrier(self, kind: int, what: str) -> None:
        """Return when every rank of the node is here. Raises RankFailure where one is at a barrier of another kind."""
        number = self.get(self.BARRIER, self.topology.place) + 1
        # A rank may be one barrier ahead, never two, so that two places hold what each says of itself.
        self.put(self.KIND + number % 2, kind)
        self.put(self.BARRIER, number)
        self.until(lambda: self.least(self.BARRIER) >= number, what)
        for place in range(self.topology.beside):
            if self.get(self.KIND + number % 2, place) != kind:
                raise RankFailure(
                    f"rank {self.topology.rank} is at '{what}' and another rank of its node is not: every rank clips, "
                    "steps and loads in the same order; go on from the last checkpoint"
                )

    @contextmanager
    def lock(self, number: int) -> Iterator[None]:
        """Alone among the ranks of the node, for what has this number. The system takes it back from who dies."""
        if self.topology.beside == 1:
            yield
            return
        import fcntl  # here, as not every system has it

        def taken() -> bool:
            try:
                fcntl.lockf(self._memory.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                return False
            return True

        self.until(taken, "rows that another rank brings up to date")
        memory.fence()
        try:
            yield
        finally:
            memory.fence()
            fcntl.lockf(self._memory.file, fcntl.LOCK_UN, 1, number)


def _lives(process: int) -> bool:
    """Whether a process is there and has not ended (a zombie has)."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False
