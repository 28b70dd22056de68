"""What a prompt and its answer become as tokens: the same wherever they are used, with each special token once."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from meft_bench.harness import evaluation
from meft_bench.train import models, tokens


@pytest.fixture(scope="module")
def loaded():
    return models.load_model("embedded", None, "float32", "cpu")


@pytest.fixture(scope="module")
def appending(tmp_path_factory):
    """The embedded tokenizer with an end token appended to every text."""
    folder = tmp_path_factory.mktemp("appending") / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.embedded_dir() / name, folder)
    about = json.loads((folder / "tokenizer.json").read_text())
    about["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    about["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (folder / "tokenizer.json").write_text(json.dumps(about))
    made = AutoTokenizer.from_pretrained(folder)
    assert made.encode("a boat")[-1] == made.eos_token_id
    return made


@pytest.mark.parametrize("text", ["what boat ?", "<s> what boat ?", "<s>what boat ?"])
def test_the_start_token_stands_once_and_no_end_token(loaded, appending, text):
    for tokenizer in (loaded.tokenizer, appending):
        (ids,) = tokens.prompt_ids(tokenizer, [text])
        assert ids == loaded.tokenizer.encode("what boat ?")
        (bare,) = tokens.prompt_ids(tokenizer, ["what boat ?"], special=False)
        assert bare == ids[1:]


def test_sequences_end_once(loaded, appending):
    end = loaded.tokenizer.eos_token_id
    for tokenizer in (loaded.tokenizer, appending):
        for whole in ("who ? boat", "who ? boat</s>"):
            ((ids, given, merged),) = tokens.sequences(tokenizer, ["who ?"], [whole])
            assert ids == [*loaded.tokenizer.encode("who ? boat"), end] and not merged
            assert ids[:given] == tokens.prompt_ids(tokenizer, ["who ?"])[0]


def test_white_space_at_a_prompts_end_is_the_answers(loaded):
    assert tokens.prompt_ids(loaded.tokenizer, ["who ? ", "who ?"]) == [loaded.tokenizer.encode("who ?")] * 2
    ((ids, given, merged),) = tokens.sequences(loaded.tokenizer, ["who ? "], ["who ? boat"])
    assert (ids[:given], merged) == (loaded.tokenizer.encode("who ?"), False)


def test_a_merged_boundary_is_said(loaded):
    ((ids, given, merged),) = tokens.sequences(loaded.tokenizer, ["who bo"], ["who boat"])
    assert merged and ids[:given] == loaded.tokenizer.encode("who")


@pytest.mark.parametrize(
    ("text", "end"), [("a </s>", 2), ("a </s> ", 2), ("a </s> b", None), ("a <unk>", None), ("a", None)]
)
def test_the_end_that_a_template_writes(loaded, text, end):
    assert tokens.written_end(loaded.tokenizer, loaded.tokenizer.encode(text)) == end
    ((ids, _, _),) = tokens.sequences(loaded.tokenizer, [""], [text], special=False)
    assert ids.count(2) == text.count("</s>") + (end is None)


def test_padding_is_a_token_that_the_embedding_has(loaded):
    class Padded:
        pad_token_id, eos_token_id = 843, 2

    assert tokens.padding_id(Padded(), 843) == 2 and tokens.padding_id(Padded(), 844) == 843
    Padded.pad_token_id = None
    assert tokens.padding_id(Padded(), 2) == 0


def test_generation_follows_the_caller_and_not_the_bases_settings(loaded):
    own = GenerationConfig(eos_token_id=5, repetition_penalty=9.0, num_beams=3, do_sample=True, temperature=2.0)
    before, loaded.model.generation_config = loaded.model.generation_config, own
    ids = torch.tensor([loaded.tokenizer.encode("what boat ?")])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    try:
        with tokens.plain_generation(loaded.model, [2], 0):
            assert loaded.model.generation_config.eos_token_id == [2]
            plain = loaded.model.generate(ids, **arguments)
        assert loaded.model.generation_config is own
    finally:
        loaded.model.generation_config = before
    assert torch.equal(plain, loaded.model.generate(ids, **arguments))
    with pytest.raises(RuntimeError), tokens.plain_generation(loaded.model, [2], 0):
        raise RuntimeError
    assert loaded.model.generation_config is before


def test_lm_eval_is_fed_the_tokens_of_training_row_by_row(loaded, appending):
    """HFLM decides by the first text of a batch whether all of them get a start token."""
    lm = evaluation.PlainLM(pretrained=loaded.model, tokenizer=appending)
    strings = ["<s> who ?", "what boat ? ", "who ?"]
    ids, mask = lm.tok_batch_encode(strings)
    for row, kept, string in zip(ids, mask, strings, strict=True):
        assert row[kept.bool()].tolist() == tokens.prompt_ids(loaded.tokenizer, [string])[0]
        assert kept.tolist() == sorted(kept.tolist()), "padded on the left"
    assert lm.tok_encode("who ? boat") == loaded.tokenizer.encode("who ? boat")
    cut, _ = lm.tok_batch_encode(strings, left_truncate_len=3)
    assert cut.shape == (3, 3) and lm.cut_prompts == 1, "three tokens fit, five do not"
    assert lm._encode_pair("who ?", " boat") == (loaded.tokenizer.encode("who ?"), [loaded.tokenizer.encode("boat")[1]])


def test_lm_eval_decodes_what_the_tokens_spell(loaded, tmp_path):
    loaded.tokenizer.save_pretrained(tmp_path)
    cleaning = AutoTokenizer.from_pretrained(tmp_path, clean_up_tokenization_spaces=True)
    lm = evaluation.PlainLM(pretrained=loaded.model, tokenizer=cleaning)
    assert lm.tok_decode(cleaning.encode("what boat ?")) == "what boat ?"


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_one_side(side):
    ids, mask = evaluation.padded([[1, 2], [3]], 9, side)
    assert ids.tolist() == [[1, 2], [9, 3] if side == "left" else [3, 9]]
    assert mask.tolist() == [[1, 1], [0, 1] if side == "left" else [1, 0]]
