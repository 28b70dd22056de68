"""AdaLomo takes the paper's step, in the backward pass, and keeps nothing but rows and columns."""

import pytest
import torch
from meft_bench.baselines import adalomo
from torch import nn

from meft_bench.harness.spec import RunSpec
from meft_bench.ranks import Ranks
from meft_bench.train import loop
from meft_bench.train.contract import describe
from meft_bench.train.models import load_model, shape_of
from meft_bench.train.step_bytes import Step, step_bytes


def attached_to(model: nn.Module):
    return adalomo.attach(model, adalomo.Options(), 0)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def reference(theta, g, kept, t, lr):
    """Algorithm 1 of the paper with sums, not means, and b = 1 - t^-0.8. Returns theta."""
    b = 1 - t**-0.8
    if theta.dim() == 1:
        kept["v"] = b * kept.get("v", 0) + (1 - b) * g**2
        v = kept["v"]
    else:
        kept["r"] = b * kept.get("r", 0) + (1 - b) * (g**2).sum(1)
        kept["c"] = b * kept.get("c", 0) + (1 - b) * (g**2).sum(0)
        v = torch.outer(kept["r"], kept["c"]) / kept["r"].sum()
    u = g / v.sqrt()
    rms = lambda x: x.square().mean().sqrt()  # noqa: E731
    return theta - lr * u / max(1, rms(u)) * max(1e-3, rms(theta))


def test_every_step_is_the_papers():
    model, rates = small(), (1e-2, 3e-2, 2e-2)
    attached = attached_to(model)
    optimizer = attached.make_optimizer(lr=1.0, weight_decay=0.0)
    thetas = [p.detach().clone() for p in model.parameters()]
    kept: list[dict] = [{} for _ in thetas]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for t, lr in enumerate(rates, 1):
        other = small()
        with torch.no_grad():
            for p, theta in zip(other.parameters(), thetas, strict=True):
                p.copy_(theta)
        other(x[t - 1]).square().sum().backward()
        gradients = [p.grad for p in other.parameters()]
        thetas = [reference(p, g, k, t, lr) for p, g, k in zip(thetas, gradients, kept, strict=True)]
        optimizer.param_groups[0]["lr"] = lr
        _, norm = loop.one_step(optimizer, [lambda t=t: model(x[t - 1]).square().sum()], lambda: attached.clip(1.0))
        assert norm.item() == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-5)
        for p, theta in zip(model.parameters(), thetas, strict=True):
            torch.testing.assert_close(p.detach(), theta, atol=1e-6, rtol=1e-5)  # the optimizer computes in float32


def test_no_gradient_outlives_the_backward_pass_and_never_two_exist_of_one_micro_batch():
    model = small()
    attached = attached_to(model)
    optimizer = attached.make_optimizer(lr=1e-3)
    alive: list[int] = []
    use = optimizer.use
    optimizer.use = lambda p: (alive.append(sum(q.grad is not None for q in model.parameters())), use(p))
    loop.one_step(optimizer, [lambda: model(torch.ones(2, 5, dtype=torch.float64)).sum()], lambda: attached.clip(1.0))
    assert alive == [1, 1, 1, 1] and all(p.grad is None for p in model.parameters())


def test_state_and_bytes_are_those_of_the_formula():
    base = load_model("embedded", None, "float32", "cpu").model
    shape, attached = shape_of(base), attached_to(base)
    accounted = attached.accounted_bytes(attached.make_optimizer(lr=1e-3))
    step = Step(shape=shape, tokens=64, dtype="float32", vocabulary=base.config.vocab_size)
    predicted = step_bytes(describe("adalomo"), adalomo.Options(), shape.parameters, step)
    assert accounted["device_moments_bytes"] == predicted.device["moments"] < accounted["device_parameters_bytes"] / 40
    assert accounted["device_gradients_bytes"] == predicted.device["gradients"]
    assert accounted["device_parameters_bytes"] == predicted.device["base weights"] and not predicted.host


def test_several_ranks_are_refused():
    settings = RunSpec(task="facts", method="adalomo", options={})
    with pytest.raises(ValueError, match="updates each weight in its backward pass.*start one process"):
        loop.train(attached_to(small()), settings, lambda step: None, ranks=Ranks(rank=0, count=2))


def test_state_of_a_bfloat16_model_stays_fp32_when_loaded():
    model = small().bfloat16()
    optimizer = attached_to(model).make_optimizer(lr=1e-2)
    loop.one_step(optimizer, [lambda: model(torch.ones(2, 5, dtype=torch.bfloat16)).sum()])
    other = attached_to(small().bfloat16()).make_optimizer(lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        assert all(t.dtype == torch.float32 for t in theirs.values())
