"""The formula that plans, estimates and refusals use, against simulated steps."""

import pytest
from transformers import LlamaConfig

from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.variants import VARIANTS
from meft_bench.simulate import cards
from meft_bench.train.contract import describe
from meft_bench.train.methods import find_method
from meft_bench.train.step_bytes import Bytes, Step, step_bytes
from tests.profile.small import shape_of_config

DEVICE, HOST = (0.90, 1.25), (0.85, 1.0)
"""Predicted over simulated. The device's side is above where gradients and activations have no common peak, and below
where LoRA keeps the inputs of every matrix; the host's leaves out the hidden states and scores of one layer."""
SHAPES = {
    "short rows": {"hidden": 512, "layers": 8, "seq": 64, "batch": 1, "neurons": 512},
    "7B's width": {"hidden": 4096, "layers": 4, "seq": 256, "batch": 2, "neurons": 3072},
}
METHODS = ("lora_attention", "lora_all", "adapter_h", "parallel_adapter", "parallel_adapter_streamed", "full", "meft",
           "meft_no_ke")  # fmt: skip


def both(variant: str, hidden: int, layers: int, seq: int, batch: int, neurons: int) -> tuple[Bytes, dict]:
    """(predicted, simulated) bytes of a step of a Llama in bfloat16, a quarter of MEFT's rows in use."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
                         num_attention_heads=hidden // 128, vocab_size=8 * hidden)  # fmt: skip
    shape = shape_of_config(config)
    card, host = cards.card("24GB"), cards.host("desktop")
    setting = Setting(config=config, shape=shape, card=card, host=host, accumulations=(1,))
    union = Union(rows=neurons // 4, source="for a test", evidence="assumed")
    needed = union if VARIANTS[variant].needs_union else None
    spec = ProfileSpec(model="x", variant=variant, neurons=neurons, batch=batch, seq=seq, union=needed)
    row, _ = simulated_row(spec, setting)
    name = VARIANTS[variant].method
    options = find_method(name).Options(**row["size"])
    step = Step(shape=shape, tokens=batch * seq, dtype="bfloat16", vocabulary=config.vocab_size, union_share=0.25)
    return step_bytes(describe(name), options, row["parameters"]["trainable"], step), row["memory"]


@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_predicts_what_is_simulated(shape, variant):
    predicted, simulated = both(variant, **SHAPES[shape])
    assert DEVICE[0] < sum(predicted.device.values()) / simulated["device_peak_bytes"] < DEVICE[1]
    if not describe(VARIANTS[variant].method).on_host({}):
        assert not predicted.host and simulated["host_peak_bytes"] < 10**6
        return
    assert HOST[0] < sum(predicted.host.values()) / simulated["host_peak_bytes"] < HOST[1]
    state = sum(simulated["host_by_category"][c] for c in ("adapter parameters", "gradients", "moments"))
    assert sum(predicted.host.values()) == pytest.approx(state, rel=1e-4), "what is owned is predicted exactly"


def test_the_upper_bound_is_above_the_simulated_step():
    """Without an assumption on U the plan must not promise too little."""
    predicted, simulated = both("meft", **SHAPES["short rows"])
    options = find_method("meft").Options(neurons=512, kept=64)
    shape = shape_of_config(LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                                        num_attention_heads=4, vocab_size=4096))  # fmt: skip
    bound = step_bytes(describe("meft"), options, 1, Step(shape=shape, tokens=64, dtype="bfloat16", vocabulary=4096))
    assert bound.device["adapter rows"] == pytest.approx(4 * predicted.device["adapter rows"])
    assert sum(bound.device.values()) > simulated["device_peak_bytes"]
