"""The two optimizers: "dense" is torch's AdamW over all rows, "lazy" is AdamW per touched row."""

import copy

import pytest
import torch
from torch import Tensor, nn

from meft_bench.meft.adam import ROW_ADAM, DenseRowAdamW, LazyRowAdamW
from meft_bench.meft.store import NeuronStore
from tests.meft.tiny_models import D, make_adapter, small_config

ADAMW = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
R = 24


def new_store(**changes) -> NeuronStore:
    return make_adapter(small_config(**changes)).store


def random_step(store: NeuronStore, optimizer: torch.optim.Optimizer, rows: list[int], seed: int) -> Tensor:
    """One step with random gradients for the given rows and the router; returns the rows' gradient."""
    generator = torch.Generator().manual_seed(seed)
    grad_UD = torch.randn(len(rows), D, generator=generator)
    optimizer.zero_grad()
    store.add_gradients(torch.tensor(rows, dtype=torch.int64), torch.stack([grad_UD, 2 * grad_UD], dim=1))
    if store.router is not None and store.router.requires_grad:
        store.add_router_gradient(torch.randn(store.router.shape, generator=generator))
    optimizer.step()
    return grad_UD


def memory(store: NeuronStore, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of everything that belongs to rows: weights and Adam state of keys and values."""
    kept = []
    optimizer.settle()
    for parameter in (store.keys, store.values):
        kept += [parameter.detach().clone()] + [t.clone() for t in optimizer.state[parameter].values()]
    return kept


def test_lazy_leaves_rows_outside_S_alone_bit_for_bit() -> None:
    store = new_store()
    optimizer = LazyRowAdamW([store], **ADAMW)
    for step in range(3):
        random_step(store, optimizer, [1, 3, 4], seed=step)
    before = memory(store, optimizer)
    random_step(store, optimizer, [2, 4], seed=9)
    others = [r for r in range(R) if r not in (2, 4)]
    for old, new in zip(before, memory(store, optimizer), strict=True):
        assert torch.equal(old[others], new[others])
        assert (old[[2, 4]] != new[[2, 4]]).flatten(1).any(1).all() if old.dim() == 2 else (old != new).sum() == 2


def test_lazy_rows_follow_adamw_with_their_own_step_count() -> None:
    """Each row as torch's AdamW on that row alone, stepped only when the row is touched."""
    store = new_store()
    optimizer = LazyRowAdamW([store], **ADAMW)
    rows = [nn.Parameter(store.keys[r].detach().clone()) for r in range(R)]
    alone = [torch.optim.AdamW([row], **ADAMW) for row in rows]
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        touched = torch.rand(R, generator=generator).lt(0.4).nonzero()[:, 0].tolist()
        for r, grad in zip(touched, random_step(store, optimizer, touched, seed=step), strict=True):
            rows[r].grad = grad.clone()
            alone[r].step()
    counts = optimizer.state[store.keys]["step"]
    assert counts.unique().numel() > 2, "the rows should differ in how often they were touched"
    torch.testing.assert_close(store.keys.detach(), torch.stack([r.detach() for r in rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_all_rows_touched_each_step_is_torch_adamw(adam: str) -> None:
    store = new_store()
    plain = [nn.Parameter(p.detach().clone()) for p in store.parameters()]
    theirs = torch.optim.AdamW(plain, **ADAMW)
    ours = ROW_ADAM[adam]([store], **ADAMW)
    for step in range(6):
        random_step(store, ours, list(range(R)), seed=step)
        for mine, other in zip(store.parameters(), plain, strict=True):
            other.grad = mine.grad.clone()
        theirs.step()
    for mine, other in zip(store.parameters(), plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_dense_rows_outside_S_decay_and_drift() -> None:
    """As in an all-resident AdamW: a row touched once goes on moving while its moments decay."""
    store = new_store()
    plain = nn.Parameter(store.values.detach().clone())
    ours, theirs = DenseRowAdamW([store], **ADAMW), torch.optim.AdamW([plain], **ADAMW)
    for step, touched in enumerate(([1, 2], [2], [], [5])):
        before = store.values.detach().clone()
        grad_UD = 2 * random_step(store, ours, touched, seed=step)
        plain.grad = torch.zeros(R, D)
        plain.grad[touched] = grad_UD
        theirs.step()
        torch.testing.assert_close(store.values.detach(), plain.detach(), rtol=1e-5, atol=1e-6)
        assert (store.values.detach() != before)[1].all()


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_a_layer_that_selected_nothing_may_be_stepped(adam: str) -> None:
    """Before its first gradient ever, too: dense then decays the weights, lazy leaves every row."""
    store = new_store(gate="none")
    optimizer = ROW_ADAM[adam]([store], **ADAMW)
    before = store.keys.detach().clone()
    optimizer.step()
    decayed = before * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
    torch.testing.assert_close(store.keys.detach(), decayed if adam == "dense" else before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_frozen_keys_and_ungated_router_are_not_optimized(adam: str) -> None:
    store = new_store(frozen_keys=True, gate="none")
    optimizer = ROW_ADAM[adam]([store], **ADAMW)
    keys, router = store.keys.detach().clone(), store.router.detach().clone()
    store.add_gradients(torch.tensor([0, 3]), torch.ones(2, 1, D))
    optimizer.step()
    assert torch.equal(store.keys, keys) and torch.equal(store.router, router)
    assert [p is store.values for group in optimizer.param_groups for p in group["params"]] == [True]


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_zero_grad_keeps_the_buffers_and_forgets_the_rows(adam: str) -> None:
    store = new_store()
    optimizer = ROW_ADAM[adam]([store], **ADAMW)
    buffers = [p.grad for p in store.parameters()]
    random_step(store, optimizer, [0, 7], seed=0)
    assert store.grads.filled_rows().tolist() == [0, 7]
    optimizer.zero_grad()
    assert not store.touched_R.any() and not store.grads.filled_rows().numel()
    assert all(p.grad is b and not b.any() for p, b in zip(store.parameters(), buffers, strict=True))


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_eight_steps_are_four_saved_and_four_more(adam: str) -> None:
    def steps(store: NeuronStore, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            random_step(store, optimizer, [step, step + 2, 20], seed=step)

    whole, half = new_store(), new_store()
    optimizer = ROW_ADAM[adam]([whole], **ADAMW)
    steps(whole, optimizer, range(8))
    first = ROW_ADAM[adam]([half], **ADAMW)
    steps(half, first, range(4))
    resumed = new_store()
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    second = ROW_ADAM[adam]([resumed], **ADAMW)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, second, range(4, 8))
    for a, b in zip(memory(whole, optimizer), memory(resumed, second), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.router, resumed.router)


def test_settle_makes_the_state_what_state_dict_shows() -> None:
    store = new_store()
    optimizer = DenseRowAdamW([store], **ADAMW)
    for step in range(3):
        random_step(store, optimizer, [step, 20], seed=step)
    optimizer.settle()
    shown = [optimizer.state[p]["exp_avg"].clone() for p in (store.keys, store.values)]
    for ours, entry in zip(shown, optimizer.state_dict()["state"].values(), strict=False):
        assert torch.equal(ours, entry["exp_avg"]) and ours.any()


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_a_state_from_before_the_first_step_starts_anew(adam: str) -> None:
    def steps(store: NeuronStore, optimizer: torch.optim.Optimizer) -> None:
        for step in range(3):
            random_step(store, optimizer, [step, step + 2, 20], seed=step)

    store, fresh = new_store(), new_store()
    optimizer = ROW_ADAM[adam]([store], **ADAMW)
    before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(store.state_dict())
    steps(store, optimizer)
    store.load_state_dict(weights)
    optimizer.load_state_dict(before)
    steps(store, optimizer)
    wanted = ROW_ADAM[adam]([fresh], **ADAMW)
    steps(fresh, wanted)
    for a, b in zip(memory(store, optimizer), memory(fresh, wanted), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(store.router, fresh.router)


def test_both_kinds_have_the_same_defaults() -> None:
    """adam="lazy" against adam="dense" must compare which rows move, not two settings of weight decay."""
    dense, lazy = (ROW_ADAM[adam]([new_store()], lr=1e-3).defaults for adam in ("dense", "lazy"))
    assert {name: dense[name] for name in lazy} == lazy
