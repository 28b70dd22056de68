"""LOMO's fused update equals SGD on clipped gradients, step for step, and holds one gradient at a time."""

import pytest
import torch
from torch import nn

from meft_bench.train.methods import find_method, parse_options
from tests.meft.tiny_models import tiny_llama, tokens

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
def test_it_is_sgd_on_clipped_gradients(given: dict, decay: float) -> None:
    options = parse_options("lomo", given)
    model = tiny_llama().train()
    before = [p.detach().clone() for p in model.parameters()]
    attached = lomo.attach(model, options, 0)
    optimizer = attached.make_optimizer(lr=LR, weight_decay=decay)
    for step in range(STEPS):
        loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters()), "gradients are dropped in the backward pass"
        norm = attached.clip_gradients(CLIP)
        assert float(norm) > CLIP, "clipping must bite"
        optimizer.step()
    for got, wanted, old in zip(model.parameters(), reference(options, decay), before, strict=True):
        torch.testing.assert_close(got.detach(), wanted, atol=1e-7, rtol=1e-5)
        assert not torch.equal(wanted, old)
    assert not optimizer.state
    held = attached.accounted_bytes(optimizer)
    assert held == {
        "device_parameters_bytes": sum(p.nbytes for p in model.parameters()),
        "device_gradients_bytes": max(p.nbytes for p in model.parameters()),
    }


def test_the_norm_is_torch_s_and_the_first_pass_changes_nothing() -> None:
    model = tiny_llama().train()
    loss_of(model, 0).backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    model = tiny_llama().train()
    before = [p.detach().clone() for p in model.parameters()]
    attached = lomo.attach(model, lomo.Options(), 0)
    attached.make_optimizer(lr=LR)
    loss_of(model, 0).backward()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(attached.clip_gradients(CLIP), wanted)


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    model = tiny_llama().train()
    before = [p.detach().clone() for p in model.parameters()]
    attached = lomo.attach(model, lomo.Options(), 0)
    attached.make_optimizer(lr=LR)
    (loss_of(model, 0) * torch.nan).backward()
    assert not bool(attached.clip_gradients(CLIP).isfinite())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_micro_batches_are_refused() -> None:
    model = tiny_llama().train()
    attached = lomo.attach(model, lomo.Options(), 0)
    attached.make_optimizer(lr=LR)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="set accumulation to 1"):
        loss_of(model, 1)
    with pytest.raises(ValueError, match="largest=0"):
        lomo.Options(largest=0)
