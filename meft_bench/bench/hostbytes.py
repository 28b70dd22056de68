"""Host memory of a few layers, in a process of its own so that its peak is nobody else's.

Run as a module it measures itself and prints JSON.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.store import NeuronStore

PARTS = ("parameters", "gradients", "moments", "in flight")
_STEPS, _MICRO_BATCHES = 2, 1


def measure(
    hidden: int, neurons: int, kept: int, tokens: int, moments: str, device: str, layers: int = 1
) -> dict[str, Any]:
    """Bytes per parameter, accounted and as growth of the peak, of layers that train a little."""
    made: dict[str, Any] = {}
    for way in ("host's part", "layer computed"):
        arguments = json.dumps([hidden, neurons, kept, tokens, moments, device, way == "layer computed", layers])
        command = [sys.executable, "-m", "meft_bench.bench.hostbytes", arguments]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"measuring host memory failed: {run.stderr.strip()[-400:]}")
        made[way] = json.loads(run.stdout.splitlines()[-1])
    last = made["layer computed"]
    parameters, accounted = last["parameters"], last["bytes"]
    growth = {way: m["growth_bytes"] for way, m in made.items()}
    return {
        "moments": moments,
        "parameters": parameters,
        "bytes": accounted,
        "growth_bytes": growth,
        "per_parameter": {part: round(accounted[part] / parameters, 3) for part in PARTS},
        "accounted_per_parameter": round(sum(accounted.values()) / parameters, 3),
        "growth_per_parameter": {w: None if g is None else round(g / parameters, 3) for w, g in growth.items()},
        "growth_per_parameter_reason": "null: the system does not tell a process's peak",
        "n": _STEPS * _MICRO_BATCHES,
    }


def resident(name: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process in bytes; None where the system has no /proc."""
    # Not getrusage: its peak outlives exec, so a child would start with its parent's.
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _train(
    hidden: int,
    neurons: int,
    kept: int,
    tokens: int,
    moments: str,
    device: str,
    computed: bool,
    layers: int = 1,
) -> dict[str, Any]:
    """Train layers side by side for a few steps; computed=False leaves out the device's arithmetic and gives it its
    result."""
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16
    h = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    given = torch.ones(1 if computed else neurons, 2, hidden, dtype=dtype, device=device)
    before = resident("VmRSS")
    config, link = MeftOptions(neurons=neurons, kept=kept, moments=moments), Link()
    stores = [NeuronStore(config, hidden, generator, torch.device("cpu")) for _ in range(layers)]
    adapters = [MeftAdapter(config, store, link, BatchInfo(), layers) for store in stores]
    optimizer, in_flight = DenseRowAdamW(stores, lr=1e-3, moments=moments), 0
    for _ in range(_STEPS):
        for _ in range(_MICRO_BATCHES):
            for adapter in adapters:
                link.reset()
                if computed:
                    adapter(h.requires_grad_()).backward(h.detach())
                else:
                    _host_part(adapter, h, given)
                # One layer at a time: its rows on their way, or its gradients.
                in_flight = max(in_flight, link.bytes["h2d", "rows"] + link.bytes["d2h", "grads"])
        optimizer.step()
        optimizer.zero_grad()
    peak = resident("VmHWM")
    whole = [p for store in stores for p in (store.handle("keys"), store.handle("values"), store.handle("router"))]
    state = [t for p in whole for t in optimizer.state[p].values() if t.shape == p.shape]
    return {
        "parameters": sum(p.numel() for p in whole),
        "bytes": {
            "parameters": _bytes(whole),
            "gradients": _bytes([p.grad for p in whole]),
            "moments": _bytes(state),
            "in flight": in_flight,
        },
        "growth_bytes": None if peak is None or before is None else peak - before,
    }


def _host_part(adapter: MeftAdapter, h: Tensor, given_R2D: Tensor) -> None:
    """What the host does in one micro-batch, and nothing else."""
    adapter.prepare(h)
    made = adapter.take()
    sent = made.loan.arrived()
    made.loan.add_gradients(given_R2D[: made.union])
    made.loan.release(sent)


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _main(
    hidden: int, neurons: int, kept: int, tokens: int, moments: str, device: str, computed: bool, layers: int
) -> None:
    _train(8, 64, 4, 4, moments, device, computed)  # libraries and kernels load themselves
    print(json.dumps(_train(hidden, neurons, kept, tokens, moments, device, computed, layers)))


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
