"""LSP-Offload takes the paper's step through its projectors, learns them, and moves 2 d^2 numbers a matrix."""

import pytest
import torch
from meft_bench.baselines import lsp_offload
from meft_bench.baselines.lsp_offload import LspAdamW, Options, attach, dense, lost
from torch import nn

from meft_bench.meft.link import Link
from meft_bench.train import loop
from meft_bench.train.contract import describe
from meft_bench.train.models import load_model, shape_of
from meft_bench.train.step_bytes import Step, step_bytes

LR = 1e-2
SMALL = {"subspace": 4, "nonzeros": 2, "rounds": 3, "threshold": 0.0}


def optimizer_of(parameters, seed=0, **options) -> LspAdamW:
    return LspAdamW(parameters, Link(), Options(**{**SMALL, **options}), seed, lr=LR)


def given(optimizer: LspAdamW, gradients) -> None:
    """A step with these gradients, as a last backward pass hands them over."""
    for parameter, gradient in zip(optimizer.index, gradients, strict=True):
        parameter.grad = gradient.clone()
        with torch.no_grad():
            optimizer.use(parameter)
        parameter.grad = None


def projectors(state) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(dense(state[s], state[f"{s}_columns"], state["exp_avg"].shape[0]).double() for s in ("left", "right"))


@pytest.mark.parametrize("every", [2, 10])
def test_every_step_is_the_papers(every):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 9), (8, 5), (3, 7))]
    optimizer, wanted = optimizer_of(parameters, every=every), [p.detach().double() for p in parameters]
    moments = [(0.0, 0.0)] * 3
    before: list = [None] * 3
    for t in range(1, 5):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        given(optimizer, gradients)
        for i, gradient in enumerate(gradients):
            p, q = projectors(optimizer.state[parameters[i]])
            m, v = moments[i]
            if before[i] is not None and not torch.equal(before[i][0], p):
                a, b = p.T @ before[i][0], before[i][1].T @ q
                m, v = a @ m @ b, a**2 @ v @ b**2
            assert (before[i] is not None and torch.equal(before[i][0], p)) == ((t - 1) % every != 0)
            g = p.T @ gradient.double() @ q
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            delta = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            wanted[i] = wanted[i] - LR * p @ delta @ q.T
            moments[i], before[i] = (m, v), (p, q)
        optimizer.step()
        for parameter, w in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.detach().double(), w, atol=1e-4, rtol=1e-4)


def test_projectors_are_sparse_drawn_from_the_seed_and_learnt_where_they_lose_too_much():
    torch.manual_seed(0)
    gradient = torch.randn(12, 3) @ torch.randn(3, 10)
    cases = {"drawn": {"rounds": 1, "threshold": 1e9}, "learnt": {}, "other": {"seed": 1}, "soon": {"threshold": 0.9}}
    made = {}
    for name, settings in cases.items():
        parameter = nn.Parameter(torch.zeros(12, 10))
        optimizer = optimizer_of([parameter], **{"subspace": 6, "rounds": 300, **settings})
        given(optimizer, [gradient])
        made[name] = projectors(optimizer.state[parameter])
        assert all(((p != 0).sum(1) <= 2).all() for p in made[name])
    losses = {name: lost(gradient.double(), *both).item() for name, both in made.items()}
    assert losses["learnt"] < 0.75 * losses["drawn"] and losses["learnt"] < losses["soon"] <= 0.9
    assert not torch.equal(made["learnt"][0], made["other"][0])


def test_projectors_that_still_fit_stay():
    parameter, gradient = nn.Parameter(torch.zeros(8, 8)), torch.randn(8, 8)
    optimizer = optimizer_of([parameter], every=1, threshold=1e9)
    kept = []
    for _ in range(3):
        given(optimizer, [gradient])
        optimizer.step()
        kept.append(projectors(optimizer.state[parameter])[0])
    assert torch.equal(kept[0], kept[2])


def test_what_crosses_and_what_is_kept_are_those_of_the_formula():
    base = load_model("embedded", None, "float32", "cpu").model
    options, shape = Options(subspace=32, rounds=1), shape_of(base)
    attached = attach(base, options, 0)
    optimizer = attached.make_optimizer(lr=1e-3)
    ids = torch.tensor([[1, 5, 9]])
    for _ in range(2):
        _, norm = loop.one_step(
            optimizer, [lambda: base(input_ids=ids, labels=ids).loss] * 2, lambda: attached.clip_gradients(1e-3)
        )
        assert norm > 1e-3
    squares = shape.layers * 7 * 32 * 32
    assert attached.link.bytes == {("d2h", "grads"): 2 * 4 * squares, ("h2d", "updates"): 2 * 4 * squares}
    step = Step(shape=shape, tokens=64, dtype="float32", vocabulary=base.config.vocab_size)
    predicted = step_bytes(describe("lsp_offload"), options, 1, step)
    accounted = attached.accounted_bytes(optimizer)
    assert accounted["host_moments_bytes"] == predicted.host["Adam moments"] == 2 * 4 * squares
    assert accounted["host_gradients_bytes"] == predicted.host["gradients"]
    assert accounted["device_projectors_bytes"] == predicted.device["projectors"]
    assert accounted["device_gradients_bytes"] == predicted.device["gradients"]
    assert attached.parameter_groups() == lsp_offload.count(options, shape)
    assert not any(p.grad is not None for p in base.parameters())
