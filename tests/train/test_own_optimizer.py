"""Optimizers that use each gradient within a step's last backward pass, when a step has several."""

import pytest
import torch
from meft_bench.baselines import adalomo, lomo, lsp_offload
from torch import nn

from meft_bench.meft.link import Link
from meft_bench.train import loop
from meft_bench.train.contract import describe
from meft_bench.train.methods import find_method, parse_options
from meft_bench.train.models import load_model, shape_of
from meft_bench.train.step_bytes import Step, step_bytes

FUSED = ("lomo", "adalomo", "lsp_offload")


class TwoExperts(nn.Module):
    """Of which the batch says one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])

    def loss(self, which: int) -> torch.Tensor:
        return self.experts[which](torch.ones(2, 4)).square().sum()


def moved(name: str, order: tuple[int, ...]) -> list[torch.Tensor]:
    """What each expert moved by in one step over these micro-batches."""
    model = TwoExperts()
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
        "lomo": lambda: lomo.Lomo(model, lomo.Options(clipping="value", largest=1e9), lr=0.1),
        "adalomo": lambda: adalomo.AdaLomo(parameters, [], lr=0.1),
        "lsp_offload": lambda: lsp_offload.LspAdamW(parameters, Link(), lsp_offload.Options(subspace=4), 0, lr=0.1),
    }[name]()
    loop.one_step(optimizer, [lambda w=which: model.loss(w) for which in order])
    assert all(p.grad is None for p in parameters)
    return [p.detach() - old for p, old in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("name", FUSED)
def test_what_the_last_micro_batch_does_not_reach_is_updated_too(name: str) -> None:
    """A gradient of an earlier micro-batch counts wherever in the step it was made."""
    for first, second in zip(moved(name, (0, 1)), moved(name, (1, 0)), strict=True):
        assert first.any() and torch.equal(first, second)


def test_lomo_is_sgd_whatever_the_last_micro_batch_reaches() -> None:
    for ours, torchs in zip(moved("lomo", (0, 0, 1)), moved("sgd", (0, 0, 1)), strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", FUSED)
def test_gradients_that_wait_for_the_last_micro_batch_are_counted(name: str, micro_batches: int) -> None:
    """By the account and by the prediction, exactly."""
    loaded = load_model("embedded", None, "float32", "cpu")
    shape, options = shape_of(loaded.model), parse_options(name, {})
    attached = find_method(name).attach(loaded.model.train(), options, 0)
    optimizer = attached.make_optimizer(lr=1e-3)
    ids, held = torch.tensor([[1, 5, 9]]), [0]

    def forward() -> torch.Tensor:
        held.append(sum(p.grad.nbytes for p in attached.parameters() if p.grad is not None))
        return loaded.model(input_ids=ids, labels=ids).loss

    loop.one_step(optimizer, [forward] * micro_batches, lambda: attached.clip_gradients(1.0))
    accounted = attached.accounted_bytes(optimizer, micro_batches)["device_gradients_bytes"]
    step = Step(shape=shape, tokens=3, dtype="float32", vocabulary=loaded.model.config.vocab_size,
                accumulation=micro_batches)  # fmt: skip
    trainable = sum(attached.parameter_groups().values())
    assert accounted == step_bytes(describe(name), options, trainable, step).device["gradients"]
    assert accounted == (max(held) if micro_batches > 1 else max(p.nbytes for p in attached.parameters()))
