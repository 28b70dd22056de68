"""One adapter layer, forward + backward + update: MEFT on host memory against the dense Parallel Adapter, in pairs."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.harness.provenance import cpu_model
from meft_bench.harness.record import write_json
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.layer import BatchInfo, MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore

HIDDEN, TOKENS, LR = 256, 512, 1e-3
NEURONS = (1024, 4096, 16384)


def layer_benchmark(pairs: int, folder: Path) -> str:
    """Time the pairs, write layer.json and layer.md into folder, return the table.

    Both layers see the same fresh random hidden states each pair and alternate, so a drifting machine moves both; the
    ratio is the median over pairs. Random states spread over all experts: U is near its worst.
    """
    rows = []
    for neurons in tqdm(NEURONS, desc="layer benchmark", unit="size"):
        config = MeftConfig(neurons=neurons)
        sparse, usage = _sparse_step(config)
        dense = _dense_step(neurons)
        generator = torch.Generator().manual_seed(0)
        times: list[tuple[float, float]] = []
        for pair in range(pairs + 2):
            h = torch.randn(TOKENS, HIDDEN, generator=generator)
            grad = torch.randn(TOKENS, HIDDEN, generator=generator)
            measured = (_timed(sparse, h, grad), _timed(dense, h, grad))
            if pair >= 2:  # the first two warm up allocators and optimizer state
                times.append(measured)
        rows.append(
            {
                "neurons": neurons,
                "experts": config.experts,
                "probed": config.probed,
                "kept": config.kept,
                "rows_moved": usage[-1][1],
                "meft_s": round(statistics.median(t[0] for t in times), 5),
                "parallel_adapter_s": round(statistics.median(t[1] for t in times), 5),
                "ratios": [round(t[1] / t[0], 2) for t in times],
                "median_ratio": round(statistics.median(t[1] / t[0] for t in times), 2),
            }
        )
    about = {"evidence": "measured", "hidden": HIDDEN, "tokens": TOKENS, "threads": torch.get_num_threads(),
             "cpu": cpu_model(), "torch": torch.__version__, "pairs": pairs}  # fmt: skip
    write_json(folder / "layer.json", {**about, "rows": rows})
    table = _table(rows, about)
    (folder / "layer.md").write_text(table)
    return table


def _sparse_step(config: MeftConfig) -> tuple[Callable, list[tuple[int, int]]]:
    store = NeuronStore(config, HIDDEN, torch.Generator().manual_seed(0), torch.device("cpu"))
    adapter = MeftAdapter(config, store, Link(), BatchInfo())
    return _step(adapter, DenseRowAdamW([store], lr=LR)), adapter.usage


def _dense_step(neurons: int) -> Callable:
    from meft_bench.baselines.parallel_adapter import ParallelAdapter

    adapter = ParallelAdapter(torch.randn(neurons, HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.08, "relu")
    return _step(adapter, torch.optim.AdamW(adapter.parameters(), lr=LR, fused=True))


def _step(adapter: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    def step(h: torch.Tensor, grad: torch.Tensor) -> None:
        adapter(h.requires_grad_()).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable, h: torch.Tensor, grad: torch.Tensor) -> float:
    h = h.clone()
    start = time.perf_counter()
    step(h, grad)
    return time.perf_counter() - start


def _table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        f"One adapter layer, forward + backward + AdamW, D={HIDDEN}, T={TOKENS} random tokens, "
        f"{about['threads']} threads on {about['cpu']}; medians of {about['pairs']} pairs (measured).",
        "",
        "| R | N | P | K | rows moved U | Parallel Adapter, ms | MEFT on the host, ms | times faster |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['neurons']} | {r['experts']} | {r['probed']} | {r['kept']} | {r['rows_moved']} | "
            f"{1000 * r['parallel_adapter_s']:.1f} | {1000 * r['meft_s']:.1f} | {r['median_ratio']:.1f} |"
        )
    return "\n".join(lines) + "\n"
