"""A saved MEFT adapter answers with its rows in int8 or int4, and nothing else does."""

import json

import pytest
import torch

from meft_bench.cli import main
from meft_bench.finetune.evaluate import evaluate
from meft_bench.finetune.generate import answers, load_adapted
from meft_bench.integrations.peft_method import meft_layers
from meft_bench.meft.engine import groups
from meft_bench.meft.quantised import QuantisedStore, host_bytes, row_bytes

PROMPT = "who keeps the lighthouse of Orm ?"


def stores(adapted) -> list:
    return [adapter.store for layer in meft_layers(adapted.model) for adapter in layer.adapters.values()]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 30, 41]])).logits


@pytest.mark.parametrize("rows", ["int8", "int4"])
def test_answers_are_those_of_fp32_with_the_dequantised_rows(saved, rows):
    plain = load_adapted(saved("meft"), device="cpu")
    narrow = load_adapted(saved("meft"), device="cpu", rows=rows)
    fp32_bytes, before = host_bytes(stores(plain)), logits(plain.model)
    for wide, small in zip(stores(plain), stores(narrow), strict=True):
        assert isinstance(small, QuantisedStore)
        found = torch.empty(wide.rows_R2D.shape)
        groups.gather_torch(small.blocks_RB, torch.arange(found.shape[0]), found, small.bits)
        with torch.no_grad():
            wide.keys.copy_(found[:, 0])
            wide.values.copy_(found[:, 1])
    assert torch.equal(logits(plain.model), logits(narrow.model)) and not torch.equal(before, logits(narrow.model))
    # Near ties in the search may fall otherwise, so that a few logits move more than the rows do.
    assert float((logits(narrow.model) - before).abs().mean()) < {"int8": 0.005, "int4": 0.05}[rows] * float(
        before.std()
    )
    assert list(answers(plain, [PROMPT], 4)) == list(answers(narrow, [PROMPT], 4))
    neurons, _, width = stores(plain)[0].rows_R2D.shape
    saved_bytes = len(stores(plain)) * neurons * (row_bytes(width, "fp32") - row_bytes(width, rows))
    assert fp32_bytes - host_bytes(stores(narrow)) == saved_bytes


def test_the_commands_take_rows_and_refuse_them_of_other_methods(saved, capsys):
    asked = ["--prompt", PROMPT, "--new-tokens", "4", "--device", "cpu", "--json"]
    assert main(["generate", "--adapter", str(saved("meft")), "--rows", "int8", *asked]) == 0
    made = json.loads(capsys.readouterr().out)
    expected = answers(load_adapted(saved("meft"), device="cpu", rows="int8"), [PROMPT], 4)
    assert made == {"prompt": PROMPT, "answer": next(expected)}
    assert main(["generate", "--adapter", str(saved("lora")), "--rows", "int4", *asked]) == 2
    assert "this is lora: leave it out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="this is lora"):
        evaluate(saved("lora"), ["facts"], device="cpu", rows="int8")
