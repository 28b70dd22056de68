"""transformers.Trainer with MEFT: the numbers of torch's AdamW on a dense Parallel Adapter, and exact resumption."""

import json
import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft_bench
from meft_bench import observe
from meft_bench.integrations.figures import Window, evenness
from meft_bench.integrations.peft_method import active_adapters, make_optimizer
from meft_bench.integrations.trainer import MOMENTS_NAME, STATE_NAME, newest_checkpoint
from meft_bench.meft.engine.budget import prices
from meft_bench.meft.engine.residency import KeptRows
from tests.integrations.small import BASES, SIZES, fill, rows_of, same, with_meft
from tests.meft.tiny_models import LAYERS, VOCAB, D, tiny_llama

STEPS, BATCH, LENGTH, ACCUMULATION = 12, 4, 8, 2
DENSE = {"k": 24, "key_experts": False, "n_experts": None, "p": None}


def rows(number: int = 96) -> list[dict[str, Tensor]]:
    ids = torch.randint(2, VOCAB, (number, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    fields = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**fields, **changes})


def train(model: nn.Module, folder: Path, resume: Any = None, **changes: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows())
    meft_bench.prepare(trainer).train(resume_from_checkpoint=resume)
    return trainer


def series(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- against an adapter that knows nothing of ours ----


class PlainParallelAdapter(nn.Module):
    """FFN(h) + relu(h K^T) V, all of it autograd's."""

    def __init__(self, ffn: nn.Module, keys_RD: Tensor, values_RD: Tensor) -> None:
        super().__init__()
        self.ffn, self.keys, self.values = ffn, nn.Parameter(keys_RD.clone()), nn.Parameter(values_RD.clone())

    def forward(self, h: Tensor) -> Tensor:
        return self.ffn(h) + torch.relu(h @ self.keys.T) @ self.values


@pytest.mark.parametrize("base", BASES)
def test_losses_norms_and_weights_equal_torch_adamw_on_a_dense_adapter(tmp_path: Path, base: str) -> None:
    model = with_meft(BASES[base](), **DENSE)
    plain = BASES[base]().requires_grad_(False)
    for layer, adapter in zip(plain.model.layers, active_adapters(model), strict=True):
        layer.mlp = PlainParallelAdapter(layer.mlp, adapter.store.keys.detach(), adapter.store.values.detach())
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    theirs = Trainer(
        model=plain, args=arguments(tmp_path / "plain"), train_dataset=rows(), optimizers=(optimizer, None)
    )
    theirs.train()
    ours = train(model, tmp_path / "meft")
    assert len(series(ours, "loss")) == STEPS and series(ours, "loss")[-1] < series(ours, "loss")[0]
    assert series(ours, "learning_rate") == series(theirs, "learning_rate")
    assert max(series(ours, "grad_norm")) > 0.5  # clipping was at work
    assert series(ours, "loss") == pytest.approx(series(theirs, "loss"), rel=1e-5)
    assert series(ours, "grad_norm") == pytest.approx(series(theirs, "grad_norm"), rel=1e-4)
    for layer, adapter in zip(plain.model.layers, active_adapters(model), strict=True):
        torch.testing.assert_close(adapter.store.keys, layer.mlp.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.store.values, layer.mlp.values, rtol=1e-4, atol=1e-5)


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    one = train(with_meft(), tmp_path, gradient_accumulation_steps=1, per_device_train_batch_size=8)
    two = train(with_meft(), tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert series(one, "loss") == pytest.approx(series(two, "loss"), rel=1e-5)
    for a, b in zip(rows_of(one.model), rows_of(two.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- checkpoints ----

KINDS = [{}, {"adam": "lazy"}, {"reading": "union", "gate": "none", "frozen_keys": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_resuming_at_step_6_is_bit_equal(tmp_path: Path, kind: dict) -> None:
    whole = train(with_meft(**kind), tmp_path, save_strategy="steps", save_steps=6)
    again = train(with_meft(filled=False, **kind), tmp_path, resume=str(tmp_path / "checkpoint-6"))
    assert same(rows_of(whole.model), rows_of(again.model))
    assert series(whole, "loss") == series(again, "loss") and len(series(again, "loss")) == STEPS
    for ours, theirs in zip(_moments(whole), _moments(again), strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("part", ["keys", "router"])
def test_what_was_frozen_by_hand_stays_frozen_when_a_checkpoint_is_read(tmp_path: Path, part: str) -> None:
    def model() -> nn.Module:
        made = with_meft()
        for adapter in active_adapters(made):
            getattr(adapter.store, part).requires_grad_(False)
        return made

    whole = train(model(), tmp_path, save_strategy="steps", save_steps=6)
    again = train(model(), tmp_path, resume=str(tmp_path / "checkpoint-6"))
    assert same(rows_of(whole.model), rows_of(again.model))
    assert not any(p.requires_grad for n, p in again.model.named_parameters() if n.endswith(part))


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_distinctive_updates_are_saved_and_resumed(tmp_path: Path, adam: str) -> None:
    """Moments of what rests are brought up to date whenever the optimizer's state is asked for, so it must be there."""

    def made() -> nn.Module:
        model = with_meft(filled=False, distinctive=4, adam=adam)
        meft_bench.count_background(model, [[2, 3, 4, 5], [6, 7, 8]])
        return model

    whole = train(made(), tmp_path, save_strategy="steps", save_steps=6)
    again = train(made(), tmp_path, resume=str(tmp_path / "checkpoint-6"))
    assert same(rows_of(whole.model), rows_of(again.model))
    plain = train(made(), tmp_path / "plain")  # and saving changes nothing
    assert same(rows_of(whole.model), rows_of(plain.model))


def _moments(trainer: Trainer) -> list[dict[str, Tensor]]:
    return list(trainer.optimizer.state_dict()["state"].values())


def test_host_state_is_in_its_own_safetensors_file(tmp_path: Path) -> None:
    trainer = train(with_meft(), tmp_path, save_strategy="steps", save_steps=6)
    folder = tmp_path / "checkpoint-6"
    with safe_open(folder / MOMENTS_NAME, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert len(shapes) == 3 * LAYERS * 3 and shapes["0.exp_avg"] == (24, D) and shapes["2.exp_avg_sq"] == (6, D)
    left = torch.load(folder / "optimizer.pt", weights_only=True)
    assert left["state"] == {} and len(left["param_groups"][0]["params"]) == 3 * LAYERS
    assert _moments(trainer)  # saving left the running optimizer its state


def test_two_adapters_are_resumed_both(tmp_path: Path) -> None:
    def model(filled: bool) -> nn.Module:
        wrapped = with_meft(filled=filled)
        wrapped.add_adapter("second", meft_bench.MeftConfig(r=16, k=4, seed=3, task_type="CAUSAL_LM"))
        return wrapped

    whole = train(model(True), tmp_path, save_strategy="steps", save_steps=6)
    again = train(model(False), tmp_path, resume=str(tmp_path / "checkpoint-6"))
    assert same(rows_of(whole.model), rows_of(again.model)) and again.model.active_adapters == ["default"]


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    whole = train(with_meft(), tmp_path, save_strategy="steps", save_steps=4)
    (tmp_path / "checkpoint-12" / STATE_NAME).write_text('{"half')
    (tmp_path / "checkpoint-8" / STATE_NAME).unlink()
    (tmp_path / "checkpoint-old").mkdir()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-4-first-try")
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-20-best")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        train(with_meft(), tmp_path, resume=str(tmp_path / "checkpoint-8"))
    again = train(with_meft(filled=False), tmp_path, resume=True)
    assert same(rows_of(whole.model), rows_of(again.model))
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        train(with_meft(), tmp_path, resume=True)


class FailingDisk(TrainerCallback):
    """The disk is full from the second checkpoint on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        self.monkeypatch.setattr("meft_bench.integrations.trainer.save_file", full)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the checkpoint that fails is written over an older whole one."""
    whole = train(with_meft(), tmp_path, save_strategy="steps", save_steps=4)
    trainer = Trainer(
        model=with_meft(),
        args=arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=rows(),
        callbacks=[FailingDisk(monkeypatch)],
    )
    with pytest.raises(OSError, match="No space left"):
        meft_bench.prepare(trainer).train()
    assert not (tmp_path / "checkpoint-8" / STATE_NAME).exists()
    shutil.rmtree(tmp_path / "checkpoint-12")
    monkeypatch.undo()
    again = train(with_meft(filled=False), tmp_path, resume=True)
    assert same(rows_of(whole.model), rows_of(again.model))


@pytest.mark.parametrize("name", ["default", "facts"])
def test_the_best_checkpoint_is_put_back(tmp_path: Path, name: str) -> None:
    """The largest evaluation loss is called best here, so that it is not the last one."""
    model = peft.get_peft_model(tiny_llama(), meft_bench.MeftConfig(**SIZES), adapter_name=name)
    fill(model)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            metric_for_best_model="loss",
            greater_is_better=True,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=4,
            save_steps=4,
            load_best_model_at_end=True,
            save_total_limit=1,
        ),
        train_dataset=rows(),
        eval_dataset=rows(8),
    )
    meft_bench.prepare(trainer).train()
    step = 4 * (1 + series(trainer, "eval_loss").index(max(series(trainer, "eval_loss"))))
    inside = "" if name == "default" else name
    best = load_file(tmp_path / f"checkpoint-{step}" / inside / "adapter_model.safetensors")
    assert step < STEPS
    for number, adapter in enumerate(active_adapters(trainer.model)):
        prefix = f"base_model.model.model.layers.{number}.mlp.meft_store"
        assert all(torch.equal(p, best[f"{prefix}.{name}"]) for name, p in adapter.store.named_parameters())


class Learning(TrainerCallback):
    """What the optimizer begins with."""

    moments: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        state = getattr(optimizer, "optimizer", optimizer).state_dict()["state"]
        self.moments = sum(float(tensor.abs().sum()) for entry in state.values() for tensor in entry.values())


def test_a_checkpoint_of_the_model_only_is_resumed_as_with_lora(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers goes on at its step with the weights, and with a fresh optimizer and schedule."""

    def run(model: nn.Module, folder: Path, resume: Any = None) -> tuple[Trainer, Learning]:
        seen = Learning()
        settings = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
        trainer = Trainer(model=model, args=settings, train_dataset=rows(), callbacks=[seen])
        if not any("lora" in name for name, _ in model.named_parameters()):
            meft_bench.prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    def lora() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
        )

    whole, _ = run(with_meft(), tmp_path / "ours")
    assert not (tmp_path / "ours" / "checkpoint-2" / MOMENTS_NAME).exists()
    again, seen = run(with_meft(filled=False), tmp_path / "ours", resume=str(tmp_path / "ours" / "checkpoint-2"))
    run(lora(), tmp_path / "lora")
    theirs, other = run(lora(), tmp_path / "lora", resume=str(tmp_path / "lora" / "checkpoint-2"))
    assert seen.moments == other.moments == 0 and again.state.global_step == theirs.state.global_step == 4
    assert series(again, "learning_rate") == series(theirs, "learning_rate")
    assert series(again, "loss")[:3] == series(whole, "loss")[:3]  # the third by the weights of step 2
    assert series(again, "loss")[3] != series(whole, "loss")[3]  # the step after it by another rate
    assert "checkpoint-2 was saved with save_only_model: the optimizer and the schedule start anew" in caplog.text


@pytest.mark.parametrize("how", ["missing", "cut", "foreign"])
def test_broken_host_state_is_refused(tmp_path: Path, how: str) -> None:
    train(with_meft(), tmp_path, save_strategy="steps", save_steps=6)
    path = tmp_path / "checkpoint-6" / MOMENTS_NAME
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        train(with_meft(r=12, k=4), tmp_path / "other", save_strategy="steps", save_steps=6)
        shutil.copy(tmp_path / "other" / "checkpoint-6" / MOMENTS_NAME, path)
    message = {"missing": f"no {MOMENTS_NAME}", "cut": "not a whole", "foreign": "fits no parameter of this model"}[how]
    with pytest.raises(ValueError, match=message):
        train(with_meft(), tmp_path, resume=str(tmp_path / "checkpoint-6"))


def test_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    train(with_meft(), tmp_path, save_strategy="steps", save_steps=6)
    with pytest.raises((ValueError, RuntimeError), match="r=12|size mismatch|has shape"):
        train(with_meft(r=12, k=4), tmp_path, resume=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_the_other_adam_is_not_resumed(tmp_path: Path, adam: str) -> None:
    other = "lazy" if adam == "dense" else "dense"
    train(with_meft(adam=adam), tmp_path, save_strategy="steps", save_steps=6)
    with pytest.raises(ValueError, match=f"written with adam='{adam}'"):
        train(with_meft(adam=other), tmp_path, resume=str(tmp_path / "checkpoint-6"))


# ---- what is logged ----


def test_figures_in_the_log_are_what_happened(tmp_path: Path) -> None:
    trainer = train(with_meft(), tmp_path, logging_steps=4)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    adapter, link = active_adapters(trainer.model)[0], active_adapters(trainer.model)[0].link
    for direction in ("h2d", "d2h"):
        total = sum(n for (way, _), n in link.bytes.items() if way == direction)
        assert sum(entry[f"meft/{direction}_bytes"] for entry in logged) * 4 == pytest.approx(total)
    moved = sum(n for (_, purpose), n in link.bytes.items() if purpose == "grads")
    touched = sum(entry["meft/rows_touched"] for entry in logged) * 4
    assert moved == touched * 2 * D * 4  # a row's key and value, fp32
    tokens = STEPS * ACCUMULATION * BATCH * LENGTH
    assert sum(e["meft/bytes_per_token"] for e in logged) / 3 == pytest.approx(sum(link.bytes.values()) / tokens)
    for entry in logged:
        share = entry["meft/rows_touched"] / (ACCUMULATION * LAYERS * adapter.config.neurons)
        assert entry["meft/union_share"] == pytest.approx(share) and 0 < share <= 1
        assert entry["meft/kept_share"] == 5 / 24 and 0 < entry["meft/expert_entropy"] <= 1
        seconds = [entry[f"meft/host_{part}_s"] for part in ("select", "gather", "gradients", "optimizer")]
        assert all(s > 0 for s in seconds)
    assert not adapter.usage


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    trainer = Trainer(
        model=with_meft(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=3),
        train_dataset=rows(),
        eval_dataset=rows(8),
    )
    meft_bench.prepare(trainer).train()
    silent = train(with_meft(), tmp_path)
    assert series(trainer, "meft/h2d_bytes") == series(silent, "meft/h2d_bytes")
    assert len(series(trainer, "eval_loss")) == 4 and len(series(silent, "meft/h2d_bytes")) == STEPS


def test_evenness() -> None:
    assert evenness(torch.tensor([0, 0, 7])) == 0 and evenness(torch.zeros(4)) == 0
    assert evenness(torch.tensor([5, 5, 5, 5])) == pytest.approx(1)
    assert evenness(torch.tensor([1, 1, 0, 0])) == pytest.approx(0.5)


def test_seconds_and_bytes_of_its_own_adapters_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, others = (active_adapters(with_meft()) for _ in range(2))
    window, clock = Window(adapters), iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with window.micro_batch():
        for about in (adapters[0], adapters[1], others[0]):
            with observe.part("retrieval", about):
                pass
        with observe.part("gather", adapters[1].store):
            pass
        for link in (adapters[0].link, adapters[0].link, others[0].link):
            with observe.copy("rows", "h2d", 7, link):
                pass
    with observe.part("retrieval", adapters[0]):
        pass  # outside of a micro-batch nobody listens
    assert (window.sums["host_select_s"], window.sums["host_gather_s"], window.sums["h2d_bytes"]) == (5.0, 1.0, 14)


def test_a_window_starts_anew_after_it_is_read() -> None:
    """Also what was counted of experts; with one expert there is nothing to be even about."""
    for experts in (6, 1):
        model = with_meft(n_experts=experts, p=1, k=4).train()
        adapters, optimizer = active_adapters(model), make_optimizer(model, lr=1e-2)
        window = Window(adapters)
        window.time_optimizer(optimizer)
        with window.micro_batch():
            model(**batches()[0]).loss.backward()
        assert all(bool(a.expert_use.any()) for a in adapters)
        optimizer.step()
        assert ("meft/expert_entropy" in window.read()) is (experts > 1)
        assert not any(bool(a.expert_use.any()) for a in adapters) and window.read() == {}


def test_tensorboard_shows_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("google.protobuf", reason="tensorboard's protobuf is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        trainer = train(with_meft(), tmp_path, report_to=["tensorboard"])
    seen = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.value for e in seen.Scalars("train/meft/rows_touched")] == series(trainer, "meft/rows_touched")


# ---- other precisions and memory savers ----


def test_a_bf16_base_and_bf16_autocast_train(tmp_path: Path) -> None:
    for base, changes in ((tiny_llama().bfloat16(), {}), (tiny_llama(), {"bf16": True})):
        trainer = train(with_meft(base), tmp_path, **changes)
        losses = series(trainer, "loss")
        assert losses[-1] < losses[0] and all(t.dtype == torch.float32 for t in rows_of(trainer.model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    plain = train(with_meft(), tmp_path, max_steps=3)
    light = train(
        with_meft(),
        tmp_path,
        max_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert series(light, "loss") == pytest.approx(series(plain, "loss"), rel=1e-5)
    for a, b in zip(rows_of(plain.model), rows_of(light.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- refusals ----


def refused(model: nn.Module, folder: Path, **changes: Any) -> None:
    meft_bench.prepare(Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows()))


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adafactor", "sgd"])
def test_other_optimizers_are_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(ValueError, match=f"optim={optim} .*set optim=adamw_torch"):
        refused(with_meft(), tmp_path, optim=optim)


def test_fp16_several_gpus_and_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**changes: Any) -> Trainer:
        trainer = Trainer(model=with_meft(), args=arguments(tmp_path), train_dataset=rows())
        for name, value in changes.items():
            monkeypatch.setattr(type(trainer.args), name, value, raising=False)
        return trainer

    trainer = settings()
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="set bf16=True"):
        meft_bench.prepare(trainer)
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        trainer = settings()
        setattr(trainer, name, True)
        with pytest.raises(ValueError, match="DeepSpeed and FSDP"):
            meft_bench.prepare(trainer)
    with pytest.raises(ValueError, match="2 GPUs .*torchrun --nproc-per-node 2, or set CUDA_VISIBLE_DEVICES"):
        meft_bench.prepare(settings(n_gpu=2))
    monkeypatch.undo()


def test_a_sharded_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its parameters' kind (FSDP2, tensor parallel), and by what accelerate is told of parts."""

    def refused_part(trainer: Trainer) -> None:
        with pytest.raises(ValueError, match="the base is sharded over the ranks .*load it without tp_plan"):
            meft_bench.prepare(trainer)

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = with_meft()
        inner = model.get_base_model().model
        whole = inner.norm.weight.detach()
        inner.norm.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,))), requires_grad=False)
        refused_part(Trainer(model=model, args=arguments(tmp_path), train_dataset=rows()))
    finally:
        distributed.destroy_process_group()
    trainer = Trainer(model=with_meft(), args=arguments(tmp_path), train_dataset=rows())
    parts = SimpleNamespace(tp_size=1, cp_size=2)
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", parts, raising=False)
    refused_part(trainer)


def test_models_and_optimizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no PeftModel: use peft.get_peft_model"):
        refused(tiny_llama(), tmp_path)
    model = with_meft(adam="lazy")
    theirs = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(theirs, None))
    with pytest.raises(ValueError, match="adam='lazy' needs"):
        meft_bench.prepare(trainer)
    another = make_optimizer(with_meft(adam="lazy"), lr=1e-2)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(another, None))
    with pytest.raises(ValueError, match="has no neuron of the active adapter"):
        meft_bench.prepare(trainer)
    ours = make_optimizer(model, lr=1e-2)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(ours, None))
    meft_bench.prepare(trainer).train()
    assert series(trainer, "meft/host_optimizer_s")[0] > 0


def test_another_adapter_made_active_since_is_told(tmp_path: Path) -> None:
    model = with_meft()
    model.add_adapter("other", model.peft_config["default"])
    trainer = meft_bench.prepare(Trainer(model=model, args=arguments(tmp_path), train_dataset=rows()))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="another adapter was made active since .* after set_adapter"):
        trainer.train()
    trainer = meft_bench.prepare(Trainer(model=model, args=arguments(tmp_path), train_dataset=rows()))
    before = active_adapters(model)[0].store.values.detach().clone()
    trainer.train()
    assert not torch.equal(active_adapters(model)[0].store.values, before)


def test_other_trainable_parameters_are_refused(tmp_path: Path) -> None:
    model = with_meft()
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    before = embedding.detach().clone()
    with pytest.raises(ValueError, match=r"embed_tokens.weight is to be trained \(1 in all beside the adapter\)"):
        train(model, tmp_path)
    both = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(both, None))
    meft_bench.prepare(trainer).train()
    assert not torch.equal(embedding, before)


def test_the_optimizer_has_the_trainer_s_settings(tmp_path: Path) -> None:
    own = {"learning_rate": 3e-3, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-3, "weight_decay": 0.2}
    trainer = Trainer(model=with_meft(), args=arguments(tmp_path, **own), train_dataset=rows())
    group = meft_bench.prepare(trainer).create_optimizer().param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-3, (0.7, 0.8), 1e-3, 0.2)


def test_rows_that_a_trainer_cast_to_bf16_are_fp32_again(tmp_path: Path) -> None:
    """TRL does so on a quantised base."""
    trainer = Trainer(model=with_meft(), args=arguments(tmp_path), train_dataset=rows())
    for parameter in active_adapters(trainer.model)[0].store.parameters():
        parameter.data = parameter.data.bfloat16()
    meft_bench.prepare(trainer)
    assert {t.dtype for t in rows_of(trainer.model)} == {torch.float32}


def test_preparing_twice_is_preparing_once(tmp_path: Path) -> None:
    trainer = Trainer(model=with_meft(), args=arguments(tmp_path), train_dataset=rows())
    assert meft_bench.prepare(trainer) is meft_bench.prepare(trainer) is trainer
    assert type(trainer).__name__ == "MeftTrainer" and isinstance(trainer, Trainer)


# ---- other loops ----


def batches() -> list[dict[str, Tensor]]:
    examples = rows(STEPS * ACCUMULATION * BATCH)
    parts = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_a_plain_accelerate_loop_equals_a_plain_torch_loop(tmp_path: Path, adam: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    bare = with_meft(adam=adam).train()
    optimizer = make_optimizer(bare, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    model, optimizer, schedule = accelerator.prepare(bare, optimizer, schedule)
    for batch in batches():
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    plain = with_meft(adam=adam).train()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    # A resident optimizer over the same tensors follows "dense", so torch's own stands in for it.
    own = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0) if adam == "dense" else None
    own = own or make_optimizer(plain, lr=1e-2)
    own_schedule = torch.optim.lr_scheduler.LinearLR(own, total_iters=STEPS)
    for number, batch in enumerate(batches(), 1):
        (plain(**batch).loss / ACCUMULATION).backward()
        if number % ACCUMULATION == 0:
            assert torch.nn.utils.clip_grad_norm_(parameters, 0.5) > 0
            own.step()
            own_schedule.step()
            own.zero_grad()
    for a, b in zip(rows_of(model), rows_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not same(rows_of(model), rows_of(with_meft()))


def test_fused_kernels_are_refused_before_they_write_over_rows() -> None:
    model = with_meft().train()
    before = [p.clone() for p in rows_of(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    model(**batches()[0]).loss.backward()
    with pytest.raises(ValueError, match="AdamW with fused=True cannot step on MEFT's rows.*make_optimizer"):
        optimizer.step()
    assert same(before, rows_of(model))


@pytest.mark.parametrize(
    "engine", [{"overlap": True}, {"device_budget": 10**7}, {"device_budget": 10**7, "overlap": True}], ids=str
)
def test_the_engine_s_options_train_the_same(tmp_path: Path, engine: dict[str, Any]) -> None:
    plain, ours = train(with_meft(), tmp_path / "a"), train(with_meft(**engine), tmp_path / "b")
    assert max(series(ours, "grad_norm")) > 0.5, "clipping was at work, on gradients that had come home"
    assert series(ours, "grad_norm") == series(plain, "grad_norm") and series(ours, "loss") == series(plain, "loss")
    assert same(rows_of(ours.model), rows_of(plain.model))
    if "device_budget" in engine:
        assert series(ours, "meft/h2d_bytes")[-1] < series(plain, "meft/h2d_bytes")[-1]


def test_a_budget_buys_no_optimizer_that_could_not_stay_on_the_device(tmp_path: Path) -> None:
    """The trainer looks at gradients in every step. So more rows fit, with their gradients alone."""
    small = with_meft(retrieval="host")
    config = active_adapters(small)[0].config
    price = prices(config, D, torch.float32)
    budget = LAYERS * (price.router + price.router_moments + 6 * (price.row + price.moments))
    ours, plain = train(with_meft(retrieval="host", device_budget=budget), tmp_path / "a"), train(small, tmp_path / "b")
    for adapter in active_adapters(ours.model):
        assert isinstance(adapter.residency, KeptRows)
        assert adapter.residency.adam is None and adapter.residency.capacity > 6
        assert adapter.device_bytes <= budget // LAYERS
    assert series(ours, "loss") == series(plain, "loss") and same(rows_of(ours.model), rows_of(plain.model))


def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w1")
    data = Dataset.from_list([{"prompt": f"w{i} w5", "completion": f" w{i + 1} w{i + 2}"} for i in range(3, 43)])

    def run(resume: Any, **changes: Any) -> Any:
        fields = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, **changes).to_dict()
        fields.pop("push_to_hub_token", None)
        fields["remove_unused_columns"] = True
        args = trl.SFTConfig(
            **{k: v for k, v in fields.items() if k in trl.SFTConfig.__dataclass_fields__}, max_length=16
        )
        # TRL wraps a model itself when it is given the configuration.
        trainer = trl.SFTTrainer(
            model=tiny_llama(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=meft_bench.MeftConfig(**SIZES),
        )
        fill(trainer.model)
        assert meft_bench.prepare(trainer) is trainer and isinstance(trainer, trl.SFTTrainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(None)
    again = run(str(tmp_path / "checkpoint-3"))
    assert series(whole, "loss")[-1] < series(whole, "loss")[0] and len(series(whole, "meft/rows_touched")) == 6
    assert same(rows_of(whole.model), rows_of(again.model))
    assert json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())["peft_type"] == "MEFT"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_that_makes_its_own_model_trains_the_same(tmp_path: Path, checkpointing: bool) -> None:
    """model_init is called once for the trainer and again for every training, as a search of hyperparameters does."""
    changes = {
        "max_steps": 3,
        "data_seed": 5,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    expected = train(with_meft(), tmp_path / "given", **changes)
    trainer = Trainer(
        model_init=lambda: with_meft(), args=arguments(tmp_path / "made", **changes), train_dataset=rows()
    )
    meft_bench.prepare(trainer)
    for _ in range(2):
        trainer.train()
        assert series(trainer, "loss") == series(expected, "loss")
        assert series(trainer, "meft/union_share") == series(expected, "meft/union_share")
        assert same(rows_of(trainer.model), rows_of(expected.model))


def test_training_again_goes_on_and_counts_steps_once(tmp_path: Path) -> None:
    """The optimizer is accelerate's wrapper by the second call; its steps are still counted, and counted once."""
    model = with_meft(tiny_llama())
    trainer = train(model, tmp_path, max_steps=4)
    first = series(trainer, "meft/rows_touched")
    trainer.args.max_steps = 8
    trainer.train()
    again = series(trainer, "meft/rows_touched")
    assert len(first) == 4 and len(again) == 8
    # Counting a step twice would halve what it touched.
    assert min(again) > 0.7 * max(first)
