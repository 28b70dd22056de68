"""A damaged checkpoint never reaches the model: it is named, and the one before it is taken where there is one."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from meft_bench.meft.files import read_safetensors
from meft_bench.train import checkpoints, loop
from tests.methods import short_spec

from .test_loop import prepare, trained

STEPS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder with the checkpoint of step 4 of 6, and the losses of the whole run."""
    folder = tmp_path_factory.mktemp("whole")
    spec = short_spec("meft", steps=STEPS)
    _, losses = trained(spec, folder, every_steps=2)
    return folder, losses


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "checkpoints")


def tensors_changed(change):
    def damage(path):
        tensors = read_safetensors(path / "state.safetensors")
        change(tensors)
        save_file(tensors, path / "state.safetensors")

    return damage


def progress_changed(change):
    def damage(path):
        about = json.loads((path / "progress.json").read_text())
        change(about)
        (path / "progress.json").write_text(json.dumps(about))

    return damage


def _without(start):
    def change(tensors):
        for name in [n for n in tensors if n.startswith(start)]:
            del tensors[name]

    return change


def _moments_of_another_model(path):
    """The list and the digest say so too."""
    tensors_changed(lambda t: t.update({"moments.0.exp_avg": torch.zeros(7)}))(path)

    def agree(about):
        about["tensors"]["moments.0.exp_avg"] = [7]
        about["state_sha256"] = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()

    progress_changed(agree)(path)


def _flip_a_bit(path):
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "state.safetensors").write_bytes(content)


DAMAGES = {
    "no moments": (tensors_changed(_without("moments.")), r"lacks \d+ tensors \(moments.0.exp_avg, "),
    "one moment less": (tensors_changed(_without("moments.1.exp_avg_sq")), "lacks the tensor moments.1.exp_avg_sq"),
    "no parameter": (tensors_changed(_without("parameters.0")), "lacks the tensor parameters.0"),
    "no random state": (tensors_changed(_without("random_state")), "lacks the tensor random_state"),
    "another shape": (
        tensors_changed(lambda t: t.update({"parameters.0": torch.zeros(3, 2)})),
        r"parameters.0 has shape \(3, 2\), the model needs",
    ),
    "a moment of another shape": (
        tensors_changed(lambda t: t.update({"moments.0.exp_avg": torch.zeros(7)})),
        r"moments.0.exp_avg has shape \(7,\), the model needs",
    ),
    "moments of another model": (_moments_of_another_model, r"moments.0.exp_avg has shape \(7,\), the model needs"),
    "one tensor more": (tensors_changed(lambda t: t.update(more=torch.zeros(1))), "does not have: more"),
    "other random state": (
        tensors_changed(lambda t: t.update(random_state=t["random_state"].float())),
        "no state of torch's generator",
    ),
    "one bit": (_flip_a_bit, "is not what was written there"),
    "cut short": (
        lambda p: (p / "state.safetensors").write_bytes((p / "state.safetensors").read_bytes()[:5000]),
        "not a whole safetensors file",
    ),
    "no state": (lambda p: (p / "state.safetensors").unlink(), "no safetensors file"),
    "no progress": (lambda p: (p / "progress.json").unlink(), "progress.json is broken"),
    "progress cut short": (lambda p: (p / "progress.json").write_text('{"step": 4, '), "progress.json is broken"),
    "progress of another kind": (lambda p: (p / "progress.json").write_text("[4]"), "progress.json is broken"),
    "step 9999": (progress_changed(lambda a: a.update(step=9999)), "says step 9999, in step-0000004 of a run of 6"),
    "step 2": (progress_changed(lambda a: a.update(step=2)), "says step 2, in step-0000004"),
    "a shorter log": (progress_changed(lambda a: a["log"]["loss"].pop()), "not one number for each of 4 steps"),
    "a log of words": (
        progress_changed(lambda a: a["log"].update(loss=["a"] * 4)),
        "not one number for each of 4 steps",
    ),
    "fewer layers counted": (progress_changed(lambda a: a["usage"].pop()), "counts rows of . layers, the model has"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(folder, damage):
    change, message = DAMAGES[damage]
    change(folder / "step-0000004")
    attached, _, _ = prepare(short_spec("meft", steps=STEPS))
    optimizer = attached.make_optimizer(lr=1e-3)
    before = [p.detach().clone() for p in attached.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.resume(folder, attached, optimizer, STEPS)
    assert "\n" not in str(error.value) and f"delete {folder} to start the run again" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, attached.parameters(), strict=True)), "nothing was loaded"


def test_a_checkpoint_beyond_the_run_is_refused(folder):
    attached, _, _ = prepare(short_spec("meft", steps=3))
    with pytest.raises(ValueError, match="says step 4, in step-0000004 of a run of 3 steps"):
        checkpoints.resume(folder, attached, attached.make_optimizer(lr=1e-3), 3)


def test_the_one_before_a_damaged_one_is_taken_and_named(whole, folder, capsys):
    # As after a kill between the new one's rename and the old one's removal, and damage to the new one.
    spec = short_spec("meft", steps=STEPS)
    older = folder.parent / "older"
    real = checkpoints.save_checkpoint
    attached, examples, pad = prepare(spec)
    first = short_spec("meft", steps=STEPS)
    optimizer = attached.make_optimizer(lr=spec.learning_rate, weight_decay=0.0)
    torch.manual_seed(0)
    log = loop.StepLog()
    for step in range(2):
        rows = [examples[i] for i in loop.batch_indices(step, first.batch_size, len(examples), first.seed)]
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * loop.learning_rate_scale(step, STEPS, spec.warmup_share)
        loop.logged_step(attached, optimizer, loop.batch_of(attached.model, rows, 1, pad), spec.clip, log)
    real(older, 2, attached, optimizer, log)
    shutil.move(older / "step-0000002", folder / "step-0000002")
    _flip_a_bit(folder / "step-0000004")
    (folder / "step-notes").mkdir()
    _, losses = trained(spec, folder, every_steps=2)
    assert losses == whole[1], "gone on from step 2, bit for bit"
    said = capsys.readouterr().out
    assert "is not what was written there (its digest differs); going on from step-0000002\n" in said
    assert sorted(p.name for p in folder.iterdir()) == ["step-0000004", "step-notes"]
    assert checkpoints.resume(folder, *_fresh(spec), STEPS)[0] == 4, "the damaged one was written anew"


def _fresh(spec):
    attached, _, _ = prepare(spec)
    return attached, attached.make_optimizer(lr=1e-3)


def test_the_newest_is_by_number(tmp_path):
    for name in ("step-9999999", "step-10000000", "writing"):
        (tmp_path / name).mkdir()
    assert checkpoints.newest_checkpoint(tmp_path).name == "step-10000000"
    assert checkpoints.newest_checkpoint(tmp_path / "none") is None


def test_all_of_the_new_one_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    spec = short_spec("parallel_adapter", steps=STEPS)
    attached, optimizer = _fresh(spec)
    log = loop.StepLog(**{name: [0.0] * 1 for name in loop.StepLog().__dict__})
    checkpoints.save_checkpoint(tmp_path, 1, attached, optimizer, log)
    events = []
    real_tree, real_sync, real_remove = checkpoints.sync_tree, checkpoints.sync, shutil.rmtree

    def tree(folder):
        names = sorted(f.name for f in folder.iterdir())
        events.append(("content", folder.name, names))
        real_tree(folder)

    def names(folder):
        events.append(("names", sorted(f.name for f in folder.iterdir())))
        real_sync(folder)

    def remove(folder, **rest):
        if folder.exists():
            events.append(("gone", folder.name))
        real_remove(folder, **rest)

    monkeypatch.setattr(checkpoints, "sync_tree", tree)
    monkeypatch.setattr(checkpoints, "sync", names)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", remove)
    checkpoints.save_checkpoint(tmp_path, 2, attached, optimizer, log)
    assert events == [
        ("content", "writing", ["progress.json", "state.safetensors"]),
        ("names", ["step-0000001", "step-0000002"]),
        ("gone", "step-0000001"),
    ]


def test_a_checkpoint_that_cannot_be_written_leaves_its_space(tmp_path, monkeypatch):
    attached, optimizer = _fresh(short_spec("parallel_adapter"))
    log = loop.StepLog()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError):
        checkpoints.save_checkpoint(tmp_path, 1, attached, optimizer, log)
    assert not list(tmp_path.iterdir())


def test_what_was_counted_goes_on_from_the_checkpoint(folder):
    about = json.loads((folder / "step-0000004" / "progress.json").read_text())
    attached, optimizer = _fresh(short_spec("meft", steps=STEPS))
    checkpoints.resume(folder, attached, optimizer, STEPS)
    assert about["link"] and {(way, what): n for way, what, n in about["link"]} == dict(attached.link.bytes)
    assert [[list(pair) for pair in layer] for layer in attached.usage] == about["usage"] and about["usage"][0]


def test_a_run_on_the_cpu_leaves_a_gpu_alone(tmp_path, monkeypatch):
    """Asking CUDA for its random state starts it: a GPU without room ended a run that does not use it."""

    def full(*given):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", full)
    monkeypatch.setattr(torch.cuda, "set_rng_state", full)
    spec = short_spec("lora", steps=2)
    trained(spec, tmp_path, every_steps=1)
    path = checkpoints.newest_checkpoint(tmp_path)
    tensors = read_safetensors(path / "state.safetensors")
    assert "random_state_cuda" not in tensors
    tensors["random_state_cuda"] = torch.zeros(16, dtype=torch.uint8)  # as older ones have it
    save_file(tensors, path / "state.safetensors")
    about = json.loads((path / "progress.json").read_text())
    about["tensors"]["random_state_cuda"] = [16]
    about["state_sha256"] = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    (path / "progress.json").write_text(json.dumps(about))
    trained(spec, tmp_path, every_steps=1)
