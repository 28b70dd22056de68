"""How fast this host, card and link are: each rate by running what it stands for. Rates are what kernels reach."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.kernels import search_experts
from meft_bench.meft.engine.products import row_dots

_KINDS = 16


class Scale(NamedTuple):
    """How much is measured; the default fits the paper's shapes and takes half a minute on two cores."""

    stream_elements: int = 1 << 26
    """fp32 elements per array of the bandwidth test; larger than any cache."""
    hidden: int = 4096
    neurons: int = 6144
    kept: int = 128
    tokens: int = 512
    device_elements: int = 1 << 28
    product: int = 8192
    """Edge of the device's matrix products."""
    copy_bytes: tuple[int, ...] = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
    repeats: int = 5


# ---- host ----


def times_s(run: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> list[float]:
    """Seconds of each run, after one untimed; before runs each time, untimed."""
    times = []
    for _ in range(repeats + 1):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[1:]


def _least_s(run: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> float:
    """The fastest repeat: other programs on the machine only add."""
    return min(times_s(run, repeats, before))


def fill_cache(scale: Scale) -> Callable[[], Any]:
    """Something that leaves other data in the caches, as the other layers do between two turns of one."""
    other = torch.zeros(scale.stream_elements)
    return lambda: other.add_(1.0)


def _bandwidth(scale: Scale) -> float:
    """STREAM's triad, a = b + s c, counted as STREAM does: two reads, one write."""
    a, b, c = (torch.ones(scale.stream_elements) for _ in range(3))
    return 3 * a.nbytes / _least_s(lambda: torch.add(b, c, alpha=2.0, out=a), scale.repeats)


def _product_rate(scale: Scale) -> float:
    """Half of the scores that retrieval without Key-Experts makes."""
    h_TD, keys_RD = torch.randn(scale.tokens, scale.hidden), torch.randn(scale.neurons // 2, scale.hidden)
    return 2 * scale.tokens * keys_RD.numel() / _least_s(lambda: h_TD @ keys_RD.T, scale.repeats)


def _dot_rate(scale: Scale) -> float:
    """Each token with the candidates of its probed experts; tokens of 16 kinds, as in hidden_states."""
    config = config_of(scale, key_experts=True)
    assert config.experts is not None and config.probed is not None
    h_TD, keys_RD = torch.randn(scale.tokens, scale.hidden), torch.randn(scale.neurons, scale.hidden)
    experts_VP = torch.randint(config.experts, (_KINDS, config.probed))
    of_kind_VC = (experts_VP[:, :, None] * config.expert_size + torch.arange(config.expert_size)).flatten(1)
    chosen_TC = of_kind_VC[torch.randint(_KINDS, (scale.tokens,))]
    seconds = _least_s(lambda: row_dots(h_TD, (keys_RD,), chosen_TC), scale.repeats, fill_cache(scale))
    return 2 * chosen_TC.numel() * scale.hidden / seconds


def _search_rate(scale: Scale) -> float:
    """The search kernel over the candidates of each token's probed experts; tokens of 16 kinds."""
    config = config_of(scale, key_experts=True)
    assert config.experts is not None and config.probed is not None
    h_TD, keys_RD = torch.randn(scale.tokens, scale.hidden), torch.randn(scale.neurons, scale.hidden)
    probed_VP = torch.rand(_KINDS, config.experts).topk(config.probed, dim=1).indices
    experts_TP = probed_VP[torch.randint(_KINDS, (scale.tokens,))]
    seconds = _least_s(
        lambda: search_experts(h_TD, keys_RD, None, experts_TP, None, config.expert_size, config.kept, True),
        scale.repeats,
    )
    return 2 * experts_TP.numel() * config.expert_size * scale.hidden / seconds


def config_of(scale: Scale, key_experts: bool) -> MeftOptions:
    return MeftOptions(neurons=scale.neurons, kept=scale.kept, key_experts=key_experts)


def _element_rate(scale: Scale) -> float:
    """topk of T x R scores."""
    scores_TR = torch.randn(scale.tokens, scale.neurons)
    return scores_TR.numel() / _least_s(lambda: scores_TR.topk(scale.kept, dim=1, sorted=False), scale.repeats)


def _fresh_bandwidth(scale: Scale) -> float:
    """Half of all keys, ascending, into fresh memory: a large gather."""
    keys_RD = torch.randn(scale.neurons, scale.hidden)
    union_U = torch.randperm(scale.neurons)[: max(1, scale.neurons // 2)].sort().values
    moved = 2 * union_U.numel() * scale.hidden * keys_RD.element_size()
    return moved / _least_s(lambda: keys_RD.index_select(0, union_U), 2 * scale.repeats, fill_cache(scale))


def _overhead(scale: Scale) -> float:
    tiny = torch.zeros(8)
    return _least_s(lambda: [tiny.add_(1.0) for _ in range(1000)], scale.repeats) / 1000


HOST_MEASURES = {"product_rate": _product_rate, "dot_rate": _dot_rate, "search_rate": _search_rate,
                 "element_rate": _element_rate, "bandwidth": _bandwidth, "fresh_bandwidth": _fresh_bandwidth,
                 "overhead": _overhead}  # fmt: skip


def hidden_states(tokens: int, hidden: int, generator: torch.Generator) -> Tensor:
    """[T, D] of 16 kinds of token with some noise: they share neurons, and U/R comes near the paper's 26 to 52 %."""
    kinds_VD = torch.randn(_KINDS, hidden, generator=generator)
    kind_T = torch.randint(_KINDS, (tokens,), generator=generator)
    return kinds_VD[kind_T] + 0.1 * torch.randn(tokens, hidden, generator=generator)


# ---- card and link ----


def measure_card(scale: Scale) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Constants of the first CUDA device and {"direction", "memory", "bytes", "seconds"} of copies by size."""
    torch.cuda.init()
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(0).total_memory
    half, full = (_device_product(scale, dtype) for dtype in (torch.bfloat16, torch.float32))
    context = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    bandwidth = _device_bandwidth(scale)
    torch.cuda.empty_cache()
    copies = [_copy(direction, pinned, size, scale.repeats)
              for direction in ("h2d", "d2h") for pinned in (True, False) for size in scale.copy_bytes]  # fmt: skip
    largest = max(scale.copy_bytes)
    link = {f"{c['direction']}_{c['memory']}": c["bytes"] / c["seconds"] for c in copies if c["bytes"] == largest}
    latency = statistics.median(c["seconds"] for c in copies if c["bytes"] == min(scale.copy_bytes))
    return {"memory_bytes": total, "usable_bytes": total, "context_bytes": max(context, 1), "half_rate": half,
            "full_rate": full, "bandwidth": bandwidth, **link, "copy_latency": latency,
            "launch": _launch_s()}, copies  # fmt: skip


def _device_s(run: Callable[[], Any], repeats: int) -> float:
    """Least seconds of run and of the device finishing it."""

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return _least_s(finished, repeats)


def _device_product(scale: Scale, dtype: torch.dtype) -> float:
    a = torch.randn(scale.product, scale.product, device="cuda").to(dtype)
    return 2 * scale.product**3 / _device_s(lambda: a @ a, scale.repeats)


def _device_bandwidth(scale: Scale) -> float:
    source = torch.ones(scale.device_elements, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _device_s(lambda: target.copy_(source), scale.repeats)


def _copy(direction: str, pinned: bool, size: int, repeats: int) -> dict[str, Any]:
    on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
    on_device = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target, source = (on_device, on_host) if direction == "h2d" else (on_host, on_device)
    seconds = _device_s(lambda: target.copy_(source), 2 * repeats)
    return {"direction": direction, "memory": "pinned" if pinned else "pageable", "bytes": size, "seconds": seconds}


def _launch_s() -> float:
    """Host seconds per operation while the device has an empty queue to fill."""
    tiny: Tensor = torch.zeros(8, device="cuda")

    def issue() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            tiny.add_(1.0)
        return (time.perf_counter() - start) / 500

    issue()
    return min(issue() for _ in range(5))
