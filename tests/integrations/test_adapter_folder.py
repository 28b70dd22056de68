"""An adapter folder from a stranger: refused with one clear error, and before memory is taken for what it claims."""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file, save_file

from meft_bench.integrations import peft_layer
from meft_bench.integrations.peft_layer import MeftLayer
from meft_bench.integrations.peft_method import MeftConfig
from meft_bench.meft import files
from meft_bench.meft.adapter_folder import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, check_folder, host_bytes
from tests.integrations.small import rows_of, same, with_meft
from tests.meft.tiny_models import LAYERS, D, small_config, tiny_llama

KEYS = "base_model.model.model.layers.0.mlp.meft_store.keys"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with_meft().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes) -> None:
    fields = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**fields, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def sparse_file(folder: Path, rows: int) -> None:
    """A whole safetensors file of some hundred bytes on disk that claims rows neurons."""
    edit(folder, r=rows, n_experts=1000, p=1)
    names = [f"base_model.model.model.layers.{i}.mlp.meft_store.{n}" for i in range(LAYERS) for n in ("keys", "values")]
    shapes = {name: (rows, D) for name in names}
    shapes |= {f"base_model.model.model.layers.{i}.mlp.meft_store.router": (1000, D) for i in range(LAYERS)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS_NAME, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_NAME), folder / PICKLE_NAME)
    (folder / WEIGHTS_NAME).unlink()


def linked(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def cut(folder: Path, share: float) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[: int(share * len(whole))])


BROKEN = {
    "weights linked": (lambda f: linked(f, WEIGHTS_NAME), "is a symbolic link"),
    "description linked": (lambda f: linked(f, CONFIG_NAME), "is a symbolic link"),
    "another file linked": (lambda f: (f / "notes").symlink_to("/etc/hostname"), "notes is a symbolic link"),
    "a pickle": (pickled, f"{PICKLE_NAME} is a pickle and is never read"),
    "weights missing": (lambda f: (f / WEIGHTS_NAME).unlink(), f"no {WEIGHTS_NAME} in"),
    "weights cut short": (lambda f: cut(f, 0.7), "not a whole safetensors file"),
    "weights empty": (lambda f: (f / WEIGHTS_NAME).write_bytes(b""), "not a whole safetensors file"),
    "a huge r": (lambda f: edit(f, r=10**9, n_experts=10**6), r"has shape \(24, 16\), not \(1000000000, 16\)"),
    "an absurd r": (lambda f: edit(f, r=10**30), "is not a size"),
    "a file with holes": (lambda f: sparse_file(f, 10**9), "GiB of host memory for its rows"),
    "r a text": (lambda f: edit(f, r="24"), "must be a whole number"),
    "r a list": (lambda f: edit(f, r=[24]), "must be a whole number"),
    "r missing": (lambda f: edit(f, r=None), "needs r"),
    "an unknown choice": (lambda f: edit(f, gate="eval"), "gate='eval' is unknown"),
    "a pattern": (lambda f: edit(f, target_modules="(a+)+$"), "is a pattern"),
    "a huge description": (lambda f: edit(f, note="x" * (1 << 21)), "it is larger than"),
    "another width": (lambda f: edit_tensors(f, lambda t: t.update({KEYS: torch.ones(24, 15)})), "has shape"),
    "a vector": (lambda f: edit_tensors(f, lambda t: t.update({KEYS: torch.ones(24)})), "has shape"),
    "a scalar": (lambda f: edit_tensors(f, lambda t: t.update({KEYS: torch.tensor(1.0)})), "has shape"),
    "another dtype": (lambda f: edit_tensors(f, lambda t: t.update({KEYS: t[KEYS].half()})), "keys is F16, .* are F32"),
    "keys missing": (lambda f: edit_tensors(f, lambda t: t.pop(KEYS)), "lacks keys of model.layers.0.mlp"),
    "a layer missing": (
        lambda f: edit_tensors(f, lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name]),
        r"lacks 3 tensors \(model.layers.0.mlp.keys, model.layers.0.mlp.router, model.layers.0.mlp.values\)",
    ),
    "a layer not named": (
        lambda f: edit(f, target_modules=["model.layers.0.mlp"]),
        "holds rows of model.layers.1.mlp, which target_modules does not name",
    ),
    "NaN": (
        lambda f: edit_tensors(f, lambda t: t[KEYS].view(-1)[-1:].fill_(float("nan"))),
        f"holds NaN or infinity in the tensor {KEYS}",
    ),
    "infinity": (
        lambda f: edit_tensors(f, lambda t: t[KEYS].view(-1)[:1].fill_(float("-inf"))),
        f"holds NaN or infinity in the tensor {KEYS}",
    ),
    "modules a number": (lambda f: edit(f, target_modules=3), "target_modules is int, and must be a list of names"),
    "modules no names": (lambda f: edit(f, target_modules=[3]), "target_modules is list, and must be a list of names"),
    "a seed of text": (lambda f: edit(f, seed="x"), "seed is str, and must be int"),
    "a std without end": (lambda f: edit(f, key_std=float("inf")), "key_std"),
    "no tensor": (lambda f: save_file({}, f / WEIGHTS_NAME), "holds no tensor"),
    "a foreign tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)})),
        "not a MEFT adapter's: base_model.model.lm_head.weight",
    ),
    "a router too many": (lambda f: edit(f, key_experts=False), "holds router of .* which this configuration does not"),
    "a layer too many": (
        lambda f: edit_tensors(f, lambda t: t.update({k.replace("s.1.", "s.9."): v + 0 for k, v in t.items()})),
        "was trained on another model: it adapts model.layers.9.mlp",
    ),
}  # fmt: skip


@pytest.fixture
def nothing_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store may be made in this test."""

    def refuse(*args, **kwargs):
        pytest.fail("memory was taken before the folder was refused")

    monkeypatch.setattr(peft_layer.HostStore, "__init__", refuse)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_before_memory_is_taken(folder: Path, case: str, request) -> None:
    break_it, message = BROKEN[case]
    break_it(folder)
    model = tiny_llama()
    request.getfixturevalue("nothing_allocated")
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert not any(isinstance(module, MeftLayer) for module in model.modules())


@pytest.mark.parametrize("case", BROKEN)
def test_the_other_ways_of_loading_refuse_it_too(folder: Path, case: str) -> None:
    """A second adapter by peft, and transformers' own loading where it reads the description at all."""
    break_it, message = BROKEN[case]
    break_it(folder)
    model = with_meft()
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"] or case in ("a layer too many", "a file with holes")
    with pytest.raises(ValueError, match=message):
        tiny_llama().load_adapter(str(folder))


@pytest.mark.parametrize("changes", [{"hidden_size": 2 * D}, {"num_hidden_layers": LAYERS - 1}])
def test_another_base_is_refused(folder: Path, changes: dict, nothing_allocated: None) -> None:
    with pytest.raises(ValueError, match="was trained on another model"):
        PeftModel.from_pretrained(tiny_llama(**changes), folder)


def test_a_description_that_python_cannot_read_is_refused(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text('{"a":' * 9000 + "1" + "}" * 9000)
    with pytest.raises(ValueError, match="does not describe a MEFT adapter: .* nests too deep"):
        check_folder(folder)
    (folder / CONFIG_NAME).unlink()
    os.mkfifo(folder / CONFIG_NAME)
    with pytest.raises(ValueError, match=f"no {CONFIG_NAME} in"):
        check_folder(folder)


def test_an_adapter_on_some_layers_needs_those_alone(tmp_path: Path) -> None:
    made = peft.get_peft_model(tiny_llama(), MeftConfig(r=24, k=5, target_modules=["layers.1.mlp"]))
    made.save_pretrained(tmp_path)
    assert same(rows_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), rows_of(made))
    edit(tmp_path, target_modules=None)
    with pytest.raises(ValueError, match="lacks .*model.layers.0.mlp.keys"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_large_rows_are_looked_at_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken number is found in whichever piece of the file it lies."""
    monkeypatch.setattr(files, "_CHUNK", 5 * D)
    with_meft().save_pretrained(tmp_path)
    whole = load_file(tmp_path / WEIGHTS_NAME)[KEYS]
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for row in (0, 4, 5, 22, len(whole) - 1):
        broken = whole.clone()
        broken[row, 3] = torch.nan
        edit_tensors(tmp_path, lambda t, broken=broken: t.update({KEYS: broken}))
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_the_hubs_own_cache_may_link(folder: Path, tmp_path: Path) -> None:
    """snapshots/<revision>/<name> -> ../../blobs/<digest>, and nowhere else."""
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((CONFIG_NAME, WEIGHTS_NAME)):
        shutil.copy(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert same(rows_of(PeftModel.from_pretrained(tiny_llama(), snapshot)), rows_of(with_meft()))
    (snapshot / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="README.md is a symbolic link"):
        check_folder(snapshot)


def test_a_repository_of_the_hub_is_checked_as_a_folder_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, name: str, **options) -> str:
        assert repository == "someone/adapter" and options["subfolder"] == "deep"
        if not (folder / name).exists():
            raise EntryNotFoundError(f"404 for {name}")
        return str(folder / name)

    for module in ("peft.config", "meft_bench.integrations.peft_method"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    config = MeftConfig.from_pretrained("someone/adapter", subfolder="deep")
    assert config.layout.widths == {f"model.layers.{i}.mlp": D for i in range(LAYERS)} and config.r == 24
    edit(folder, r=12, k=4)
    with pytest.raises(ValueError, match=r"has shape \(24, 16\), not \(12, 16\)"):
        MeftConfig.from_pretrained("someone/adapter", subfolder="deep")
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors in someone/adapter .*pickles are never read"):
        MeftConfig.from_pretrained("someone/adapter", subfolder="deep")


def test_adapters_of_other_methods_load_as_before(tmp_path: Path) -> None:
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_host_bytes_is_the_sum_of_what_is_made() -> None:
    rows = sum(t.nbytes for t in rows_of(with_meft()))
    assert host_bytes(small_config(), D, LAYERS, training=False) == rows
    assert host_bytes(small_config(), D, LAYERS, training=True) == 4 * rows
    assert host_bytes(MeftConfig(r=24, k=5, key_experts=False).to_core(), D, LAYERS, False) == 2 * 24 * D * LAYERS * 4
