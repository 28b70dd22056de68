"""What crosses the link of one layer in one accumulation window, by how many rows are on the device with their
optimizer; and what a parameter costs in host memory.

Bytes are counted at the link, not timed. M = 2 D R is the layer's keys and values in elements; in bytes, as many of the
wire's format. T tokens a micro-batch, D hidden size, R neurons, K kept, U rows a micro-batch uses.
"""

import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from meft_bench.bench import common, hostbytes
from meft_bench.meft.adam import MOMENTS, DenseRowAdamW
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import prices
from meft_bench.meft.engine.slots import Slots
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore
from meft_bench.train.methods import require_positive

NUMERICS = 3
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
WINDOWS = {"random": (0.0, 0.25, 0.5, 1.0), "repeating": (0.0, 0.25, 1.0)}
"""Kind of states -> the shares of all rows that the device's budget holds, with their optimizer."""
_WIRE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Raises ValueError for values that do not fit together."""

    hidden: int = 4096
    neurons: int = 6144
    kept: int = 64
    sequences: int = 2
    """Of a micro-batch."""
    length: int = 256
    """Tokens per sequence."""
    micro_batches: int = 32
    """To an optimizer step."""
    host_layers: int = 4
    """Layers whose host memory is measured together: staging is that of one layer at a time."""
    repeated: int = 64
    """Distinct states in a micro-batch of repeating tokens."""
    device: str = "cpu"
    """"cpu": an arena in the same memory; "cuda"."""

    def __post_init__(self) -> None:
        require_positive(**{k: v for k, v in dataclasses.asdict(self).items() if k != "device"})
        self.config(0.0)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def m_bytes(self) -> int:
        """M in the wire's format."""
        return 2 * self.hidden * self.neurons * _WIRE.itemsize

    def config(self, share: float) -> MeftOptions:
        """The host selects, and a budget holds this share of all rows, and the router."""
        plain = MeftOptions(neurons=self.neurons, kept=self.kept, retrieval="host")
        rows = round(share * self.neurons)
        if not rows:
            return plain
        price = prices(plain, self.hidden, _WIRE)
        spent = price.router + price.router_moments + rows * (price.row + price.moments)
        return dataclasses.replace(plain, device_budget=spent)


def residency_benchmark(output: Path, repeats: int = 1, **sizes: Any) -> str:
    """Run one window per share and kind of tokens; write residency.json and residency.md into output, return the
    Markdown.

    sizes are fields of Sizes; device defaults to CUDA where there is one. repeats is taken as 1: counts do not vary.
    Raises ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats)
    sizes.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    settings = Sizes(**sizes)
    common.open_folder(output)
    windows = []
    plan = [(kind, share) for kind, shares in WINDOWS.items() for share in shares]
    for kind, share in tqdm(plan, desc="residency", unit="window", leave=False):
        windows.append(window(settings, kind, share))
        gc.collect()
    host = [hostbytes.measure(settings.hidden, settings.neurons, settings.kept, settings.tokens, moments,
                              settings.device, settings.host_layers) for moments in MOMENTS]  # fmt: skip
    about = common.about(1, **dataclasses.asdict(settings), wire="bf16", m_bytes=settings.m_bytes)
    result = {**about, "windows": windows, "host": host}
    return common.write_result(output, "residency", result, _text(result))


# ---- one window ----


def random_states(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Every token its own: U is near its worst."""
    return torch.randn(sizes.sequences, sizes.length, sizes.hidden, generator=generator)


def repeating_states(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """A few states again and again, others in every micro-batch: U is well below R."""
    few = torch.randn(sizes.repeated, sizes.hidden, generator=generator)
    return few[torch.randint(sizes.repeated, (sizes.sequences, sizes.length), generator=generator)]


STATES: dict[str, Callable[[Sizes, torch.Generator], Tensor]] = {
    "random": random_states,
    "repeating": repeating_states,
}


def window(sizes: Sizes, kind: str, share: float) -> dict[str, Any]:
    """Micro-batches, then the optimizer's step; bytes that crossed until that was over. Two steps before, which are not
    counted, tell which rows to hold."""
    config, generator, link = sizes.config(share), torch.Generator().manual_seed(0), Link()
    store = NeuronStore(config, sizes.hidden, generator, torch.device("cpu"))
    adapter, optimizer = MeftAdapter(config, store, link, BatchInfo()), DenseRowAdamW([store], lr=common.LR)
    device, raw, seconds = torch.device(sizes.device), [], []

    def micro_batch() -> None:
        h = STATES[kind](sizes, generator).to(device, _WIRE).requires_grad_()
        grad = torch.randn(h.shape, generator=generator).to(device, _WIRE)
        before, start = Counter(link.bytes), time.perf_counter()
        adapter(h).backward(grad)
        seconds.append(round(time.perf_counter() - start, 4))
        raw.append(_by_purpose(link.bytes - before))

    if share:
        for _ in range(2):
            for _ in range(Slots.known_after // 2):
                micro_batch()
            _step(store, optimizer)
        assert store.away is not None, "the rows are held"
        for kept in (raw, seconds, adapter.usage):
            kept.clear()
        link.reset()
    for _ in range(sizes.micro_batches):
        micro_batch()
    before = Counter(link.bytes)
    adapter.collect()
    store.queue.wait()
    touched = int(store.touched_R.sum())
    _step(store, optimizer)
    unions = [u for _, u in adapter.usage]
    total = _by_purpose(link.bytes)
    per_batch = {name: count / sizes.micro_batches for name, count in total.items()}
    expected = formula(sizes, share, unions)
    return {
        "states": kind,
        "share_on_device": share,
        "device_budget_bytes": config.device_budget,
        "device_bytes": adapter.device_bytes,
        "bytes_per_micro_batch": {name: round(count, 1) for name, count in per_batch.items()},
        "m_per_micro_batch": {name: round(count / sizes.m_bytes, 5) for name, count in per_batch.items()},
        "total_m_per_micro_batch": round(sum(per_batch.values()) / sizes.m_bytes, 5),
        "formula_m_per_micro_batch": None if isinstance(expected, str) else round(expected / sizes.m_bytes, 5),
        **({"formula_m_per_micro_batch_reason": expected} if isinstance(expected, str) else {}),
        "union_share": round(sum(unions) / len(unions) / sizes.neurons, 5),
        "host_updated_share": round(touched / sizes.neurons, 5),
        "raw": {"union": unions, "bytes": raw, "bytes_at_step": _by_purpose(link.bytes - before), "seconds": seconds},
        "n": sizes.micro_batches,
    }


def _step(store: NeuronStore, optimizer: DenseRowAdamW) -> None:
    optimizer.step()
    optimizer.zero_grad()
    store.queue.wait()


def formula(sizes: Sizes, share: float, unions: Sequence[int]) -> float | str:
    """Mean bytes of a micro-batch by the closed formula, or why it says nothing of this window."""
    if share:
        return "stated for budget 0 only"
    if sizes.device != "cpu":
        return "stated for a host that finds the experts; a GPU finds them itself"
    return sum(sum(crossing(sizes, u).values()) for u in unions) / len(unions)


def crossing(sizes: Sizes, union: int) -> dict[str, int]:
    """Bytes of one micro-batch by the closed formula at budget 0, where the host does all of the search: rows of S
    down, their gradients back, hidden states up and the router's share of their gradient down, and per kept neuron a
    place (int32), a gate and its gradient."""
    item, states, kept = _WIRE.itemsize, sizes.tokens * sizes.hidden, sizes.tokens * sizes.kept
    return {
        "d2h hidden": states * item,
        "h2d rows": 2 * union * sizes.hidden * item,
        "h2d index": 4 * kept,
        "h2d score": kept * item,
        "d2h grads": 2 * union * sizes.hidden * item,
        "d2h score": kept * item,
        "h2d router_hidden": states * item,
    }


def _by_purpose(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{direction} {purpose}": number for (direction, purpose), number in sorted(counts.items()) if number}


# ---- Markdown ----


def _text(result: dict[str, Any]) -> str:
    s = result["settings"]
    purposes = sorted({p for w in result["windows"] for p in w["m_per_micro_batch"]})
    lines = [
        f"One layer, D={s['hidden']}, R={s['neurons']}, K={s['kept']}, {s['micro_batches']} micro-batches of "
        f"{s['sequences']} x {s['length']} tokens to a step, hidden states and wire in bf16, device: {s['device']}. "
        "Bytes counted at the link per micro-batch, the step's own included, in units of M: 2 D R = "
        f"{2 * s['hidden'] * s['neurons']:,} elements, {s['m_bytes']:,} bytes (measured). On the device: rows with "
        "their optimizer, those used most. Touched, for the host: of all rows, those of the others with a gradient.",
        "",
        f"| states | on the device | device, MB | U/R | touched, for the host | {' | '.join(purposes)} | all | "
        "formula |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(purposes) + 2),
    ]
    for w in result["windows"]:
        cells = " | ".join(f"{w['m_per_micro_batch'].get(p, 0):.4f}" for p in purposes)
        formula = w["formula_m_per_micro_batch"]
        lines.append(
            f"| {w['states']} | {100 * w['share_on_device']:.0f} % | {w['device_bytes'] / 1e6:.0f} | "
            f"{w['union_share']:.2f} | {w['host_updated_share']:.2f} | {cells} | {w['total_m_per_micro_batch']:.4f} | "
            f"{'' if formula is None else f'{formula:.4f}'} |"
        )
    return "\n".join([*lines, *_host_text(result)]) + "\n"


def _host_text(result: dict[str, Any]) -> list[str]:
    parts = list(hostbytes.PARTS)
    lines = [
        "",
        f"Host bytes per parameter of the adapter (keys, values, router), {result['settings']['host_layers']} layers, "
        "without a device budget. Accounted: by the tensors and what one layer of a micro-batch has in flight (of a 7B "
        "model's 32 layers, too). Growth: of the process's peak resident memory, with the device's part left out (its "
        "gradients are given) and, on a CPU, with the layer computed in the same memory.",
        "",
        f"| moments | {' | '.join(parts)} | accounted | growth, host's part | growth, layer computed |",
        "|---|" + "---:|" * (len(parts) + 3),
    ]
    for h in result["host"]:
        cells = " | ".join(f"{h['per_parameter'][p]:.2f}" for p in parts)
        growth = " | ".join("not known" if g is None else f"{g:.2f}" for g in h["growth_per_parameter"].values())
        lines.append(f"| {h['moments']} | {cells} | {h['accounted_per_parameter']:.2f} | {growth} |")
    return lines
