"""One adapter layer, forward + backward + update: MEFT on host memory against the dense Parallel Adapter.

T tokens, D hidden size, R neurons, N experts, P probed, K kept, U rows moved.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.bench import common
from meft_bench.bench.common import LR, TOKENS, open_folder
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore
from meft_bench.train.methods import require_positive

NUMERICS = 2
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
SIZES = ((256, 1024), (256, 4096), (256, 16384), (4096, 4096), (4096, 16384))
"""(D, R)"""
_BYTES_PER_NEURON_WIDTH = 2 * 4 * 2 * 4 + 8
"""Two methods of p, gradient, m, v in fp32, keys and values; and what backward makes on the way."""

Step = Callable[[torch.Tensor, torch.Tensor], None]
"""step(h [T, D], gradient of the output [T, D])."""


def layer_benchmark(
    output: Path, repeats: int = 7, *, sizes: Sequence[tuple[int, int]] = SIZES, tokens: int = TOKENS
) -> str:
    """Time the pair at every (D, R), write layer.json and layer.md into output, return the table.

    Both layers see the same fresh random hidden states each pair and alternate, so a drifting machine moves both; the
    ratio is the median over pairs. Random states spread over all experts: U is near its worst. Raises ValueError for
    repeats below 1 or an output that cannot be written.
    """
    require_positive(repeats=repeats, tokens=tokens)
    open_folder(output)
    rows = []
    for hidden, neurons in tqdm(sizes, desc="layer", unit="size", leave=False):
        if why := common.lacks_memory(neurons * hidden * _BYTES_PER_NEURON_WIDTH):
            rows.append({"hidden": hidden, "neurons": neurons, "skipped": why})
            continue
        rows.append(_pairs_of(hidden, neurons, tokens, repeats))
        gc.collect()  # gigabytes, before the next ones
    result = {**common.about(repeats, tokens=tokens), "rows": rows}
    return common.write_result(output, "layer", result, _table(result))


def _pairs_of(hidden: int, neurons: int, tokens: int, pairs: int) -> dict[str, Any]:
    config = MeftOptions(neurons=neurons)
    sparse, usage = sparse_step(config, hidden)
    dense = _dense_step(hidden, neurons)
    generator, inputs = torch.Generator().manual_seed(0), [torch.empty(0)] * 2

    def fresh() -> None:
        inputs[:] = (torch.randn(tokens, hidden, generator=generator) for _ in range(2))

    contenders = {"meft": lambda: sparse(*inputs), "parallel_adapter": lambda: dense(*inputs)}
    times = common.timed_rounds(contenders, pairs, fresh)
    ratios = common.ratios(times["parallel_adapter"], times["meft"])
    return {
        "hidden": hidden,
        "neurons": neurons,
        "experts": config.experts,
        "probed": config.probed,
        "kept": config.kept,
        "rows_moved": usage[-1][1],
        "meft_s": round(common.median(times["meft"]), 5),
        "parallel_adapter_s": round(common.median(times["parallel_adapter"]), 5),
        "ratios": ratios,
        "median_ratio": round(statistics.median(ratios), 2),
        "n": pairs,
        "rounds_s": {name: common.rounded(t) for name, t in times.items()},
    }


def sparse_step(config: MeftOptions, hidden: int) -> tuple[Step, list[tuple[int, int]]]:
    """MEFT's step, and the list to which it adds (tokens, U) every time."""
    store = NeuronStore(config, hidden, torch.Generator().manual_seed(0), torch.device("cpu"))
    adapter = MeftAdapter(config, store, Link(), BatchInfo())
    return _step(adapter, DenseRowAdamW([store], lr=LR)), adapter.usage


def _dense_step(hidden: int, neurons: int) -> Step:
    from meft_bench.baselines.parallel_adapter import ParallelAdapter

    keys_RD = common.fill_normal(torch.empty(neurons, hidden), torch.Generator().manual_seed(0), 0.08)
    adapter = ParallelAdapter(keys_RD, "relu")
    return _step(adapter, torch.optim.AdamW(adapter.parameters(), lr=LR, fused=True))


def _step(adapter: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(h: torch.Tensor, grad: torch.Tensor) -> None:
        adapter(h.detach().clone().requires_grad_()).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _table(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"One adapter layer, forward + backward + AdamW, T={s['tokens']} random tokens, {s['threads']} threads on "
        f"{result['cpu']}; {s['kernels']}; medians of n pairs (measured).",
        "",
        "| D | R | N | P | K | rows moved U | Parallel Adapter, ms | MEFT on the host, ms | times faster | n |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        if r.get("skipped"):
            lines.append(f"| {r['hidden']} | {r['neurons']} | not run: {r['skipped']} | | | | | | | |")
            continue
        lines.append(
            f"| {r['hidden']} | {r['neurons']} | {r['experts']} | {r['probed']} | {r['kept']} | {r['rows_moved']} | "
            f"{1000 * r['parallel_adapter_s']:.1f} | {1000 * r['meft_s']:.1f} | {r['median_ratio']:.1f} | {r['n']} |"
        )
    return "\n".join(lines) + "\n"
