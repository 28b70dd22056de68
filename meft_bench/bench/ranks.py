"""Several ranks on this machine, one thread each, beside one rank that accumulates the same micro-batches: tokens per
second of whole training steps, base model included, and the host bytes of a parameter.

All processes live through all rounds; in a round one rank works while the others wait, then all of them together. The
micro-batches and the sums are the same (tests/meft/test_ranks.py holds the bits).
"""

import dataclasses
import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from meft_bench.bench import common
from meft_bench.bench.timed_step import Sizes, random_llama
from meft_bench.meft.model import MeftModel, attach
from meft_bench.train.loop import one_step
from meft_bench.train.methods import require_positive

NUMERICS = 1
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
_CLIP = 1.0


def ranks_benchmark(output: Path, repeats: int = 7, *, ranks: int = 2, **sizes: Any) -> str:
    """Write ranks.json and ranks.md into output, return the Markdown. A round is one optimizer step of `ranks`
    micro-batches; sizes are fields of timed_step.Sizes. Raises ValueError for bad arguments before anything runs."""
    require_positive(repeats=repeats, ranks=ranks)
    settings = Sizes(**sizes)
    common.open_folder(output)
    rounds: list[dict[str, tuple[float, float]]] = []
    with _started(1, settings) as alone, _started(ranks, settings) as together:
        for number in range(settings.warmup + repeats):
            taken = {"one": _step(alone, number, ranks), "ranks": _step(together, number, ranks)}
            if number >= settings.warmup:
                rounds.append(taken)
        one, node = _host_bytes(alone), _host_bytes(together)
    tokens = ranks * settings.batch * settings.length
    times = {name: [r[name][0] for r in rounds] for name in ("one", "ranks")}
    work = {name: [r[name][1] for r in rounds] for name in ("one", "ranks")}
    ratios = common.ratios(times["one"], times["ranks"])
    result = {
        **common.about(repeats, ranks=ranks, **{k: v for k, v in dataclasses.asdict(settings).items()}),
        "tokens": tokens,
        "tokens_per_s": {name: round(tokens / common.median(t), 1) for name, t in times.items()},
        "times_faster": round(common.median(ratios), 3),
        "ratios": ratios,
        "processor_ratios": common.ratios(work["one"], work["ranks"]),
        "parameters": one["parameters"],
        "host_bytes_per_parameter": {
            name: round(found["bytes"] / found["parameters"], 3) for name, found in (("one", one), ("ranks", node))
        },
        "n": repeats,
        "rounds_s": {name: common.rounded(t) for name, t in times.items()},
        "processor_s": {name: common.rounded(t) for name, t in work.items()},
    }
    return common.write_result(output, "ranks", result, _text(result))


def _text(result: dict[str, Any]) -> str:
    s, speed, host = result["settings"], result["tokens_per_s"], result["host_bytes_per_parameter"]
    faster, work = (common.spread(result[name]) for name in ("ratios", "processor_ratios"))
    return "\n".join([
        f"Whole steps of {s['ranks']} micro-batches of {s['batch']} x {s['length']} tokens, {s['layers']} layers, "
        f"D={s['hidden']}, R={s['neurons']}, on {result['cpu']}; one thread per rank, medians of {result['n']} rounds "
        "(measured).",
        "",
        "| | tokens/s | times faster | less processor time a rank | host bytes a parameter |",
        "|---|---:|---:|---:|---:|",
        f"| one rank, accumulating | {speed['one']:.0f} | 1 | 1 | {host['one']:.2f} |",
        f"| {s['ranks']} ranks of one node | {speed['ranks']:.0f} | {faster} | {work} | {host['ranks']:.2f} |",
        "",
        "Processor time is that of the rank that took most of it: what the ratio would be on cores that nobody else "
        "uses, without waiting for one another. Host bytes: rows, gradients, moments and the engine's books over all "
        "ranks, where memory that ranks share counts once.",
    ]) + "\n"  # fmt: skip


# ---- the ranks ----


@contextmanager
def _started(ranks: int, sizes: Sizes) -> Iterator[list[Connection]]:
    """Pipes to processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, processes = multiprocessing.get_context("forkserver"), [], []
    context.set_forkserver_preload(["meft_bench.bench.ranks"])
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        # One that dies takes no other with it; they end when their pipe does.
        processes.append(context.Process(target=_rank, args=(rank, ranks, port, sizes, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _step(pipes: list[Connection], number: int, micro_batches: int) -> tuple[float, float]:
    """(seconds of one step on these ranks, processor seconds), of the rank with most of each."""
    for pipe in pipes:
        pipe.send((number, micro_batches))
    taken, worked = zip(*_answers(pipes), strict=True)
    return max(taken), max(worked)


def _host_bytes(pipes: list[Connection]) -> dict[str, int]:
    for pipe in pipes:
        pipe.send("bytes")
    found = list(_answers(pipes))
    shared = max(one["shared"] for one in found)
    return {"parameters": found[0]["parameters"], "bytes": shared + sum(one["own"] for one in found)}


def _answers(pipes: list[Connection]) -> list[Any]:
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError("a rank of the benchmark ended; its own output says why") from None


def _rank(rank: int, ranks: int, port: int, sizes: Sizes, pipe: Connection) -> None:
    """What one process does: steps as it is told, until the pipe closes."""
    torch.set_num_threads(1)
    if ranks > 1:
        address, waits = f"tcp://127.0.0.1:{port}", timedelta(minutes=5)
        torch.distributed.init_process_group("gloo", address, waits, world_size=ranks, rank=rank)
    meft = attach(random_llama(sizes), sizes.config(key_experts=True))
    optimizer = meft.make_optimizer(lr=1e-3)
    meft.model.train()
    while True:
        try:
            told = pipe.recv()
        except EOFError:
            break
        if told == "bytes":
            pipe.send(host_bytes(meft, optimizer))
            continue
        number, micro_batches = told
        mine = range(rank, micro_batches, ranks)
        losses = [functools.partial(_loss, meft, sizes, number, i, micro_batches) for i in mine]
        if ranks > 1:
            torch.distributed.barrier()
        before = time.process_time()
        taken = common.seconds(functools.partial(_work, meft, optimizer, losses))
        pipe.send((taken, time.process_time() - before))
    os._exit(0)


def _work(meft: MeftModel, optimizer: torch.optim.Optimizer, losses: list[Any]) -> None:
    one_step(optimizer, losses, lambda: meft.clip_grad_norm_(_CLIP))
    for store in meft.stores:
        store.come_home()  # a step counts when all ranks have made it


def _loss(meft: MeftModel, sizes: Sizes, number: int, i: int, micro_batches: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + i)
    ids_BL = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length), generator=generator)
    logits = meft.model(input_ids=ids_BL, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()) / micro_batches


def host_bytes(meft: MeftModel, optimizer: Any) -> dict[str, int]:
    """Parameters, and bytes of this process's own and of shared memory, of rows, gradients, moments and all that the
    engine notes of each row."""
    shared: dict[int, int] = {}
    own: dict[int, int] = {}
    for store, updates in zip(meft.stores, optimizer.updates, strict=True):
        for tensor in store.share.tensors.values() if store.share is not None else ():
            shared[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        owners = (store, store.grads, updates, store.share)
        held = [value for owner in owners if owner is not None for value in vars(owner).values()]
        states = [value for parameter in store._parameters.values() for value in optimizer.state[parameter].values()]
        for value in (*held, *states, *store._parameters.values()):
            if isinstance(value, Tensor):
                own[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    own = {place: nbytes for place, nbytes in own.items() if place not in shared}
    parameters = sum(
        p.numel() for store in meft.stores for p in (store.handle(n) for n in ("keys", "values", "router"))
    )
    return {"parameters": parameters, "own": sum(own.values()), "shared": sum(shared.values())}
