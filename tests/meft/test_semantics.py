"""What a token's adapter output depends on: the two readings, gates, limits of N, selection order, padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.model import attach
from meft_bench.meft.reference import kept_neurons, neuron_outputs
from tests.meft.tiny_models import (
    GATES,
    D,
    fill_values,
    hidden,
    make_adapter,
    named,
    next_token_loss,
    small_config,
    tiny_llama,
    tokens,
)

READINGS = ["per_token", "union"]


def union_of(adapter: MeftAdapter, h: Tensor, mask: Tensor | None = None) -> list[int]:
    """S, found without the package: the formula's masks, collected over the real tokens."""
    store = adapter.store
    o_TR, candidates_TR = neuron_outputs(h.reshape(-1, D), store.keys, store.router, adapter.config)
    kept_TR = kept_neurons(o_TR, candidates_TR, adapter.config)
    if mask is not None:
        kept_TR &= mask.reshape(-1, 1).bool()
    return kept_TR.any(0).nonzero()[:, 0].tolist()


def chosen_by(adapter: MeftAdapter, h: Tensor) -> list[int]:
    return adapter.select(h.reshape(-1, D), adapter.batch.valid_tokens(h)).union_U.tolist()


# ---- the two readings ----


@pytest.mark.parametrize("variant", GATES, ids=named)
def test_per_token_is_causal_and_batch_invariant(variant: dict) -> None:
    adapter = make_adapter(small_config(**variant))
    h, other = hidden(), hidden(seed=1)
    out = adapter(h)
    assert out.abs().amax(-1).gt(0).any(1).all()
    later = adapter(torch.cat([h[:, :3], other[:, 3:]], dim=1))
    torch.testing.assert_close(later[:, :3], out[:, :3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(later[:, 3:], out[:, 3:])
    mates = adapter(torch.stack([h[0], other[1]]))
    torch.testing.assert_close(mates[0], out[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adapter(h[:1]), out[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", ["positive", "signed", "relu_first"])
@pytest.mark.parametrize("key_experts", [True, False])
def test_union_is_algorithm_1(key_experts: bool, selection: str) -> None:
    config = small_config(reading="union", gate="none", key_experts=key_experts, selection=selection)
    adapter, h = make_adapter(config), hidden(1, 3)  # few tokens: S must not be all neurons
    S = chosen_by(adapter, h)
    W_A, W_B = adapter.store.keys[S], adapter.store.values[S]
    torch.testing.assert_close(adapter(h), (h @ W_A.T).relu() @ W_B, rtol=1e-5, atol=1e-5)
    assert len(S) < config.neurons and not torch.allclose(adapter(h), adapter_of_all(adapter, h))


def adapter_of_all(adapter: MeftAdapter, h: Tensor) -> Tensor:
    return (h @ adapter.store.keys.T).relu() @ adapter.store.values


@pytest.mark.parametrize("variant", GATES, ids=named)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("selection", ["positive", "signed"])
def test_both_readings_move_the_same_rows(selection: str, reading: str, variant: dict) -> None:
    """relu_first is left out: which of several zeros fill its top-K is anybody's choice."""
    adapter, h = make_adapter(small_config(**variant, reading=reading, selection=selection)), hidden(1, 3)
    assert chosen_by(adapter, h) == union_of(adapter, h)


@pytest.mark.parametrize("variant", GATES, ids=named)
def test_union_leaks_the_future(variant: dict) -> None:
    """The reason it is only an option: another last token changes S, hence the first token's output."""
    adapter = make_adapter(small_config(**variant, reading="union"))
    h, other = hidden(1, 4), hidden(1, 4, seed=2)
    changed = torch.cat([h[:, :3], other[:, 3:]], dim=1)
    assert chosen_by(adapter, h) != chosen_by(adapter, changed)
    assert not torch.allclose(adapter(h)[:, :3], adapter(changed)[:, :3])


@pytest.mark.parametrize("variant", GATES, ids=named)
@pytest.mark.parametrize("selection", ["positive", "signed"])
def test_readings_agree_on_a_single_token(selection: str, variant: dict) -> None:
    options = {**variant, "selection": selection}
    h = hidden(1, 1)
    per_token, union = (make_adapter(small_config(**options, reading=r))(h) for r in READINGS)
    assert per_token.abs().max() > 0
    torch.testing.assert_close(per_token, union, rtol=1e-5, atol=1e-6)


# ---- the order of ReLU and top-K ----


@given(st.integers(0, 10**6), st.sampled_from(["score", "softmax", "none"]), st.integers(1, 8))
def test_selection_changes_S_and_not_the_output(seed: int, gate: str, kept_K: int) -> None:
    """Rows that do not fire contribute nothing; whether they cross the link is all that differs."""
    h, out, U = hidden(2, 3, seed), {}, {}
    for selection in ("positive", "signed", "relu_first"):
        adapter = make_adapter(small_config(gate=gate, selection=selection, kept=kept_K), seed=seed)
        out[selection], U[selection] = adapter(h), len(chosen_by(adapter, h))
    torch.testing.assert_close(out["positive"], out["signed"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["positive"], out["relu_first"], rtol=1e-5, atol=1e-6)
    assert U["positive"] <= min(U["signed"], U["relu_first"])


def test_dropping_silent_rows_makes_S_smaller() -> None:
    """Otherwise the inequality above could hold with equality always."""
    h = hidden(1, 1)
    U = {s: len(chosen_by(make_adapter(small_config(kept=8, selection=s)), h)) for s in ("positive", "signed")}
    assert U["positive"] < U["signed"] == 8


# ---- limits of N ----


@pytest.mark.parametrize("reading", READINGS)
def test_one_expert_is_no_key_experts(reading: str) -> None:
    h = hidden()
    one = make_adapter(small_config(experts=1, probed=1, gate="none", reading=reading))
    none = make_adapter(small_config(key_experts=False, reading=reading))
    assert torch.equal(one.store.keys, none.store.keys)
    none.store.values.data.copy_(one.store.values)  # the router's init took other random numbers
    assert one(h).abs().max() > 0
    torch.testing.assert_close(one(h), none(h), rtol=1e-5, atol=1e-6)


def test_an_expert_per_neuron_is_no_key_experts_when_the_router_holds_the_keys() -> None:
    """N = R and P = K: to probe P experts is to keep K neurons."""
    h = hidden()
    each = make_adapter(small_config(experts=24, probed=5, kept=5, gate="none"))
    none = make_adapter(small_config(key_experts=False))
    each.store.router.data.copy_(each.store.keys)
    none.store.values.data.copy_(each.store.values)
    assert each(h).abs().max() > 0
    torch.testing.assert_close(each(h), none(h), rtol=1e-5, atol=1e-6)


def test_all_experts_probed_without_a_gate_is_no_key_experts() -> None:
    h = hidden()
    every = make_adapter(small_config(probed=6, gate="none"))
    none = make_adapter(small_config(key_experts=False))
    none.store.values.data.copy_(every.store.values)
    torch.testing.assert_close(every(h), none(h), rtol=1e-5, atol=1e-6)


def test_neurons_of_other_experts_are_never_kept() -> None:
    config = small_config(probed=1, kept=4, selection="signed")
    adapter, h = make_adapter(config), hidden(1, 1)
    expert = int((h.flatten() @ adapter.store.router.T).argmax())
    assert chosen_by(adapter, h) == [4 * expert + i for i in range(4)]


# ---- init ----


def test_router_starts_as_asked() -> None:
    keys = make_adapter(small_config()).store.keys.detach()
    mean_ND = keys.view(6, 4, D).mean(1)
    torch.testing.assert_close(
        make_adapter(small_config(router_init="mean_key_x50")).store.router.detach(), 50 * mean_ND
    )
    router = make_adapter(small_config()).store.router.detach()
    torch.testing.assert_close(torch.cosine_similarity(router, mean_ND), torch.ones(6))
    torch.testing.assert_close(router.norm(dim=1), keys.norm(dim=1).mean().expand(6))
    wide = make_adapter(small_config(neurons=4000, experts=2000, probed=8, router_init="normal")).store
    assert wide.router.std().item() == pytest.approx(0.02, rel=0.02)
    assert wide.keys.std().item() == pytest.approx(0.02 * (4096 / D) ** 0.5, rel=0.02)
    asked = make_adapter(small_config(neurons=4000, experts=2000, probed=8, key_std=0.02)).store
    assert asked.keys.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_unchanged_bit_for_bit_until_a_step(dtype: torch.dtype, reading: str) -> None:
    ids = tokens()
    before = tiny_llama().to(dtype)(ids).logits
    model = tiny_llama().to(dtype)
    meft = attach(model, small_config(reading=reading))
    assert torch.equal(model(ids).logits, before)
    fill_values(meft)
    assert not torch.equal(model(ids).logits, before)


# ---- what is trained ----


def train_llama(steps: int = 3, **options):
    """(meft, base weights before) after some optimizer steps."""
    model = tiny_llama().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    meft = attach(model, small_config(**options))
    fill_values(meft)
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = tokens(seed=step)
        optimizer.zero_grad()
        next_token_loss(model(ids).logits, ids).backward()
        optimizer.step()
    return meft, before


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_base_is_untouched_and_adapter_is_not(adam: str) -> None:
    meft, before = train_llama(adam=adam)
    after = dict(meft.model.named_parameters())
    for name, weights in before.items():
        assert torch.equal(after[name], weights), name
        assert after[name].grad is None and not after[name].requires_grad, name
    fresh = attach(tiny_llama(), small_config(adam=adam))
    for store, start in zip(meft.stores, fresh.stores, strict=True):
        assert not torch.equal(store.keys, start.keys) and not torch.equal(store.router, start.router)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("gate", ["score", "softmax", "none"])
def test_router_learns_exactly_when_it_gates(gate: str, reading: str) -> None:
    meft, _ = train_llama(steps=1, gate=gate, reading=reading)
    for store in meft.stores:
        assert store.router.requires_grad is (gate != "none")
        if gate == "none":
            assert store.router.grad is None
        else:
            assert store.router.grad.abs().max() > 0
    assert ("router" in meft.parameters_by_group()) is (gate != "none")


def test_zero_values_get_the_first_gradient() -> None:
    """At init the keys' and router's gradients are zero and the values' are not: step 1 moves values only."""
    model, ids = tiny_llama(), tokens()
    meft = attach(model, small_config())
    next_token_loss(model(ids).logits, ids).backward()
    for store in meft.stores:
        assert store.values.grad.any() and not store.keys.grad.any() and not store.router.grad.any()


@pytest.mark.parametrize("adam", ["dense", "lazy"])
@pytest.mark.parametrize("reading", READINGS)
def test_frozen_keys_stay_and_send_nothing_back(reading: str, adam: str) -> None:
    meft, _ = train_llama(frozen_keys=True, reading=reading, adam=adam)
    fresh = attach(tiny_llama(), small_config())
    for store, start in zip(meft.stores, fresh.stores, strict=True):
        assert torch.equal(store.keys, start.keys) and store.keys.grad is None
        assert store.values.grad.any() and not torch.equal(store.router, start.router)
    assert 2 * meft.link.bytes["d2h", "grads"] == meft.link.bytes["h2d", "rows"]


@pytest.mark.parametrize("reading", READINGS)
def test_a_graph_of_the_backward_pass_is_made_and_cannot_be_used(reading: str) -> None:
    """Rows get their gradients beside autograd, so a second derivative through them would be wrong: torch refuses."""
    adapter = make_adapter(small_config(reading=reading, gate="none")).train()
    h = hidden().requires_grad_()
    (grad,) = torch.autograd.grad(adapter(h).square().sum(), h, create_graph=True)
    assert grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
