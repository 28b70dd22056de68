"""An adapter that is not trained: gradients pass through it, and none is made of it."""

import pytest
import torch
from torch import Tensor

from meft_bench.meft.engine import native
from meft_bench.meft.model import MeftModel
from meft_bench.meft.quantised import QuantisedAdapter
from tests.meft.test_engine import EVERYTHING, tiny_meft
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
