"""What one optimizer step is: the loss it takes, the rate it uses, the norm it clips to, and what it logs."""

import math

import pytest
import torch

from meft_bench.harness.spec import RunSpec
from meft_bench.train import loop, models
from meft_bench.train.methods import Attached

ROWS = [loop.Example([1, 5, 6, 7, 2], 3), loop.Example([1, 8, 2], 1), loop.Example([1, 9, 4, 2], 2),
        loop.Example([1, 3, 3, 3, 3, 2], 4)]  # fmt: skip
SUPERVISED, REAL = 2 + 2 + 2 + 2, 5 + 3 + 4 + 6


def spec(**fields) -> RunSpec:
    return RunSpec(task="facts", method="full", **{"batch_size": 4, "steps": 1, **fields})


@pytest.fixture
def attached() -> Attached:
    """The embedded model, all of it trained by plain SGD: a step is then its gradient times its rate."""
    model = models.load_model("embedded", None, "float32", "cpu").model
    model.requires_grad_(True)
    return Attached(
        model, {"all": list(model.parameters())}, lambda lr, **_: torch.optim.SGD(model.parameters(), lr=lr)
    )


def mean_loss(model: torch.nn.Module) -> torch.Tensor:
    """Written out: every row alone, no padding, mean over all target and end tokens of the batch."""
    losses = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].float()
        for place in range(row.prompt_length, len(row.ids)):
            losses.append(torch.nn.functional.cross_entropy(logits[place - 1], torch.tensor(row.ids[place])))
    assert len(losses) == SUPERVISED
    return torch.stack(losses).mean()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_takes_the_mean_over_supervised_tokens_and_its_gradient(attached: Attached, accumulation: int) -> None:
    expected = mean_loss(attached.model)
    gradients = torch.autograd.grad(expected, attached.parameters(), allow_unused=True)
    before = [p.detach().clone() for p in attached.parameters()]
    log, optimizer = loop.StepLog(), attached.make_optimizer(lr=0.01)
    loop.logged_step(attached, optimizer, loop.batch_of(attached.model, ROWS, accumulation, 0), 1e9, log)
    assert log.loss == [pytest.approx(float(expected), rel=1e-5)]
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None))
    assert log.gradient_norm == [pytest.approx(norm, rel=1e-4)]
    for old, new, gradient in zip(before, attached.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close((old - new) / 0.01, gradient, atol=2e-4, rtol=1e-3)
    assert all(p.grad is None or not p.grad.any() for p in attached.parameters()), "nothing is left for the next step"


def test_a_step_counts_its_tokens(attached: Attached) -> None:
    log, optimizer = loop.StepLog(), attached.make_optimizer(lr=0.01)
    loop.logged_step(attached, optimizer, loop.batch_of(attached.model, ROWS, 2, 0), 1.0, log)
    assert (log.tokens_real, log.tokens_supervised) == ([REAL], [SUPERVISED])
    assert log.tokens_padded == [2 * 5 + 2 * 6], "each micro-batch is padded to its own longest row"
    assert (log.h2d_bytes, log.d2h_bytes) == ([0], [0]) and log.step_s[0] > 0


def test_gradients_are_clipped_to_the_specs_norm_and_the_norm_before_is_logged(attached: Attached) -> None:
    before = [p.detach().clone() for p in attached.parameters()]
    log, optimizer = loop.StepLog(), attached.make_optimizer(lr=1.0)
    loop.logged_step(attached, optimizer, loop.batch_of(attached.model, ROWS, 1, 0), 0.01, log)
    moved = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(before, attached.parameters(), strict=True)))
    assert log.gradient_norm[0] > 1 and moved == pytest.approx(0.01, rel=1e-3)


def test_the_rate_of_every_step() -> None:
    """Ten steps, a fifth of them warm-up: 1/2 and 1, then down in eighths; the last step still moves."""
    scales = [loop.learning_rate_scale(step, 10, 0.2) for step in range(10)]
    assert scales == pytest.approx([0.5, 1.0, *(k / 8 for k in range(8, 0, -1))])
    # Warm-up is one step at least, and rounded, not cut.
    assert loop.learning_rate_scale(0, 10, 0.0) == 1.0 and loop.learning_rate_scale(1, 10, 0.0) == 1.0
    assert loop.learning_rate_scale(0, 10, 0.16) == 0.5 and loop.learning_rate_scale(0, 10, 0.14) == 1.0
    assert [loop.learning_rate_scale(0, 1, share) for share in (0.0, 0.9)] == [1.0, 1.0]


def test_the_optimizer_is_given_that_rate(attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def step(optimizer, losses, clip):
        rates.append(optimizer.param_groups[0]["lr"])
        return 1.0, torch.ones(())

    monkeypatch.setattr(loop, "one_step", step)
    asked = spec(steps=10, learning_rate=0.4, warmup_share=0.2)
    loop.train(attached, asked, loop.shuffled(attached, ROWS, asked, 0))
    assert rates == pytest.approx([0.4 * loop.learning_rate_scale(step, 10, 0.2) for step in range(10)])
