"""MEFT as peft's users meet it: wrap, train, save, load, switch, delete."""

import copy
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn

from meft_bench import observe
from meft_bench.integrations import figures, peft_method, register
from meft_bench.integrations.figures import Window
from meft_bench.integrations.peft_layer import MeftLayer
from meft_bench.integrations.peft_method import MeftConfig, active_adapters, attach, make_optimizer, meft_layers
from meft_bench.meft import config as core
from meft_bench.meft.engine.workers import UPDATE
from meft_bench.meft.link import Resident
from meft_bench.meft.model import attach as attach_core
from meft_bench.train import meft as harness_meft
from tests.integrations.small import BASES, SIZES, TRANSFORMERS_TAKES_PEFT, fill, rows_of, same, with_meft
from tests.meft.tiny_models import LAYERS, VOCAB, D, named, next_token_loss, small_config, tiny_llama, tokens

CHOICES = [
    {},
    {"key_experts": False, "n_experts": None, "p": None},
    {"gate": "none", "frozen_keys": True},
    {"gate": "softmax", "reading": "union", "adam": "lazy"},
    {"selection": "signed", "activation": "silu", "router_init": "mean_key_x50", "key_std": 0.02},
    {"selection": "relu_first", "router_init": "normal", "seed": 7},
]


def logits(model: nn.Module) -> torch.Tensor:
    ids = tokens()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = tokens(batch=3, length=8)
    return next_token_loss(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, ids)


# ---- one implementation ----


@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_it_is_the_harness_method_under_another_name(choice: dict) -> None:
    config = MeftConfig(**{**SIZES, **choice})
    ours = harness_meft.attach(tiny_llama(), config.to_core(), seed=config.seed)
    theirs = attach(tiny_llama(), config, seed=config.seed)
    assert ours.parameter_groups() == theirs.parameter_groups()
    assert same([p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()])
    for attached in (ours, theirs):
        with torch.no_grad():
            for number, p in enumerate(attached.groups["values"]):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        attached.model.train()
        optimizer = attached.make_optimizer(lr=1e-2)
        for _ in range(3):
            loss_of(attached.model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same([p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()])
    assert ours.link.bytes == theirs.link.bytes and ours.usage == theirs.usage and len(ours.usage[0]) == 3


def test_the_base_is_untouched_and_the_start_is_the_base() -> None:
    base = tiny_llama()
    before = {name: p.clone() for name, p in base.named_parameters()}
    want = logits(base)
    model = with_meft(base, filled=False)
    assert torch.equal(logits(model), want)
    fill(model)
    model.train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert not torch.equal(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    kept = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters() if "meft_" not in n}
    assert kept.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in kept.items())
    assert torch.equal(logits(model.unload()), want)


def test_padding_selects_nothing_also_in_a_deep_copy() -> None:
    """The mask must reach the copy's own layers, not the original's."""
    model = with_meft().train()
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    twin = copy.deepcopy(model)
    twin(input_ids=ids, attention_mask=mask).logits.sum().backward()
    assert [adapter.usage[0][0] for adapter in active_adapters(twin)] == [8] * LAYERS
    assert all(not adapter.usage for adapter in active_adapters(model))
    store, original = active_adapters(twin)[0].store, active_adapters(model)[0].store
    assert store is meft_layers(twin)[0].meft_store["default"] and store is not original and original.keys.grad is None


@pytest.mark.parametrize("way", ["peft", "peft, lookahead", "core"])
def test_threads_that_share_a_model_do_not_mix_their_passes(way: str) -> None:
    """The second thread's whole pass comes while the first is within an FFN, with another mask."""
    base, found = tiny_llama(), {}
    if way == "core":
        model: Any = attach_core(base, small_config()).model
        with torch.no_grad():
            for adapter in (layer.parallel_adapter for layer in base.model.layers):
                adapter.store.values.copy_(0.3 * torch.randn(24, D, generator=torch.Generator().manual_seed(1)))
    else:
        model = with_meft(base, lookahead=int(way != "peft"))
    model.eval()
    ids = torch.randint(2, VOCAB, (2, 2, 12), generator=torch.Generator().manual_seed(1))
    masks = torch.ones_like(ids)
    masks[0, 0, :9] = 0

    @torch.no_grad()
    def run(number: int) -> torch.Tensor:
        return model(input_ids=ids[number], attention_mask=masks[number]).logits

    def other_pass(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: found.update(other=run(1)))
            thread.start()
            thread.join()

    expected = [run(0), run(1)]
    within = next(m for n, m in base.named_modules() if "layers.0.mlp" in n and n.endswith("gate_proj"))
    within.register_forward_hook(other_pass)
    assert torch.equal(run(0), expected[0]) and torch.equal(found["other"], expected[1])


def test_torch_save_writes_a_whole_model() -> None:
    model, file = with_meft().train(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(logits(twin), logits(model))
    loss_of(twin).backward()
    assert all(a.store.values.grad.any() for a in active_adapters(twin))
    assert all(a.store.values.grad is None for a in active_adapters(model))


# ---- what trains ----


@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_the_parameter_count_is_true(choice: dict, capsys: pytest.CaptureFixture) -> None:
    model = with_meft(**choice)
    want = sum(model.peft_config["default"].to_core().parameter_groups(D, LAYERS).values())
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == want
    assert everything == sum(p.numel() for p in tiny_llama().parameters()) + sum(t.numel() for t in rows_of(model))
    model.print_trainable_parameters()
    assert f"trainable params: {want:,} ||" in capsys.readouterr().out


def test_what_is_frozen_stays_so_when_adapters_are_switched() -> None:
    model = with_meft(gate="none", frozen_keys=True)
    model.add_adapter("other", MeftConfig(**SIZES))
    for name in ("other", "default", "other", "default"):
        model.set_adapter(name)
    with model.disable_adapter():
        pass
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == LAYERS and all(n.endswith("meft_store.default.values") for n in trained)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    plain, light = with_meft().train(), with_meft().train()
    light.enable_input_require_grads()
    light.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, light):
        loss_of(model).backward()
    assert light.get_base_model().is_gradient_checkpointing
    for a, b in zip(active_adapters(plain), active_adapters(light), strict=True):
        assert a.usage == b.usage and len(a.usage) == 1
        for p, q in zip(a.store.parameters(), b.store.parameters(), strict=True):
            assert p.grad.abs().sum() > 0 and torch.allclose(p.grad, q.grad, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_run_again_with_the_mask_of_their_pass(reentrant: bool) -> None:
    plain, light = with_meft().train(), with_meft().train()
    light.enable_input_require_grads()
    light.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    mask[:, :4] = 0
    for model in (plain, light):
        sum(model(input_ids=ids, labels=ids, attention_mask=given).loss for given in (mask, None)).backward()
    for a, b in zip(active_adapters(plain), active_adapters(light), strict=True):
        for p, q in zip(a.store.parameters(), b.store.parameters(), strict=True):
            assert p.grad.abs().sum() > 0 and torch.allclose(p.grad, q.grad, atol=1e-7)


def test_a_call_of_the_decoder_alone_has_no_earlier_mask() -> None:
    model, ids, mask = with_meft(), tokens(), torch.ones(2, 6, dtype=torch.long)
    mask[:, :4] = 0
    with torch.no_grad():
        before = model.get_base_model().model(ids).last_hidden_state
        model(ids, attention_mask=mask)
        assert torch.equal(model.get_base_model().model(ids).last_hidden_state, before)


def test_a_frozen_adapter_below_collects_no_gradient(tmp_path: Path) -> None:
    with_meft().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path).train()
    model.enable_input_require_grads()
    loss_of(model).backward()
    assert all(p.grad is None for adapter in active_adapters(model) for p in adapter.store.parameters())


def test_a_mask_handed_over_by_place_is_known_too() -> None:
    model = with_meft().train()
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    model.base_model(ids, mask).logits.sum().backward()
    assert [adapter.usage[0][0] for adapter in active_adapters(model)] == [8] * LAYERS


def test_lookahead_is_the_core_s() -> None:
    options = {"lookahead": 1, "gate": "none"}
    ours = harness_meft.attach(tiny_llama(), MeftConfig(**{**SIZES, **options}).to_core(), seed=0)
    model = with_meft(filled=False, **options)
    for number, adapter in enumerate(active_adapters(model)):
        with torch.no_grad():
            values = torch.randn(adapter.store.values.shape, generator=torch.Generator().manual_seed(number))
            ours.groups["values"][number].copy_(values)
            adapter.store.values.copy_(values)
    assert torch.equal(logits(ours.model), logits(model))
    exact = with_meft(filled=False, gate="none")
    exact.load_state_dict(model.state_dict())
    assert not torch.equal(logits(exact), logits(model))


def test_a_loop_of_one_s_own_gets_what_waits_on_the_device() -> None:
    """The optimizer and clipping send it home first; the budget is for all layers together."""
    results = []
    for budget in (0, 10**7):
        model = with_meft(device_budget=budget).train()
        optimizer = make_optimizer(model, lr=1e-2)
        norms = []
        for step in range(3):
            loss_of(model).backward()
            if step:
                norms.append(float(peft_method.clip_grad_norm_(model, 0.1)))
            optimizer.step()
            optimizer.zero_grad()
        results.append((norms, rows_of(model)))
        assert {adapter.layers for adapter in active_adapters(model)} == {LAYERS}
    assert results[0][0] == results[1][0] and min(results[0][0]) > 0.1 and same(results[0][1], results[1][1])


def test_moments_are_kept_as_the_configuration_says() -> None:
    for moments, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = with_meft(moments=moments).train()
        optimizer = make_optimizer(model, lr=1e-2)
        loss_of(model).backward()
        optimizer.step()
        kept = {t.dtype for e in optimizer.state_dict()["state"].values() for n, t in e.items() if "exp_avg" in n}
        assert dtype in kept and (dtype == torch.bfloat16 or kept == {torch.float32})


def test_seconds_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the window's own adapters, within its micro-batches."""
    adapters = active_adapters(with_meft())
    window, clock = Window(adapters), iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(figures.time, "perf_counter", lambda: next(clock))
    with window.micro_batch():
        for adapter in (*adapters[:2], object()):
            with observe.part("retrieval", adapter):
                pass
    with observe.part("retrieval", adapters[0]):
        pass
    assert window.sums["host_select_s"] == 5.0 and window.sums["host_gather_s"] == 0.0


def test_an_adapter_without_weights_says_so() -> None:
    model = tiny_llama()
    model = get_peft_model(model, MeftConfig(**SIZES), low_cpu_mem_usage=True)
    if active_adapters(model)[0].store.handle("values").device.type == "meta":
        with pytest.raises(ValueError, match="has no weights yet: load them first"):
            logits(model)
    store = active_adapters(with_meft())[0]
    store.store._parameters["values"] = nn.Parameter(torch.empty(24, D, device="meta"))
    with pytest.raises(ValueError, match="has no weights yet: load them first"):
        store(torch.zeros(1, 2, D))


def test_model_zero_grad_keeps_the_buffers() -> None:
    """Trainer calls model.zero_grad(), which drops gradients: their memory is used again, zeroed."""
    model = with_meft().train()
    store = active_adapters(model)[0].store
    loss_of(model).backward()
    place, first = store.keys.grad.data_ptr(), store.keys.grad.clone()
    model.zero_grad()
    assert store.keys.grad is None
    loss_of(model).backward()
    assert store.keys.grad.data_ptr() == place and torch.equal(store.keys.grad, first)


def test_lazy_adam_forgets_touched_rows_after_a_step_of_a_trainer() -> None:
    model = with_meft(adam="lazy").train()
    optimizer = make_optimizer(model, lr=1e-2)
    loss_of(model).backward()
    assert active_adapters(model)[0].store.touched_R.any()
    optimizer.step()
    assert not active_adapters(model)[0].store.touched_R.any()


def test_a_plain_loop_keeps_a_bounded_record_of_use() -> None:
    model = with_meft().train()
    adapter = active_adapters(model)[0]
    for number in range(5000):
        adapter.usage.append((1, number))
    assert len(adapter.usage) <= 4096 and adapter.usage[-1] == (1, 4999)


# ---- where the rows live ----


def test_moving_and_casting_the_model_passes_the_rows_by() -> None:
    model = with_meft()
    rows = rows_of(model)
    model.half().bfloat16().to("meta")
    assert all(p.device.type == "meta" for n, p in model.named_parameters() if "meft_" not in n)
    assert same(rows, rows_of(model)) and all(t.dtype == torch.float32 for t in rows_of(model))


def test_a_bf16_base_keeps_fp32_rows_and_moves_bf16() -> None:
    wide, narrow = with_meft(tiny_llama()), with_meft(tiny_llama().bfloat16())
    for model in (wide, narrow):
        assert {t.dtype for t in rows_of(model)} == {torch.float32}
        logits(model)
    assert logits(narrow).dtype == torch.bfloat16
    hidden = [active_adapters(m)[0].link.bytes["d2h", "hidden"] for m in (wide, narrow)]
    assert hidden[0] == tokens().numel() * D * 4 * LAYERS and hidden[1] == hidden[0]  # bf16: two passes, half the bytes


def test_assigned_parameters_come_home() -> None:
    store = active_adapters(with_meft())[0].store
    store.keys = nn.Parameter(store.keys.detach().double())
    assert store.keys.dtype == torch.float32 and store.keys.device == store.home


def test_device_placement_is_resident_and_checked() -> None:
    model = with_meft(placement="device")
    assert isinstance(active_adapters(model)[0].link, Resident)
    assert torch.equal(logits(model), logits(with_meft()))
    with pytest.raises(ValueError, match="move it before get_peft_model"):
        active_adapters(model)[0](torch.empty(1, 2, D, device="meta"))


# ---- saving and loading ----


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_round_trip_is_exact(tmp_path: Path, base: str, choice: dict) -> None:
    model = with_meft(BASES[base](), **choice)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(BASES[base](), tmp_path, **options)
        assert same(rows_of(model), rows_of(again)) and torch.equal(logits(model), logits(again))
        assert again.peft_config["default"].to_core() == model.peft_config["default"].to_core()
        assert any(p.requires_grad for p in again.parameters()) is bool(options.get("is_trainable"))


def test_every_choice_is_written_down(tmp_path: Path) -> None:
    with_meft(n_experts=None, p=None, k=4).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    method = core.MeftOptions(neurons=24, kept=4).to_dict()
    names = {"neurons": "r", "kept": "k", "experts": "n_experts", "probed": "p"}
    assert {names.get(name, name): value for name, value in method.items()}.items() <= written.items()
    assert written["peft_type"] == "MEFT" and written["seed"] == 0 and written["n_experts"] == 24
    assert written["target_modules"] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_auto_class_and_transformers_own_loading(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = with_meft(tiny_llama())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(auto), logits(model))
    assert model.generate(tokens(), max_new_tokens=5).tolist() == auto.generate(tokens(), max_new_tokens=5).tolist()
    for dtype in (torch.float32, torch.bfloat16):
        own = tiny_llama().to(dtype)
        own.load_adapter(str(tmp_path / "adapter"))
        assert same(rows_of(own), rows_of(model))
    assert not any(p.requires_grad for p in own.parameters())
    if TRANSFORMERS_TAKES_PEFT:
        own.delete_adapter("default")
        assert torch.equal(logits(own), logits(tiny_llama().bfloat16()))


def test_a_step_of_an_adapter_that_is_not_active_is_refused() -> None:
    """It would lose the gradients. Once the adapter is active again they are all there."""

    def trained(early: bool) -> list[torch.Tensor]:
        model = with_meft()
        model.add_adapter("other", MeftConfig(**SIZES))
        optimizer = make_optimizer(model, lr=1e-2)
        model.train()
        loss_of(model).backward()
        if early:
            model.set_adapter("other")
            with pytest.raises(ValueError, match="frozen now, as those of an adapter that is not active"):
                optimizer.step()
            model.set_adapter("default")
        optimizer.step()
        return rows_of(model)

    assert same(trained(early=True), trained(early=False))


@pytest.mark.parametrize("change", ["disabled", "switched", "frozen"])
def test_queued_work_is_of_what_was_trained_when_it_was_queued(change: str) -> None:
    """A pass without the adapter, as for a reference model, another adapter's turn, or a frozen model come while the
    last step is still at work in the background."""

    def trained(overlap: bool) -> list[torch.Tensor]:
        model = with_meft(overlap=overlap)
        model.add_adapter("other", MeftConfig(**{**SIZES, "overlap": overlap}))
        adapters, optimizer = active_adapters(model), make_optimizer(model, lr=1e-2)
        model.train()
        for _ in range(3):
            loss_of(model).backward()
            if overlap:
                for adapter in adapters:
                    adapter.store.queue.submit(time.sleep, 0.05, priority=UPDATE)
            optimizer.step()
            optimizer.zero_grad()
            if change == "disabled":
                with model.disable_adapter():
                    time.sleep(0.1)
            elif change == "switched":
                model.set_adapter("other")
                time.sleep(0.1)
                model.set_adapter("default")
            else:
                parameters = [p for adapter in adapters for p in adapter.store.parameters()]
                for parameter in parameters:
                    parameter.requires_grad = False
                time.sleep(0.1)
                for parameter in parameters:
                    parameter.requires_grad = True
        return rows_of(model)

    assert same(trained(overlap=True), trained(overlap=False))


@pytest.mark.parametrize("budget", [0, 4000, 10**7])
def test_gradients_looked_at_while_the_adapter_is_off_are_not_lost(budget: int) -> None:
    """They may wait on the device until then, and come home to neurons that are frozen for the moment."""

    def trained(looks: bool) -> list[torch.Tensor]:
        model = with_meft(device_budget=budget)
        optimizer = make_optimizer(model, lr=1e-2)
        model.train()
        for _ in range(3):
            loss_of(model).backward()
            with model.disable_adapter():
                for parameter in model.parameters():
                    assert not looks or parameter.grad is None or parameter.grad.isfinite().all()
            peft_method.clip_grad_norm_(model, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return rows_of(model)

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_adapters_together_switched_and_deleted(tmp_path: Path) -> None:
    base = logits(tiny_llama())
    model = with_meft()
    alone = logits(model)
    model.add_adapter("second", MeftConfig(r=16, k=4, seed=3, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), alone)  # added, not active
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    fill(model, seed=5)
    other = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, alone) and not torch.equal(both, other)
    with pytest.raises(ValueError, match="exactly one MEFT adapter must be active, found default, second"):
        active_adapters(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again), alone)
    again.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(again), both)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), other) and len(rows_of(model)) == 3 * LAYERS
    assert not any("default" in name for name, _ in model.named_parameters())
    model.delete_adapter("second")
    assert torch.equal(logits(model.base_model.model), base)
    with pytest.raises(ValueError, match="found none"):
        active_adapters(model)


def test_what_is_missing_or_not_finite_is_not_loaded_by_any_way(tmp_path: Path) -> None:
    """Into an adapter that is there peft loads without reading the folder's description, and takes any part of it."""
    model = with_meft()
    state = get_peft_model_state_dict(model)
    key = "base_model.model.model.layers.1.mlp.meft_store.values"
    short = {name: tensor for name, tensor in state.items() if name != key}
    broken = {**state, key: state[key].clone().fill_(float("nan"))}
    model.save_pretrained(tmp_path)
    for bad, message in ((short, f"lacks .*{key.replace('values', '')}"), (broken, "holds .*(NaN|infinity)")):
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(model, bad)
        save_file(bad, tmp_path / "adapter_model.safetensors")
        for load in (
            lambda: PeftModel.from_pretrained(tiny_llama(), tmp_path),
            lambda: model.load_adapter(tmp_path, "default"),
            lambda: model.load_adapter(tmp_path, "second"),
            lambda: tiny_llama().load_adapter(str(tmp_path)),
        ):
            with pytest.raises(ValueError, match="lacks|NaN|not finite|finite"):
                load()
    twin = with_meft(filled=False)
    assert not set_peft_model_state_dict(twin, state).unexpected_keys and same(rows_of(twin), rows_of(with_meft()))
    twin.load_state_dict(tiny_llama().state_dict(), strict=False)  # no adapter at all: nothing of it is asked for


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_batch_of_several_adapters_is_refused(call: str) -> None:
    """It would be answered by the active adapter alone."""
    model = with_meft()
    model.add_adapter("second", MeftConfig(**SIZES))
    run = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=r"adapter_names= is not supported: .*set_adapter\(name\)"):
        run(input_ids=tokens(), adapter_names=["default", "second"])
    run(input_ids=tokens())


def test_beside_lora_of_another_wrapper() -> None:
    """A LoRA already merged or stacked by peft is not ours to judge: the FFN we wrap may hold any linear layers."""
    lora = get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    merged = lora.merge_and_unload()
    want = logits(merged)
    assert torch.equal(logits(get_peft_model(merged, MeftConfig(**SIZES))), want)


# ---- what is refused ----

BAD = {
    "no r": ({"r": None}, "needs r"),
    "no k": ({"k": None}, "k=None"),
    "k above r": ({"k": 25}, r"kept K=25 exceeds neurons R=24.*kept is k"),
    "experts that do not divide": ({"n_experts": 5}, "does not divide"),
    "an unknown choice": ({"reading": "both"}, "reading='both' is unknown"),
    "a size of no machine": ({"r": 10**30}, "is not a size"),
    "a task of no kind": ({"task_type": "POETRY"}, "POETRY"),
    "a task with a head": ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS: MEFT trains .* not the new head"),
    "a task with a head, by its member": ({"task_type": peft.TaskType.TOKEN_CLS}, "task_type=TOKEN_CLS: MEFT"),
}


def test_a_configuration_fits_a_second_model() -> None:
    config = MeftConfig(**SIZES)
    for layers in (2, 4):
        model = get_peft_model(tiny_llama(num_hidden_layers=layers), config)
        assert len(meft_layers(model)) == layers == len(model.peft_config["default"].target_modules)
    assert config.target_modules is None


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes_are_refused(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        MeftConfig(**{**SIZES, **change})


def test_more_memory_than_there_is_is_refused_before_anything_is_made() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"needs [\d,.]+ GiB of host memory for training .* lower r"):
        get_peft_model(model, MeftConfig(r=10**9, k=8, n_experts=10**6, p=1))
    assert not any(isinstance(module, MeftLayer) for module in model.modules())


@pytest.mark.parametrize("targets", [["q_proj"], ["mlp", "lm_head"], "nothing", ["up_proj"]])
def test_targets_that_are_no_ffn_are_refused(targets: list[str] | str) -> None:
    with pytest.raises(ValueError, match="must name whole FFNs such as model.layers.0.mlp"):
        with_meft(target_modules=targets)


@pytest.mark.parametrize("targets", [["model.layers.1.mlp"], r".*\.1\.mlp"])
def test_some_ffns_only(tmp_path: Path, targets: list[str] | str) -> None:
    model = with_meft(target_modules=targets)
    assert [n for n, m in model.get_base_model().named_modules() if isinstance(m, MeftLayer)] == ["model.layers.1.mlp"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_merging_and_data_parallel_are_refused() -> None:
    model = with_meft()
    for call in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="MEFT cannot be merged"):
            call()
    layer = meft_layers(model)[0]
    with pytest.raises(ValueError, match="use one GPU"):
        layer._replicate_for_data_parallel()


def test_a_method_of_the_same_name_in_peft_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        __module__ = "peft.tuners.meft"

    monkeypatch.setitem(register.PEFT_TYPE_TO_CONFIG_MAPPING, peft_method._PEFT_TYPE, Theirs)
    with pytest.raises(ImportError, match="has a method called MEFT of its own"):
        register.peft_type()


def test_registering_again_changes_nothing() -> None:
    before = list(register.PeftType)
    register.register(MeftConfig, peft_method.MeftTuner)
    assert list(register.PeftType) == before and register.PeftType("MEFT") is register.peft_type()
    assert "MEFT" in before and copy.deepcopy(register.peft_type()) is register.peft_type()


# ---- imports ----


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, meft_bench; print(sorted(m for m in ('torch', 'peft', 'transformers') if m in sys.modules))"
    assert fresh(code) == "[]"


def test_the_core_needs_torch_and_transformers_only() -> None:
    """Every import of another installed package from within the core is made to fail."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'peft', 'accelerate', 'datasets', 'lm_eval', 'pandas', 'scipy', 'matplotlib',
                                      'psutil', 'pynvml', 'yaml'}:
            raise ImportError(name)
import transformers, torch, torch._dynamo
sys.meta_path.insert(0, Refuse())
import pkgutil, importlib, meft_bench.meft
for module in pkgutil.walk_packages(meft_bench.meft.__path__, 'meft_bench.meft.'):
    importlib.import_module(module.name)
print(*sorted(m for m in ('peft', 'accelerate', 'lm_eval', 'pandas') if m in sys.modules))
"""
    assert fresh(code) in ("", "accelerate")  # transformers may have loaded it, the core did not


def test_public_names() -> None:
    import meft_bench

    assert meft_bench.MeftConfig is MeftConfig and meft_bench.make_optimizer is make_optimizer
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = meft_bench.nothing
    assert MeftConfig.from_core(small_config()).to_core() == small_config()


def test_distinctive_updates_count_their_background_and_train_few_rows() -> None:
    """Through peft as through the core: counts first, then only chosen rows move; another adapter refuses."""
    model: Any = peft.get_peft_model(tiny_llama(), MeftConfig(**SIZES, distinctive=3))
    with pytest.raises(ValueError, match="count_background"):
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    texts = [row.tolist() for row in tokens(4, 5, seed=3)]
    assert peft_method.count_background(model, texts) == 4
    optimizer = make_optimizer(model, lr=1e-2)
    stores = [adapter.store for adapter in active_adapters(model)]
    before = [store.values.detach().clone() for store in stores]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    moved = [int((store.values.detach() != old).any(1).sum()) for store, old in zip(stores, before, strict=True)]
    assert moved == [3] * len(stores)
    with pytest.raises(ValueError, match="set distinctive"):
        peft_method.count_background(peft.get_peft_model(tiny_llama(), MeftConfig(**SIZES)), texts)
