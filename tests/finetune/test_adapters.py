"""Every method's adapter comes back exactly, and a stranger's folder is data only."""

import json
import shutil
import struct

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from meft_bench.finetune import adapters
from meft_bench.finetune.base_model import load_tokenizer
from meft_bench.finetune.generate import load_adapted
from meft_bench.finetune.train import train
from meft_bench.meft.files import read_safetensors
from meft_bench.train import models

from .conftest import job

METHODS = (
    "meft",
    "lora",
    "parallel_adapter",
    "parallel_adapter_offload",
    "parallel_adapter_shrunk",
    "adapter_h",
    "product_keys",
    "shira",
    "lomo",
    "adalomo",
    "galore",
    "lsp_offload",
    "full",
)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 30, 41]])).logits


def base_model():
    return models.load_model("embedded", None, "float32", "cpu").model


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a saved adapter to be broken."""

    def make(method: str):
        return shutil.copytree(saved(method), tmp_path / method)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_is_loaded(tmp_path, monkeypatch, method):
    kept = {}

    def spy(folder, attached, *rest):
        attached.model.eval()
        kept["logits"] = logits(attached.model)
        save(folder, attached, *rest)

    save = adapters.save
    monkeypatch.setattr(adapters, "save", spy)
    folder = train(job(tmp_path / "out", method=method), say=lambda line: None)
    loaded = load_adapted(folder, device="cpu").model
    assert torch.equal(logits(loaded), kept["logits"])
    assert not torch.allclose(kept["logits"], logits(base_model()), atol=1e-4), "training must have changed something"


def test_methods_of_pefts_format_are_read_by_peft(saved):
    from peft import PeftModel

    import meft_bench.integrations.peft_method  # noqa: F401

    for method in ("meft", "lora", "shira"):
        theirs = PeftModel.from_pretrained(base_model(), saved(method)).eval()
        assert torch.equal(logits(theirs), logits(load_adapted(saved(method), device="cpu").model))


def test_rows_never_pass_through_a_gpu(saved, monkeypatch):
    """peft reads a file into the memory of the GPU that it finds, where MEFT's rows need not have room."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "meta")
    monkeypatch.setattr("peft.utils.save_and_load.infer_device", lambda: "meta")
    assert logits(load_adapted(saved("meft"), device="cpu").model).isfinite().all()
    assert 'torch_device="cpu")' in (saved("meft") / "README.md").read_text(encoding="utf-8")


def test_a_link_and_a_foreign_file_are_refused(copied, tmp_path):
    folder = copied("parallel_adapter")
    (tmp_path / "secret").write_text("{}")
    (folder / "extra.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="extra.json is a link"):
        load_adapted(folder)
    (folder / "extra.json").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="adapter_model.bin does not belong in an adapter folder: only safetensors"):
        load_adapted(folder)


def test_further_chat_templates_belong_to_a_whole_model(copied, tmp_path):
    folder = copied("full")
    tokenizer = load_tokenizer("embedded", None)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    more = folder / "additional_chat_templates"
    assert [f.name for f in more.iterdir()] == ["tool_use.jinja"]
    load_adapted(folder, device="cpu")
    (more / "broken.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=r"broken\.jinja"):
        load_adapted(folder)
    (more / "broken.jinja").unlink()
    for name in ("extra.json", "deep/a.jinja"):
        (more / name).parent.mkdir(exist_ok=True)
        (more / name).write_text("{}")
        with pytest.raises(ValueError, match="does not belong in an adapter folder"):
            load_adapted(folder)
        (more / name).unlink()
    (more / "deep").rmdir()
    (more / "link.jinja").symlink_to(folder / "config.json")
    with pytest.raises(ValueError, match=r"link\.jinja is a link"):
        load_adapted(folder)


@pytest.mark.parametrize("method", ["meft", "lora", "parallel_adapter"])
def test_missing_and_truncated_weights_are_refused(copied, method):
    folder = copied(method)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{file.name} is not a whole safetensors file"):
        load_adapted(folder, device="cpu")
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"no {file.name} in"):
        load_adapted(folder, device="cpu")


def _rewrite(file, change) -> None:
    """Change the header of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _swap_shape(header) -> None:
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = header[name]["shape"][::-1]


def _grow(header) -> None:
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = [10**9, 10**9]


def _rename(header) -> None:
    name = next(n for n in header if n != "__metadata__")
    header["model.other"] = header.pop(name)


@pytest.mark.parametrize("method", ["meft", "lora", "parallel_adapter"])
@pytest.mark.parametrize("change", [_swap_shape, _grow, _rename])
def test_headers_that_claim_something_else_are_refused(copied, method, change):
    folder = copied(method)
    (file,) = folder.glob("*.safetensors")
    _rewrite(file, change)
    with pytest.raises(ValueError, match=f"{file.name}|holds the ranks") as error:
        load_adapted(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "file", "key"),
    [
        ("parallel_adapter", "adapter.json", "neurons"),
        ("meft", "adapter_config.json", "r"),
        ("lora", "adapter_config.json", "r"),
    ],
)
def test_huge_claimed_sizes_take_no_memory(copied, method, file, key):
    folder = copied(method)
    about = json.loads((folder / file).read_text())
    (about["options"] if file == "adapter.json" else about)[key] = 10**8
    if method == "meft":
        about["n_experts"] = 10**7
    (folder / file).write_text(json.dumps(about))
    # 10^8 rows of 128 would be 51 GB a matrix: allocating them would fail in another way.
    with pytest.raises(ValueError, match="claim|has shape|holds the ranks"):
        load_adapted(folder, device="cpu")


def test_lora_settings_beyond_plain_ones_are_refused(copied):
    folder = copied("lora")
    about = json.loads((folder / "adapter_config.json").read_text())
    about["megatron_core"], about["megatron_config"] = "os", {"a": 1}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="sets megatron_con?.*which is not read here"):
        load_adapted(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(format=9), "its format is 9"),
        (lambda a: a.pop("base"), "is not an adapter description"),
        (lambda a: a["base"].pop("fingerprint"), "is not an adapter description"),
        (lambda a: a.update(method="magic"), "unknown method 'magic'"),
        (lambda a: a["options"].update(colour=1), "parallel_adapter has no option colour"),
        (lambda a: (a.pop("method"), a.update(config={})), "read it with meft_bench.meft.model.load"),
        (lambda a: a["base"]["shape"].update(layers=5), "has 4 of 128"),
        (lambda a: a["base"].update(fingerprint="0" * 12), "with the weights 000000000000; this base has"),
        (lambda a: a["base"].update(source="./gone"), "the adapter's base ./gone is not here: name it with --model"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(copied, change, message):
    folder = copied("parallel_adapter")
    about = json.loads((folder / "adapter.json").read_text())
    change(about)
    (folder / "adapter.json").write_text(json.dumps(about))
    with pytest.raises(ValueError) as error:
        load_adapted(folder, device="cpu")
    assert message in str(error.value)


def test_another_base_is_refused(saved, tmp_path):
    other = base_model()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    for file in models.embedded_dir().glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on embedded with the weights .*: load it on the base"):
        load_adapted(saved("meft"), model=str(tmp_path / "other"), device="cpu")


def test_the_fingerprint_is_that_of_the_weights_whatever_their_dtype():
    half = models.load_model("embedded", None, "bfloat16", "cpu").model
    assert adapters.fingerprint(half) == adapters.fingerprint(base_model())


def test_no_folder_and_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        load_adapted(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no adapter.json in"):
        load_adapted(tmp_path)


def test_an_unfinished_run_is_told_from_an_adapter(tmp_path):
    (tmp_path / "out.partial" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out.partial" / "run.json").write_text("{}")
    for name in ("out", "out.partial"):
        with pytest.raises(FileNotFoundError, match=r"out.partial is an unfinished run: .* again, with --resume"):
            load_adapted(tmp_path / name)


def test_the_header_is_what_the_file_holds(saved):
    file = saved("parallel_adapter") / "adapter.safetensors"
    found = {name: tuple(t.shape) for name, t in read_safetensors(file).items()}
    assert {name: about.shape for name, about in adapters.read_header(file).items()} == found
    shapes = json.loads((saved("parallel_adapter") / "adapter.json").read_text())["shapes"]
    assert {name: tuple(shape) for name, shape in shapes.items()} == found


@pytest.mark.parametrize("method", ["meft", "lora", "adapter_h"])
def test_a_mistral_with_grouped_queries(tmp_path, method):
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=843, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    for file in models.embedded_dir().glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    settings = job(tmp_path / "out", model=str(tmp_path / "base"), method=method, steps=12)
    folder = train(settings, say=lambda line: None)
    record = json.loads((folder / "training.json").read_text())
    loaded = load_adapted(folder, device="cpu")
    assert loaded.max_length == 32 and torch.isfinite(logits(loaded.model)).all()
    assert record["training"]["loss_last"] < record["training"]["loss_first"]
