"""A base whose vocabulary was resized: peft saves its embeddings beside the rows, and loading puts both back."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from meft_bench.integrations.peft_layer import MeftLayer
from meft_bench.meft.adapter_folder import WEIGHTS_NAME
from tests.integrations.small import fill, rows_of, same, with_meft
from tests.integrations.test_trainer import series, train
from tests.meft.tiny_models import VOCAB, D, tiny_llama

MORE = VOCAB + 7
IDS = torch.tensor([[3, 5, MORE - 1, 9, MORE - 2]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base(folder: Path, tokens: int = MORE, seed: int = 0) -> PreTrainedModel:
    """The base with random rows for the tokens it did not have; other ones for another seed."""
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight[VOCAB:].normal_()
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_it_is_loaded_with_the_embeddings_it_was_trained_with(base_folder: Path, tmp_path: Path) -> None:
    model = with_meft(base(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter" / WEIGHTS_NAME))
    again = PeftModel.from_pretrained(base(base_folder, seed=1), tmp_path / "adapter")
    assert same(rows_of(model), rows_of(again)) and torch.equal(logits(model), logits(again))
    assert not torch.equal(logits(again), logits(with_meft(base(base_folder, seed=1))))
    own = base(base_folder, seed=1)
    own.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(own), logits(model))


def test_saved_without_its_embeddings_it_is_loaded_too(base_folder: Path, tmp_path: Path) -> None:
    model = with_meft(base(base_folder))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(base(base_folder), tmp_path / "adapter")
    assert same(rows_of(model), rows_of(again)) and torch.equal(logits(model), logits(again))


def test_another_vocabulary_is_refused_with_the_way_to_it(base_folder: Path, tmp_path: Path) -> None:
    with_meft(base(base_folder)).save_pretrained(tmp_path / "adapter")
    for tokens in (VOCAB, MORE + 1):
        model = base(base_folder, tokens)
        with pytest.raises(
            ValueError, match=rf"\({MORE}, {D}\).*is \({tokens}, {D}\).*resize_token_embeddings\({MORE}\)"
        ):
            PeftModel.from_pretrained(model, tmp_path / "adapter")
        assert not any(isinstance(module, MeftLayer) for module in model.modules())


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed.weight"])
def test_other_matrices_of_the_base_are_refused(base_folder: Path, tmp_path: Path, name: str) -> None:
    with_meft(base(base_folder)).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    save_file({**tensors, f"base_model.model.{name}": torch.ones(D, D)}, tmp_path / "adapter" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"not a MEFT adapter's: (base_model.model.)?{name}"):
        PeftModel.from_pretrained(base(base_folder), tmp_path / "adapter")


def test_a_trainer_s_checkpoint_is_resumed(base_folder: Path, tmp_path: Path) -> None:
    whole = train(with_meft(base(base_folder)), tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    other = with_meft(base(base_folder, seed=1), filled=False)
    again = train(other, tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4)
    assert series(whole, "loss") == series(again, "loss") and same(rows_of(whole.model), rows_of(again.model))
    fill(other, seed=9)
    assert not same(rows_of(whole.model), rows_of(again.model))
