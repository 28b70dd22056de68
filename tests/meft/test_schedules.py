"""Dense AdamW is torch's for every schedule: rates of zero, tiny ones, jumps, any betas, settings that change."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import get_scheduler

from meft_bench.meft.adam import ROW_ADAM, DenseRowAdamW, StoreUpdates
from meft_bench.meft.engine import native, schedule
from meft_bench.meft.store import NeuronStore
from tests.meft.test_engine import assert_same, micro_batch, tiny_meft
from tests.meft.tiny_models import D, make_adapter, small_config

R = 6
RATES = [0.0, 0.0, 1e-30, 1e-10, 1e-8, 1e-4, 1e-2, 1.0, 1e4]
BETAS = [(0.9, 0.999), (0.99, 0.9), (0.9, 0.7), (0.0, 0.999), (0.5, 0.0), (0.999, 0.998)]
EPSILONS = [1e-8, 1e-30, 1e-2]


@dataclass(frozen=True)
class Stretch:
    """Some optimizer steps with equal settings; the first has gradients of `size` for some rows."""

    steps: int
    lr: float
    growth: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    size: float
    touched: tuple[int, ...]
    read: tuple[int, ...]
    """Rows that are looked at after it."""


STRETCHES = st.builds(
    Stretch,
    steps=st.sampled_from([1, 2, 3, 7, 40, 150]),
    lr=st.sampled_from(RATES),
    growth=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    weight_decay=st.sampled_from([0.0, 0.0, 0.1]),
    betas=st.sampled_from([BETAS[0], *BETAS]),
    eps=st.sampled_from([EPSILONS[0], *EPSILONS]),
    size=st.sampled_from([1.0, 1e-3, 1e-20, 1e20]),
    touched=st.sampled_from([(0, 1), (2, 3, 5), (0,), ()]),
    read=st.sampled_from([tuple(range(R)), (0, 1, 2), ()]),
)


def make_store() -> NeuronStore:
    store = make_adapter(small_config(neurons=R, experts=2, kept=2, gate="none")).store
    with torch.no_grad():
        store.values[: R // 2] = 0.0  # as a fresh adapter's
        store.values[:, ::5] = 0.0
    return store


def run(plan: list[Stretch], moments: str, eager: bool) -> list[Tensor]:
    """What is read after each stretch, and rows and moments at the end. eager: each step is made for every row at once,
    by plain torch."""
    store, seen = make_store(), []
    optimizer = DenseRowAdamW([store], lr=1.0, moments=moments)
    generator = torch.Generator().manual_seed(0)
    with native.without_kernels() if eager else contextlib.nullcontext():
        for stretch in plan:
            for step in range(stretch.steps):
                optimizer.param_groups[0].update(
                    lr=min(stretch.lr * stretch.growth**step, 1e6),
                    weight_decay=stretch.weight_decay,
                    betas=stretch.betas,
                    eps=stretch.eps,
                )
                if step == 0:
                    rows_U = torch.tensor(sorted(stretch.touched), dtype=torch.int64)
                    gradient = torch.randn(len(rows_U), 2, D, generator=generator) * stretch.size
                    store.add_gradients(rows_U, gradient)
                optimizer.step()
                optimizer.zero_grad()
                if eager:
                    optimizer.settle()
            seen.append(store.gather(torch.tensor(sorted(stretch.read), dtype=torch.int64)))
        state = optimizer.state_dict()["state"]
    moments_of = [state[n][k].float() for n in (0, 1) for k in ("exp_avg", "exp_avg_sq")]
    return [*seen, store.rows_R2D.clone(), *moments_of]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@settings(deadline=None, max_examples=30)
@given(st.lists(STRETCHES, min_size=1, max_size=7), st.sampled_from(["fp32", "bf16"]))
def test_any_schedule_is_the_same_to_the_bit_as_a_step_for_every_row(plan: list[Stretch], moments: str) -> None:
    assert_same_bits(run(plan, moments, eager=False), run(plan, moments, eager=True))


USUAL = Stretch(1, 1e-2, 1.0, 0.0, BETAS[0], 1e-8, 1.0, (0, 1), (0, 1, 2))


def usual(**changes) -> Stretch:
    return Stretch(**{**vars(USUAL), **changes})


CASES = {
    "first rate zero": [usual(lr=0.0), usual(steps=60, touched=())],
    "zero in the middle": [usual(), usual(lr=0.0, steps=7), usual(steps=60, touched=())],
    "zero at the end": [usual(steps=7), usual(lr=0.0, steps=300)],
    "tiny, then large": [usual(lr=1e-8, steps=60), usual(lr=1.0, steps=60, touched=())],
    "still, then a rate 1e8 times larger": [usual(lr=1e-8, steps=150), usual(lr=1.0, steps=60, touched=())],
    "beta1 above the root of beta2": [
        usual(betas=(0.99, 0.9), lr=1e-10),
        *[usual(betas=(0.99, 0.9), lr=1e-10, steps=60, touched=())] * 5,
    ],
    "v gone, m not": [
        usual(betas=(0.9, 0.7), lr=1e-10),
        *[usual(betas=(0.9, 0.7), lr=1e-10, steps=30, touched=())] * 6,
    ],
    "v gone at once": [
        usual(betas=(0.9, 0.0), lr=1e-10),
        *[usual(betas=(0.9, 0.0), lr=1e-10, steps=30, touched=())] * 6,
    ],
    "v overflows, then is NaN": [usual(size=1e20, betas=(0.9, 0.0), steps=300)],
    "v overflows at rate 0, then is NaN": [usual(size=1e20, lr=0.0, betas=(0.9, 0.0), steps=7)],
    "betas change at rate 0": [
        usual(lr=0.0),
        usual(lr=0.0, betas=(0.5, 0.9), touched=()),
        usual(betas=(0.5, 0.9), steps=60, touched=()),
    ],
    "eps falls": [usual(eps=1e-2, steps=150), usual(eps=1e-30, steps=60, touched=())],
    "eps falls late, where the corrected rate stays": [
        usual(eps=10.0, betas=(0.5, 0.999), steps=80),
        usual(eps=1e6, betas=(0.5, 0.999), steps=18, read=()),
        usual(eps=1e-30, betas=(0.5, 0.999), steps=30, touched=()),
    ],
    "decay on and off": [usual(steps=300), usual(weight_decay=0.1, touched=()), usual(steps=60, touched=())],
    "eps of zero makes rows without gradient NaN, as torch's": [usual(eps=0.0, steps=2)],
    "rows asleep get a gradient": [usual(steps=300), usual(steps=60), usual(steps=7, touched=(1, 2))],
}


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_schedules_that_went_wrong(name: str, moments: str) -> None:
    assert_same_bits(run(CASES[name], moments, eager=False), run(CASES[name], moments, eager=True))


def against_torch(store: NeuronStore, steps: int, scheduler: str, betas: tuple[float, float], warmup: int) -> float:
    """Largest difference of the values from torch.optim.AdamW's over the way, read at every fifth step."""
    plain = nn.Parameter(store.values.detach().clone())
    ours = DenseRowAdamW([store], lr=1e-2, betas=betas)
    theirs = torch.optim.AdamW([plain], lr=1e-2, betas=betas, weight_decay=0.0)
    plans = [get_scheduler(scheduler, o, num_warmup_steps=warmup, num_training_steps=steps) for o in (ours, theirs)]
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for step in range(steps):
        rows_U = torch.randperm(R, generator=generator)[:2].sort().values if step < steps // 3 else torch.tensor([0])
        gradient = torch.randn(len(rows_U), 2, D, generator=generator)
        store.add_gradients(rows_U, gradient)
        plain.grad = torch.zeros_like(plain).index_copy(0, rows_U, gradient[:, 1])
        for optimizer, plan in zip((ours, theirs), plans, strict=True):
            optimizer.step()
            plan.step()
            optimizer.zero_grad()
        if step % 5 == 4:
            worst = max(worst, (store.values.detach() - plain.detach()).abs().max().item())
    return worst


@pytest.mark.parametrize("betas", BETAS[:3])
@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup", "constant"])
def test_warm_up_from_zero_is_torch_adamw(scheduler: str, betas: tuple[float, float]) -> None:
    """transformers' schedules start at rate 0; values move by up to 0.1 here."""
    assert against_torch(make_store(), 40, scheduler, betas, warmup=0 if scheduler == "constant" else 5) < 2e-6


def test_a_growing_rate_seldom_wakes_rows(monkeypatch) -> None:
    """Settled rows are tested well above the rate: a warm-up over 50 steps wakes them three times, not 50."""
    woken = []
    monkeypatch.setattr(StoreUpdates, "_wake", lambda updates: woken.append(updates.steps))
    optimizer = DenseRowAdamW([make_store()], lr=1.0)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 50
        optimizer.step()
    assert len(woken) <= 3 and schedule.MARGIN > 1


def test_still_rows_cost_nothing() -> None:
    """At a constant rate a row is soon left alone: no kernel sees it again."""
    store = make_store()
    optimizer = DenseRowAdamW([store], lr=1e-2)
    store.add_gradients(torch.arange(R), torch.randn(R, 2, D, generator=torch.Generator().manual_seed(0)))
    for _ in range(400):
        optimizer.step()
        optimizer.zero_grad()
    store.refresh()
    updates = store.updates
    assert updates._still_RH[R // 2 :].all()


@pytest.mark.parametrize("options", [{}, {"device_budget": 10**8}, {"overlap": True}, {"moments": "bf16"}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_model_trains_as_a_resident_one_from_a_rate_of_zero(options: dict, accumulation: int) -> None:
    def trained(resident: bool) -> tuple[list[float], list[Tensor]]:
        meft = (
            tiny_meft(placement="device", moments=options.get("moments", "fp32")) if resident else tiny_meft(**options)
        )
        optimizer = meft.make_optimizer(lr=1e-2)
        plan = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=12)
        losses = []
        for step in range(12):
            losses += [micro_batch(meft, step * accumulation + i, accumulation) for i in range(accumulation)]
            optimizer.step()
            plan.step()
            optimizer.zero_grad()
            if resident:
                optimizer.settle()
        return losses, [p.detach().clone() for store in meft.stores for p in store.parameters()]

    assert_same(trained(False), trained(True), 0.0)


# ---- settings that are no numbers ----

BAD = [float("nan"), float("inf"), -1e-3, 1e39, "1e-3", None, True]


@pytest.mark.parametrize("adam", ["dense", "lazy"])
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay", "betas"])
def test_settings_that_are_no_numbers_are_refused(field: str, value, adam: str) -> None:
    store = make_store()
    given = {"lr": 1e-2, field: (0.9, value) if field == "betas" else value}
    with pytest.raises(ValueError, match=f"^{field}=.* must be"):
        ROW_ADAM[adam]([store], **given)
    optimizer = ROW_ADAM[adam]([store], lr=1e-2)
    store.add_gradients(torch.arange(2), torch.ones(2, 2, D))
    optimizer.param_groups[0].update({field: given[field]})
    before = store.values.detach().clone()
    with pytest.raises(ValueError, match=f"^{field}=.* must be"):
        optimizer.step()
    assert torch.equal(store.values, before) and optimizer.steps_done == 0


def test_what_overflows_together_is_refused() -> None:
    for changes in ({"lr": 1e38}, {"lr": 1e20, "weight_decay": 1e20}):
        with pytest.raises(ValueError, match=r"^lr=.* overflows fp32"):
            DenseRowAdamW([make_store()], **changes)
    with pytest.raises(ValueError, match="must lie below 1"):
        DenseRowAdamW([make_store()], lr=1e-2, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="two numbers"):
        DenseRowAdamW([make_store()], lr=1e-2, betas=(0.9,))


@pytest.mark.parametrize("max_norm", [float("nan"), -1.0, 1e39, float("-inf")])
def test_a_norm_that_is_no_number_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm=.* must be a number"):
        tiny_meft().clip_grad_norm_(max_norm)


def test_an_infinite_norm_only_measures() -> None:
    meft = tiny_meft()
    micro_batch(meft, 0)
    parameters = [p for store in meft.stores for p in store.parameters()]
    before = [p.grad.clone() for p in parameters]
    norm = meft.clip_grad_norm_(float("inf"))
    wanted = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_a_diverged_gradient_is_torch_s(bad: float) -> None:
    meft, other = tiny_meft(), tiny_meft()
    for model in (meft, other):
        micro_batch(model, 0)
        rows_U = model.stores[0].grads.filled_rows()[:1]
        model.stores[0].add_gradients(rows_U, torch.full((1, 2, D), bad))
    meft.clip_grad_norm_(1.0)
    theirs = [p for store in other.stores for p in store.parameters()]
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for ours, wanted in zip([p for store in meft.stores for p in store.parameters()], theirs, strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, equal_nan=True)
