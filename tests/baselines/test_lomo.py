"""LOMO's fused update equals SGD on clipped gradients, step for step, and holds one gradient at a time."""

import pytest
import torch
from torch import nn

from meft_bench.ranks import Ranks
from meft_bench.train import loop
from meft_bench.train.contract import describe
from meft_bench.train.methods import find_method, parse_options
from meft_bench.train.models import load_model, shape_of
from meft_bench.train.step_bytes import Step, step_bytes
from tests.meft.tiny_models import tiny_llama, tokens
from tests.methods import short_spec

lomo = find_method("lomo")
LR, CLIP, STEPS = 0.5, 0.1, 3


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    ids = tokens(seed=step)
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def reference(options, decay: float) -> list[torch.Tensor]:
    """By torch's own SGD, which holds every gradient until the step."""
    model = tiny_llama().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        loss_of(model, step).backward()
        if options.clipping == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        else:
            torch.nn.utils.clip_grad_value_(model.parameters(), options.largest)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 - LR * decay)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("given", [{}, {"clipping": "value", "largest": 1e-3}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_sgd_on_clipped_gradients(given: dict, decay: float, parts: int) -> None:
    options = parse_options("lomo", given)
    model = tiny_llama().train()
    before = [p.detach().clone() for p in model.parameters()]
    attached = lomo.attach(model, options, 0)
    optimizer = attached.make_optimizer(lr=LR, weight_decay=decay)
    for step in range(STEPS):
        losses = [lambda step=step: loss_of(model, step) / parts] * parts
        _, norm = loop.one_step(optimizer, losses, lambda: attached.clip_gradients(CLIP))
        assert float(norm) > CLIP, "clipping must bite"
        assert all(p.grad is None for p in model.parameters())
    for got, wanted, old in zip(model.parameters(), reference(options, decay), before, strict=True):
        torch.testing.assert_close(got.detach(), wanted, atol=1e-7, rtol=1e-5)
        assert not torch.equal(wanted, old)
    assert not optimizer.state


def test_one_gradient_is_held_at_a_time_in_both_passes() -> None:
    model = tiny_llama().train()
    attached = lomo.attach(model, lomo.Options(), 0)
    optimizer = attached.make_optimizer(lr=LR)
    held: list[int] = []
    use = optimizer.use
    optimizer.use = lambda p: (held.append(sum(q.grad is not None for q in model.parameters())), use(p))
    loop.one_step(optimizer, [lambda: loss_of(model, 0)], lambda: attached.clip_gradients(CLIP))
    assert held == [1] * 2 * len(list(model.parameters()))


def test_the_norm_is_torch_s_and_the_first_pass_changes_nothing() -> None:
    model = tiny_llama().train()
    loss_of(model, 0).backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    model = tiny_llama().train()
    before = [p.detach().clone() for p in model.parameters()]
    attached = lomo.attach(model, lomo.Options(), 0)
    optimizer = attached.make_optimizer(lr=LR)
    with optimizer.last_backward():
        loss_of(model, 0).backward()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(attached.clip_gradients(CLIP), wanted)


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    model = tiny_llama().train()
    before = [p.detach().clone() for p in model.parameters()]
    attached = lomo.attach(model, lomo.Options(), 0)
    optimizer = attached.make_optimizer(lr=LR)
    clip = lambda: attached.clip_gradients(CLIP)  # noqa: E731
    _, norm = loop.one_step(optimizer, [lambda: loss_of(model, 0) * torch.nan], clip)
    assert not bool(norm.isfinite())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="largest=0"):
        lomo.Options(largest=0)


def test_bytes_are_those_of_the_formula() -> None:
    base = load_model("embedded", None, "float32", "cpu").model
    shape, attached = shape_of(base), lomo.attach(base, lomo.Options(), 0)
    accounted = attached.accounted_bytes(attached.make_optimizer(lr=1e-3))
    step = Step(shape=shape, tokens=64, dtype="float32", vocabulary=base.config.vocab_size)
    predicted = step_bytes(describe("lomo"), lomo.Options(), shape.parameters, step)
    assert accounted["device_gradients_bytes"] == predicted.device["gradients"] and not predicted.device["moments"]
    assert accounted["device_parameters_bytes"] == predicted.device["base weights"] and not predicted.host


@pytest.mark.parametrize("given", [{}, {"clipping": "value"}])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_logits_that_wait_are_in_the_formula(given: dict, parts: int) -> None:
    """Those of earlier micro-batches; the last one's are among the logits of any method."""
    model, options = tiny_llama().train(), parse_options("lomo", given)
    attached = lomo.attach(model, options, 0)
    optimizer, waiting = attached.make_optimizer(lr=LR), []

    def clip() -> torch.Tensor:
        waiting.extend(gradient.nbytes for _, gradient in optimizer._seen)
        return attached.clip_gradients(CLIP)

    loop.one_step(optimizer, [lambda: loss_of(model, 0) / parts] * parts, clip)
    step = Step(shape=shape_of(model), tokens=tokens(seed=0).numel(), dtype="float32",
                vocabulary=model.config.vocab_size, accumulation=parts)  # fmt: skip
    predicted = step_bytes(describe("lomo"), options, shape_of(model).parameters, step)
    assert predicted.device["gradients of logits"] == sum(waiting[1:])
    assert len(waiting) == (parts if options.clipping == "norm" else 0)


def test_several_ranks_are_refused() -> None:
    attached = lomo.attach(tiny_llama(), lomo.Options(), 0)
    with pytest.raises(ValueError, match="2 ranks: this method updates each weight in its backward pass"):
        loop.train(attached, short_spec("lomo", steps=1), lambda step: None, ranks=Ranks(rank=0, count=2))
