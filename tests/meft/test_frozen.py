"""An adapter that is not trained: gradients pass through it, and none is made of it."""

import copy
import math

import pytest
import torch
from torch import Tensor

from meft_bench.meft.engine import native
from meft_bench.meft.model import MeftModel
from meft_bench.meft.quantised import QuantisedAdapter
from tests.meft.test_engine import EVERYTHING, POINTS, budget_for, micro_batch, tiny_meft
from tests.meft.tiny_models import hidden, make_adapter, named, next_token_loss, small_config, tokens

PLACES = [{}, {"overlap": True}, {"device_budget": 10**4}, {"device_budget": EVERYTHING}, {"reading": "union"}]


def input_gradient(meft: MeftModel, ids: Tensor) -> Tensor:
    """As prompt tuning and saliency take it."""
    given = meft.model.embed(ids).detach().requires_grad_()
    handle = meft.model.embed.register_forward_hook(lambda *_: given)
    next_token_loss(meft.model(ids), ids).backward()
    handle.remove()
    return given.grad


@pytest.mark.parametrize("native_kernels", [True, False])
@pytest.mark.parametrize("options", PLACES, ids=named)
def test_gradients_of_the_input_pass_a_frozen_adapter_and_leave_nothing_there(
    options: dict, native_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_kernels:
        monkeypatch.setattr(native, "fits", lambda *tensors: False)
    trained, frozen = (tiny_meft(**options) for _ in range(2))
    frozen.model.requires_grad_(False)
    for seed in range(3):
        ids = tokens(seed=seed)
        assert torch.equal(input_gradient(frozen, ids), input_gradient(trained, ids))
    assert not any("grads" in key for key in frozen.link.bytes)
    for store in frozen.stores:
        assert all(p.grad is None for p in store.parameters()) and not store.grads.filled_rows().numel()


@pytest.mark.parametrize("options", PLACES, ids=named)
def test_what_was_frozen_in_a_first_pass_is_trained_like_any_other(options: dict) -> None:
    def left(first: bool) -> list[Tensor]:
        meft = tiny_meft(**options)
        wanted = [p for store in meft.stores for p in store.parameters() if p.requires_grad]
        if first:
            for p in wanted:
                p.requires_grad_(False)
            input_gradient(meft, tokens(seed=9))
            for p in wanted:
                p.requires_grad_(True)
        optimizer = meft.make_optimizer(lr=1e-2)
        for seed in range(4):
            ids = tokens(seed=seed)
            next_token_loss(meft.model(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in wanted]

    for ours, theirs in zip(left(first=True), left(first=False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_the_input_pass_rows_in_int8() -> None:
    adapter = make_adapter(small_config()).eval()
    narrow = QuantisedAdapter(adapter, "int8").eval()
    plain = make_adapter(small_config()).eval()
    with torch.no_grad():  # what the rows in int8 are
        rows_R2D = narrow.store.gather(torch.arange(24))
        plain.store.keys.copy_(rows_R2D[:, 0])
        plain.store.values.copy_(rows_R2D[:, 1])
    for seed in range(2):
        ours, theirs = (hidden(seed=seed).requires_grad_() for _ in range(2))
        narrow(ours).square().sum().backward()
        plain(theirs).square().sum().backward()
        assert torch.equal(ours.grad, theirs.grad)


def test_keys_may_be_frozen_after_all() -> None:
    """As with frozen_keys, whose gradients are those of values alone."""
    late, early = tiny_meft(), tiny_meft(frozen_keys=True)
    for store in late.stores:
        store.keys.requires_grad_(False)
    for meft in (late, early):
        ids = tokens()
        next_token_loss(meft.model(ids), ids).backward()
    for ours, theirs in zip(late.stores, early.stores, strict=True):
        assert ours.keys.grad is None and torch.equal(ours.values.grad, theirs.values.grad)


# ---- a part that is frozen ----


def rows(meft: MeftModel, name: str) -> list[Tensor]:
    return [store.state_dict()[name].clone() for store in meft.stores]


def freeze(meft: MeftModel, name: str, frozen: bool = True) -> None:
    for store in meft.stores:
        getattr(store, name).requires_grad_(not frozen)


def steps(meft: MeftModel, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    losses = []
    for step in numbers:
        losses.append(micro_batch(meft, step))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_keys_frozen_after_steps_leave_no_gradient_of_before() -> None:
    """What .grad showed then is memory that is not used any more."""
    late, early = tiny_meft(), tiny_meft(frozen_keys=True)
    steps(late, late.make_optimizer(lr=1e-2), range(2))
    freeze(late, "keys")
    with torch.no_grad():
        for ours, theirs in zip(late.stores, early.stores, strict=True):
            theirs.load_state_dict(ours.state_dict())
    losses = [steps(meft, meft.make_optimizer(lr=1e-2), range(3)) for meft in (late, early)]
    assert losses[0] == losses[1]
    for name in ("keys", "values", "router"):
        assert all(map(torch.equal, rows(late, name), rows(early, name)))


@pytest.mark.parametrize("point", POINTS)
def test_a_frozen_router_trains_with_every_budget(point: str) -> None:
    """Frozen before the optimizer is made, set free after it, or frozen meanwhile: it stays as it is."""

    def run(budget: int) -> list[float]:
        meft = tiny_meft(device_budget=budget)
        optimizer = meft.make_optimizer(lr=1e-2)
        losses = steps(meft, optimizer, range(3))
        freeze(meft, "router")
        before = rows(meft, "router")
        losses += steps(meft, optimizer, range(3, 6))
        without = meft.make_optimizer(lr=1e-2)
        losses += steps(meft, without, range(6, 9))
        freeze(meft, "router", False)
        losses += steps(meft, without, range(9, 12))
        assert all(map(torch.equal, rows(meft, "router"), before))
        losses += steps(meft, optimizer, range(12, 15))
        assert not any(map(torch.equal, rows(meft, "router"), before))
        return losses

    assert run(budget_for(point, {})) == pytest.approx(run(0), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"adam": "lazy"}, {"device_budget": EVERYTHING}], ids=named)
def test_a_frozen_layer_is_left_alone(options: dict) -> None:
    meft = tiny_meft(**options)
    frozen, trained = meft.stores
    frozen.requires_grad_(False)
    before, other = copy.deepcopy([frozen.state_dict(), trained.state_dict()])
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.1)
    steps(meft, optimizer, range(3))
    assert len(optimizer.state_dict()["state"]) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    steps(meft, optimizer, range(3, 5))
    after = frozen.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(torch.equal(tensor, other[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("options", PLACES, ids=named)
def test_rows_frozen_in_part_since_the_optimizer_was_made_are_refused_unharmed(options: dict, name: str) -> None:
    meft = tiny_meft(**options)
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(2))
    freeze(meft, name)
    before = rows(meft, "keys") + rows(meft, "values")
    with pytest.raises(ValueError, match="keys or values were frozen, or set free, after the optimizer was made"):
        optimizer.step()
    assert all(map(torch.equal, rows(meft, "keys") + rows(meft, "values"), before))
    freeze(meft, name, False)
    steps(meft, optimizer, range(2, 4))


def test_an_optimizer_of_keys_without_values_is_refused() -> None:
    meft = tiny_meft()
    freeze(meft, "values")
    with pytest.raises(ValueError, match="adapter layer 0: its values are frozen and its keys or its router are not"):
        meft.make_optimizer(lr=1e-2)


@pytest.mark.parametrize("frozen", [("values",), ("values", "keys"), ("values", "router")], ids="-".join)
@pytest.mark.parametrize("options", PLACES, ids=named)
def test_what_is_not_frozen_gets_its_gradient_without_the_values(options: dict, frozen: tuple[str, ...]) -> None:
    ours, plain = tiny_meft(**options), tiny_meft(**options)
    for name in frozen:
        freeze(ours, name)
    for meft in (ours, plain):
        micro_batch(meft, 0)
    trained = [p for store in ours.stores for p in store.parameters() if p.requires_grad]
    torch.testing.assert_close(ours.clip_grad_norm_(torch.inf), torch.nn.utils.clip_grad_norm_(trained, torch.inf))
    for store, other in zip(ours.stores, plain.stores, strict=True):
        for name, parameter in store.named_parameters():
            wanted = getattr(other, name).grad
            assert parameter.grad is None if name in frozen else torch.equal(parameter.grad, wanted)


@pytest.mark.parametrize("options", PLACES, ids=named)
def test_gradients_of_before_come_home_to_neurons_that_are_frozen_for_a_while(options: dict) -> None:
    def run(freezes: bool) -> list[Tensor]:
        meft = tiny_meft(**options)
        optimizer = meft.make_optimizer(lr=1e-2)
        for step in range(3):
            micro_batch(meft, step)
            if freezes:
                meft.model.requires_grad_(False)
                assert all(p.grad.isfinite().all() for store in meft.stores for p in store.parameters())
                meft.clip_grad_norm_(math.inf)
                for store in meft.stores:
                    store.requires_grad_(True)
            optimizer.step()
            optimizer.zero_grad()
        return [tensor for name in ("keys", "values", "router") for tensor in rows(meft, name)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("part", ["router", "everything"])
@pytest.mark.parametrize("options", PLACES, ids=named)
def test_gradients_cleared_while_frozen_do_not_come_back(options: dict, part: str) -> None:
    """As those of an adapter that is not active when its optimizer clears them."""

    def run(freezes: bool) -> list[Tensor]:
        meft = tiny_meft(**options)
        optimizer = meft.make_optimizer(lr=1e-2)
        for step in range(4):
            micro_batch(meft, step)
            optimizer.step()
            parts = [s if part == "everything" else s.router for s in meft.stores] if freezes else []
            for some in parts:
                some.requires_grad_(False)
            optimizer.zero_grad()
            for some in parts:
                some.requires_grad_(True)
        return [tensor for name in ("keys", "values", "router") for tensor in rows(meft, name)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs)
