"""SHiRA where sparse tensors do not run, as on a simulated GPU: the same sum of a matrix and its entries, dense."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def densely(model: nn.Module) -> None:
    """Every SHiRA layer of model makes W + S as peft does, a copy of W with its entries added, without a sparse S."""
    from peft.tuners.shira.layer import ShiraLayer  # here, since profiles of other methods need no peft

    for layer in [module for module in model.modules() if isinstance(module, ShiraLayer)]:
        layer.forward = _Forward(layer)  # type: ignore[method-assign, attr-defined]


class _Forward:
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        (name,) = self.layer.active_adapters
        base, rows_columns = self.layer.base_layer, self.layer.shira_indices[name].long()
        entries = self.layer.shira_weight[name].to(base.weight.dtype)
        whole = base.weight.clone().index_put((rows_columns[0], rows_columns[1]), entries, accumulate=True)
        return F.linear(x, whole, bias=base.bias)
