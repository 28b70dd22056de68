"""GaLore takes the paper's step: Adam on the projected gradient, back through the projector, a fresh one every T."""

import pytest
import torch
from meft_bench.baselines.galore import GaLoreAdamW, Options, attach
from torch import nn

from meft_bench.train.contract import describe
from meft_bench.train.models import load_model, shape_of
from meft_bench.train.step_bytes import Step, step_bytes

LR = 1e-2


def adam(g, kept, t):
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * g
    kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * g**2
    return (kept["m"] / (1 - 0.9**t)) / ((kept["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


def reference(w, g, kept, t, r, every, alpha):
    """Algorithm 2 of the paper: t counts from 0, and W is m x n with m <= n."""
    if w.dim() < 2 or min(w.shape) <= r:
        return w - LR * adam(g, kept, t + 1)
    if w.shape[0] > w.shape[1]:
        return reference(w.T, g.T, kept, t, r, every, alpha).T
    if t % every == 0:
        vectors = torch.linalg.eigh(g @ g.T).eigenvectors.flip(1)[:, :r]
        kept["p"] = torch.stack([v if v.max() == v.abs().max() else -v for v in vectors.T], 1)
    return w - LR * alpha * kept["p"] @ adam(kept["p"].T @ g, kept, t + 1)


@pytest.mark.parametrize("every", [2, 10])
def test_every_step_is_the_papers(every):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 8), (9, 6), (4, 4), (2, 7), (6,)]
    parameters = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    options = Options(rank=3, every=every, scale=0.5)
    optimizer = GaLoreAdamW(parameters, {id(p) for p in parameters if p.dim() == 2}, options, lr=LR)
    wanted, kept = [p.detach().clone() for p in parameters], [{} for _ in parameters]
    for t in range(5):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        wanted = [reference(w, p.grad, k, t, 3, every, 0.5) for w, p, k in zip(wanted, parameters, kept, strict=True)]
        optimizer.step()
        for p, w in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, atol=1e-5, rtol=1e-5)  # singular vectors are made in float32
    assert {n: tuple(t.shape) for n, t in optimizer.state[parameters[1]].items() if n != "step"} == {
        "projector": (3, 6), "exp_avg": (9, 3), "exp_avg_sq": (9, 3)
    }  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_keeps_the_projector(bad):
    """It has no singular vectors. The run then ends as diverged, as with any optimizer."""
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = GaLoreAdamW([parameter], {id(parameter)}, Options(rank=2, every=1), lr=LR)
    parameter.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    before = optimizer.state[parameter]["projector"].clone()
    parameter.grad = torch.full((4, 6), bad)
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["projector"], before) and not parameter.isfinite().any()


def test_a_rank_above_every_matrix_is_adamw():
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    one = GaLoreAdamW([ours], {id(ours)}, Options(rank=4), lr=LR, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=LR, weight_decay=0.1)
    for _ in range(4):
        ours.grad = torch.randn(4, 6, generator=generator)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_state_and_bytes_are_those_of_the_formula():
    base = load_model("embedded", None, "float32", "cpu").model
    options, shape = Options(rank=16), shape_of(base)
    attached = attach(base, options, 0)
    optimizer = attached.make_optimizer(lr=1e-3)
    base(input_ids=torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss.backward()
    optimizer.step()
    accounted = attached.accounted_bytes(optimizer)
    step = Step(shape=shape, tokens=64, dtype="float32", vocabulary=base.config.vocab_size)
    predicted = step_bytes(describe("galore"), options, shape.parameters, step)
    counts = 4 * len(attached.parameters())  # one step count a tensor
    assert accounted["device_moments_bytes"] - counts == predicted.device["moments"] < 2 * 4 * shape.parameters / 2
    assert accounted["device_gradients_bytes"] == predicted.device["gradients"] == 4 * shape.parameters
