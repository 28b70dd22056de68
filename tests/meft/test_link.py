"""Bytes over the link against the closed formula: per layer and micro-batch T*D hidden, 2*D*U rows, 2*D*U gradients."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.meft.engine import micro_batch as micro_batches
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.model import MeftModel, attach
from meft_bench.meft.reference import kept_neurons, neuron_outputs
from tests.meft.tiny_models import (
    GATES,
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

K, N = 5, 6
INT32 = 4
B, LENGTH = 2, 6
T = B * LENGTH
DTYPES = [torch.float32, torch.bfloat16]


def attached(dtype: torch.dtype = torch.float32, **options) -> MeftModel:
    meft = attach(tiny_stack().to(dtype).train(), small_config(**options))
    fill_values(meft)
    return meft


def micro_batch(meft: MeftModel, seed: int = 0) -> list[int]:
    """One forward and backward; returns U of each layer, counted by the formula from the FFNs' inputs."""
    sizes = []

    def count(module, args) -> None:
        store = meft.stores[len(sizes)]
        o_TR, candidates_TR = neuron_outputs(args[0].float().reshape(-1, D), store.keys, store.router, meft.config)
        sizes.append(int(kept_neurons(o_TR, candidates_TR, meft.config).any(0).sum()))

    watches = [layer.mlp.register_forward_pre_hook(count) for layer in meft.model.layers]
    ids = tokens(B, LENGTH, seed)
    next_token_loss(meft.model(ids), ids).backward()
    for watch in watches:
        watch.remove()
    return sizes


def formula(sizes: list[int], item: int, keys_back: bool = True) -> Counter:
    """method.md's count in bytes, gradients included (Eq. 8 leaves them out)."""
    U = sum(sizes)
    return Counter(
        {
            ("d2h", "hidden"): LAYERS * T * D * item,
            ("h2d", "rows"): 2 * D * U * item,
            ("d2h", "grads"): (2 if keys_back else 1) * D * U * item,
        }
    )


def overhead(config, sizes: list[int], item: int) -> Counter:
    """What the formula leaves out: kept places or the union's experts, gate values and their way back."""
    per_token, gated = config.reading == "per_token", config.trains_router
    counts = Counter()
    if per_token:
        counts["h2d", "index"] = LAYERS * T * K * INT32
    elif gated:
        counts["h2d", "index"] = sum(sizes) * INT32
    if gated:
        width = K if per_token else N
        counts["h2d", "score"] = counts["d2h", "score"] = LAYERS * T * width * item
        # The first layer's input is the frozen embedding, which asks for no gradient.
        counts["h2d", "router_hidden"] = (LAYERS - 1) * T * D * item
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("variant", [*GATES, {"selection": "signed"}, {"frozen_keys": True}], ids=named)
def test_counts_are_the_formula_to_the_byte(variant: dict, reading: str, dtype: torch.dtype) -> None:
    meft = attached(dtype, **variant, reading=reading)
    sizes = micro_batch(meft)
    assert all(0 < U < meft.config.neurons for U in sizes), "U = R would hide a count of R rows"
    main = formula(sizes, dtype.itemsize, keys_back=not meft.config.frozen_keys)
    assert meft.link.bytes == main + overhead(meft.config, sizes, dtype.itemsize)
    assert [adapter.usage for adapter in meft.adapters] == [[(T, U)] for U in sizes]


@pytest.mark.parametrize("reading", ["per_token", "union"])
def test_accumulated_micro_batches_add_up(reading: str) -> None:
    """Rows cross again in each micro-batch; the optimizer's step and zeroing move nothing."""
    meft = attached(reading=reading)
    optimizer = meft.make_optimizer(lr=0.0, weight_decay=0.0)
    sizes = [micro_batch(meft, seed) for seed in range(4)]
    together = Counter(meft.link.bytes)
    optimizer.step()
    optimizer.zero_grad()
    assert meft.link.bytes == together
    apart = Counter()
    for seed in range(4):
        meft.link.reset()
        assert micro_batch(meft, seed) == sizes[seed]
        apart += meft.link.bytes
    assert together == apart
    assert together["h2d", "rows"] == sum(2 * D * U * 4 for micro in sizes for U in micro)


def test_a_forward_pass_alone_sends_nothing_back() -> None:
    meft = attached()
    with torch.no_grad():
        meft.model.eval()(tokens(B, LENGTH))
    assert set(meft.link.bytes) == {("d2h", "hidden"), ("h2d", "rows"), ("h2d", "index"), ("h2d", "score")}
    assert [adapter.usage for adapter in meft.adapters] == [[], []], "usage is kept of training calls only"


@pytest.mark.parametrize("reading", ["per_token", "union"])
def test_device_placement_counts_nothing(reading: str) -> None:
    meft = attached(placement="device", reading=reading)
    micro_batch(meft)
    assert isinstance(meft.link, Resident) and not meft.link.bytes


def test_reset_clears_all_counts() -> None:
    link = Link()
    link.to_host(torch.ones(3), "hidden")
    link.reset()
    assert not link.bytes and link.bytes["d2h", "hidden"] == 0


# ---- copies ----


@given(
    st.integers(0, 5),
    st.integers(1, 5),
    st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.booleans(),
)
def test_a_copy_is_never_an_alias(rows: int, columns: int, wire: torch.dtype | None, turned: bool, up: bool) -> None:
    """Whole tensors and views of them, with and without a cast: equal values, own memory, the wire type's bytes."""
    whole = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    source = whole.T[1:] if turned else whole
    link, before = Link(), whole.clone()
    copied = link.to_device(source, torch.device("cpu"), "rows", wire) if up else link.to_host(source, "rows", wire)
    dtype = wire or torch.float32
    assert copied.dtype == dtype and torch.equal(copied.float(), source)
    assert link.bytes == {("h2d" if up else "d2h", "rows"): source.numel() * dtype.itemsize}
    copied.fill_(-7)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("placement", ["host", "device"])
def test_fetched_rows_are_not_the_store_s(placement: str) -> None:
    store = make_adapter(small_config(placement=placement)).store
    link = Link() if placement == "host" else Resident()
    before = [p.detach().clone() for p in (store.keys, store.values)]
    for union_U in (torch.arange(24), torch.tensor([0]), torch.arange(3, 9)):
        for rows in [store.gather(union_U)]:
            link.to_device(rows, torch.device("cpu"), "rows", torch.float32).fill_(-7)
    assert all(torch.equal(a, b) for a, b in zip(before, (store.keys, store.values), strict=True))


def test_training_uses_the_rows_of_the_forward_pass() -> None:
    """A step between forward and backward must not change what the backward pass works with."""

    def hidden_gradient(step_between: bool) -> torch.Tensor:
        adapter, h = make_adapter(small_config(gate="none")), hidden().requires_grad_()
        loss = adapter(h).pow(2).sum()
        if step_between:
            with torch.no_grad():
                adapter.store.keys.mul_(3), adapter.store.values.mul_(-2)
        loss.backward()
        return h.grad

    assert torch.equal(hidden_gradient(False), hidden_gradient(True))


# ---- neurons selected on the device ----


@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("variant", [{}, {"gate": "none"}, {"frozen_keys": True}, {"scoring": "int8"}], ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
def test_selecting_on_the_device_sends_values_and_marks(dtype: torch.dtype, variant: dict, reading: str) -> None:
    """To the byte: once the keys and the router; in each micro-batch marks of R neurons, the values of S, gradients."""
    meft, item = attached(dtype, **variant, reading=reading, retrieval="device"), dtype.itemsize
    micro_batch(meft)
    U, int8 = sum(rows for adapter in meft.adapters for _, rows in adapter.usage), "scoring" in variant
    assert 0 < U < LAYERS * 24
    assert meft.link.bytes == {
        ("h2d", "router"): LAYERS * N * D * item,
        ("h2d", "key_index"): LAYERS * 24 * (D + 4 if int8 else D * item),
        ("d2h", "index"): LAYERS * 24,
        ("h2d", "rows"): (2 if int8 else 1) * U * D * item,
        ("d2h", "grads"): (1 if meft.config.frozen_keys else 2) * U * D * item,
    }


def test_a_router_on_the_device_sends_experts_and_gates() -> None:
    """The host selects, and multiplies nothing with the router: P experts and gates a token cross instead."""
    meft = attached(device_budget=LAYERS * N * D * 8)
    sizes = micro_batch(meft)
    assert meft.link.bytes == formula(sizes, 4) + Counter(
        {
            ("h2d", "router"): LAYERS * N * D * 4,
            ("d2h", "index"): LAYERS * T * 2 * INT32,
            ("d2h", "score"): LAYERS * T * 2 * 4,
            ("h2d", "index"): 2 * LAYERS * T * K * INT32,
        }
    )


@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("retrieval", ["host", "device"])
def test_rows_that_round_u_up_change_nothing(reading: str, retrieval: str, monkeypatch) -> None:
    """As on a device that is no CPU: rows of zeros, which do not cross and whose gradients are dropped."""
    runs = []
    for room in (1, 64):
        monkeypatch.setattr(micro_batches, "padded", lambda rows, device, room=room: -(-rows // room) * room)
        meft = attached(reading=reading, retrieval=retrieval, selection="signed")
        micro_batch(meft)
        runs.append((dict(meft.link.bytes), [p.grad.clone() for s in meft.stores for p in s.parameters()]))
    assert runs[0][0] == runs[1][0]
    for plain, rounded in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(rounded, plain, rtol=1e-5, atol=1e-7)
