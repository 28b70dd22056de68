"""The host kernels of the engine against plain torch, against peers that do the same work, and against bandwidth.

One layer's rows as the store lays them out: keys and values in [R, 2, D], gradients likewise, the moments of a half
side by side in [R, 2, D]. U touched rows, drawn anew every round so that caches hold none of them by habit. T tokens, N
experts, P probed, K kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from meft_bench.bench import common, peers
from meft_bench.meft.config import default_experts
from meft_bench.meft.engine import adamw, kernels, memory
from meft_bench.train.methods import require_positive

NUMERICS = 4
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
NEURONS = (4096, 8464, 16384, 65536)

# Bytes a kernel must move per element (of a touched row, D wide), read + written.
BYTES = {
    "gather_bf16": 4 + 2,  # fp32 read, bf16 written
    "gather_fp32": 4 + 4,
    "accumulate_first": 2 + 4,  # bf16 gradient read, sum written: the row held nothing
    "accumulate": 2 + 4 + 4,  # the sum is read as well
    "advance_fp32": 4 * 4 + 3 * 4,  # p, m, v, g read; p, m, v written
    "advance_bf16": (4 + 2 + 2 + 4) + (4 + 2 + 2),  # the same with m and v in bf16
}
_WIDE = ("gather_bf16", "gather_fp32", "accumulate_first", "accumulate")
"""Kernels that take keys and values at once: 2 D elements a row."""
_FEW = 3  # rounds of contenders that take up to a second a call
OURS, PLAIN = "rows.py", "plain torch (the same steps)"
BY_EXPERT = "torch's products, expert by expert"
NARROW, NARROW_BY_EXPERT = "rows.py with bf16 keys", "torch's bf16 products, expert by expert"
"""The search with scoring="bf16", and its peer."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Raises ValueError for values that do not fit together."""

    neurons: tuple[int, ...] = NEURONS
    """Every R."""
    hidden: int = 4096
    tokens: int = common.TOKENS
    kept: int = 64
    probed: int = 8
    touched: int = 1600
    """U, at most R."""

    def __post_init__(self) -> None:
        numbers = dataclasses.asdict(self)
        require_positive(**{k: v for k, v in numbers.items() if k != "neurons"})
        for R in self.neurons:
            require_positive(neurons=R)
            if self.kept > self.probed * (R // default_experts(R)) or self.probed > default_experts(R):
                raise ValueError(f"neurons={R} has too few candidates for probed={self.probed}, kept={self.kept}")

    def bytes_needed(self, neurons: int) -> int:
        """Rows, gradients, fp32 and bf16 moments (2 D each), SparseAdam's own p, m, v, keys in bf16, and copies of
        touched rows."""
        return neurons * self.hidden * (3 * 8 + 4 + 12 + 2) + self.touched * self.hidden * 100


class Layer:
    """The memory of one layer and the inputs of the round that runs."""

    def __init__(self, neurons: int, sizes: Sizes) -> None:
        self.sizes, self.neurons, D = sizes, neurons, sizes.hidden
        self.generator = torch.Generator().manual_seed(0)
        shape = (neurons, 2, D)
        self.rows_R2D = common.fill_normal(memory.empty(shape, torch.float32, common.CPU), self.generator)
        self.grads_R2D = common.fill_normal(memory.empty(shape, torch.float32, common.CPU), self.generator)
        self.moments = {
            dtype: common.fill_normal(memory.empty(shape, dtype, common.CPU), self.generator).abs_()
            for dtype in (torch.float32, torch.bfloat16)
        }
        self.step = 1
        self.done_R = torch.zeros(neurons, dtype=torch.int32)
        self.still_R = torch.zeros(neurons, dtype=torch.bool)
        self.filled_R = torch.ones(neurons, dtype=torch.bool)
        self.empty_R = torch.zeros(neurons, dtype=torch.bool)
        self.touched = min(sizes.touched, neurons)
        self.out_U2D = {d: memory.empty((self.touched, 2 * D), d, common.CPU) for d in (torch.float32, torch.bfloat16)}
        self.source_U2D = common.fill_normal(torch.empty(self.touched, 2 * D), self.generator).bfloat16()
        self.router_ND = common.fill_normal(torch.empty(default_experts(neurons), D), self.generator)
        self.steps = adamw.Steps(torch.tensor([[1e-3, 1.0, 1.0]]), 0, 0.9, 0.999, 1e-8, 1e-3)
        self.draw()

    def draw(self) -> None:
        """Another round: other rows, other tokens."""
        sizes = self.sizes
        self.index_U = torch.randperm(self.neurons, generator=self.generator)[: self.touched].sort().values
        self.h_TD = torch.randn(sizes.tokens, sizes.hidden, generator=self.generator)
        scores_TN = self.h_TD @ self.router_ND.T
        self.gates_TP, self.experts_TP = scores_TN.topk(sizes.probed, dim=1, sorted=False)
        self.probed_experts = int(self.experts_TP.unique().numel())

    @functools.cached_property
    def narrow_RD(self) -> Tensor:
        """The keys in bf16. No kernel that is timed changes keys."""
        keys_RD = self.rows_R2D[:, 0]
        return memory.empty(tuple(keys_RD.shape), torch.bfloat16, common.CPU).copy_(keys_RD)

    def state(self, dtype: torch.dtype) -> adamw.RowState:
        """The values' half, as the optimizer hands it over: one step behind, so that the hot path runs."""
        self.done_R.zero_()
        first_RD, second_RD = self.moments[dtype][:, 0], self.moments[dtype][:, 1]
        return adamw.RowState(self.rows_R2D[:, 1], first_RD, second_RD, self.done_R, self.still_R, 1)

    def moved_bytes(self, kernel: str) -> int:
        """What the kernel must move in this round at the least."""
        sizes = self.sizes
        if kernel == "search_experts":  # each probed key once, and the tokens
            size = self.neurons // self.router_ND.shape[0]
            return 4 * sizes.hidden * (self.probed_experts * size + sizes.tokens)
        return BYTES[kernel] * self.touched * sizes.hidden * (2 if kernel in _WIDE else 1)


def kernels_benchmark(output: Path, repeats: int = 7, **sizes: Any) -> str:
    """Time every kernel at every R; write kernels.json and kernels.md into output, return the Markdown.

    sizes are fields of Sizes. Rows of the result: one per R and kernel, seconds of every contender and round. Raises
    ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats)
    settings = Sizes(**sizes)
    common.open_folder(output)
    found: list[dict[str, Any]] = []
    for R in tqdm(settings.neurons, desc="kernels", unit="size", leave=False):
        if why := common.lacks_memory(settings.bytes_needed(R)):
            found.append({"neurons": R, "kernel": None, "skipped": why})
            continue
        found += size_rows(Layer(R, settings), repeats)
    result = {**common.about(repeats, **dataclasses.asdict(settings), bytes_per_element=BYTES), "rows": found,
              "not_installed": peers.missing()}  # fmt: skip
    return common.write_result(output, "kernels", result, _table(result))


def size_rows(layer: Layer, repeats: int, kernels: Sequence[str] = (*BYTES, "search_experts")) -> list[dict[str, Any]]:
    """The result rows of one R."""
    triad = common.Triad(max(layer.moved_bytes(k) for k in kernels))
    made = []
    for kernel in kernels:
        others = contenders_of(kernel, layer)
        # The triad right after ours, so that their ratio is that of one moment.
        contenders = {OURS: others.pop(OURS), common.TRIAD: triad.over(layer.moved_bytes(kernel)), **others}
        slow = {PLAIN: _FEW} if kernel.startswith(("advance", "search")) else None
        moved: list[int] = []

        def fresh(kernel: str = kernel, moved: list[int] = moved) -> None:
            layer.draw()
            moved.append(layer.moved_bytes(kernel))

        times = common.timed_rounds(contenders, repeats, fresh, slow)
        made.append(summary(kernel, layer.neurons, layer.touched, moved[-1], times))
    return made


def summary(
    kernel: str, neurons: int, touched: int, moved: int, times: dict[str, list[float | None]]
) -> dict[str, Any]:
    """One row of the result; predicted_s is the bytes at the rate of the triad in the same rounds."""
    ours, triad = times[OURS], times[common.TRIAD]
    return {
        "kernel": kernel,
        "neurons": neurons,
        "experts": default_experts(neurons),
        "touched": touched,
        "bytes": moved,
        "seconds": round(common.median(ours), 6),
        "predicted_s": round(common.median(triad), 6),
        "gigabytes_per_s": round(moved / common.median(ours) / 1e9, 2),
        "triad_gigabytes_per_s": round(moved / common.median(triad) / 1e9, 2),
        "share_of_triad": round(common.median(common.ratios(triad, ours)), 3),
        "times_faster_than": {
            name: round(common.median(common.ratios(t, ours)), 3)
            for name, t in times.items()
            if name not in (OURS, common.TRIAD)
        },
        "n": len(ours),
        "rounds_s": {name: common.rounded(t) for name, t in times.items()},
    }


# ---- who does the same work ----


def contenders_of(kernel: str, layer: Layer, peers: bool = True) -> dict[str, Callable[[], Any]]:
    """Name -> one call on the layer's inputs of this round; with peers, those that need memory of their own."""
    if kernel.startswith("gather"):
        return _gather(layer, getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[kernel.removeprefix("gather_")]))
    if kernel.startswith("accumulate"):
        return _accumulate(layer, layer.empty_R if kernel.endswith("first") else layer.filled_R)
    if kernel == "search_experts":
        return _search(layer)
    return _advance(layer, torch.bfloat16 if kernel.endswith("bf16") else torch.float32, peers)


def _gather(layer: Layer, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    rows_RX, out_UX = layer.rows_R2D.flatten(1), layer.out_U2D[dtype]

    def indexed() -> Tensor:
        return rows_RX[layer.index_U].to(dtype)

    return {
        OURS: lambda: kernels.gather(rows_RX, layer.index_U, out_UX),
        PLAIN: lambda: kernels.gather_torch(rows_RX, layer.index_U, out_UX),
        "indexed torch": indexed,
    }


def _accumulate(layer: Layer, touched_R: Tensor) -> dict[str, Callable[[], Any]]:
    sums_RX, source_UX = layer.grads_R2D.flatten(1), layer.source_U2D
    squares_R = torch.empty(layer.neurons, dtype=torch.float64)

    def indexed() -> None:
        sums_RX[layer.index_U] += source_UX

    return {
        OURS: lambda: kernels.accumulate(sums_RX, layer.index_U, source_UX, touched_R, squares_R),
        PLAIN: lambda: kernels.accumulate_torch(sums_RX, layer.index_U, source_UX, touched_R, squares_R),
        "indexed torch": indexed,
    }


def _search(layer: Layer) -> dict[str, Callable[[], Any]]:
    wide_RD, narrow_RD = layer.rows_R2D[:, 0], layer.narrow_RD
    size, kept = layer.neurons // layer.router_ND.shape[0], layer.sizes.kept

    def search(function: Callable, keys_RD: Tensor = wide_RD) -> Any:
        return function(layer.h_TD, keys_RD, None, layer.experts_TP, layer.gates_TP, size, kept, False)

    return {
        OURS: lambda: search(kernels.search_experts),
        NARROW: lambda: search(kernels.search_experts, narrow_RD),
        BY_EXPERT: lambda: search(_by_expert),
        NARROW_BY_EXPERT: lambda: search(_by_expert, narrow_RD),
        PLAIN: lambda: search(kernels.search_experts_torch),
    }


def _by_expert(
    h_TD: Tensor,
    keys_RD: Tensor,
    _scales: None,
    experts_TP: Tensor,
    gates_TP: Tensor,
    size: int,
    kept: int,
    _relu: bool,
) -> tuple[Tensor, Tensor]:
    """search_experts as one writes it with torch's products: each expert's tokens are gathered and multiplied with its
    keys, in the keys' dtype."""
    tokens, probed = experts_TP.shape
    order = experts_TP.flatten().argsort(stable=True)
    of_expert = order.split(experts_TP.flatten().bincount(minlength=keys_RD.shape[0] // size).tolist())
    scores_TPS, h_TD = torch.empty(tokens, probed, size), h_TD.to(keys_RD.dtype)
    for keys_SD, places in zip(keys_RD.split(size), of_expert, strict=True):
        scores_TPS.view(-1, size)[places] = (h_TD[places // probed] @ keys_SD.T).float()
    best = (scores_TPS * gates_TP[:, :, None]).flatten(1).topk(kept, dim=1, sorted=False)
    return experts_TP.gather(1, best.indices // size) * size + best.indices % size, best.values


def _advance(layer: Layer, dtype: torch.dtype, with_peers: bool) -> dict[str, Callable[[], Any]]:
    grads_RD = layer.grads_R2D[:, 1]

    def advance(function: Callable) -> None:
        function(layer.state(dtype), grads_RD, layer.index_U, layer.step, layer.steps)

    made: dict[str, Callable[[], Any]] = {
        OURS: lambda: advance(adamw.advance),
        PLAIN: lambda: advance(adamw.advance_torch),
    }
    if with_peers and dtype == torch.float32:  # no peer keeps bf16 moments
        state = layer.state(dtype)
        made |= peers.row_adamw(state, grads_RD, lambda: layer.index_U)
    return made


# ---- Markdown ----


def _table(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"Kernels of the host, D={s['hidden']}, T={s['tokens']}, P={s['probed']}, K={s['kept']}, at most "
        f"{s['touched']} rows touched, {s['threads']} threads on {result['cpu']}; {s['kernels']}. Medians of "
        f"{s['repeats']} rounds, every call after a rest in which torch's threads stop spinning; ratios are medians of "
        "the rounds' own (measured). Predicted: the bytes a kernel must "
        "move at the rate of torch.add over as many bytes in the same round (triad), whose write-allocate traffic is "
        "not counted: more than 100 % is possible, and in search_experts the arithmetic counts too.",
        "",
        "| kernel | R | rows | MB | ms | predicted, ms | GB/s | of the triad | times faster than |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in result["rows"]:
        if r["kernel"] is None:
            lines.append(f"| all | {r['neurons']} | not run: {r['skipped']} | | | | | | |")
            continue
        share, rate = f"{100 * r['share_of_triad']:.0f} %", f"{r['gigabytes_per_s']:.1f}"
        rivals = ", ".join(
            f"{name} {ratio:.{1 if ratio >= 1 else 2}f}" for name, ratio in r["times_faster_than"].items()
        )
        lines.append(
            f"| {r['kernel']} | {r['neurons']} | {r['touched']} | {r['bytes'] / 1e6:.0f} | "
            f"{1000 * r['seconds']:.2f} | "
            f"{1000 * r['predicted_s']:.2f} | {rate} | {share} | {rivals} |"
        )
    for name, why in result["not_installed"].items():
        lines.append(f"| {name} | | not installed: {why} | | | | | | |")
    return "\n".join(lines) + "\n"
