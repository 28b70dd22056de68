"""MEFT's rows in int8 or int4 inside a peft model, to answer from less host memory (meft/quantised.py)."""

from typing import Any, cast

from torch import nn

from meft_bench.integrations.peft_layer import HostAdapter
from meft_bench.integrations.peft_method import meft_layers
from meft_bench.meft.model import look_ahead
from meft_bench.meft.quantised import QuantisedAdapter


def quantise_rows(model: nn.Module, rows: str) -> nn.Module:
    """Hold every MEFT adapter of model in "int8" or "int4", in place; layer by layer, so that fp32 rows of no more than
    the whole adapter are in memory at any time. Returns model, in eval mode.

        model = quantise_rows(PeftModel.from_pretrained(base, "my-adapter", torch_device="cpu"), "int8")

    Raises ValueError for a model without a MEFT adapter, and for rows that lie on the device.
    """
    layers = meft_layers(model)
    for layer in layers:
        for name, adapter in layer.adapters.items():
            layer.add(name, cast(HostAdapter, QuantisedAdapter(adapter, rows)))
    for name in layers[0].adapters:
        adapters: list[Any] = [layer.adapters[name] for layer in layers if name in layer.adapters]
        look_ahead(adapters, adapters[0].config.lookahead)
    return model.eval()
