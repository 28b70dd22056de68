"""What a run would need, worked out by hand on numbers that can be checked with a pencil."""

import pytest

from meft_bench.harness import estimate
from meft_bench.harness.spec import RunSpec
from meft_bench.train.methods import ModelShape

SHAPE = ModelShape(hidden=10, layers=3, ffn=20, query=10, value=10, parameters=1000)


def spec(method: str, **fields) -> RunSpec:
    options = {
        "parallel_adapter": {"neurons": 4},
        "parallel_adapter_offload": {"neurons": 4},
        "meft": {"neurons": 4, "experts": 2, "probed": 1, "kept": 2},
    }.get(method, {})
    settings = {"task": "facts", "steps": 5, "batch_size": 8, "accumulation": 2, "max_length": 16, **fields}
    return RunSpec(method=method, options=options, **settings)


# 8 / 2 sequences of 16 tokens, 3 layers of width 10, 34 bytes at 16 bits: 65,280; twice that in fp32.
ACTIVATIONS = 4 * 16 * 3 * 10 * 34
ADAPTER = 2 * 4 * 10 * 3
"""Keys and values of 4 neurons in 3 layers; MEFT's router has 2 rows a layer beside them."""


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_each_kind_of_method(dtype: str, width: int) -> None:
    base, acts = 1000 * width, ACTIVATIONS * (2 if dtype == "float32" else 1)

    def need(method: str, **fields):
        return estimate.predict(spec(method, dtype=dtype, **fields), SHAPE)

    assert need("base", steps=0) == {"device_bytes": base, "host_bytes": 0}
    # fp32 parameter, gradient and two moments; full fine-tuning has its parameters in the base already, and torch's
    # AdamW keeps gradients and moments in their dtype.
    assert need("parallel_adapter") == {"device_bytes": base + 16 * ADAPTER + acts, "host_bytes": 0}
    assert need("full") == {"device_bytes": base + 3 * width * 1000 + acts, "host_bytes": 0}
    # Linked: rows of three layers and the gradients of one more on the device, all state on the host.
    rows = 2 * 4 * 10 * (3 + 1) * width
    assert need("parallel_adapter_offload") == {"device_bytes": base + rows + acts, "host_bytes": 16 * ADAPTER}
    meft = need("meft")
    assert meft["host_bytes"] == 16 * (ADAPTER + 2 * 10 * 3)
    assert meft["device_bytes"] == base + int(0.26 * rows) + acts


def test_a_micro_batch_of_half_the_rows_keeps_half_the_activations() -> None:
    whole, half = (estimate.predict(spec("base", steps=1, accumulation=a), SHAPE)["device_bytes"] for a in (1, 2))
    assert whole - half == 2 * ACTIVATIONS


def test_with_several_micro_batches_gradients_used_in_backward_wait_whole() -> None:
    """LOMO holds the largest gradient, of a 20 x 10 matrix, where a step has one micro-batch."""
    one, several = (estimate.predict(spec("lomo", accumulation=a), SHAPE)["device_bytes"] for a in (1, 2))
    assert one == 4 * (1000 + 200) + 4 * ACTIVATIONS and several == 4 * (1000 + 1000) + 2 * ACTIVATIONS


def test_hours_on_one_card() -> None:
    """4 multiply-adds a parameter and token with a frozen base, 6 without; 35.6 Tflop/s (71 in bf16) of which 40 % are
    used."""
    one = 5 * 8 * 16 * 1000 / (35.6e12 * 0.4) / 3600
    assert estimate.hours(spec("parallel_adapter"), SHAPE) == pytest.approx(4 * one, rel=1e-12)
    assert estimate.hours(spec("full", dtype="bfloat16"), SHAPE) == pytest.approx(6 * one * 35.6 / 71, rel=1e-12)
    assert estimate.hours(spec("full"), SHAPE) == pytest.approx(6 * one, rel=1e-12)
    assert estimate.hours(spec("full", max_length=None), SHAPE) == pytest.approx(6 * one * 16, rel=1e-12)


def test_what_cannot_fit_is_refused_and_what_just_fits_is_not() -> None:
    run = spec("meft")
    need = sum(estimate.predict(run, SHAPE).values())
    estimate.refuse_if_too_large(run, SHAPE, free_host=need)
    with pytest.raises(ValueError, match="needs about .* choose a smaller size"):
        estimate.refuse_if_too_large(run, SHAPE, free_host=need - 1)


def test_llama_7b_needs_what_is_published() -> None:
    """6,738,415,616 parameters: 13.5 GB in 16 bits; AdamW's 16 bytes for each of 8464 neurons' rows on the host."""
    run = RunSpec(
        task="nq", method="meft", data="hub", dtype="bfloat16", device="cuda", batch_size=64, accumulation=32,
        max_length=256, options={"neurons": 8464, "experts": 368, "probed": 8, "kept": 64},
    )  # fmt: skip
    need = estimate.predict(run, estimate.KNOWN_SHAPES["llama-7b"])
    assert need["host_bytes"] == 16 * 32 * 4096 * (2 * 8464 + 368)
    assert 13.4e9 < need["device_bytes"] < 19e9
