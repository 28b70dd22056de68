"""Saving and loading an adapter: exact round trips, and a refusal that says what is wrong with the files. Files that
earlier versions wrote are written here as those did, and still load."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meft_bench.meft import adapter_folder
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.model import MeftModel, attach, load
from tests.meft.tiny_models import LAYERS, D, fill_values, named, small_config, tiny_llama, tokens

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OLD_WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
VARIANTS = [{}, {"key_experts": False}, {"gate": "none", "frozen_keys": True}, {"reading": "union", "adam": "lazy"}]


def say(model) -> list[int]:
    ids = tokens()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False).tolist()


def saved(folder: Path, **options) -> MeftModel:
    meft = attach(tiny_llama(), small_config(**options), seed=4)
    fill_values(meft, size=1.0)
    meft.save(folder)
    return meft


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_round_trip_is_exact(tmp_path: Path, options: dict) -> None:
    meft = saved(tmp_path / "new" / "folder", **options)
    again = load(tiny_llama(), tmp_path / "new" / "folder")
    assert again.config == meft.config
    for ours, theirs in zip(meft.stores, again.stores, strict=True):
        for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other and torch.equal(a, b) and a.requires_grad is b.requires_grad
    assert say(again.model) == say(meft.model) != say(tiny_llama())


def test_placement_may_be_chosen_anew(tmp_path: Path) -> None:
    meft = saved(tmp_path)
    moved = load(tiny_llama(), tmp_path, placement="device")
    assert isinstance(meft.link, Link) and isinstance(moved.link, Resident)
    assert say(moved.model) == say(meft.model)


@pytest.mark.parametrize("options", [{"device_budget": 10**6}, {"retrieval": "device"}, {"lookahead": 1}], ids=named)
def test_on_the_device_nothing_is_left_to_choose_of_the_way_there(tmp_path: Path, options: dict) -> None:
    meft = saved(tmp_path, **options)
    moved = load(tiny_llama(), tmp_path, placement="device")
    plain = dataclasses.replace(meft.config, device_budget=0, retrieval="auto", lookahead=0)
    assert moved.config == dataclasses.replace(plain, placement="device")
    meft.config = plain
    meft.save(tmp_path)
    assert say(moved.model) == say(load(tiny_llama(), tmp_path).model)
    assert load(tiny_llama(), tmp_path, placement="host").config == plain


def test_saving_again_replaces_both_files(tmp_path: Path) -> None:
    meft = saved(tmp_path)
    fill_values(meft, seed=8)
    meft.save(tmp_path)
    assert torch.equal(load(tiny_llama(), tmp_path).stores[0].values, meft.stores[0].values)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("options", [*VARIANTS, {"moments": "bf16", "device_budget": 1 << 20}], ids=named)
def test_peft_reads_what_the_method_alone_wrote_and_the_other_way_round(tmp_path: Path, options: dict) -> None:
    peft = pytest.importorskip("peft")
    from meft_bench.integrations import peft_method

    meft = saved(tmp_path / "ours", **options)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert theirs.peft_config["default"].to_core() == meft.config
    assert say(theirs) == say(meft.model) != say(tiny_llama())
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = load(tiny_llama(), tmp_path / "theirs")
    assert again.config == meft.config and say(again.model) == say(meft.model)
    assert {f.name for f in dataclasses.fields(peft_method.MeftConfig)} >= set(
        json.loads((tmp_path / "ours" / CONFIG).read_text())
    )


def test_an_adapter_of_some_layers_is_left_to_peft(tmp_path: Path) -> None:
    meft = saved(tmp_path)
    some = {"model.layers.1.mlp": meft.stores[1]}
    adapter_folder.write(tmp_path, meft.config, some)
    model = tiny_llama()
    with pytest.raises(ValueError, match="leaves model.layers.0.mlp out: load it on the base .*; peft.PeftModel"):
        load(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())


# ---- the old format ----


def saved_old(folder: Path, **options) -> MeftModel:
    """What MeftModel.save wrote before 0.1."""
    meft = attach(tiny_llama(), small_config(**options), seed=4)
    fill_values(meft, size=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layers.{i}.{n}": t for i, s in enumerate(meft.stores) for n, t in s.named_parameters()}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / OLD_WEIGHTS)
    about = {"format": 1, "config": meft.config.to_dict(), "hidden_size": D, "layers": LAYERS}
    (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return meft


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_an_old_adapter_still_loads_exactly(tmp_path: Path, options: dict) -> None:
    meft = saved_old(tmp_path, **options)
    again = load(tiny_llama(), tmp_path)
    assert again.config == meft.config and say(again.model) == say(meft.model) != say(tiny_llama())
    assert isinstance(load(tiny_llama(), tmp_path, placement="device").link, Resident)
    again.save(tmp_path)
    assert say(load(tiny_llama(), tmp_path).model) == say(meft.model)


def edit_about(folder: Path, **changes) -> None:
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / OLD_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / OLD_WEIGHTS)


def cut(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])


@pytest.mark.parametrize("gone", [WEIGHTS, CONFIG, OLD_WEIGHTS, ABOUT])
def test_a_missing_file_or_folder_is_named(tmp_path: Path, gone: str) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that MeftModel.save wrote"):
        load(tiny_llama(), tmp_path / "nowhere")
    (saved_old if gone in (OLD_WEIGHTS, ABOUT) else saved)(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {gone} in "):
        load(tiny_llama(), tmp_path)


BROKEN = {
    "a number that is none": (
        lambda f: edit_tensors(f, lambda t: t["layers.1.values"].view(-1)[-1:].fill_(float("nan"))),
        "holds NaN or infinity in the tensor layers.1.values",
    ),
    "a layer missing": (
        lambda f: edit_tensors(f, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n]),
        r"lacks 3 tensors \(layers.1.keys, layers.1.router, layers.1.values\)",
    ),
    "description deep": (lambda f: (f / ABOUT).write_text("[" * 200_000), "not an adapter description"),
    "description large": (lambda f: os.truncate(f / ABOUT, 300 << 20), "not an adapter description"),
    "weights cut short": (lambda f: cut(f, OLD_WEIGHTS, 0.7), "not a whole safetensors file"),
    "weights cut in the header": (lambda f: cut(f, OLD_WEIGHTS, 0.02), "not a whole safetensors file"),
    "weights empty": (lambda f: (f / OLD_WEIGHTS).write_bytes(b""), "not a whole safetensors file"),
    "description cut short": (lambda f: cut(f, ABOUT, 0.5), "not an adapter description"),
    "description not text": (lambda f: (f / ABOUT).write_bytes(b"\xff\xfe\x00"), "not an adapter description"),
    "description a list": (lambda f: (f / ABOUT).write_text("[]"), "not an adapter description"),
    "description without config": (lambda f: (f / ABOUT).write_text("{}"), "not an adapter description: .*config"),
    "config unknown field": (lambda f: edit_about(f, config={"neurons": 24, "rank": 1}), "unknown MEFT option rank"),
    "config impossible": (lambda f: edit_about(f, config={"neurons": 24, "kept": 99}), "set kept to at most 24"),
    "other hidden size": (lambda f: edit_about(f, hidden_size=2 * D), f"layers of width {2 * D}; this model has"),
    "other layer count": (lambda f: edit_about(f, layers=LAYERS + 1), f"trained on {LAYERS + 1} layers"),
    "a later format": (lambda f: edit_about(f, format=2), "format"),
    "tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop("layers.1.values")), "lacks .* layers.1.values"),
    "router missing": (lambda f: edit_tensors(f, lambda t: t.pop("layers.0.router")), "lacks .* layers.0.router"),
    "tensor foreign": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))),
        "a tensor this model does not have: extra",
    ),
    "tensor misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({"layers.0.keys": torch.ones(23, D)})),
        r"layers.0.keys has shape \(23, 16\), the model needs \(24, 16\)",
    ),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_broken_files_are_refused_before_the_model_is_touched(tmp_path: Path, breakage: str) -> None:
    break_it, message = BROKEN[breakage]
    saved_old(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    break_it(tmp_path / "bad")
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path / "bad")
    assert all(p.requires_grad for p in model.parameters())
    load(model, tmp_path / "good")  # still free to take an adapter


@pytest.mark.parametrize("changes", [{"hidden_size": 2 * D}, {"num_hidden_layers": LAYERS + 1}], ids=named)
def test_another_base_is_refused(tmp_path: Path, changes: dict) -> None:
    saved(tmp_path / "new")
    with pytest.raises(ValueError, match="was trained on another model|load it on the base it was trained on"):
        load(tiny_llama(**changes), tmp_path / "new")
    saved_old(tmp_path / "old")
    with pytest.raises(ValueError, match="load it on the base it was trained on"):
        load(tiny_llama(**changes), tmp_path / "old")


NEW_BROKEN = {
    "a number that is none": (
        "keys",
        float("nan"),
        "holds NaN or infinity in the tensor .*keys: the training diverged",
    ),
    "a tensor missing": ("values", None, "lacks values of model.layers.1.mlp"),
}


@pytest.mark.parametrize("breakage", NEW_BROKEN)
def test_broken_files_of_the_new_format_are_refused_before_the_model_is_touched(tmp_path: Path, breakage: str) -> None:
    part, value, message = NEW_BROKEN[breakage]
    saved(tmp_path)
    tensors, name = load_file(tmp_path / WEIGHTS), f"base_model.model.model.layers.1.mlp.meft_store.{part}"
    if value is None:
        del tensors[name]
    else:
        tensors[name][3, 2] = value
    save_file(tensors, tmp_path / WEIGHTS)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path)
    cut(tmp_path, WEIGHTS, 0.7)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())


def test_loading_onto_an_attached_model_is_refused(tmp_path: Path) -> None:
    meft = saved(tmp_path)
    with pytest.raises(ValueError, match="already has a parallel adapter"):
        load(meft.model, tmp_path)
    assert meft.parameters_by_group().keys() == {"keys", "values", "router"}


def test_an_unknown_placement_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="placement='disk' is unknown; choose one of host, device"):
        load(tiny_llama(), tmp_path, placement="disk")
