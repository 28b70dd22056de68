"""A base model's folder from anyone: every tensor the config asks for, or one line; nothing random is filled in."""

import json
import os
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe

from meft_bench import cli
from meft_bench.finetune.base_model import length_limit, load_tokenizer
from meft_bench.finetune.generate import load_adapted
from meft_bench.finetune.settings import TrainSettings
from meft_bench.train import model_files, models
from meft_bench.train.tokens import decoded
from tests.finetune.conftest import write_lines
from tests.limits import within

WEIGHTS = "model.safetensors"
SMALL = {"vocab_size": 843, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FFN = {"intermediate_size": 64, "max_position_embeddings": 64}
FAMILIES = {
    "llama, tied": (hf.LlamaConfig(**SMALL, **FFN, tie_word_embeddings=True), 64),
    "gpt2": (hf.GPT2Config(vocab_size=843, n_embd=32, n_layer=2, n_head=2, n_positions=48), 48),
    "gpt-neox": (hf.GPTNeoXConfig(**SMALL, **FFN), 64),
    "opt": (hf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64), 64),
    "mixtral": (hf.MixtralConfig(**SMALL, **FFN, num_key_value_heads=2, num_local_experts=4), 64),
    "bloom": (hf.BloomConfig(vocab_size=843, hidden_size=32, n_layer=2, n_head=2), models.UNLIMITED),
    "mpt": (hf.MptConfig(vocab_size=843, d_model=32, n_layers=2, n_heads=2, max_seq_len=40), 40),
    "marian": (hf.MarianConfig(vocab_size=843, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
                               encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=64,
                               max_position_embeddings=64, pad_token_id=0), 64),
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded base to be broken."""
    return shutil.copytree(models.embedded_dir(), tmp_path / "base", ignore=shutil.ignore_patterns("__*"))


def folder_of(config, folder):
    """A random model with the embedded base's tokenizer, without a limit of its own."""
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(models.embedded_dir() / "tokenizer.json", folder)
    about = json.loads((models.embedded_dir() / "tokenizer_config.json").read_text())
    about.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit(folder, name: str = "config.json", **changes) -> None:
    about = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**about, **changes}))


def refused(folder, message: str) -> None:
    """Both by its config alone and when it is loaded."""
    for look in (models.model_shape, models.weights_digest, lambda f: models.load_model(f, None, "float32", "cpu")):
        with within(), pytest.raises(ValueError) as error:
            look(folder)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_whole_is_loaded_bit_for_bit(tmp_path, family, capfd):
    config, longest = FAMILIES[family]
    folder = folder_of(config, tmp_path / "model")
    capfd.readouterr()
    loaded = models.load_model(folder, None, "float32", "cpu")
    assert capfd.readouterr().err == "" and loaded.max_length == longest
    held = load_file(folder / WEIGHTS)
    same = [n for n, p in loaded.model.state_dict().items() if n in held and torch.equal(p, held[n])]
    assert len(same) == len(set(held) & set(loaded.model.state_dict())) > 0
    models.model_shape(folder)


def test_shards_are_one_model(tmp_path, base):
    whole = models.load_model(base, None, "float32", "cpu").model
    whole.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    again = models.load_model(tmp_path / "shards", None, "float32", "cpu").model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    shards[1].unlink()
    refused(tmp_path / "shards", f"no safetensors file {shards[1]}")
    edit(tmp_path / "shards", "model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})
    refused(tmp_path / "shards", "must map tensors to files of its own folder")


def test_a_tensor_that_is_missing_is_named(base):
    gone = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(base, lambda t: t.pop(gone))
    refused(base, f"the weight files of the model base lack the tensor {gone}: copy them whole")


def test_a_tied_output_may_be_missing_and_an_untied_one_may_not(base, tmp_path):
    edit_tensors(base, lambda t: t.pop("lm_head.weight"))
    refused(base, "lack the tensor lm_head.weight")
    edit(base, tie_word_embeddings=True)
    model = models.load_model(base, None, "float32", "cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tensor_of_another_shape_is_named(base):
    edit_tensors(base, lambda t: t.update({"lm_head.weight": torch.zeros(5, 128)}))
    refused(base, "lm_head.weight has shape (5, 128) in its files, and its config asks for (843, 128)")


def test_a_tensor_too_many_is_refused_where_it_would_act_and_left_out_where_not(base):
    edit_tensors(base, lambda t: t.update({"v_head.weight": torch.zeros(3)}))
    models.load_model(base, None, "float32", "cpu")
    edit_tensors(base, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}))
    refused(base, "hold the tensor model.layers.0.self_attn.q_proj.bias that its config has no place for")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_none_is_named(base, value, dtype):
    edit_tensors(base, lambda t: t["model.layers.3.mlp.down_proj.weight"].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match="the model base holds NaN or infinity in the tensor model.layers.3.mlp.down_"):
        models.load_model(base, None, dtype, "cpu")


def test_integers_are_no_weights(base):
    edit_tensors(base, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int64)}))
    refused(base, "hold the tensor model.norm.weight (I64) that are not in F64, F32, F16, BF16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 6_000_000}, "far more than its weight files hold"),
        ({"vocab_size": 30_000}, "in its files, and its config asks for (30000, 128)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, and its weight files hold 39 tensors"),
        ({"text_config": {"num_layers": 10**9}}, "num_layers=1000000000, and its weight files hold 39 tensors"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0, and must have at least 1"),
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3, and must have at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0, and must have at least 1"),
        ({"hidden_act": "swoosh"}, "it names 'swoosh', which transformers does not know"),
        ({"model_type": "nothing"}, "cannot read the config of base"),
        ({"model_type": "t5"}, "the config of base makes no decoder"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "needs code that lies beside it (auto_map)"),
        ({"hidden_size": "large"}, "base"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(base, changes, message, tmp_path):
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(base, **changes)
    refused(base, message)
    assert not (tmp_path / "ran").exists()


def test_a_table_of_positions_that_no_file_holds_takes_no_memory(tmp_path):
    folder = folder_of(FAMILIES["gpt2"][0], tmp_path / "model")
    edit(folder, n_positions=10**9)
    refused(folder, "far more than its weight files hold")


def test_a_mask_that_grows_with_the_square_of_a_length_takes_no_memory(tmp_path):
    layers = [[["global", "local"], 1]]
    config = hf.GPTNeoConfig(vocab_size=843, hidden_size=8, num_layers=2, num_heads=2, attention_types=layers,
                             max_position_embeddings=64)  # fmt: skip
    folder = folder_of(config, tmp_path / "model")
    edit_tensors(folder, lambda t: t.update({"transformer.wpe.weight": torch.zeros(40_000, 8)}))
    edit(folder, max_position_embeddings=40_000)
    refused(folder, "computes tables of 3.0 GiB by its config")


def test_a_model_of_countless_small_parts_is_not_made_to_its_end(tmp_path):
    made = []
    with pytest.raises(model_files._TooLarge, match="far more than its weight files hold"):
        with model_files._limit(tmp_path, tensors=9, elements=10**9):
            while True:
                made.append(torch.nn.Linear(1, 1))
    assert len(made) == 4
    torch.nn.Linear(1, 1)  # nothing is counted any more


def test_a_pickle_is_never_read(base):
    (base / WEIGHTS).rename(base / "pytorch_model.bin")
    refused(base, "pytorch_model.bin is a pickle, which can run code and is never read: take the model's safetensors")
    (base / "pytorch_model.bin").unlink()
    refused(base, "only safetensors weights are loaded")


def test_an_adapter_in_the_folder_would_bring_another_base(base):
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/other", "peft_type": "LORA"}')
    refused(base, "holds adapter_config.json, so it is an adapter and no base model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", WEIGHTS])
def test_what_is_no_file_is_not_opened(base, name):
    for kind in ("pipe", "device"):
        (base / name).unlink()
        os.mkfifo(base / name) if kind == "pipe" else (base / name).symlink_to("/dev/zero")
        refused(base, f"{base / name} is a {kind}: model file must be a file")


def test_a_description_of_300_mb_is_not_read(base):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        with open(base / name, "ab") as file:
            kept = file.tell()
            file.truncate(300 << 20)
        refused(base, f"{base / name} has 314,572,800 bytes")
        os.truncate(base / name, kept)
    models.model_shape(base)


def test_a_folder_that_changed_is_looked_at_again(base):
    models.model_shape(base)
    edit_tensors(base, lambda t: t.pop("model.norm.weight"))
    refused(base, "lack the tensor model.norm.weight")


def test_a_change_that_keeps_the_size_is_seen(base):
    models.model_shape(base)
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"silu"', '"sulu"'))
    refused(base, "it names 'sulu'")


def test_a_base_saved_without_its_head_has_no_place_for_more_either(tmp_path):
    """Its names lack the prefix that the language model puts before them; the tied head may be missing."""
    folder = folder_of(FAMILIES["gpt2"][0], tmp_path / "model")
    edit_tensors(folder, lambda t: [t.update({n.removeprefix("transformer."): t.pop(n)}) for n in list(t)])
    models.load_model(folder, None, "float32", "cpu")
    edit_tensors(folder, lambda t: t.update({"h.1.mlp.c_fc.scale": torch.ones(1)}))
    refused(folder, "c_fc.scale that its config has no place for")


def test_a_tokenizer_that_is_missing_or_broken_is_named(base):
    for content in ("", "{}", '{"version":'):
        (base / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="cannot load the tokenizer of .*copy its files there again") as error:
            models.load_model(base, None, "float32", "cpu")
        assert "\n" not in str(error.value)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json in the model folder"):
        models.load_model(base, None, "float32", "cpu")


def test_a_text_that_is_token_0_is_no_padding(tmp_path, capsys):
    """GPT-2 and Llama 3 have no padding token, and "!" is their token 0: a whole model that was saved with "!" for
    padding left it out of every answer and read prompts as other tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Tokenizer(bpe.BPE({letter: i for i, letter in enumerate([*letters, "Ġ!"])}, [("Ġ", "!")]))
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own = hf.PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<end>")
    config = hf.GPT2Config(vocab_size=len(own), n_embd=32, n_layer=2, n_head=2, n_positions=48)
    folder = folder_of(config, tmp_path / "base")
    own.save_pretrained(folder)
    assert own.convert_ids_to_tokens(0) == "!" and own.pad_token is None
    write_lines(tmp_path / "rows.jsonl", [{"prompt": f"say {i} !", "completion": f"{i}!"} for i in range(4)])
    asked = ["--data", str(tmp_path / "rows.jsonl"), "--model", str(folder), "--output", str(tmp_path / "made")]
    assert cli.main(["train", *asked, "--method", "full", "--steps", "1", "--device", "cpu"]) == 0, capsys.readouterr()
    made = load_adapted(tmp_path / "made", device="cpu").tokenizer
    ids = own("yes ! no!")["input_ids"]
    assert made("yes ! no!")["input_ids"] == ids and decoded(made, ids) == "yes ! no!"


def padded_beyond(base) -> None:
    """A [PAD] that was added without a row in the embedding."""
    about = json.loads((base / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    about["added_tokens"].append({"id": 843, "content": "[PAD]", **plain})
    (base / "tokenizer.json").write_text(json.dumps(about))


def test_a_special_token_beyond_the_embedding_is_named(base, capsys):
    padded_beyond(base)
    models.load_model(base, None, "float32", "cpu")  # a token that nobody uses may have no row, as in Gemma 3
    edit(base, "tokenizer_config.json", pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"has \[PAD\] \(843\) beyond the 843 rows of the model's embedding: resize"):
        models.load_model(base, None, "float32", "cpu")
    with pytest.raises(ValueError, match=r"\[PAD\] \(843\) beyond the 843 rows"):
        load_tokenizer(base, None)


# ---- as commands ----


def test_the_commands_answer_in_one_line_and_leave_nothing(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_tensors(base, lambda t: t.pop("model.norm.weight"))
    train = ["train", "--data", "example", "--steps", "1", "--output", "out", "--device", "cpu"]
    run = ["run", "--task", "facts", "--method", "lora", "--option", "rank=2", "--runs", "runs"]
    for command in (train, run):
        assert cli.main([*command, "--model", str(base)]) == 2
        printed = capsys.readouterr()
        assert printed.err == (
            "meft-bench: the weight files of the model base lack the tensor model.norm.weight: copy them whole, or "
            "save the model again\n"
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "runs").exists()


def test_a_bloom_trains_once_its_length_is_named(tmp_path, capsys):
    folder = folder_of(FAMILIES["bloom"][0], tmp_path / "model")
    command = ["train", "--data", "example", "--steps", "8", "--batch-size", "8", "--eval-share", "0",
               "--eval-rows", "2", "--neurons", "16", "--kept", "4", "--device", "cpu",
               "--model", str(folder)]  # fmt: skip
    assert cli.main([*command, "--output", str(tmp_path / "no")]) == 2
    assert "states no longest sequence: give --max-length TOKENS" in capsys.readouterr().err
    assert cli.main([*command, "--max-length", "32", "--output", str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "training.json").read_text())["training"]
    assert about["loss_last"] < about["loss_first"]
    capsys.readouterr()
    assert cli.main(["generate", "--adapter", str(tmp_path / "out"), "--prompt", "who ?", "--device", "cpu"]) == 0


@pytest.mark.parametrize(("stated", "longest"), [(48, 48), (int(1e30), models.UNLIMITED)])
def test_a_tokenizers_limit_stands_in_where_the_model_has_none(tmp_path, stated, longest):
    folder = folder_of(FAMILIES["bloom"][0], tmp_path / "model")
    edit(folder, "tokenizer_config.json", model_max_length=stated)
    assert models.load_model(folder, None, "float32", "cpu").max_length == longest
    settings = TrainSettings(data="example", output="out", max_length=96)
    assert length_limit(folder, settings) == 96, "ALiBi has no end"
    if stated == 48:
        assert length_limit(folder, TrainSettings(data="example", output="out")) == 48


def test_quiet_gives_back_what_it_found():
    import warnings

    from transformers.utils import logging

    def hook(factory, args, kwargs):
        return factory(*args, **kwargs)

    level, before = logging.get_verbosity(), logging.set_tqdm_hook(hook)
    try:
        logging.set_verbosity(logging.INFO)
        with pytest.raises(KeyError), model_files.quiet():
            assert logging.get_verbosity() == logging.CRITICAL
            warnings.warn("soon gone", FutureWarning, stacklevel=1)
            raise KeyError
        assert logging.get_verbosity() == logging.INFO and logging.set_tqdm_hook(None) is hook
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(before)
