"""The engine on a GPU: copies on streams of their own, host work beside the device's, the numbers of the CPU.

Every comparison also runs with the CPU as the device, so that it cannot break unseen where there is no GPU.

What may differ. Sums run in another order on a GPU. A sum of n fp32 terms is off by at most n * 2^-24 of the sum of
their absolute values (Higham 2002, section 4.2); TERMS bounds n along the longest way through the tiny model. Adam
divides by the gradient's own size, so where a gradient is as small as its error its sign may flip, and one element then
moves the other way by the whole rate: single elements of a trajectory are compared by nobody. Compared are losses, the
norm of a tensor's difference over the tensor's, and every element of a step whose update is smooth in the gradient.
"""

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from meft_bench.meft.adam import RowAdamW
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import at
from meft_bench.meft.model import MeftModel, attach
from tests.meft.tiny_models import LAYERS, VOCAB, D, fill_values, next_token_loss, small_config, tiny_stack, tokens

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]

_TOKENS = 2 * 6
TERMS = LAYERS * (_TOKENS + 2 * D + 2 * D) + 2 * D + VOCAB
"""Terms that are added up one after the other from a weight through loss to gradient: per layer the tokens of cumsum
and gradients, two matrices and the adapter's rows; norm, head and softmax."""
EPS = 2.0**-24
LOSS, NORM = 16 * TERMS * EPS, 1e-3
"""Relative: of a loss after a few steps (errors of weights come on top of those of sums), of a tensor's difference."""

SHARES = (0.0, 0.05, 0.35, 0.7, 1.0)
ENGINES: list[dict[str, Any]] = [
    *({"overlap": overlap, "share": share} for share in SHARES for overlap in (False, True)),
    *({"overlap": overlap, "retrieval": "device"} for overlap in (False, True)),
    {"overlap": True, "retrieval": "device", "share": 0.2},
    {"overlap": True, "retrieval": "host", "share": 0.35},
    {"overlap": True, "retrieval": "host", "share": 1.0},
    {"overlap": True, "lookahead": 0, "scoring": "int8", "probed": 6, "kept": 24, "selection": "signed"},
    {"overlap": True, "adam": "lazy", "share": 1.0},
    {"overlap": True, "frozen_keys": True, "share": 0.7},
    {"overlap": True, "reading": "union", "gate": "softmax"},
    {"overlap": True, "gate": "none", "share": 0.7},
]
_METHOD = "neurons activation probed kept selection adam frozen_keys reading gate key_experts".split()
"""Options that say what is computed, and not how."""


def config_of(engine: dict[str, Any]) -> MeftOptions:
    options = {name: value for name, value in engine.items() if name != "share"}
    share = engine.get("share", 0.0)
    budget = at(share, small_config(**options), LAYERS, D, torch.float32) if share else 0
    return small_config(**options, device_budget=budget)


def meft_on(device: str, engine: dict[str, Any], dtype: torch.dtype = torch.float32) -> MeftModel:
    meft = attach(tiny_stack().to(device, dtype), config_of(engine), seed=3)
    fill_values(meft)
    meft.model.train()
    return meft


def reference(engine: dict[str, Any], dtype: torch.dtype = torch.float32) -> MeftModel:
    """The same method on the CPU at budget 0, serial."""
    return meft_on("cpu", {name: value for name, value in engine.items() if name in _METHOD}, dtype)


def micro_batch(meft: MeftModel, device: str, seed: int, accumulation: int = 1) -> Tensor:
    ids = tokens(seed=seed).to(device)
    loss = next_token_loss(meft.model(ids), ids) / accumulation
    loss.backward()
    return loss.detach()


def train(meft: MeftModel, device: str, steps: int = 6, accumulation: int = 2) -> tuple[list[float], list[Tensor]]:
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            losses.append(micro_batch(meft, device, step * accumulation + micro, accumulation))
        meft.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [float(loss) for loss in losses], weights(meft)


def weights(meft: MeftModel) -> list[Tensor]:
    return [p.detach().cpu().clone() for store in meft.stores for p in store.parameters()]


def assert_trained_alike(got: tuple[list[float], list[Tensor]], wanted: tuple[list[float], list[Tensor]]) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=LOSS)
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        assert (ours - theirs).norm() <= NORM * theirs.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_gpu_trains_as_the_cpu_does(engine: dict[str, Any], device: str) -> None:
    wanted = train(reference(engine), "cpu")
    assert_trained_alike(train(meft_on(device, engine), device), wanted)


def one_smooth_step(meft: MeftModel, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients, weights after a step). With Adam's eps at 1 an element moves by rate * g / (|g| + 1), which follows g
    at most as steeply as SGD does."""
    optimizer = meft.make_optimizer(lr=1e-2, eps=1.0, weight_decay=0.0)
    micro_batch(meft, device, seed=0)
    gradients = [p.grad.cpu().clone() for s in meft.stores for p in s.parameters() if p.grad is not None]
    optimizer.step()
    return gradients, weights(meft)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_every_element_of_a_smooth_step_is_the_cpus_to_rounding(engine: dict[str, Any], device: str) -> None:
    wanted, got = one_smooth_step(reference(engine), "cpu"), one_smooth_step(meft_on(device, engine), device)
    assert len(got[0]) == len(wanted[0]) > 0
    # The absolute values that were added up are not known; those of the largest element stand for all.
    errors = [TERMS * EPS * float(g.abs().max()) for g in wanted[0]]
    for ours, theirs, error in zip(got[0], wanted[0], errors, strict=True):
        assert (ours - theirs).abs().max() <= error
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        assert ((ours - theirs).abs() <= 1e-2 * max(errors) + 4 * EPS * theirs.abs()).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES[:4] + ENGINES[8:12], ids=str)
def test_a_trainer_on_a_stream_of_its_own_trains_the_same(engine: dict[str, Any], device: str) -> None:
    """The stream is held up before every pass: host work that did not wait for it would read what is not there yet."""
    wanted = train(reference(engine), "cpu")
    meft = meft_on(device, engine)
    stream: Any = contextlib.nullcontext()
    if device == "cuda":
        torch.cuda.synchronize()
        stream = torch.cuda.stream(torch.cuda.Stream())
        meft.model.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))
    with stream:
        got = train(meft, device)
    assert_trained_alike(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.get("share") == 0.0], ids=str)
def test_products_of_an_odd_number_of_rows_are_those_of_the_cpu(engine: dict[str, Any], device: str) -> None:
    """In bfloat16, whose products want a multiple of 8 rows: U is padded, and what pads must not be seen. Every token
    keeps every neuron, and no activation has a kink: hidden states that differ by rounding would else now and then
    choose another row, or the other side, and that row's gradient is no rounding (of 40 runs on the CPU with a fiftieth
    of all elements one unit off, 11 failed)."""
    engine = {**engine, "neurons": 30, "probed": 6, "kept": 30, "selection": "signed", "activation": "silu"}
    wanted = reference(engine, torch.bfloat16)
    got = meft_on(device, engine, torch.bfloat16)
    for seed in range(3):
        theirs, ours = micro_batch(wanted, "cpu", seed), micro_batch(got, device, seed)
        assert float(ours) == pytest.approx(float(theirs), rel=2.0**-6)
    assert any(union % 8 for adapter in got.adapters for _, union in adapter.usage)
    for (name, ours), (_, theirs) in zip(_gradients(got), _gradients(wanted), strict=True):
        assert (ours - theirs).norm() <= 2.0**-4 * theirs.norm(), name


def _gradients(meft: MeftModel) -> list[tuple[str, Tensor]]:
    named = [(f"layer {i} {n}", p) for i, s in enumerate(meft.stores) for n, p in s.named_parameters()]
    return [(name, p.grad.float().cpu()) for name, p in named if p.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key_experts", [True, False])
def test_keys_on_the_device_are_searched_there(device: str, key_experts: bool) -> None:
    """Every neuron is kept, so that scores of int8 keys choose what exact ones do; no hidden states cross."""
    options = {"key_experts": key_experts, "kept": 24, "selection": "signed", **({"probed": 6} if key_experts else {})}
    wanted = train(reference(options), "cpu")
    meft = meft_on(device, {**options, "retrieval": "device"})
    assert train(meft, device)[0] == pytest.approx(wanted[0], rel=LOSS)
    assert ("d2h", "hidden") not in meft.link.bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", SHARES)
def test_background_and_serial_work_count_the_same_bytes(share: float, device: str) -> None:
    counts = []
    for overlap in (False, True):
        meft = meft_on(device, {"overlap": overlap, "share": share})
        train(meft, device)
        counts.append(dict(meft.link.bytes))
    assert counts[0] == counts[1] and (share == 1.0 or sum(counts[0].values()) > 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_no_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a device-wide synchronisation")

    meft = meft_on(device, {"overlap": True})
    assert isinstance(meft.make_optimizer(lr=1e-2), RowAdamW)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    train(meft, device, steps=2)


@pytest.mark.parametrize("device", DEVICES)
def test_with_every_row_on_the_device_the_host_waits_for_nothing(device: str) -> None:
    """From the second step on (the first hands the rows over), torch itself refuses whatever waits for the device."""
    meft = meft_on(device, {"overlap": True, "share": 1.0})
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    batches = [tokens(seed=seed).to(device) for seed in range(5)]
    try:
        for number, ids in enumerate(batches):
            if number == 3 and device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            next_token_loss(meft.model(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(w).all() for w in weights(meft))


def test_what_torch_says_of_a_thread_s_first_product_fails_no_test() -> None:
    """The thread may be one of the engine's, whose warnings are errors in tests."""
    said = "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context..."
    warnings.warn_explicit(said, UserWarning, "routing.py", 1, module="meft_bench.meft.routing")
    with pytest.raises(UserWarning):
        warnings.warn_explicit("another", UserWarning, "routing.py", 1, module="meft_bench.meft.routing")
