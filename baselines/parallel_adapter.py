"""Parallel Adapter (He et al. 2022): FFN(h) + act(h keys^T) values, dense and resident on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_bench.meft.dense import activate, fresh_keys
from meft_bench.meft.sites import add_parallel, free_ffns, hidden_size
from meft_bench.train.methods import Attached, ModelShape, freeze, require_choice, require_positive

TITLE = "Parallel Adapter"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "neurons"
CHOICES = {"activation": ("relu", "silu")}


@dataclass(frozen=True, kw_only=True)
class Options:
    neurons: int = 64
    """R: key-value pairs per layer."""
    activation: str = "relu"
    """"relu" (paper) or "silu" (what the released code computes when dense)."""

    def __post_init__(self) -> None:
        require_positive(neurons=self.neurons)
        require_choice("activation", self.activation, CHOICES["activation"])


class ParallelAdapter(nn.Module):
    """act(h keys^T) values for h [..., D]; keys and values [R, D] fp32, computed in h's dtype."""

    def __init__(self, keys_RD: Tensor, activation: str) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys_RD), nn.Parameter(torch.zeros_like(keys_RD))
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        return activate(h @ self.keys.T.to(h.dtype), self.activation) @ self.values.to(h.dtype)


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    rows = options.neurons * shape.hidden * shape.layers
    return {"keys": rows, "values": rows}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    sites = free_ffns(model)
    freeze(model)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    groups: dict[str, list[nn.Parameter]] = {"keys": [], "values": []}
    for site in sites:
        keys_RD = fresh_keys(options.neurons, hidden_size(model), generator)
        adapter = ParallelAdapter(keys_RD.to(device), options.activation)
        add_parallel(site, adapter)
        groups["keys"].append(adapter.keys)
        groups["values"].append(adapter.values)
    return Attached(model=model, groups=groups)
