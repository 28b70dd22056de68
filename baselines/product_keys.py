"""Product-key memory beside every FFN (Lample et al. 2019, arXiv 1907.05242), dense and resident on the device.

n x n value rows, found through 2 n sub-keys: a query's halves are scored against n sub-keys each, the best k of either
side make k x k candidates, and the best k of those are the exact top k of all n x n sums. Each head has its own queries
and sub-keys, all heads share the values. The paper puts the memory in an FFN's place and normalises queries over the
batch; here it is added beside the FFN of a pretrained model, starts at zero, and does not, since a batch's statistics
would make a step depend on its micro-batches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meft_bench.meft.sites import add_parallel, free_ffns, hidden_size
from meft_bench.train.methods import Attached, ModelShape, freeze, require_positive

TITLE = "Product-key memory"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "subkeys"
EXACT_COUNT = True


@dataclass(frozen=True, kw_only=True)
class Options:
    subkeys: int = 12
    """n: sub-keys of each half; the memory has n x n value rows."""
    heads: int = 4
    kept: int = 8
    """k: value rows a token and head reads; all where there are fewer."""
    key_width: int = 8
    """Width of a sub-key, half a query's."""

    def __post_init__(self) -> None:
        require_positive(subkeys=self.subkeys, heads=self.heads, kept=self.kept, key_width=self.key_width)


class ProductKeyMemory(nn.Module):
    """Weighted sum of the value rows that each token's queries find, for x [..., D]; fp32 weights, computed in x's
    dtype. query [H, 2, w, D], keys [H, 2, n, w], values [n n, D]."""

    def __init__(self, hidden: int, options: Options, generator: torch.Generator) -> None:
        super().__init__()
        n, h, w = options.subkeys, options.heads, options.key_width
        self.query = nn.Parameter(_uniform((h, 2, w, hidden), hidden, generator))
        self.keys = nn.Parameter(_uniform((h, 2, n, w), w, generator))
        self.values = nn.Parameter(torch.zeros(n * n, hidden))
        self.kept = options.kept

    def forward(self, x: Tensor) -> Tensor:
        weights, rows = self.search(x.reshape(-1, x.shape[-1]))
        values = self.values.to(x.dtype)
        found = F.embedding_bag(rows.flatten(1), values, per_sample_weights=weights.flatten(1), mode="sum")
        return found.reshape(x.shape)

    def search(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(softmax weights, indices of value rows), each [T, H, k], the best first."""
        queries = torch.einsum("td,hpwd->thpw", x_TD, self.query.to(x_TD.dtype))
        scores = torch.einsum("thpw,hpnw->thpn", queries, self.keys.to(x_TD.dtype))
        n = scores.shape[-1]
        best, at = scores.topk(min(self.kept, n))
        sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
        rows = (at[:, :, 0, :, None] * n + at[:, :, 1, None, :]).flatten(2)
        top, places = sums.topk(min(self.kept, n * n, sums.shape[-1]))
        return top.softmax(-1), rows.gather(-1, places)


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    """Per FFN: H (2 w) D of queries, H (2 w) n of sub-keys, n n D of values."""
    n, widths = options.subkeys, 2 * options.heads * options.key_width
    each = {"query": widths * shape.hidden, "keys": widths * n, "values": n * n * shape.hidden}
    return {name: entries * shape.layers for name, entries in each.items()}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    sites = free_ffns(model)
    freeze(model)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    groups: dict[str, list[nn.Parameter]] = {"query": [], "keys": [], "values": []}
    for site in sites:
        memory = ProductKeyMemory(hidden_size(model), options, generator).to(device)
        add_parallel(site, memory)
        for name, tensors in groups.items():
            tensors.append(getattr(memory, name))
    return Attached(model=model, groups=groups)


def _uniform(shape: tuple[int, ...], width: int, generator: torch.Generator) -> Tensor:
    """Within 1 / sqrt(width) of zero, as torch starts linear layers."""
    return (2 * torch.rand(shape, generator=generator) - 1) / width**0.5
