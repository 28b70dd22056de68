"""AdamW on a GPU in few passes, computed here on the processor, against the update that the host makes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_bench.meft.engine import adamw, device_step
from meft_bench.meft.engine.schedule import step_constants

BETAS, EPS = (0.9, 0.999), 1e-8
STEPS = adamw.Steps(torch.empty(0, 3), 0, *BETAS, EPS, 1.0)


def state(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    weights, first, second = (torch.randn(rows, width, generator=made) for _ in range(3))
    return weights, first.mul_(0.1).to(dtype), second.square_().mul_(0.01).to(dtype)


def gradients(rows: int, width: int, seed: int) -> Tensor:
    """Values alone of keys and values, so not side by side."""
    return torch.randn(rows, 2, width, generator=torch.Generator().manual_seed(seed))[:, 1]


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 20), st.floats(0, 0.1), st.floats(0, 0.5))
def test_a_step_of_all_rows_is_the_host_s(seed: int, rows: int, width: int, lr: float, decay: float) -> None:
    ours, theirs = state(rows, width, seed), state(rows, width, seed)
    for step in range(1, 4):
        grads, taken = gradients(rows, width, seed + step), torch.full((rows,), step, dtype=torch.int32)
        rates = step_constants(step, lr, BETAS, decay)
        device_step.advance(*ours, grads, STEPS, taken, rates, None, torch.arange(rows), 5)
        constants = tuple(torch.full((1, 1), rate) for rate in rates)
        theirs = adamw.made_step(theirs, grads, constants, taken, torch.arange(rows), 5, False, STEPS)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_without_a_gradient_keep_every_bit_where_they_count_their_own_steps(
    dtype: torch.dtype, decay: float
) -> None:
    """The others are stepped by the constants of their own counts."""
    rows, width, lr = 6, 7, 0.01
    ours, before = state(rows, width, 1, dtype), state(rows, width, 1, dtype)
    marked, taken = torch.tensor([True, False, True, True, False, True]), torch.tensor([1, 0, 7, 30, 2, 3]).int()
    grads = gradients(rows, width, 2) * marked[:, None]
    each = [step_constants(max(1, t), lr, BETAS, decay) for t in taken.tolist()]
    rate, scale, keep = (torch.tensor(column)[:, None] for column in zip(*each, strict=True))
    device_step.advance(*ours, grads, STEPS, taken, (rate, scale, 1 - lr * decay), marked, torch.arange(rows), 5)
    assert all(torch.equal(a[~marked], b[~marked]) for a, b in zip(ours, before, strict=True))
    values = before[0], before[1].float(), before[2].float()
    made = adamw.made_step(values, grads, (rate, scale, keep), taken, torch.arange(rows), 5, False, STEPS)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    for a, b in zip(ours, made, strict=True):
        torch.testing.assert_close(a[marked].float(), b[marked], **tolerance)


def test_a_rate_of_0_moves_no_weight() -> None:
    ours, before = state(3, 4, 0), state(3, 4, 0)
    rates = step_constants(1, 0.0, BETAS, 0.0)
    taken = torch.ones(3, dtype=torch.int32)
    device_step.advance(*ours, gradients(3, 4, 1), STEPS, taken, rates, None, torch.arange(3), 0)
    assert torch.equal(ours[0], before[0]) and not torch.equal(ours[1], before[1])


def test_bf16_moments_are_rounded_to_a_neighbour_and_right_on_average() -> None:
    """Over rows, over columns and over the steps of one element: half a thousandth of a bf16 step in 2,000."""
    value = 1 + 0.3 * 2**-7  # three tenths of the way from one bf16 number to the next
    found = []
    for step in range(40):
        values = torch.full((50, 50), value)
        taken = torch.full((50,), step, dtype=torch.int32)
        found.append(device_step._rounded(values, torch.arange(50), taken, 3, high=bool(step % 2)))
    rounded = torch.stack(found)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    up = (rounded > 1).float()
    assert up.mean().item() == pytest.approx(0.3, abs=0.01)
    for axes in ((1, 2), (0, 2), (0, 1)):
        assert up.mean(axes).sub(0.3).abs().max() < 0.12
    pairs = up[:, 0] * up[:, 1]  # two rows of one step know nothing of each other
    assert pairs.mean().item() == pytest.approx(0.09, abs=0.03)


def test_numbers_that_are_none_stay_what_they_are() -> None:
    """Also the NaN of a GPU, all of whose bits are set but the sign."""
    odd = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000, -1], dtype=torch.int32).view(torch.float32)
    made = device_step._rounded(odd.expand(9, 4).clone(), torch.arange(9), torch.ones(9, dtype=torch.int32), 0, False)
    assert made[:, [0, 3]].isnan().all()
    assert (made[:, 1] == torch.inf).all() and (made[:, 2] == -torch.inf).all()


def test_rows_without_a_gradient_keep_their_bits_whatever_stands_there() -> None:
    """eps 0 and no moment yet, and a gradient that is no number and was not counted: nothing is multiplied by 0."""
    weights, first, second = torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    grads, marked = torch.ones(3, 4), torch.tensor([True, False, True])
    grads[1] = torch.tensor([torch.nan, torch.inf, 0.0, 1.0])
    steps = adamw.Steps(torch.empty(0, 3), 0, *BETAS, 0.0, 1.0)
    rate, scale, decay = step_constants(1, 0.01, BETAS, 0.0)
    rates = torch.full((3, 1), rate), torch.full((3, 1), scale), decay
    device_step.advance(weights, first, second, grads, steps, torch.ones(3).int(), rates, marked, torch.arange(3), 0)
    assert (weights[1] == 1).all() and not first[1].any() and not second[1].any()
    torch.testing.assert_close(weights[[0, 2]], torch.full((2, 4), 0.99))


def test_a_moment_that_overflows_stands_still_as_on_the_host() -> None:
    ours = [torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)]
    for step, number in enumerate((1e22, 1.0, 1.0), start=1):
        rates, taken = step_constants(step, 0.01, BETAS, 0.0), torch.tensor([step], dtype=torch.int32)
        device_step.advance(*ours, torch.full((1, 2), number), STEPS, taken, rates, None, torch.arange(1), 0)
    assert (ours[0] == 1).all() and ours[2].isposinf().all()
