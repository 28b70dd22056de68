"""`meft-bench profile --calibrate`: this machine's constants, measured, and how well they predict MEFT's host work.

The file it writes stands in for a card and a host of simulate/cards.py. Rates here are what kernels reach, so the
shares of a peak are 1. Imports neither datasets nor lm-eval: GPU machines often lack them.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from meft_bench.harness.methods import require_choice
from meft_bench.harness.provenance import provenance
from meft_bench.harness.record import write_json
from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.routing import select
from meft_bench.meft.rowmath import row_dots
from meft_bench.meft.store import NeuronStore
from meft_bench.simulate.cards import Card, Constant, Host, card
from meft_bench.simulate.machine import Machine
from meft_bench.simulate.timeline import replay

SCHEMA = 1
_COMMAND = "meft-bench profile --calibrate"
_HOST_RATES = {"product_rate": "FLOP/s", "dot_rate": "FLOP/s", "element_rate": "1/s", "bandwidth": "B/s",
               "fresh_bandwidth": "B/s", "overhead": "s"}  # fmt: skip
_CARD_RATES = {"memory_bytes": "bytes", "usable_bytes": "bytes", "context_bytes": "bytes", "half_rate": "FLOP/s",
               "full_rate": "FLOP/s", "bandwidth": "B/s", "h2d_pinned": "B/s", "d2h_pinned": "B/s",
               "h2d_pageable": "B/s", "d2h_pageable": "B/s", "copy_latency": "s", "launch": "s"}  # fmt: skip


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


def calibrate(output: Path, device: str, scale: Scale | None = None) -> dict[str, Any]:
    """Measure host, and with device "cuda" card and link; write output (JSON) and return what it holds.

    "constants" are as in simulate/cards.py; "checks" list host-side pieces of a MEFT step as predicted from them and as
    measured; "copies" the link by size. Raises ValueError for an unknown or absent device or an output that cannot be
    written, before anything is measured.
    """
    require_choice("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device: use device='cpu'")
    _check_writable(output)
    scale = scale or Scale()
    constants: dict[str, dict[str, Any]] = {}
    copies: list[dict[str, Any]] = []
    with tqdm(total=len(_HOST_MEASURES) + 2, desc="calibrate", leave=False) as bar:
        for name, measure in _HOST_MEASURES.items():
            constants[f"host.{name}"] = _measured(measure(scale), _HOST_RATES[name])
            bar.update()
        if device == "cuda":
            rates, copies = _measure_card(scale)
            constants |= {f"card.{k}": _measured(v, _CARD_RATES[k]) for k, v in rates.items()}
        bar.update()
        checks = _checks(_host(constants, "this machine"), scale)
        bar.update()
    result = {"schema": SCHEMA, "evidence": "measured", "settings": {**scale._asdict(), "device": device},
              "constants": constants, "checks": checks, "copies": copies, "provenance": provenance(torch.get_num_threads())}  # fmt: skip
    write_json(output, result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The constants, and predicted beside measured, as two tables."""
    lines = ["| constant | value | unit |", "|---|---:|---|"]
    lines += [f"| {k} | {c['value']:.4g} | {c['unit']} |" for k, c in sorted(result["constants"].items())]
    lines += ["", "| host work | predicted, ms | measured, ms | predicted / measured |", "|---|---:|---:|---:|"]
    for c in result["checks"]:
        lines.append(
            f"| {c['name']} | {1000 * c['predicted_s']:.2f} | {1000 * c['measured_s']:.2f} | {c['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def from_calibration(path: Path) -> tuple[Card | None, Host]:
    """The card (None where no GPU was measured) and host of a file that calibrate wrote.

    Raises ValueError, naming file and place, for anything else.
    """
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): write it with `{_COMMAND}`") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON: write it again with `{_COMMAND}`") from None
    try:
        constants, made = _checked(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write it again with `{_COMMAND}`") from None
    host = _host(constants, f"measured: {made['cpu']}, {made['threads']} threads")
    if not any(k.startswith("card.") for k in constants):
        return None, host
    return _card(constants, str(made["gpu"])), host


def _checked(result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"not a calibration of schema {SCHEMA}")
    constants, made = result.get("constants"), result.get("provenance")
    if not isinstance(constants, dict) or not isinstance(made, dict):
        raise ValueError("constants or provenance is missing")
    wanted = [f"host.{k}" for k in _HOST_RATES]
    if any(str(k).startswith("card.") for k in constants):
        wanted += [f"card.{k}" for k in _CARD_RATES]
    for name in wanted:
        value = constants[name].get("value") if isinstance(constants.get(name), dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value!r}")
    for name in ("cpu", "threads", "gpu"):
        if name not in made:
            raise ValueError(f"provenance.{name} is missing")
    return constants, made


def _measured(value: float, unit: str) -> dict[str, Any]:
    return Constant(float(f"{value:.4g}") if unit != "bytes" else value, unit, f"measured: {_COMMAND}")._asdict()


def _host(constants: dict[str, dict[str, Any]], title: str) -> Host:
    rates = {k: Constant(constants[f"host.{k}"]["value"], unit, f"measured: {_COMMAND}")
             for k, unit in _HOST_RATES.items()}  # fmt: skip
    return Host(name="calibrated", title=title, **rates)


def _card(constants: dict[str, dict[str, Any]], gpu: str) -> Card:
    rates = {k: Constant(constants[f"card.{k}"]["value"], unit, f"measured: {_COMMAND}")
             for k, unit in _CARD_RATES.items()}  # fmt: skip
    reached = Constant(1.0, "1", "the rates are measured, not peaks")
    kernel = card("24GB").kernel
    return Card(name="calibrated", title=f"measured: {gpu}", kernel=kernel, half_share=reached, full_share=reached,
                bandwidth_share=reached, **rates)  # fmt: skip


def _check_writable(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {output} ({error.strerror}): name another with --output") from None
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name a file with --output")


# ---- host ----


def _times_s(run: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> list[float]:
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
    return min(_times_s(run, repeats, before))


def _fill_cache(scale: Scale) -> Callable[[], Any]:
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
    """Each token with the candidates of its probed experts; tokens of 16 kinds, as in _hidden_states."""
    config = _config(scale, key_experts=True)
    assert config.experts is not None and config.probed is not None
    h_TD, keys_RD = torch.randn(scale.tokens, scale.hidden), torch.randn(scale.neurons, scale.hidden)
    experts_VP = torch.randint(config.experts, (_KINDS, config.probed))
    of_kind_VC = (experts_VP[:, :, None] * config.expert_size + torch.arange(config.expert_size)).flatten(1)
    chosen_TC = of_kind_VC[torch.randint(_KINDS, (scale.tokens,))]
    seconds = _least_s(lambda: row_dots(h_TD, keys_RD, chosen_TC), scale.repeats, _fill_cache(scale))
    return 2 * chosen_TC.numel() * scale.hidden / seconds


def _config(scale: Scale, key_experts: bool) -> MeftConfig:
    return MeftConfig(neurons=scale.neurons, kept=scale.kept, key_experts=key_experts)


def _element_rate(scale: Scale) -> float:
    """topk of T x R scores."""
    scores_TR = torch.randn(scale.tokens, scale.neurons)
    return scores_TR.numel() / _least_s(lambda: scores_TR.topk(scale.kept, dim=1, sorted=False), scale.repeats)


def _fresh_bandwidth(scale: Scale) -> float:
    """Half of all keys, ascending, into fresh memory: a large gather."""
    keys_RD = torch.randn(scale.neurons, scale.hidden)
    union_U = torch.randperm(scale.neurons)[: max(1, scale.neurons // 2)].sort().values
    moved = 2 * union_U.numel() * scale.hidden * keys_RD.element_size()
    return moved / _least_s(lambda: keys_RD.index_select(0, union_U), 2 * scale.repeats, _fill_cache(scale))


def _overhead(scale: Scale) -> float:
    tiny = torch.zeros(8)
    return _least_s(lambda: [tiny.add_(1.0) for _ in range(1000)], scale.repeats) / 1000


_HOST_MEASURES = {"product_rate": _product_rate, "dot_rate": _dot_rate, "element_rate": _element_rate,
                  "bandwidth": _bandwidth, "fresh_bandwidth": _fresh_bandwidth, "overhead": _overhead}  # fmt: skip


# ---- predicted beside measured ----


def _checks(host: Host, scale: Scale) -> list[dict[str, Any]]:
    """Host-side pieces of a training step, run as they are in training and predicted from the work of each operation.

    Both at the full hidden size and at a quarter of it, where more stays in cache.
    """
    rows, other = [], _fill_cache(scale)
    for hidden in (scale.hidden, max(8, scale.hidden // 4)):
        for name, run in _pieces(scale, hidden).items():
            run()  # what the first call alone does: moments
            predicted = _predict(run, host)
            measured = statistics.median(_times_s(run, scale.repeats, other))
            rows.append({"name": f"{name}, D={hidden}, R={scale.neurons}, T={scale.tokens}",
                         "predicted_s": round(predicted, 7), "measured_s": round(measured, 7),
                         "ratio": round(predicted / measured, 3)})  # fmt: skip
    return rows


def _predict(run: Callable[[], Any], host: Host) -> float:
    # All tensors are on the host: "cuda" is a device that none of them is on.
    with Machine(device="cuda") as machine, machine.phase("forward"):
        run()
    return replay(machine.operations, card("24GB"), host).step_s


def _pieces(scale: Scale, hidden: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    configs = [_config(scale, key_experts) for key_experts in (True, False)]
    store = NeuronStore(configs[0], hidden, generator, torch.device("cpu"))
    h_TD = _hidden_states(scale.tokens, hidden, generator)
    keys_RD, router_ND = store.keys.detach(), store.router.detach() if store.router is not None else None
    union_U = select(h_TD, keys_RD, router_ND, configs[0], None).union_U
    gradients_UD = torch.randn(union_U.numel(), hidden, generator=generator)
    optimizer = DenseRowAdamW([store], lr=1e-3)
    return {
        "selection with Key-Experts": lambda: select(h_TD, keys_RD, router_ND, configs[0], None),
        "selection without Key-Experts": lambda: select(h_TD, keys_RD, None, configs[1], None),
        f"gather of U={union_U.numel()} rows": lambda: store.gather(union_U),
        "rows to bf16 and back": lambda: gradients_UD.to(torch.bfloat16).float(),
        "gradients into the store": lambda: _no_grad(store.add_gradients, union_U, gradients_UD, gradients_UD),
        "clipping": lambda: nn.utils.clip_grad_norm_(list(store.parameters()), 1.0),
        "AdamW over all rows": lambda: _no_grad(optimizer.step),
        "clearing gradients": lambda: _no_grad(optimizer.zero_grad),
    }


def _hidden_states(tokens: int, hidden: int, generator: torch.Generator) -> Tensor:
    """[T, D] of 16 kinds of token with some noise: they share neurons, and U/R comes near the paper's 26 to 52 %."""
    kinds_VD = torch.randn(_KINDS, hidden, generator=generator)
    kind_T = torch.randint(_KINDS, (tokens,), generator=generator)
    return kinds_VD[kind_T] + 0.1 * torch.randn(tokens, hidden, generator=generator)


def _no_grad(run: Callable[..., Any], *arguments: Any) -> None:
    with torch.no_grad():
        run(*arguments)


# ---- card and link ----


def _measure_card(scale: Scale) -> tuple[dict[str, float], list[dict[str, Any]]]:
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
