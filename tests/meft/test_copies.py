"""A copy of a model, or one that torch.save wrote, computes and trains with its own neurons and leaves the original
alone."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.model import MeftModel, attach
from tests.meft.test_engine import POINTS, budget_for, micro_batch, tiny_meft
from tests.meft.tiny_models import named, small_config, tiny_llama, tiny_stack, tokens

OPTIONS = [{}, {"overlap": True}, {"lookahead": 1}, {"distinctive": 20}, {"scoring": "int8"}, {"reading": "union"},
           {"retrieval": "device"}]  # fmt: skip


def trained(steps: int = 3, **options) -> MeftModel:
    meft = tiny_meft(**options)
    if meft.config.is_distinctive:
        meft.count_background([[2, 3, 4], [5, 6]])
    optimizer = meft.make_optimizer(lr=1e-2)
    for seed in range(steps):
        micro_batch(meft, seed)
        optimizer.step()
        optimizer.zero_grad()
    return meft


def values(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("values")]


def assert_on_its_own(copied: nn.Module, meft: MeftModel) -> None:
    """copied, a copy of meft's model, has its numbers and none of its memory."""
    ids = tokens(seed=9)
    before = meft.model(ids).detach()
    assert torch.equal(copied(ids), before)
    link = meft.adapters[0].link
    assert all(a.link is not link and a.link.bytes for a in copied.modules() if isinstance(a, MeftAdapter))
    copied(ids).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in values(copied))
    assert not any(p.grad is not None and p.grad.any() for p in values(meft.model))
    with torch.no_grad():
        for parameter in values(copied):
            parameter.zero_()
    assert torch.equal(copied(ids), tiny_stack()(ids)), "values of zero add nothing to the base"
    assert torch.equal(meft.model(ids), before)


def saved(model: nn.Module) -> nn.Module:
    """What torch.save wrote of model and torch.load reads."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_a_copy_computes_and_trains_with_its_own_rows(options: dict, copied: Callable) -> None:
    meft = trained(**options)
    assert_on_its_own(copied(meft.model), meft)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("point", POINTS)
def test_a_copy_has_its_own_rows_on_the_device(point: str, copied: Callable) -> None:
    meft = trained(device_budget=budget_for(point, {}))
    assert_on_its_own(copied(meft.model), meft)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("point", POINTS)
def test_a_copy_between_backward_and_step_changes_nothing(point: str, copied: Callable) -> None:
    plain, ours = (trained(device_budget=budget_for(point, {})) for _ in range(2))
    for meft in (plain, ours):
        optimizer = meft.make_optimizer(lr=1e-2)
        micro_batch(meft, 7)
        if meft is ours:
            assert torch.equal(copied(meft.model)(tokens()), meft.model(tokens()))
        optimizer.step()
    for p, q in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("point", POINTS)
def test_a_copy_of_a_copy_has_what_a_step_sent(point: str, copied: Callable) -> None:
    """Router and keys may be on their way to the device when it is made."""
    meft = copied(trained(device_budget=budget_for(point, {})))
    optimizer = meft.make_optimizer(lr=1e-2)
    micro_batch(meft, 7)
    optimizer.step()
    assert torch.equal(copied(meft.model)(tokens()), meft.model(tokens()))


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("point", POINTS)
def test_a_copy_of_a_copy_trains_as_the_original(point: str, copied: Callable) -> None:
    """One without a trained router, and before any pass, has nothing else that tells its device what to fetch anew."""
    meft = trained(0, device_budget=budget_for(point, {}))
    for store in meft.stores:
        store.router.requires_grad_(False)
    losses: list[list[float]] = []
    twice = meft
    for _ in range(2):
        twice.make_optimizer(lr=1e-2)
        twice = copied(twice)
    for model in (twice, meft):
        optimizer, seen = model.make_optimizer(lr=1e-2), []
        for seed in range(4):
            seen.append(micro_batch(model, seed))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_copy_knows_its_own_padding() -> None:
    model = tiny_llama().train()
    meft = attach(model, small_config())
    copied = copy.deepcopy(meft)
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    copied.model(ids, attention_mask=mask).logits.sum().backward()
    assert [a.usage[0][0] for a in copied.adapters] == [8, 8] and not any(a.usage for a in meft.adapters)
    assert meft.adapters[0].batch.attention_mask is None


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_average_of_the_weights_computes_with_the_average(decay: float) -> None:
    """With decay 0 it is the newest model, and before an update it is the oldest."""
    meft = trained(0)
    ids = tokens(seed=9)
    averaged, first = AveragedModel(meft.model, avg_fn=get_ema_avg_fn(decay)), meft.model(ids).detach()
    averaged.update_parameters(meft.model)  # torch copies at the first call
    optimizer = meft.make_optimizer(lr=1e-1)
    olds = [p.detach().clone() for p in meft.model.parameters()]
    for seed in range(3):
        micro_batch(meft, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(averaged(ids), first) and not torch.equal(meft.model(ids), first)
    averaged.update_parameters(meft.model)
    with torch.no_grad():
        for parameter, old in zip(meft.model.parameters(), olds, strict=True):
            parameter.copy_(decay * old + (1 - decay) * parameter)
    torch.testing.assert_close(averaged(ids), meft.model(ids))


def test_an_optimizer_alone_is_not_copied() -> None:
    """It would step with nothing, or with the original's neurons."""
    meft = tiny_meft()
    optimizer = meft.make_optimizer(lr=1e-2)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"make one for the copied model and load state_dict\(\) into it"):
            copied(optimizer)
