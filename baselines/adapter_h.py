"""AdapterH: bottleneck adapters in series (Houlsby et al. 2019), at the sites the paper's baseline uses.

Three per layer: before the gate projection, before the up projection, and after the down projection; on FFNs without a
gate, two. x becomes x + up(tanh(down(x))).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_bench.meft.dense import key_std
from meft_bench.meft.sites import hidden_size
from meft_bench.train.methods import Attached, ModelShape, freeze, require_choice, require_positive
from meft_bench.train.projections import ffn_projections

TITLE = "AdapterH"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "size"
CHOICES = {"start": ("normal", "spread", "identity")}
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Options:
    size: int = 8
    """Width of the bottleneck."""
    start: str = "normal"
    """"normal": both matrices N(0, 0.02), so training does not start at the base model (released code). Controls:
    "spread" makes the down matrix as wide as MEFT's fresh keys, 0.02 sqrt(4096 / D); "identity" an up matrix of zero.
    """

    def __post_init__(self) -> None:
        require_positive(size=self.size)
        require_choice("start", self.start, CHOICES["start"])


class SerialAdapter(nn.Module):
    """x + up(tanh(down(x))) for x [..., D]; fp32 weights, computed in x's dtype."""

    def __init__(self, hidden: int, options: Options, generator: torch.Generator) -> None:
        super().__init__()
        down_std = key_std(hidden) if options.start == "spread" else _STD
        self.down = nn.Parameter(torch.randn(options.size, hidden, generator=generator) * down_std)
        self.up = nn.Parameter(torch.randn(hidden, options.size, generator=generator) * _STD)
        if options.start == "identity":
            nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.down.T.to(x.dtype)).tanh() @ self.up.T.to(x.dtype)


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    """Three sites of a LLaMA-like layer."""
    half = 3 * shape.hidden * options.size * shape.layers
    return {"down": half, "up": half}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    sites, width = ffn_projections(model), hidden_size(model)
    freeze(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, list[nn.Parameter]] = {"down": [], "up": []}
    for into, out in sites:
        for site in (*into, out):
            adapter = SerialAdapter(width, options, generator).to(device)
            site.add_module("serial_adapter", adapter)
            if site is out:
                site.register_forward_hook(lambda module, args, output: module.serial_adapter(output))
            else:
                site.register_forward_pre_hook(lambda module, args: (module.serial_adapter(args[0]), *args[1:]))
            groups["down"].append(adapter.down)
            groups["up"].append(adapter.up)
    return Attached(model=model, groups=groups)
