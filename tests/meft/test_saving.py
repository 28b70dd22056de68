"""Saving and loading an adapter: exact round trips, and a refusal that says what is wrong with the files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meft_bench.meft.link import Link, Resident
from meft_bench.meft.model import MeftModel, attach, load
from tests.meft.tiny_models import LAYERS, D, fill_values, named, small_config, tiny_llama, tokens

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
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


def test_saving_again_replaces_both_files(tmp_path: Path) -> None:
    meft = saved(tmp_path)
    fill_values(meft, seed=8)
    meft.save(tmp_path)
    assert torch.equal(load(tiny_llama(), tmp_path).stores[0].values, meft.stores[0].values)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ABOUT, WEIGHTS]


def edit_about(folder: Path, **changes) -> None:
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def cut(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])


@pytest.mark.parametrize("gone", [WEIGHTS, ABOUT])
def test_a_missing_file_or_folder_is_named(tmp_path: Path, gone: str) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that MeftModel.save wrote"):
        load(tiny_llama(), tmp_path / "nowhere")
    saved(tmp_path)
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
    "weights cut short": (lambda f: cut(f, WEIGHTS, 0.7), "not a whole safetensors file"),
    "weights cut in the header": (lambda f: cut(f, WEIGHTS, 0.02), "not a whole safetensors file"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "not a whole safetensors file"),
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
    saved(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    break_it(tmp_path / "bad")
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path / "bad")
    assert all(p.requires_grad for p in model.parameters())
    load(model, tmp_path / "good")  # still free to take an adapter


@pytest.mark.parametrize("changes", [{"hidden_size": 2 * D}, {"num_hidden_layers": LAYERS + 1}], ids=named)
def test_another_base_is_refused(tmp_path: Path, changes: dict) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="load it on the base it was trained on"):
        load(tiny_llama(**changes), tmp_path)


def test_loading_onto_an_attached_model_is_refused(tmp_path: Path) -> None:
    meft = saved(tmp_path)
    with pytest.raises(ValueError, match="already has a parallel adapter"):
        load(meft.model, tmp_path)
    assert meft.parameters_by_group().keys() == {"keys", "values", "router"}


def test_an_unknown_placement_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="placement='disk' is unknown; choose one of host, device"):
        load(tiny_llama(), tmp_path, placement="disk")
