"""Speed on this machine, whatever else a number depends on held equal by interleaving.

layer: one adapter layer, forward + backward + update, MEFT on host memory against the dense Parallel Adapter.
retrieval: finding a token's neurons with and without Key-Experts as R grows (paper section 4.2).
The whole step in parts is timeline.py. B batch, T tokens, D hidden size, R neurons, N experts, m = R / N per expert, P
probed, K kept, U rows moved.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.harness.methods import require_positive
from meft_bench.harness.provenance import cpu_model, provenance
from meft_bench.harness.record import write_json
from meft_bench.meft import routing
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.layer import BatchInfo, MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore
from meft_bench.write import write_if_changed

HIDDEN, TOKENS, LR = 256, 512, 1e-3
NEURONS = (1024, 4096, 16384)
RETRIEVAL_NEURONS = (1024, 4096, 16384, 65536)
WARMUP = 2


def all_benchmarks(pairs: int, output: Path) -> str:
    """Run layer, retrieval and timeline with this many repeats each; write their files, return their Markdown.

    Raises ValueError, before anything runs, for pairs below 1 or an output that is no folder.
    """
    from meft_bench.harness.timeline import timeline_benchmark

    require_positive(pairs=pairs)
    open_folder(output)
    parts = {
        "layer": functools.partial(layer_benchmark, pairs, output),
        "retrieval": functools.partial(retrieval_benchmark, output, pairs),
        "timeline": functools.partial(timeline_benchmark, output, pairs),
    }
    texts = []
    with tqdm(parts.items(), desc="benchmarks", unit="benchmark") as bar:
        for name, benchmark in bar:
            bar.set_postfix_str(name)
            texts.append(benchmark())
    return "\n".join(texts)


def open_folder(folder: Path) -> None:
    """Make folder if it is missing. Raises ValueError when it cannot be: better before an hour of timing than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}): name a folder with --output") from None


# ---- one layer ----


def layer_benchmark(pairs: int, folder: Path) -> str:
    """Time the pairs, write layer.json and layer.md into folder, return the table.

    Both layers see the same fresh random hidden states each pair and alternate, so a drifting machine moves both; the
    ratio is the median over pairs. Random states spread over all experts: U is near its worst. Raises ValueError for
    pairs below 1 or a folder that cannot be written.
    """
    require_positive(pairs=pairs)
    open_folder(folder)
    rows = []
    for neurons in tqdm(NEURONS, desc="layer benchmark", unit="size", leave=False):
        config = MeftConfig(neurons=neurons)
        sparse, usage = _sparse_step(config)
        dense = _dense_step(neurons)
        generator = torch.Generator().manual_seed(0)
        times: list[tuple[float, float]] = []
        for pair in range(WARMUP + pairs):
            h = torch.randn(TOKENS, HIDDEN, generator=generator)
            grad = torch.randn(TOKENS, HIDDEN, generator=generator)
            measured = (_timed(sparse, h, grad), _timed(dense, h, grad))
            if pair >= WARMUP:  # the first ones warm up allocators and optimizer state
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
    write_if_changed(folder / "layer.md", table.encode())
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


# ---- retrieval ----


def retrieval_benchmark(
    output: Path,
    repeats: int = 7,
    *,
    neurons: Sequence[int] = RETRIEVAL_NEURONS,
    hidden: int = HIDDEN,
    tokens: int = TOKENS,
    kept: int = 64,
    probed: int = 8,
) -> str:
    """Time routing.select with and without Key-Experts; write retrieval.json and .md into output, return the Markdown.

    neurons are the sizes R; N is default_experts(R). Each repeat runs every size, with and without, once on the same
    fresh random hidden states [tokens, hidden] fp32, so its fitted exponents stand on equal conditions. Times are
    seconds. Raises ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats, hidden=hidden, tokens=tokens)
    if len(set(neurons)) < 2:
        raise ValueError(f"neurons={tuple(neurons)} must hold at least two sizes: an exponent is fitted through them")
    with_ke = [MeftConfig(neurons=R, kept=kept, probed=probed) for R in neurons]
    without = [MeftConfig(neurons=R, kept=kept, key_experts=False) for R in neurons]
    open_folder(output)
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    stores = [NeuronStore(config, hidden, generator, cpu) for config in with_ke]
    with_times: list[list[float]] = []  # [repeat][size], seconds
    without_times: list[list[float]] = []
    for repeat in tqdm(range(WARMUP + repeats), desc="retrieval", unit="round", leave=False):
        h_TD = torch.randn(tokens, hidden, generator=generator)
        pairs = [
            (_select_time(h_TD, store, config), _select_time(h_TD, store, flat))
            for store, config, flat in zip(stores, with_ke, without, strict=True)
        ]
        if repeat >= WARMUP:
            with_times.append([p[0] for p in pairs])
            without_times.append([p[1] for p in pairs])
    rows = [
        {
            "neurons": config.neurons,
            "experts": config.experts,
            "expert_size": config.expert_size,
            "with_ke_s": round(statistics.median(t[i] for t in with_times), 6),
            "with_ke_times_s": [round(t[i], 6) for t in with_times],
            "without_ke_s": round(statistics.median(t[i] for t in without_times), 6),
            "without_ke_times_s": [round(t[i], 6) for t in without_times],
            "without_over_with": [round(b[i] / a[i], 3) for a, b in zip(with_times, without_times, strict=True)],
            "dot_products_per_token_with_ke": dot_products_per_token(config),
            "dot_products_per_token_without_ke": dot_products_per_token(flat),
        }
        for i, (config, flat) in enumerate(zip(with_ke, without, strict=True))
    ]
    exponents_with = [round(fitted_exponent(neurons, t), 4) for t in with_times]
    exponents_without = [round(fitted_exponent(neurons, t), 4) for t in without_times]
    result = {
        "evidence": "measured",
        "about": "routing.select on the host, random fp32 hidden states; a dot product is D multiply-adds. Counts are "
        "exact, times are this machine's: a dense product over R rows runs at a higher rate per multiply-add than the "
        "search of chosen experts.",
        "settings": {"hidden": hidden, "tokens": tokens, "kept": kept, "probed": probed, "repeats": repeats,
                     "threads": torch.get_num_threads()},
        "rows": rows,
        "exponents_with_ke": exponents_with,
        "exponents_without_ke": exponents_without,
        "exponent_with_ke": round(statistics.median(exponents_with), 4),
        "exponent_without_ke": round(statistics.median(exponents_without), 4),
        "count_exponent_with_ke": round(fitted_exponent(neurons, [dot_products_per_token(c) for c in with_ke]), 4),
        "count_exponent_without_ke": round(fitted_exponent(neurons, [dot_products_per_token(c) for c in without]), 4),
        "provenance": provenance(torch.get_num_threads()),
    }  # fmt: skip
    write_json(output / "retrieval.json", result)
    text = _retrieval_table(result)
    write_if_changed(output / "retrieval.md", text.encode())
    return text


def dot_products_per_token(config: MeftConfig) -> int:
    """Dot products of length D that finding one token's neurons takes: N + P m with Key-Experts, R without."""
    return config.candidates + (config.experts or 0 if config.key_experts else 0)


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value against log size by least squares: 1 for linear growth, 0.5 for a square root.

    Raises ValueError unless there are two different sizes and everything is above 0.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError("an exponent needs one value per size, two different sizes, and all of them above 0")
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def _select_time(h_TD: torch.Tensor, store: NeuronStore, config: MeftConfig) -> float:
    router_ND = store.router.detach() if config.key_experts and store.router is not None else None
    keys_RD = store.keys.detach()
    start = time.perf_counter()
    routing.select(h_TD, keys_RD, router_ND, config, None)
    return time.perf_counter() - start


def _retrieval_table(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"Finding K={s['kept']} neurons per token on the host, D={s['hidden']}, T={s['tokens']} random tokens, "
        f"P={s['probed']}, {s['threads']} threads on {result['provenance']['cpu']}; medians of {s['repeats']} repeats "
        "(measured; dot products counted exactly).",
        "",
        "| R | N | m | dot products with Key-Experts | without | with Key-Experts, ms | without, ms | times faster |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        counts = f"{r['dot_products_per_token_with_ke']} | {r['dot_products_per_token_without_ke']}"
        lines.append(
            f"| {r['neurons']} | {r['experts']} | {r['expert_size']} | {counts} | {1000 * r['with_ke_s']:.2f} | "
            f"{1000 * r['without_ke_s']:.2f} | {statistics.median(r['without_over_with']):.1f} |"
        )
    lines += [
        "",
        f"Grows as R to the power of: counted {result['count_exponent_with_ke']:.2f} with Key-Experts, "
        f"{result['count_exponent_without_ke']:.2f} without; measured {_spread(result['exponents_with_ke'])} with, "
        f"{_spread(result['exponents_without_ke'])} without.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
