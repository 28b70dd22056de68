"""A job trains as the harness does, survives being killed and a full disk, and leaves whole folders only."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from meft_bench.finetune import data, workplace
from meft_bench.finetune import train as job_module
from meft_bench.finetune.base_model import load_tokenizer
from meft_bench.finetune.plan import Plan
from meft_bench.finetune.row_files import EXAMPLE, file_digest
from meft_bench.finetune.settings import TrainSettings
from meft_bench.finetune.train import fit, schedule, train
from meft_bench.meft.files import read_safetensors
from meft_bench.train import checkpoints as checkpoints_module
from meft_bench.train import loop, models
from meft_bench.train.methods import Attached, find_method, parse_options
from tests.small_disk import NEEDS_ROOT, small_disk

from .conftest import facts, job, write_lines

PLAN = Plan(options={}, accumulation=2, learning_rate=5e-3, steps=6, dtype="float32", device="cpu", trainable={},
            device_bytes={}, host_bytes={}, reasons=[])  # fmt: skip


def quiet(line: str) -> None:
    """Say nothing."""


def weights(folder) -> dict[str, torch.Tensor]:
    return read_safetensors(next(folder.glob("adapter*.safetensors")))


def test_the_loop_is_the_harness_loop(tmp_path, tokenizer):
    settings = job(tmp_path / "out", steps=6, method="meft", checkpoint_steps=2)
    rows = data.prepare(settings, tokenizer, 64, tmp_path / "rows")
    options = parse_options("meft", {"neurons": 64, "kept": 8})
    spec, found = schedule(settings, PLAN), []
    for train_by in (
        lambda a: fit(a, rows.train, spec, 0, tmp_path / "checkpoints", settings),
        lambda a: loop.train(a, spec, loop.shuffled(a, list(rows.train), spec, 0))[1],
    ):
        attached = find_method("meft").attach(models.load_model("embedded", None, "float32", "cpu").model, options, 0)
        log = train_by(attached)
        found.append((log.loss, [p.detach().clone() for p in attached.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_run_leaves_the_adapter_its_card_and_nothing_else(saved):
    folder = saved("meft")
    assert not folder.with_name("meft.partial").exists()
    record = json.loads((folder / "training.json").read_text())
    assert record["scores"]["held_out"]["rows"] == 8 and 0 <= record["scores"]["trained"]["contains"] <= 1
    assert record["training"]["steps"] == 4 and record["data"]["digest"] == file_digest(EXAMPLE)
    card = (folder / "README.md").read_text()
    for fact in (
        f"{sum(record['plan']['trainable'].values()):,}",
        record["data"]["digest"],
        record["base"]["fingerprint"],
        f"{record['training']['loss_last']:.4f}",
        f"{record['scores']['held_out']['loss']:.4f}",
    ):
        assert fact in card


def test_the_scores_are_the_models(tmp_path, tokenizer):
    from meft_bench.finetune import scores

    settings = job(tmp_path / "out", eval_rows=12)
    rows = data.prepare(settings, tokenizer, 64, tmp_path / "rows")
    model = models.load_model("embedded", None, "float32", "cpu").model
    whole, found = (scores.score(model, tokenizer, rows, settings, 64, batch)["held_out"] for batch in (16, 1))
    assert whole == pytest.approx(found, rel=1e-5)
    total = count = 0.0
    for example in rows.held_out:  # one by one, without padding
        logits = model(torch.tensor([example.ids])).logits[0, :-1].log_softmax(-1)
        wanted = torch.tensor(example.ids[1:])
        total -= logits[torch.arange(len(wanted)), wanted][example.prompt_length - 1 :].sum().item()
        count += len(example.ids) - example.prompt_length
    assert found["tokens"] == count and found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2.718281828 ** (total / count), rel=1e-4)


def test_no_more_rows_are_scored_at_once_than_trained(tmp_path, monkeypatch):
    seen, load = [], models.load_model

    def watched(*args, **kwargs):
        loaded = load(*args, **kwargs)
        loaded.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        return loaded

    monkeypatch.setattr(models, "load_model", watched)
    train(job(tmp_path / "out", steps=1, batch_size=4, accumulation=2), say=quiet)
    assert set(seen) == {2} and len(seen) > 2 + 2 * 8 // 2


def _train_and_die(settings: TrainSettings) -> None:
    """Kill -9 this process in the middle of writing the checkpoint of step 4."""
    torch.set_num_threads(1)
    save, written = loop.save_checkpoint, checkpoints_module.save_file

    def save_then_die(folder, step, *rest):
        def die(tensors, path):
            written(tensors, path)
            with open(path, "r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoints_module.save_file = die if step == 4 else written
        save(folder, step, *rest)

    loop.save_checkpoint = save_then_die
    train(settings, say=quiet)


@pytest.mark.parametrize("method", ["meft", "lora", "parallel_adapter"])
def test_killed_while_writing_a_checkpoint_it_resumes_bit_for_bit(tmp_path, method):
    fields = {"method": method, "steps": 6, "checkpoint_steps": 2}
    straight = train(job(tmp_path / "straight", **fields), say=quiet)
    settings = job(tmp_path / "killed", **fields)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meft_bench.finetune.train", "meft_bench.baselines.lora"])
    victim = context.Process(target=_train_and_die, args=(settings,))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL and not settings.destination.exists()
    checkpoints = tmp_path / "killed.partial" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-0000002", "writing"]
    with pytest.raises(ValueError, match="holds an unfinished run: go on with --resume"):
        train(settings, say=quiet)
    resumed = train(settings, resume=True, say=quiet)
    one, two = weights(straight), weights(resumed)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert not (tmp_path / "killed.partial").exists()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    settings = job(tmp_path / "out", steps=4, checkpoint_steps=1)
    written = checkpoints_module.save_file

    def full(tensors, path):
        if (tmp_path / "out.partial" / "checkpoints" / "step-0000002").is_dir():
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, path)

    monkeypatch.setattr(checkpoints_module, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device.*; step-0000002 is kept: free space and go on with"):
        train(settings, say=quiet)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "out.partial" / "checkpoints").iterdir()] == ["step-0000002"]
    resumed = train(settings, resume=True, say=quiet)
    straight = train(job(tmp_path / "straight", steps=4), say=quiet)
    assert all(torch.equal(weights(straight)[n], t) for n, t in weights(resumed).items())


@pytest.mark.parametrize("done", [0, 2])
def test_memory_that_runs_out_keeps_the_last_checkpoint(tmp_path, monkeypatch, done):
    """As torch says it on a GPU, of which another process may have taken what is missing."""
    settings, steps = job(tmp_path / "out", method="lora", steps=4, checkpoint_steps=1), iter(range(9))
    stepped = loop.one_step

    def full(*given):
        if next(steps) == done:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
        return stepped(*given)

    monkeypatch.setattr(loop, "one_step", full)
    if not done:
        with pytest.raises(torch.OutOfMemoryError):
            train(settings, say=quiet)
        assert not (tmp_path / "out.partial").exists()
        return
    with pytest.raises(
        ValueError, match=r"^out of memory \(CUDA out of memory\); step-0000002 is kept: go on with --res"
    ):
        train(settings, say=quiet)
    monkeypatch.undo()
    assert weights(train(settings, resume=True, say=quiet))


@NEEDS_ROOT
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "1800k"):
        settings = job(disk / "out", steps=4, checkpoint_steps=1)
        with pytest.raises(ValueError, match="No space left on device.*step-000000. is kept"):
            train(settings, say=quiet)
        (kept,) = (disk / "out.partial" / "checkpoints").iterdir()
        assert read_safetensors(kept / "state.safetensors")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert weights(train(settings, resume=True, say=quiet))


def test_outputs_that_are_not_ours_are_refused(tmp_path, saved):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and no run of meft-bench train: choose another --output"):
        train(job(tmp_path / "out"), say=quiet)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder: choose another --output"):
        train(job(tmp_path / "file"), say=quiet)
    done = saved("meft")
    with pytest.raises(ValueError, match=r"result of other settings or rows \(.*seed was 0\)"):
        train(job(done, method="meft", seed=5), resume=True, say=quiet)
    with pytest.raises(ValueError, match="already holds the result of these settings"):
        train(job(done, method="meft"), say=quiet)
    said: list[str] = []
    assert train(job(done, method="meft"), resume=True, say=said.append) == done and "already finished" in said[0]


def test_an_unfinished_run_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "r.jsonl", facts(20))
    settings = job(tmp_path / "out", data=str(path), checkpoint_steps=1)
    monkeypatch.setattr(job_module.scores, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"unfinished run of other settings or rows \(seed was 0\)"):
        train(job(tmp_path / "out", data=str(path), checkpoint_steps=1, seed=1), resume=True, say=quiet)
    write_lines(path, facts(21))
    with pytest.raises(ValueError, match="the rows' content changed"):
        train(settings, resume=True, say=quiet)
    write_lines(path, facts(20))
    # All steps were done: the run goes on with the scores.
    monkeypatch.setattr(loop, "one_step", lambda *_: pytest.fail("trained again"))
    assert train(settings, resume=True, say=quiet) == settings.destination


def test_another_base_under_the_same_name_is_not_gone_on_with(tmp_path, monkeypatch):
    base = shutil.copytree(models.embedded_dir(), tmp_path / "base")
    settings = job(tmp_path / "out", model=str(base))
    monkeypatch.setattr(job_module.scores, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    tensors = read_safetensors(base / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the unfinished run was on .*: put those back"):
        train(settings, resume=True, say=quiet)


def test_a_slip_before_training_leaves_the_way_free(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [*facts(9), "{oops"])
    settings = job(tmp_path / "out", data=str(path))
    with pytest.raises(ValueError, match="r.jsonl, line 10 is not JSON"):
        train(settings, say=quiet)
    write_lines(path, facts(10))
    assert train(settings, say=quiet) == settings.destination


def test_a_diverging_run_names_the_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "token_loss", lambda model, batch: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(ValueError, match="the loss is nan at step 1 of 4: start anew with a smaller --learning-rate"):
        train(job(tmp_path / "out"), say=quiet)


@pytest.mark.parametrize("method", ["meft", "lora"])
def test_a_last_update_that_diverges_publishes_nothing(tmp_path, monkeypatch, method):
    step, done = loop.one_step, []

    def overflow_last(optimizer, *rest):
        made = step(optimizer, *rest)
        done.append(1)
        if len(done) == 4:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] = float("inf")
        return made

    monkeypatch.setattr(loop, "one_step", overflow_last)
    settings = job(tmp_path / "out", method=method)
    with pytest.raises(ValueError, match="no finite number after step 4 of 4: start anew with a smaller --learning-ra"):
        train(settings, say=quiet)
    assert not settings.destination.exists()


def test_the_seed_decides_the_rows_of_each_step(tmp_path, monkeypatch):
    make, seen, seeds = loop.batch_of, {}, []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        taken = seen[name] = []
        seeds.append(seed)

        def note(model, rows, *rest, taken=taken):
            assert torch.initial_seed() == seeds[-1], "dropout, say, draws by the seed too"
            taken.append([row.ids for row in rows])
            return make(model, rows, *rest)

        monkeypatch.setattr(loop, "batch_of", note)
        # Nothing is held out, so that the seed chooses the order alone.
        train(job(tmp_path / name, steps=2, seed=seed, eval_share=0.0), say=quiet)
    assert seen["a"] == seen["b"] != seen["c"]


@pytest.mark.parametrize("method", ["meft", "lora"])
def test_the_seed_decides_the_initialisation(tmp_path, monkeypatch, method):
    found = []

    def seen(attached, *_):
        found.append([p.detach().clone() for p in attached.parameters()])
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "fit", seen)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with pytest.raises(KeyboardInterrupt):
            train(job(tmp_path / name, method=method, seed=seed), say=quiet)
    first, same, other = found
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, c) for a, c in zip(first, other, strict=True))


def test_checkpoints_are_due_by_steps_or_by_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.time, "monotonic", lambda: 1000.0)
    asked = []

    def note(attached, spec, batches, *, checkpoints, **_):
        asked.append(checkpoints)
        return None, loop.StepLog()

    monkeypatch.setattr(loop, "train", note)
    attached = Attached(torch.nn.Linear(1, 1), {})
    for settings in (job("out", checkpoint_steps=3), job("out", checkpoint_minutes=2.0)):
        fit(attached, [], schedule(settings, PLAN), 0, tmp_path, settings)
    by_steps, by_minutes = asked
    assert [by_steps.due(step, 0.0) for step in range(1, 7)] == [False, False, True] * 2
    assert not by_minutes.due(1, 881.0) and by_minutes.due(1, 879.0)
    assert by_steps.after_last and by_minutes.after_last


# ---- kills and refusals around the output ----


def _unfinished(tmp_path, name="out"):
    """A finished run whose process was killed between publishing and cleaning: (settings, its partial folder)."""
    settings, kept = job(tmp_path / name), tmp_path / "kept"
    real = workplace._remove
    workplace._remove = lambda folder: shutil.copytree(folder, kept)
    try:
        train(settings, say=quiet)
    finally:
        workplace._remove = real
    return settings, workplace.partial_folder(settings)


def test_what_a_kill_after_publishing_left_is_cleaned_by_the_next_command(tmp_path):
    settings, partial = _unfinished(tmp_path)
    assert {f.name for f in partial.iterdir()} >= {"run.json", "rows", "checkpoints", "lock"}
    with pytest.raises(ValueError, match="already holds the result"):
        train(settings, say=quiet)
    assert not partial.exists()
    # The kill may also have come while it was cleaned: run.json and the lock go last.
    for rest in (["run.json", "lock"], ["lock"], []):
        partial.mkdir()
        for name in rest:
            shutil.copyfile(tmp_path / "kept" / name, partial / name)
        assert train(settings, resume=True, say=quiet) == settings.destination
        assert not partial.exists(), rest


def test_another_runs_folder_beside_a_result_is_left_alone(tmp_path):
    settings, partial = _unfinished(tmp_path)
    (partial / "run.json").write_text(json.dumps({"settings_digest": "another"}))
    assert train(settings, resume=True, say=quiet) and (partial / "checkpoints").is_dir()
    (partial / "run.json").unlink()
    assert train(settings, resume=True, say=quiet) and (partial / "checkpoints").is_dir()
    shutil.copyfile(tmp_path / "kept" / "run.json", partial / "run.json")
    with workplace.locked(partial):
        assert train(settings, resume=True, say=quiet) and (partial / "checkpoints").is_dir()


def test_the_cleaning_ends_with_what_says_whose_it_is(tmp_path, monkeypatch):
    (tmp_path / "p" / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "lock", "notes"):
        (tmp_path / "p" / name).write_text("")
    real, left = shutil.rmtree, []
    monkeypatch.setattr(
        workplace.shutil, "rmtree", lambda p, **k: (left.append({f.name for f in (tmp_path / "p").iterdir()}), real(p))
    )
    workplace._remove(tmp_path / "p")
    assert left[-1] == {"run.json", "lock"} and not (tmp_path / "p").exists()


def test_the_result_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, tree, names = [], workplace.sync_tree, workplace.sync
    monkeypatch.setattr(
        workplace, "sync_tree", lambda f: (events.append((f.name, (tmp_path / "out").exists())), tree(f))
    )
    monkeypatch.setattr(workplace, "sync", lambda f: (events.append((f.name, (tmp_path / "out").exists())), names(f)))
    train(job(tmp_path / "out"), say=quiet)
    assert events == [("adapter", False), (tmp_path.name, True)]


REFUSED = {
    "broken row": ({}, [*facts(9), "{oops"], "line 10 is not JSON"),
    "overlong": ({"max_length": 3}, facts(4), "max_length"),
    "empty": ({}, [{"prompt": "", "completion": ""}], "are empty or white space"),
    "too little memory": ({"host_memory": "1MB"}, facts(9), "no size of the method fits"),
    "no template": ({"chat_template": "nowhere.jinja"}, facts(4), "nowhere.jinja"),
    "unknown option": ({"options": {"colour": "red"}}, facts(4), "has no option colour"),
    "no model": ({"model": "./nowhere"}, facts(4), "no model folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_nothing_behind(tmp_path, case):
    fields, rows, message = REFUSED[case]
    path = write_lines(tmp_path / "r.jsonl", rows)
    with pytest.raises((ValueError, OSError), match=message):
        train(job(tmp_path / "new" / "deep" / "out", data=str(path), **fields), say=quiet)
    assert [f.name for f in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("error", "checkpoint", "stays"),
    [
        (ValueError("refused"), False, False),
        (ValueError("diverged"), True, True),
        (KeyboardInterrupt(), False, True),  # tokenised rows are worth keeping
        (workplace.Taken("another process made it first"), False, True),
    ],
)
def test_what_stays_after_an_error(tmp_path, error, checkpoint, stays):
    folder = tmp_path / "new" / "out.partial"
    with pytest.raises(type(error)), workplace.nothing_left_behind(folder):
        (folder / ("checkpoints/step-0000002" if checkpoint else "rows")).mkdir(parents=True)
        raise error
    assert folder.exists() is (tmp_path / "new").exists() is stays


def test_a_refusal_keeps_what_was_there(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", ["{oops"])
    partial = workplace.partial_folder(job(tmp_path / "out"))
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    for message in ("is no run of meft-bench train", "is not JSON"):
        with pytest.raises(ValueError, match=message):
            train(job(tmp_path / "out", data=str(path)), say=quiet)
        if message == "is not JSON":
            break
        assert (partial / "thesis.tex").read_text() == "years of work"
        (partial / "thesis.tex").unlink()
    assert partial.is_dir()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "./nowhere"}, "no model folder ./nowhere"),
        ({"max_length": 100}, "max_length=100 is above the model's limit of 64 tokens"),
        ({"host_memory": "1MB"}, "of host memory, 1.00 MB are given: no size of the method fits"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError) as error:
        train(job(tmp_path / "out", **fields), say=quiet)
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_a_base_that_meft_cannot_be_saved_on_is_refused_before_rows_and_weights(tmp_path, tokenizer, monkeypatch):
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=32, **sizes)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    for module, name in ((models, "load_model"), (data, "prepare")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="peft cannot wrap: use .* or another method, such as parallel_adapter$"):
        train(job(tmp_path / "out", model=str(tmp_path / "opt")), say=quiet)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_share_a_run(tmp_path):
    from meft_bench.harness.runner import locked

    settings = job(tmp_path / "out")
    with locked(workplace.partial_folder(settings)), pytest.raises(ValueError, match="worked on by another process"):
        train(settings, say=quiet)


def test_a_tokenizer_that_is_not_there():
    with pytest.raises(ValueError, match="cannot load the tokenizer of nobody/nothing") as error:
        load_tokenizer("nobody/nothing", None)
    assert "\n" not in str(error.value)
