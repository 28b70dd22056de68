"""Several processes that train one model together (ranks), as torchrun and accelerate start them.

Who this process is stands in its environment; one that was started alone is ALONE, for whom everything here is free.
together() joins the ranks; inside, they agree by what rank 0 does first, by doing the same, and by adding up. Nobody
waits for ever: a wait has a limit, and when one rank ends, or is silent (heartbeat.py), all end, of which one says why.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from meft_bench import heartbeat
from meft_bench.fields import shown

if TYPE_CHECKING:  # the environment is read before torch is imported
    import torch
    from torch import Tensor

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ENGINE_TIMEOUT = "MEFT_BENCH_RANKS_TIMEOUT"
"""In seconds. MEFT's engine has groups of its own, so that it works in any training loop (meft/engine/topology.py)."""
_LAST_WORDS_S = 1.0
"""How long the rank that keeps the store stays, so that the others find out that it has spoken."""
_GONE = "has died|has waited .* for the other ranks|gloo|nccl|connection (closed|reset|refused)|timed? ?out|broken pipe"
T = TypeVar("T")


class SaidElsewhere(Exception):
    """Another rank has told the user why all of them end."""


class Stopped(BaseException):
    """The launcher told this rank to end (SIGTERM), as it does when another one has died."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process (rank) among all (count), and among those of its machine (local_rank of local_count)."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, decides and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    def by_first(self, work: Callable[[], T]) -> T:
        """What rank 0's work() returns, a value that JSON knows; the others wait. Its error ends all ranks."""
        if self.alone:
            return work()
        found, error = _try(work) if self.first else (None, None)
        self._end_with(error)
        return self.gather(found)[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """work() on rank 0, which leaves files, then on the others, which find them. An error ends all ranks."""
        if self.alone:
            return work()
        found, error = _try(work) if self.first else (None, None)
        self._end_with(error)
        return self.on_all(work if not self.first else lambda: found)  # type: ignore[return-value]

    def on_all(self, work: Callable[[], T]) -> T:
        """work() on every rank at once. The error of the lowest rank that has one ends all."""
        if self.alone:
            return work()
        found, error = _try(work)
        self._end_with(error)
        return found  # type: ignore[return-value]

    def same(self, values: dict[str, Any]) -> None:
        """Raises ValueError unless the values, each of which JSON knows, are the same on every rank."""
        for rank, theirs in enumerate(found := self.gather(values)):
            for name, value in found[0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"{name} is {shown(theirs[name])} on rank {rank} and {shown(value)} on rank 0: start the same "
                        "command with the same files on every machine"
                    )

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order; each is one that JSON knows."""
        return [json.loads(text) for text in _gather(json.dumps(value).encode())] if not self.alone else [value]

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Every count-th part, from this rank's on: as samplers deal batches out, and in which order MEFT adds."""
        return parts[self.rank :: self.count]

    def add_gradients(self, parameters: Iterable["torch.nn.Parameter"]) -> None:
        """Replace every gradient by its sum over the ranks. One that no rank has stays None."""
        import torch
        from torch import distributed

        if self.alone:
            return
        parameters = list(parameters)
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        distributed.all_reduce(present, distributed.ReduceOp.MAX)
        wanted = [p for p, somewhere in zip(parameters, present.tolist(), strict=True) if somewhere]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for work in [distributed.all_reduce(p.grad, async_op=True) for p in wanted]:
            work.wait()

    def _end_with(self, error: Exception | None) -> None:
        """Raise error where it happened and SaidElsewhere on the other ranks; nothing where no rank has one."""
        failed = [rank for rank, fails in enumerate(self.gather(error is not None)) if fails]
        if failed and (error is None or failed[0] != self.rank):
            raise SaidElsewhere(f"rank {failed[0]} ends all")
        if error is not None:
            raise error


ALONE = Ranks()


def launched() -> Ranks:
    """Who this process is by its environment; ALONE where no launcher started it. Raises ValueError for half of one."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    found = {name: os.environ.get(name, "") for name in _NAMES}
    if odd := [name for name, text in found.items() if not text.isdecimal()]:
        raise ValueError(
            f"{odd[0]}={found[odd[0]]} in the environment is no number: start the ranks with "
            "torchrun --nproc-per-node N -m meft_bench train ..."
        )
    rank, count, local_rank, local_count = map(int, found.values())
    return Ranks(rank=rank, count=count, local_rank=local_rank, local_count=local_count)


@contextmanager
def together(ranks: Ranks, minutes: float, *, gpu: bool, go_on: str) -> Iterator[None]:
    """Join the ranks: by gloo, and by NCCL for tensors on GPUs, of which each rank of a machine takes its own.

    minutes: what one rank waits for another at most. go_on: what the user may do when a rank has died, in words.
    Raises, on one rank, the error that ends all, or ValueError when others are gone; SaidElsewhere on the others.
    """
    if ranks.alone:
        yield
        return
    from torch import distributed

    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if gpu:
            _take_gpu(ranks)
        os.environ.setdefault(ENGINE_TIMEOUT, f"{60 * minutes:g}")
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=minutes), rank=ranks.rank,
            world_size=ranks.count,
        )  # fmt: skip
        with heartbeat.watched(go_on):
            yield
    except (Exception, Stopped) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this rank is ending, and says so
        gone = others_gone(error)
        if isinstance(error, SaidElsewhere) or not _speaks(ranks):
            raise SaidElsewhere("another rank has said why") from error
        if gone:
            raise ValueError(
                f"one of {ranks.count} ranks ended without a word or did not answer for {minutes:g} minutes (killed, "
                f"out of memory, or its machine is gone), so all end: {go_on}"
            ) from error
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, before)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _take_gpu(ranks: Ranks) -> None:
    import torch

    if ranks.local_rank >= (here := torch.cuda.device_count()):
        raise ValueError(
            f"rank {ranks.rank} is number {ranks.local_rank + 1} on its machine, which has {here} GPU"
            f"{'s' if here != 1 else ''}: start torchrun with --nproc-per-node {here}, or use --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)


def others_gone(error: BaseException) -> bool:
    """Whether an error is what a wait for another rank ends with; it may have come up in a thread of the engine."""
    if isinstance(error, Stopped):
        return True
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError) and re.search(_GONE, str(found), re.I):
            return True
        found = found.__cause__ or found.__context__
    return False


def _speaks(ranks: Ranks) -> bool:
    """Whether this rank is the first that ends, so that the user hears of it once. Also where nobody can be asked."""
    from torch.distributed import distributed_c10d

    try:
        store = distributed_c10d._get_default_store()
        spoken = store.compare_set(heartbeat.ENDED, "", str(ranks.rank)).decode() == str(ranks.rank)
    except (RuntimeError, ValueError):
        return True
    if spoken and ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(_LAST_WORDS_S)
    return spoken


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _gather(message: bytes) -> list[bytes]:
    """The messages of all ranks, in their order."""
    import torch
    from torch import distributed

    count = distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    distributed.all_gather(sizes, torch.tensor([len(message)]))
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(message.ljust(longest)), dtype=torch.uint8)
    found: list[Tensor] = [torch.empty_like(padded) for _ in range(count)]
    distributed.all_gather(found, padded)
    return [bytes(t[: int(size)].numpy()) for t, size in zip(found, sizes, strict=True)]
