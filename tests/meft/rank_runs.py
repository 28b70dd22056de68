"""Several ranks on this machine, started once for many cases: each trains tiny models and leaves what came of it."""

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import topology
from meft_bench.meft.model import MeftModel, attach
from tests.meft.tiny_models import fill_values, next_token_loss, small_config, tiny_stack, tokens

STEPS, LR = 4, 2e-2
_LONGEST_S = 240


def options(**changes: Any) -> tuple[MeftOptions, dict[str, Any]]:
    """(an adapter's options, its optimizer's) from the fields of both."""
    optimizer = {name: changes.pop(name) for name in ("weight_decay", "betas") if name in changes}
    return small_config(**changes), optimizer


def trained(rank: int, world: int, micro_batches: int = 1, **changes: Any) -> dict[str, Tensor]:
    """What this rank of `world` has after training on its micro-batches, of `micro_batches` * world in each step."""
    config, settings = options(**changes)
    meft = attach(tiny_stack(), config, seed=3)
    fill_values(meft)
    optimizer = meft.make_optimizer(lr=LR, **settings)
    norms = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR / (1 + step % 3)
        for a in range(micro_batches):
            loss_of(meft, step, a * world + rank, world * micro_batches).backward()
        if step != 2:  # in which the step itself makes the sum
            norms.append(meft.clip_grad_norm_(0.5))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms), **left(meft, optimizer)}


def loss_of(meft: MeftModel, step: int, number: int, of: int) -> Tensor:
    """Of micro-batch `number` among `of` in a step."""
    ids = tokens(1 + number % 2, 6, seed=100 * step + number)
    return next_token_loss(meft.model(ids), ids) / of


def left(meft: MeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and moments."""
    found = {f"{i}.{name}": p.detach().clone() for i, s in enumerate(meft.stores) for name, p in s.named_parameters()}
    for number, entry in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": t.clone() for name, t in entry.items()}
    return found


def start(
    world: int, work: Callable[[int, int], Any], folder: Path, environment: dict[str, str] | None = None
) -> list[Any]:
    """What work(rank, world) returned on each rank; what it raised instead, or where it hangs, as a text; None for one
    that died."""
    context, processes = multiprocessing.get_context("fork"), []
    for rank in range(world):
        arguments = rank, world, work, folder, environment or {}
        processes.append(context.Process(target=_ranked, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(_LONGEST_S + 5)
        if process.is_alive():
            process.kill()
            process.join()
    return [_found(folder, rank) for rank in range(world)]


def _found(folder: Path, rank: int) -> Any:
    if (folder / f"{rank}.pt").exists():
        return torch.load(folder / f"{rank}.pt")
    return (folder / f"{rank}.txt").read_text() or None


def _ranked(rank: int, world: int, work: Callable, folder: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_LONGEST_S, file=(folder / f"{rank}.txt").open("w"))
    os.environ.update({topology.TIMEOUT: "120", **environment})
    try:
        place, waits = f"file://{folder}/store", timedelta(seconds=120)
        dist.init_process_group("gloo", place, waits, world_size=world, rank=rank)
        made = work(rank, world)
    except BaseException:
        made = traceback.format_exc()
    torch.save(made, folder / f"{rank}.pt")
    os._exit(0)  # nothing of the process that it was forked from is to be ended twice
