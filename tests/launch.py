"""Start a few processes as torchrun would: the ranks of a test, on this machine's processor."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 300
_PRELOADED = ["meft_bench.finetune.train", "meft_bench.baselines.lora"]


@dataclass(frozen=True)
class Ended:
    """One rank after its end: its exit code and what it printed."""

    code: int
    out: str
    err: str


def on_ranks(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Ended]:
    """work(*arguments), a function of a module, on each of count ranks; SystemExit or an int gives the exit code."""
    context = multiprocessing.get_context("forkserver")  # torch's threads do not survive a plain fork
    context.set_forkserver_preload(_PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(8)
    started = [
        context.Process(target=_rank, args=(rank, count, ports, folder, work, arguments)) for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(LIMIT_S)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    files = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(count)]
    assert not hanging, f"{len(hanging)} ranks hang: {files}"
    return [Ended(process.exitcode or 0, *texts) for process, texts in zip(started, files, strict=True)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def next_port(ports: list[int]) -> Iterator[None]:
    """The ranks meet at another port inside, so that one process may join others more than once."""
    os.environ["MASTER_PORT"] = str(ports.pop(0))
    yield


def _rank(rank: int, count: int, ports: list[int], folder: Path, work: Callable[..., Any], arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": ports[0]}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    sys.stdout, sys.stderr = open(folder / f"{rank}.out", "w"), open(folder / f"{rank}.err", "w")  # noqa: SIM115
    code = work(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code or 0)
