"""Kernels and one layer on 1 to all threads: what a second core adds where memory is the limit."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.bench import common, kernels, peers
from meft_bench.bench.layer import sparse_step
from meft_bench.meft.config import MeftOptions
from meft_bench.train.methods import require_positive

NUMERICS = 4
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
NEURONS = 8464


def threads_benchmark(
    output: Path, repeats: int = 7, *, most: int | None = None, neurons: int = NEURONS, **sizes: Any
) -> str:
    """Write threads.json and threads.md into output, return the Markdown.

    Every round runs every number of threads once, from 1 to `most` (None: the cores this process may use; powers of two
    and the last one beyond 8). sizes are fields of kernels.Sizes. Raises ValueError for bad arguments before anything
    runs.
    """
    require_positive(repeats=repeats)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings, counts = kernels.Sizes(neurons=(neurons,), **sizes), counts_up_to(most or cores)
    common.open_folder(output)
    layer = kernels.Layer(neurons, settings)
    triad = common.Triad(max(layer.moved_bytes(k) for k in (*kernels.BYTES, "search_experts")))
    work: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {
        kernel: (kernels.contenders_of(kernel, layer, peers=False)[kernels.OURS], layer.draw)
        for kernel in (*kernels.BYTES, "search_experts")
    }
    if deepspeed := peers.dense_deepspeed(layer.touched, settings.hidden):
        work[peers.DENSE_DEEPSPEED] = (deepspeed, lambda: None)
    work[common.TRIAD] = (triad.over(layer.moved_bytes("advance_fp32")), lambda: None)
    work["layer, MEFT"] = _layer_step(settings, neurons)
    rows = []
    for name, (run, fresh) in tqdm(work.items(), desc="threads", unit="kernel", leave=False):
        rows.append({"kernel": name, **_over_threads(run, fresh, counts, repeats)})
    lacking = {name: how for name, how in peers.missing().items() if name == peers.DENSE_DEEPSPEED}
    head = common.about(repeats, **dataclasses.asdict(settings), counts=counts)
    result = {**head, "rows": rows, "not_installed": lacking}
    return common.write_result(output, "threads", result, _table(result))


def counts_up_to(most: int) -> list[int]:
    """1, 2, ... most; beyond 8 only powers of two and the last."""
    return [n for n in range(1, most + 1) if n <= 8 or n == most or n & (n - 1) == 0]


def _layer_step(sizes: kernels.Sizes, neurons: int) -> tuple[Callable[[], Any], Callable[[], None]]:
    config = MeftOptions(neurons=neurons, kept=sizes.kept, probed=sizes.probed)
    step, _ = sparse_step(config, sizes.hidden)
    generator, inputs = torch.Generator().manual_seed(0), [torch.empty(0)] * 2

    def fresh() -> None:
        inputs[:] = (torch.randn(sizes.tokens, sizes.hidden, generator=generator) for _ in range(2))

    return lambda: step(*inputs), fresh


def _over_threads(run: Callable[[], Any], fresh: Callable[[], None], counts: list[int], repeats: int) -> dict[str, Any]:
    def on(number: int) -> Callable[[], None]:
        def work() -> None:
            with common.threads(number):
                run()

        return work

    times = common.timed_rounds({str(n): on(n) for n in counts}, repeats, fresh)
    return {
        "seconds": {n: round(common.median(t), 6) for n, t in times.items()},
        "times_faster_than_one": {n: round(common.median(common.ratios(times["1"], t)), 3) for n, t in times.items()},
        "n": repeats,
        "rounds_s": {n: common.rounded(t) for n, t in times.items()},
    }


def _table(result: dict[str, Any]) -> str:
    s = result["settings"]
    counts = [str(n) for n in s["counts"]]
    lines = [
        f"Kernels and one layer by threads, D={s['hidden']}, R={s['neurons'][0]}, T={s['tokens']}, {s['touched']} rows "
        f"touched by a kernel, on {result['cpu']}; {s['kernels']}. Milliseconds, medians of {s['repeats']} rounds, and "
        "times faster than one thread (measured).",
        "",
        f"| | {' | '.join(f'{n}, ms | faster' for n in counts)} |",
        "|---|" + "---:|---:|" * len(counts),
    ]
    for r in result["rows"]:
        cells = [f"{1000 * r['seconds'][n]:.2f} | {r['times_faster_than_one'][n]:.2f}" for n in counts]
        lines.append(f"| {r['kernel']} | {' | '.join(cells)} |")
    for name, why in result["not_installed"].items():
        lines.append(f"| {name} | not installed: {why} |")
    return "\n".join(lines) + "\n"
