"""MEFT on a base in 4 or 8 bits, where bitsandbytes runs; and what is said where it does not."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, PreTrainedModel

from meft_bench.integrations import quantized
from meft_bench.integrations.quantized import quantization
from tests.integrations.small import rows_of, same, with_meft
from tests.integrations.test_trainer import series, train
from tests.meft.tiny_models import tiny_llama, tokens


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(source: Path, bits: int) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    try:
        config = quantization(bits)
    except ValueError as error:
        pytest.skip(str(error))
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
def test_meft_trains_on_a_quantised_base(source: Path, tmp_path: Path, bits: int) -> None:
    base = load(source, bits)
    kinds = {type(module).__name__ for module in base.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = with_meft(base)
    start = rows_of(model)[0].clone()
    trainer = train(model, tmp_path / "run", max_steps=6)
    losses = series(trainer, "loss")
    assert losses[-1] < losses[0] and not torch.equal(start, rows_of(model)[0])
    after = {n.replace(".base_layer", ""): p for n, p in model.base_model.model.named_parameters() if "meft_" not in n}
    assert after.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in after.items())
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(source, bits), tmp_path / "adapter")
    assert same(rows_of(again), rows_of(model))
    with torch.no_grad():  # bitsandbytes multiplies another way when gradients are on
        assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_pefts_own_preparation_of_quantised_bases(source: Path, tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(load(source, 4), gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = train(with_meft(base), tmp_path / "run", max_steps=6)
    assert series(trainer, "loss")[-1] < series(trainer, "loss")[0]


def test_the_configuration_is_that_of_qlora() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = quantization(4)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and quantization(8).load_in_8bit


def test_other_widths_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bits=3: .*4 or 8 bits"):
        quantization(3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'meft-bench\[peers\]'"):
        quantization(4)


def test_a_back_end_that_fails_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel\nfor this device")

    fake = SimpleNamespace(nn=SimpleNamespace(Linear4bit=broken, Linear8bitLt=broken))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake)
    quantized._failure.cache_clear()
    for bits in (4, 8):
        with pytest.raises(
            ValueError, match=rf"{bits}-bit layers on cpu here \(RuntimeError: no kernel\): load the base in bf16"
        ):
            quantization(bits)
    quantized._failure.cache_clear()
