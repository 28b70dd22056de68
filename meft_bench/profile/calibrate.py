"""`meft-bench profile --calibrate`: this machine's constants, measured, and how well they predict MEFT's host work.

The file it writes stands in for a card and a host of simulate/cards.py. Rates here are what kernels reach, so the
shares of a peak are 1. Imports neither datasets nor lm-eval: GPU machines often lack them.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm

from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.routing import select
from meft_bench.meft.store import NeuronStore
from meft_bench.profile.limits import read_small
from meft_bench.profile.machine_rates import (
    HOST_MEASURES,
    Scale,
    config_of,
    fill_cache,
    hidden_states,
    measure_card,
    times_s,
)
from meft_bench.provenance import provenance
from meft_bench.simulate.cards import Card, Constant, Host, card
from meft_bench.simulate.host_kernels import host_kernels
from meft_bench.simulate.machine import Machine
from meft_bench.simulate.timeline import replay
from meft_bench.train.methods import require_choice
from meft_bench.write import write_json

SCHEMA = 2
_COMMAND = "meft-bench profile --calibrate"
_HOST_RATES = {"product_rate": "FLOP/s", "dot_rate": "FLOP/s", "search_rate": "FLOP/s",
               "element_rate": "1/s", "bandwidth": "B/s", "fresh_bandwidth": "B/s", "overhead": "s"}  # fmt: skip
_CARD_RATES = {"memory_bytes": "bytes", "usable_bytes": "bytes", "context_bytes": "bytes", "half_rate": "FLOP/s",
               "full_rate": "FLOP/s", "bandwidth": "B/s", "h2d_pinned": "B/s", "d2h_pinned": "B/s",
               "h2d_pageable": "B/s", "d2h_pageable": "B/s", "copy_latency": "s", "launch": "s"}  # fmt: skip


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
    scale, load = scale or Scale(), psutil.getloadavg()[0]
    constants: dict[str, dict[str, Any]] = {}
    copies: list[dict[str, Any]] = []
    with tqdm(total=len(HOST_MEASURES) + 2, desc="calibrate", leave=False) as bar:
        for name, measure in HOST_MEASURES.items():
            constants[f"host.{name}"] = _measured(measure(scale), _HOST_RATES[name])
            bar.update()
        if device == "cuda":
            rates, copies = measure_card(scale)
            constants |= {f"card.{k}": _measured(v, _CARD_RATES[k]) for k, v in rates.items()}
        bar.update()
        checks = _checks(_host(constants, "this machine"), scale)
        bar.update()
    result = {
        "schema": SCHEMA,
        "evidence": "measured",
        "settings": {**scale._asdict(), "device": device},
        "load_before": round(load, 2),
        "constants": constants,
        "checks": checks,
        "copies": copies,
        "provenance": provenance(torch.get_num_threads()),
    }
    write_json(output, result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The constants, and predicted beside measured, as two tables; and whether the machine was busy with other work."""
    lines = ["| constant | value | unit |", "|---|---:|---|"]
    lines += [f"| {k} | {c['value']:.4g} | {c['unit']} |" for k, c in sorted(result["constants"].items())]
    lines += ["", "| host work | predicted, ms | measured, ms | predicted / measured |", "|---|---:|---:|---:|"]
    for c in result["checks"]:
        lines.append(
            f"| {c['name']} | {1000 * c['predicted_s']:.2f} | {1000 * c['measured_s']:.2f} | {c['ratio']:.2f} |"
        )
    load, cores = result["load_before"], result["provenance"]["cores"]
    if load > cores / 4:
        lines += [
            "",
            f"Other programs kept the machine busy (load {load:.1f} on {cores} cores): calibrate when it is idle.",
        ]
    return "\n".join(lines) + "\n"


def from_calibration(path: Path) -> tuple[Card | None, Host]:
    """The card (None where no GPU was measured) and host of a file that calibrate wrote.

    Raises ValueError, naming file and place, for anything else.
    """
    try:
        content = read_small(path)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): write it with `{_COMMAND}`") from None
    except ValueError as error:
        raise ValueError(f"{path} is no file of constants ({error}): write one with `{_COMMAND}`") from None
    try:
        result = json.loads(content)
    except (ValueError, RecursionError):
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


# ---- predicted beside measured ----


def _checks(host: Host, scale: Scale) -> list[dict[str, Any]]:
    """Host-side pieces of a training step, run as they are in training and predicted from the work of each operation.

    Both at the full hidden size and at a quarter of it, where more stays in cache.
    """
    rows, other = [], fill_cache(scale)
    for hidden in (scale.hidden, max(8, scale.hidden // 4)):
        for name, run in _pieces(scale, hidden).items():
            run()  # what the first call alone does: moments
            predicted = _predict(run, host)
            measured = statistics.median(times_s(run, scale.repeats, other))
            rows.append({"name": f"{name}, D={hidden}, R={scale.neurons}, T={scale.tokens}",
                         "predicted_s": round(predicted, 7), "measured_s": round(measured, 7),
                         "ratio": round(predicted / measured, 3)})  # fmt: skip
    return rows


def _predict(run: Callable[[], Any], host: Host) -> float:
    # All tensors are on the host: "cuda" is a device that none of them is on.
    with host_kernels(), Machine(device="cuda") as machine, machine.phase("forward"):
        run()
    return replay(machine.program, card("24GB"), host).step_s


def _pieces(scale: Scale, hidden: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    configs = [config_of(scale, key_experts) for key_experts in (True, False)]
    store = NeuronStore(configs[0], hidden, generator, torch.device("cpu"))
    h_TD = hidden_states(scale.tokens, hidden, generator)
    keys_RD, router_ND = store.keys.detach(), store.router.detach() if store.router is not None else None
    union_U = select(h_TD, keys_RD, router_ND, configs[0], None).union_U
    gradients_U2D = torch.randn(union_U.numel(), 2, hidden, generator=generator)
    optimizer = DenseRowAdamW([store], lr=1e-3)
    return {
        "selection with Key-Experts": lambda: select(h_TD, keys_RD, router_ND, configs[0], None),
        "selection without Key-Experts": lambda: select(h_TD, keys_RD, None, configs[1], None),
        f"gather of U={union_U.numel()} rows": lambda: store.gather(union_U),
        "rows to bf16 and back": lambda: gradients_U2D.to(torch.bfloat16).float(),
        "gradients into the store": lambda: _no_grad(store.add_gradients, union_U, gradients_U2D),
        "clipping": lambda: nn.utils.clip_grad_norm_(list(store.parameters()), 1.0),
        "AdamW over the rows with a gradient": lambda: _no_grad(optimizer.step),
        "clearing gradients": lambda: _no_grad(optimizer.zero_grad),
    }


def _no_grad(run: Callable[..., Any], *arguments: Any) -> None:
    with torch.no_grad():
        run(*arguments)
