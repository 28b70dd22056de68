"""The host engine: whatever is kept, deferred or run in the background, training is that of a resident adapter."""

import gc
import math
import subprocess
import sys
import textwrap
import time
import weakref
from collections import Counter

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meft_bench.meft.adam import RowAdamW
from meft_bench.meft.engine import host_part, native
from meft_bench.meft.engine.budget import Split, prices, split
from meft_bench.meft.engine.index import KeyIndex, quantise
from meft_bench.meft.engine.residency import KeptRows
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.model import MeftModel, attach
from tests.meft.tiny_models import (
    LAYERS,
    D,
    fill_values,
    hidden,
    make_adapter,
    named,
    next_token_loss,
    small_config,
    tiny_stack,
    tokens,
)

EVERYTHING = 10**8
"""A device budget that makes tiny models resident adapters."""
ALL_ROWS = LAYERS * (6 * D * 4 + 24 * D * 16)
"""One that holds all rows of the usual one, in fp32 and with an untrained router to select with, and no moments."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets buy rows without their optimizer, as with several ranks."""
    monkeypatch.setattr(host_part, "split", split_for_ranks)


def split_for_ranks(*given, host_optimizer: bool, **settings) -> Split:
    return split(*given, host_optimizer=True, **settings)


def tiny_meft(**options) -> MeftModel:
    meft = attach(tiny_stack(), small_config(**options), seed=3)
    fill_values(meft)
    meft.model.train()
    return meft


def micro_batch(meft: MeftModel, seed: int, accumulation: int = 1) -> float:
    ids = tokens(seed=seed)
    loss = next_token_loss(meft.model(ids), ids) / accumulation
    loss.backward()
    return loss.item()


def train(
    meft: MeftModel, steps: int = 5, accumulation: int = 2, clip: float | None = None, eager: bool = False
) -> tuple[list[float], list[Tensor]]:
    """Losses and gradient norms on the way, and all weights at the end. eager: every row is updated at every step."""
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    assert isinstance(optimizer, RowAdamW)
    seen = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / steps  # a schedule, which late updates must remember
        for micro in range(accumulation):
            seen.append(micro_batch(meft, step * accumulation + micro, accumulation))
        if clip is not None:
            seen.append(float(meft.clip_grad_norm_(clip)))
        optimizer.step()
        optimizer.zero_grad()
        if eager:
            optimizer.settle()
    return seen, [p.detach().clone() for store in meft.stores for p in store.parameters()]


def assert_same(got: tuple[list[float], list[Tensor]], wanted: tuple[list[float], list[Tensor]], tolerance: float):
    if tolerance == 0:
        assert got[0] == wanted[0]
    assert got[0] == pytest.approx(wanted[0], rel=10 * tolerance, abs=10 * tolerance)
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def learns(meft: MeftModel) -> None:
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(6):
        losses.append(micro_batch(meft, 0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


# ---- the same training, whatever the engine does ----

SIZES = st.sampled_from([(24, 6, 2, 5), (24, 24, 3, 2), (60, 6, 1, 3), (32, 1, 1, 32), (40, 8, 8, 4), (96, 12, 2, 1)])
CHOICES = st.fixed_dictionaries(
    {
        "reading": st.sampled_from(["per_token", "union"]),
        "gate": st.sampled_from(["score", "softmax", "none"]),
        "selection": st.sampled_from(["positive", "signed"]),
        "key_experts": st.booleans(),
        "frozen_keys": st.booleans(),
        "adam": st.sampled_from(["dense", "lazy"]),
        "retrieval": st.sampled_from(["auto", "host", "device"]),
        "moments": st.sampled_from(["fp32", "bf16"]),
    }
)


POINTS = ["nothing", "router", "keys", "rows alone", "some rows", "keys and some rows", "everything"]
"""What a budget may hold, in the order in which it buys."""


def budget_for(point: str, fields: dict) -> int:
    """The bytes that buy just this much for the tiny model in fp32; 0 where there is nothing of the kind to buy."""
    config = small_config(**fields)
    price = prices(config, D, torch.float32)
    trained = price.router if config.trains_router else 0  # any other serves the search alone, and comes with the keys
    return (
        LAYERS
        * {
            "nothing": 0,
            "router": trained,
            "keys": price.router + price.keys,
            "keys and some rows": price.router + price.keys + price.router_moments + 5 * (price.value + price.moments),
            "some rows": trained + price.router_moments + 5 * (price.row + price.moments),
            "rows alone": trained + price.row,  # with no room for the moments of one
            "everything": price.everything,
        }[point]
    )


@settings(deadline=None, max_examples=50)
@given(
    SIZES,
    CHOICES,
    st.integers(1, 4),
    st.sampled_from([None, 0.05]),
    st.sampled_from(POINTS),
    st.booleans(),
)
def test_training_is_that_of_a_resident_adapter(
    sizes: tuple[int, int, int, int], choices: dict, accumulation: int, clip: float | None, point: str, overlap: bool
) -> None:
    """Bit for bit in fp32 on one thread; to rounding where rows are evicted in the middle of a window, as their
    gradients are then added up in another order, and where all rows are lent as they lie, as products then have other
    shapes."""
    neurons, experts, probed, kept = sizes
    if not choices["key_experts"] and choices["retrieval"] == "device":
        choices["retrieval"] = "auto"  # asked for outright, that is int8
    fields = {**choices, "neurons": neurons, "experts": experts, "probed": probed, "kept": kept}
    resident = {**fields, "retrieval": "auto", "placement": "device"}
    reference = train(tiny_meft(**resident), accumulation=accumulation, clip=clip, eager=True)
    meft = tiny_meft(**fields, device_budget=budget_for(point, fields), overlap=overlap)
    got = train(meft, accumulation=accumulation, clip=clip)
    lent_whole = point == "everything" and choices["reading"] == "per_token" and choices["retrieval"] != "host"
    exact = "rows" not in point and not lent_whole
    # A bf16 moment that lies near a rounding edge may take the other side after a sum in another order.
    tolerance = 0.0 if exact else 2e-6 if choices["moments"] == "fp32" else 2e-3
    assert_same(got, reference, tolerance)


@pytest.mark.parametrize("options", [{}, {"reading": "union"}, {"frozen_keys": True}, {"adam": "lazy"}])
def test_native_kernels_and_plain_torch_train_alike(options: dict) -> None:
    fields = {"neurons": 96, "experts": 12, "kept": 2, **options}
    if not native.fits(torch.zeros(1)):
        pytest.skip(native.status())
    with_kernels = train(tiny_meft(**fields))
    with native.without_kernels():
        without = train(tiny_meft(**fields))
    assert_same(with_kernels, without, 2e-6)


def test_threads_change_nothing_beyond_rounding() -> None:
    one = train(tiny_meft())
    torch.set_num_threads(2)
    assert_same(train(tiny_meft(overlap=True)), one, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_put_off_updates_are_the_same_updates(weight_decay: float) -> None:
    """Rows that nothing reads for many steps, then all of them: as if updated every step."""

    def run(eager: bool) -> list[Tensor]:
        store = make_adapter(small_config(gate="none")).store
        from meft_bench.meft.adam import DenseRowAdamW

        optimizer = DenseRowAdamW([store], lr=1e-2, weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(0)
        for step in range(400):
            if step < 20 or step % 97 == 0:
                rows_U = torch.randperm(24, generator=generator)[:3].sort().values
                store.add_gradients(rows_U, torch.randn(3, 2, D, generator=generator))
            optimizer.step()
            optimizer.zero_grad()
            if eager:
                optimizer.settle()
        state = optimizer.state_dict()["state"]
        return [
            store.keys.detach(),
            store.values.detach(),
            *(s[k] for s in state.values() for k in ("exp_avg", "exp_avg_sq")),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_a_changed_beta_ends_what_was_put_off() -> None:
    def run(eager: bool) -> Tensor:
        meft = tiny_meft(gate="none")
        optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
        for step in range(6):
            micro_batch(meft, step % 2)
            if step == 3:
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)
            optimizer.step()
            optimizer.zero_grad()
            if eager:
                optimizer.settle()
        return torch.stack([store.values.detach() for store in meft.stores])

    assert torch.equal(run(True), run(False))


def test_bf16_moments_are_right_on_average() -> None:
    """Rounding to nearest would freeze v: 0.1 % of decay is less than half a step of bf16."""
    store = make_adapter(small_config(neurons=400, experts=20, kept=5)).store
    from meft_bench.meft.adam import DenseRowAdamW

    optimizer = DenseRowAdamW([store], lr=1e-3, moments="bf16")
    store.add_gradients(torch.arange(400), torch.ones(400, 2, D))
    for _ in range(200):
        optimizer.step()
        optimizer.zero_grad()
    second = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    assert second.float().mean().item() == pytest.approx(1e-3 * 0.999**199, rel=0.02)
    held = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if t.dim() == 2)
    assert held == 2 * 2 * sum(p.numel() for p in store.parameters())


# ---- no byte twice ----


def row_bytes(meft: MeftModel) -> Counter:
    return Counter({way: meft.link.bytes[way] for way in (("h2d", "rows"), ("d2h", "grads"))})


def test_within_a_window_no_row_crosses_twice(rows_alone: None) -> None:
    meft = tiny_meft(device_budget=ALL_ROWS, gate="none", retrieval="host")
    touched = [torch.zeros(24, dtype=torch.bool) for _ in meft.stores]
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        meft.link.reset()
        for seed in range(6):
            micro_batch(meft, seed)
        rows_sent = meft.link.bytes["h2d", "rows"] // (2 * D * 4)
        assert meft.link.bytes["d2h", "grads"] == 0, "gradients wait beside their rows"
        meft.collect_gradients()
        for marks, store in zip(touched, meft.stores, strict=True):
            marks.zero_()
            marks[store.grads.filled_rows()] = True
        union = sum(int(marks.sum()) for marks in touched)
        assert rows_sent == union and meft.link.bytes["d2h", "grads"] == union * 2 * D * 4
        optimizer.step()
        optimizer.zero_grad()
    twice = tiny_meft(gate="none")
    for seed in range(6):
        micro_batch(twice, seed)
    assert row_bytes(twice)["h2d", "rows"] > 2 * rows_sent * 2 * D * 4


@pytest.mark.parametrize("retrieval", ["host", "auto"])
def test_rows_cross_again_only_after_a_step(retrieval: str, rows_alone: None) -> None:
    meft = tiny_meft(device_budget=ALL_ROWS, gate="none", adam="lazy", retrieval=retrieval)
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)

    def rows_sent(since: bool = False) -> int:
        if not since:
            meft.link.reset()
        micro_batch(meft, 0)
        return meft.link.bytes["h2d", "rows"] // (2 * D * 4)

    assert rows_sent() > 0
    meft.collect_gradients()
    optimizer.zero_grad()  # a step that is skipped
    assert rows_sent() == 0
    optimizer.step()
    optimizer.zero_grad()
    stale = [(a.residency._version_R < 0) | (a.store.changed_R == a.store.version) for a in meft.adapters]
    used: list[Tensor] = []
    for adapter in meft.adapters:
        adapter.on_select = lambda h, chosen: used.append(chosen.union_U) or chosen
    if retrieval == "auto":  # all keys are searched on the device, so all rows are renewed, as part of the step
        assert rows_sent(since=True) == sum(int(marks.sum()) for marks in stale) > 0
    else:
        assert rows_sent() == sum(int(marks[union_U].sum()) for marks, union_U in zip(stale, used, strict=True)) > 0


def test_the_budget_is_kept_and_said() -> None:
    for budget in (2000, 6000, 14000, 20000):
        meft = tiny_meft(device_budget=budget)
        micro_batch(meft, 0)
        assert 0 < meft.device_bytes == split(meft.config, LAYERS, D, torch.float32).nbytes <= budget
    with pytest.raises(ValueError, match=r"device_budget=100 bytes buys nothing: 2 layers need at least \d+"):
        micro_batch(tiny_meft(device_budget=100), 0)


@pytest.mark.parametrize("rows", [1, 3, 7, 15])
def test_no_gradient_is_lost_under_eviction(rows: int, rows_alone: None) -> None:
    budget = LAYERS * rows * 16 * D
    small, none = tiny_meft(gate="none", device_budget=budget, retrieval="host"), tiny_meft(gate="none")
    for seed in range(8):
        micro_batch(small, seed)
        micro_batch(none, seed)
    small.collect_gradients()
    for a, b in zip(small.stores, none.stores, strict=True):
        torch.testing.assert_close(a.keys.grad, b.keys.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.values.grad, b.values.grad, rtol=1e-5, atol=1e-6)
    kept = [adapter.residency for adapter in small.adapters]
    assert all(
        isinstance(k, KeptRows) and k.capacity == rows and int((k.slots.slot_R >= 0).sum()) == rows for k in kept
    )


def test_rows_used_most_stay(rows_alone: None) -> None:
    adapter = make_adapter(small_config(gate="none", device_budget=3 * 16 * D))
    adapter.prepare(hidden())
    loan = adapter.take().loan
    loan.release(loan.arrived())
    kept = adapter.residency
    assert isinstance(kept, KeptRows)
    for union in ([1, 2, 3], [1, 2, 9], [1, 2, 3], [1, 2, 11], [1, 2, 12]):
        loan = kept.lend(torch.tensor(union), training=True)
        loan.release(loan.arrived())
    assert kept.slots.slot_R[[1, 2]].ge(0).all()


@pytest.mark.parametrize("budget", [6000, EVERYTHING])
def test_a_forward_pass_without_backward_holds_nothing(budget: int) -> None:
    meft = tiny_meft(device_budget=budget)
    for seed in range(3):  # an early stop, an exception in the loss
        meft.model(tokens(seed=seed))
    gc.collect()
    for adapter in meft.adapters:
        rows = adapter.residency
        assert not rows.readers if isinstance(rows, WholeRows) else not rows.slots.pins_C.any()
    if budget != EVERYTHING:
        return
    reference = tiny_meft()
    assert_same(train(meft), train(reference), 0.0)


def test_backward_uses_the_rows_of_its_own_forward() -> None:
    """A step in between renews the kept rows, but not those that a backward pass still reads."""
    meft, plain = tiny_meft(device_budget=EVERYTHING, gate="none"), tiny_meft(gate="none")
    for model in (meft, plain):
        optimizer = model.make_optimizer(lr=1e-1, weight_decay=0.0)
        ids = tokens(seed=1)
        early = next_token_loss(model.model(ids), ids)
        micro_batch(model, 2)
        optimizer.step()
        optimizer.zero_grad()
        micro_batch(model, 3)  # other rows and new versions of the same
        early.backward()
        model.collect_gradients()
    for a, b in zip(meft.stores, plain.stores, strict=True):
        torch.testing.assert_close(a.values.grad, b.values.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_the_same_graph_twice(budget: int) -> None:
    meft, twice = tiny_meft(device_budget=budget), tiny_meft(device_budget=budget)
    ids = tokens()
    for _ in range(2):
        next_token_loss(meft.model(ids), ids).backward()
    loss = next_token_loss(twice.model(ids), ids)
    loss.backward(retain_graph=True)
    loss.backward()
    for model in (meft, twice):
        model.collect_gradients()
    for a, b in zip(meft.stores, twice.stores, strict=True):
        torch.testing.assert_close(a.values.grad, b.values.grad)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [0, 3000, EVERYTHING])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool, budget: int, overlap: bool) -> None:
    """A checkpoint runs forward twice; the second time other rows may have their place on the device."""
    plain, again = tiny_meft(gate="none"), tiny_meft(gate="none", device_budget=budget, overlap=overlap)
    for layer in again.model.layers:
        inner = layer.forward
        layer.forward = lambda h, inner=inner: checkpoint(inner, h, use_reentrant=reentrant)
    again.model.embed.register_forward_hook(lambda module, args, out: out.requires_grad_())
    for seed in range(4):
        micro_batch(plain, seed)
        micro_batch(again, seed)
    again.collect_gradients()
    for a, b in zip(plain.stores, again.stores, strict=True):
        torch.testing.assert_close(a.keys.grad, b.keys.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.values.grad, b.values.grad, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_frees_the_rows() -> None:
    """Between forward and backward nothing that was sent is alive."""
    meft, sent = tiny_meft(gate="none"), []
    copy = meft.link._copy

    def watched(source, target, key, dtype):
        transfer = copy(source, target, key, dtype)
        if key == ("h2d", "rows"):
            sent.append(weakref.ref(transfer.tensor))
        return transfer

    meft.link._copy = watched
    h = meft.model.embed(tokens()).requires_grad_()
    out = checkpoint(meft.model.layers[0], h, use_reentrant=False)
    gc.collect()
    assert len(sent) == 1 and sent[0]() is None
    out.sum().backward()
    assert len(sent) == 2


@pytest.mark.parametrize("budget", [0, EVERYTHING])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_empty_selection_trains(budget: int, overlap: bool) -> None:
    meft = tiny_meft(device_budget=budget, overlap=overlap, gate="none")
    with torch.no_grad():
        for store in meft.stores:
            store.keys.zero_()  # no neuron fires
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    for seed in range(2):
        micro_batch(meft, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert [u for adapter in meft.adapters for _, u in adapter.usage] == [0] * 4
    assert not any(store.keys.any() for store in meft.stores)


# ---- selecting ----


@pytest.mark.parametrize(
    "options", [{"key_experts": False}, {"probed": 6}, {"probed": 6, "gate": "none"}, {"probed": 6, "reading": "union"}]
)
def test_lookahead_changes_only_which_neurons(options: dict) -> None:
    """When every token keeps all neurons, selecting earlier changes nothing."""
    fields = {**options, "kept": 24, "selection": "signed"}
    assert_same(train(tiny_meft(**fields, lookahead=1)), train(tiny_meft(**fields)), 2e-6)


def test_lookahead_selects_from_the_layer_before() -> None:
    meft = tiny_meft(lookahead=1)
    inputs, chosen = [], []
    for layer, adapter in zip(meft.model.layers, meft.adapters, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().reshape(-1, D)))
        adapter.on_select = lambda h, selection: chosen.append(selection) or selection
    meft.model(tokens())
    meft.adapters[1].on_select = None
    wanted = MeftAdapter.select(meft.adapters[1], inputs[0], None)
    assert torch.equal(chosen[1].union_U, wanted.union_U) and torch.equal(chosen[1].local_TK, wanted.local_TK)
    assert meft.link.bytes["d2h", "hidden"] == inputs[0].nbytes, "the last layer's own input stays on the device"


def test_lookahead_says_what_it_cannot() -> None:
    with pytest.raises(ValueError, match="lookahead=2 reaches past the 2 layers"):
        attach(tiny_stack(), small_config(lookahead=2))
    meft = tiny_meft(lookahead=1)
    with pytest.raises(RuntimeError, match="run the whole model, without gradient checkpointing"):
        meft.adapters[1](hidden())


@pytest.mark.parametrize("scoring", ["bf16", "int8"])
def test_narrow_keys_choose_nearly_the_same(scoring: str) -> None:
    fields = {"neurons": 96, "experts": 12, "kept": 8, "probed": 4}
    exact, narrow = make_adapter(small_config(**fields)), make_adapter(small_config(**fields, scoring=scoring))
    h = hidden(4, 8).reshape(-1, D)
    a, b = exact.select(h, None), narrow.select(h, None)
    neurons = [torch.where(s.local_TK >= 0, s.union_U[s.local_TK.clamp(min=0)], -1) for s in (a, b)]
    shared = sum(len(set(x.tolist()) & set(y.tolist())) for x, y in zip(*neurons, strict=True))
    assert shared / neurons[0].numel() > 0.9
    learns(tiny_meft(**fields, scoring=scoring))


@pytest.mark.parametrize("scoring", ["bf16", "int8"])
def test_narrow_keys_follow_training(scoring: str) -> None:
    meft = tiny_meft(scoring=scoring, probed=6)
    train(meft)
    micro_batch(meft, 0)
    for adapter in meft.adapters:
        index, keys_RD = adapter.index, adapter.store.keys.detach()
        assert isinstance(index, KeyIndex)
        if scoring == "bf16":
            assert torch.equal(index.keys_RD, keys_RD.bfloat16())
        else:
            wanted, scales_R = quantise(keys_RD)
            assert torch.equal(index.keys_RD, wanted) and torch.equal(index.scales_R, scales_R)
            error = (wanted * scales_R[:, None] - keys_RD).abs()
            assert (error <= 0.5001 * scales_R[:, None]).all()


def test_keys_on_the_device_are_searched_there() -> None:
    fields = {"key_experts": False, "neurons": 60, "kept": 6}
    meft = tiny_meft(**fields, retrieval="device")
    learns(meft)
    assert ("d2h", "hidden") not in meft.link.bytes and meft.link.bytes["h2d", "key_index"] > 0
    assert meft.device_bytes == LAYERS * 60 * (D + 4)
    everything = {**fields, "kept": 60, "selection": "signed"}
    assert_same(train(tiny_meft(**everything, retrieval="device")), train(tiny_meft(**everything)), 2e-6)


def test_bf16_wire_halves_what_crosses() -> None:
    wide, narrow = tiny_meft(gate="none"), tiny_meft(gate="none", wire="bf16")
    for meft in (wide, narrow):
        micro_batch(meft, 0)
    assert {w: 2 * n for w, n in row_bytes(narrow).items()} == row_bytes(wide)
    assert train(narrow)[0] == pytest.approx(train(wide)[0], rel=2e-2)


# ---- in the background ----


def test_an_error_in_the_background_reaches_the_loop_with_its_cause() -> None:
    meft = tiny_meft(overlap=True)
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    micro_batch(meft, 0)

    def broken(*args):
        raise ZeroDivisionError("no such row")

    meft.stores[1].add_gradients = broken
    with pytest.raises(
        RuntimeError, match="host work of adapter layer 1 failed .*no such row.*last checkpoint"
    ) as caught:
        for seed in range(3):
            micro_batch(meft, seed)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.settle()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="no such row"):
        meft.stores[1].settle()
    meft.stores[0].settle()


@pytest.mark.parametrize("stopped", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"scoring": "int8"},
        {"retrieval": "device"},
        {"device_budget": 12000},
        {"device_budget": EVERYTHING},
    ],
    ids=named,
)
def test_after_a_pass_that_was_stopped_training_goes_on_with_the_same_bits(
    options: dict, error: type[BaseException], stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a copy to the device was under way, in the first pass or a later one: ctrl-C, or a device without
    room."""

    def run(stop_at: int | None) -> tuple[list[Tensor], int]:
        meft, copies = tiny_meft(**options), 0
        optimizer, copy_there = meft.make_optimizer(lr=1e-2), meft.link.send_to_device

        def stopping(*given, **named):
            nonlocal copies
            copies += 1
            if copies == stop_at:
                raise error
            return copy_there(*given, **named)

        for step in range(4):
            if step == stopped:
                optimizer.settle()  # nothing is queued: what follows is the pass alone
                monkeypatch.setattr(meft.link, "send_to_device", stopping)
                try:
                    with torch.no_grad():
                        meft.model(tokens(seed=7))
                except error:
                    assert stop_at is not None
                monkeypatch.setattr(meft.link, "send_to_device", copy_there)
            micro_batch(meft, step)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for store in meft.stores for p in store.parameters()], copies

    wanted, copies = run(None)
    for stop_at in range(1, copies + 1):
        assert all(map(torch.equal, run(stop_at)[0], wanted)), stop_at


def test_gradients_are_complete_when_backward_returns() -> None:
    """Whatever clips next need not know of threads."""
    meft, serial = tiny_meft(overlap=True), tiny_meft()
    slow = [store.add_gradients for store in meft.stores]
    for store, inner in zip(meft.stores, slow, strict=True):
        store.add_gradients = lambda *args, inner=inner: (time.sleep(0.05), inner(*args))
    for model in (meft, serial):
        micro_batch(model, 0)
    norms = [torch.nn.utils.clip_grad_norm_([p for s in m.stores for p in s.parameters()], 0.1) for m in (meft, serial)]
    assert torch.equal(*norms)


@pytest.mark.parametrize("to_none", ["after the step", "before backward"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"overlap": True}, {"overlap": True, "device_budget": EVERYTHING}], ids=named)
def test_no_gradient_is_lost_where_others_set_grad_to_none(options: dict, training: bool, to_none: str) -> None:
    """In the background as at once, and in eval mode as in training."""

    def norms(**options) -> list[float]:
        meft = tiny_meft(**options)
        meft.model.train(training)
        optimizer, found = meft.make_optimizer(lr=1e-2), []
        for seed in range(3):
            loss = next_token_loss(meft.model(tokens(seed=seed)), tokens(seed=seed))
            if to_none == "before backward":
                meft.model.zero_grad()
            loss.backward()
            found.append(float(meft.clip_grad_norm_(1e9)))
            optimizer.step()
            if to_none == "after the step":
                meft.model.zero_grad()
        return found

    assert norms(**options) == pytest.approx(norms(), rel=1e-5) and all(norms())


def test_reading_weights_waits_for_the_background() -> None:
    meft, serial = tiny_meft(overlap=True), tiny_meft()
    for model in (meft, serial):
        optimizer = model.make_optimizer(lr=1e-2, weight_decay=0.0)
        for seed in range(3):
            micro_batch(model, seed)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(meft.stores, serial.stores, strict=True):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]) and tensor.is_contiguous()


def test_threads_end_with_the_process() -> None:
    code = """
        import torch
        from tests.meft.test_engine import micro_batch, tiny_meft
        meft = tiny_meft(overlap=True)
        optimizer = meft.make_optimizer(lr=1e-2)
        for seed in range(3):
            micro_batch(meft, seed)
            optimizer.step()
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize("options", [{}, {"device_budget": 6000, "overlap": True}], ids=["plain", "kept"])
def test_memory_stays_flat(options: dict) -> None:
    meft = tiny_meft(**options)
    optimizer = meft.make_optimizer(lr=1e-3, weight_decay=0.0)
    process, sizes = psutil.Process(), []
    for step in range(1000):
        micro_batch(meft, step % 7)
        optimizer.step()
        optimizer.zero_grad()
        if step in (300, 999):
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 4 << 20


# ---- a diverged adapter ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_budget": EVERYTHING},
        {"scoring": "int8"},
        {"scoring": "bf16"},
        {"selection": "relu_first"},
        {"reading": "union"},
    ],
)
@pytest.mark.parametrize("part", ["keys", "values", "router"])
def test_a_diverged_adapter_does_not_go_quiet(part: str, options: dict) -> None:
    """NaN in the rows of every expert is NaN in the loss, as of a resident adapter, and in the gradients."""
    meft = tiny_meft(**{"neurons": 96, "experts": 12, "kept": 1, **options})
    with torch.no_grad():
        getattr(meft.stores[0], part).fill_(torch.nan)
    assert math.isnan(micro_batch(meft, 0))
    meft.collect_gradients()
    assert any(p.grad.isnan().any() for store in meft.stores for p in store.parameters())
