"""Gradients are touched once: who looks finds them as if they were added, multiplied and zeroed at once."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meft_bench.meft.adam import ROW_ADAM, DenseRowAdamW
from meft_bench.meft.engine import kernels, native
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.store import NeuronStore
from tests.meft.test_engine import EVERYTHING, micro_batch, tiny_meft
from tests.meft.tiny_models import D, make_adapter, named, small_config

R = 24


def new_store() -> NeuronStore:
    return make_adapter(small_config(gate="none")).store


def arrive(store: NeuronStore, rows: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[int]:
    """Gradients handed over as they crossed; the list grows when their memory is given back."""
    released: list[int] = []
    grads = torch.randn(len(rows), 2, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    store.add_gradients(torch.tensor(rows), grads, lambda: released.append(seed))
    return released


def end(store: NeuronStore, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    optimizer.settle()
    return [store.rows_R2D.clone(), optimizer.updates[0].moments_RH2D.clone()]


Play = Callable[[NeuronStore, torch.optim.Optimizer, Callable], None]


def once(store, optimizer, give):
    give(store, [1, 4, 7])


def twice(store, optimizer, give):
    give(store, [1, 4, 7])
    give(store, [2, 4], 1)


def clipped(store, optimizer, give):
    give(store, [1, 4, 7])
    assert clip_grad_norm([store], 0.5) > 0.5


def clipped_and_more(store, optimizer, give):
    clipped(store, optimizer, give)
    give(store, [4, 5], 1)


def clipped_twice(store, optimizer, give):
    clipped(store, optimizer, give)
    assert clip_grad_norm([store], 0.2) == pytest.approx(0.5, rel=1e-5)


def two_steps_with_one_gradient(store, optimizer, give):
    clipped(store, optimizer, give)
    optimizer.step()


def cleared_and_again(store, optimizer, give):
    clipped(store, optimizer, give)
    optimizer.zero_grad()
    give(store, [2, 4], 1)


def clipped_to_nan(store, optimizer, give):
    give(store, [1, 4, 7])
    store.add_gradients(torch.tensor([3]), torch.full((1, 2, D), torch.nan))
    assert clip_grad_norm([store], 1.0).isnan()


PLAYS = [
    once, twice, clipped, clipped_and_more, clipped_twice, two_steps_with_one_gradient, cleared_and_again,
    clipped_to_nan,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("adam", ["dense", "lazy"])
@pytest.mark.parametrize("play", PLAYS)
def test_a_look_changes_nothing(play: Play, adam: str, plain: bool, dtype: torch.dtype, monkeypatch) -> None:
    """Somebody who looks at .grad has everything done at once, as ever; who does not gets the same bits."""
    if plain:
        monkeypatch.setattr(native, "fits", lambda *tensors: False)
    give = functools.partial(arrive, dtype=dtype)

    def run(looks: bool) -> list[Tensor]:
        store = new_store()
        optimizer = ROW_ADAM[adam]([store], lr=1e-2)
        for _ in range(3):
            if looks:
                assert not store.keys.grad.any()
            play(store, optimizer, give)
            shown = [p.grad.clone() for p in store.parameters() if p.requires_grad] if looks else None
            optimizer.step()
            if looks:
                now = [p.grad for p in store.parameters() if p.requires_grad]
                assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(shown, now, strict=True))
            optimizer.zero_grad()
        assert not store.values.grad.any() and not store.keys.grad.any()
        return end(store, optimizer)

    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(run(False), run(True), strict=True))


def test_what_arrived_is_read_where_it_lies_and_given_back_once() -> None:
    store = new_store()
    optimizer = ROW_ADAM["dense"]([store], lr=1e-2)
    first = arrive(store, [1, 4, 7], 3)
    assert store.grads.arrived is not None and not first
    optimizer.step()
    assert not first, "a look after the step still finds it"
    optimizer.zero_grad()
    assert first == [3] and store.grads.arrived is None
    first, second = arrive(store, [1], 1), arrive(store, [1, 2], 2)
    assert (first, second) == ([1], [2]) and store.grads.filled_rows().tolist() == [1, 2]
    third = arrive(store, [5], 3)
    assert store.values.grad[5].any() and third == [3]
    optimizer.zero_grad()
    assert arrive(store, [5], 4) == [4], "who may hold .grad finds it there at once"
    store.keys.grad = store.values.grad = None
    store.prepare_gradients()
    assert not arrive(store, [5], 5)


def test_a_gradient_held_over_steps_is_right_at_every_moment() -> None:
    store = new_store()
    optimizer = ROW_ADAM["dense"]([store], lr=1e-2)
    held = store.values.grad
    for seed in range(3):
        arrive(store, [1, 4], seed)
        assert held[[1, 4]].any(1).all() and held.any(1).sum() == 2
        norm = clip_grad_norm([store], 0.5)
        assert norm > 0.5 and held.norm() < 0.5
        optimizer.step()
        optimizer.zero_grad()
        assert not held.any()


def test_the_norm_is_the_same_for_every_number_of_threads_and_without_kernels(monkeypatch) -> None:
    rows_UX = torch.randn(600, 1030, generator=torch.Generator().manual_seed(0))
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums.append(kernels.squares(rows_UX))
    finally:
        torch.set_num_threads(before)
    sums.append(kernels.squares_torch(rows_UX))
    assert all(torch.equal(s, sums[0]) for s in sums)
    torch.testing.assert_close(kernels.in_pairs(sums[0]), rows_UX.double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_norm_is_torch_s(accumulation: int) -> None:
    ours, theirs = tiny_meft(), tiny_meft()
    for model in (ours, theirs):
        for number in range(accumulation):
            micro_batch(model, number, accumulation)
    norm = ours.clip_grad_norm_(0.1)
    wanted = torch.nn.utils.clip_grad_norm_([p for s in theirs.stores for p in s.parameters()], 0.1)
    torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
    for a, b in zip(ours.stores, theirs.stores, strict=True):
        torch.testing.assert_close(a.values.grad, b.values.grad, rtol=1e-6, atol=0)


def test_the_norm_of_a_single_micro_batch_is_taken_as_it_arrives(monkeypatch) -> None:
    """From the second step on nothing is left to read after the backward pass. With several nothing is read twice."""
    store, expected = new_store(), new_store()
    optimizer = ROW_ADAM["dense"]([store], lr=1e-2)

    def step(batches: int) -> tuple[int, float, int]:
        """(rows read as gradients arrive, their norm, rows read to tell it)."""
        read: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "squares", lambda rows: read.append(rows.shape[0]) or squares(rows))
            for number in range(batches):
                arrive(store, [1, 4, 7], number)
            arrived, norm = sum(read), float(clip_grad_norm([store], 0.5))
        optimizer.step()
        optimizer.zero_grad()
        return arrived, norm, sum(read) - arrived

    squares = kernels.squares
    arrive(expected, [1, 4, 7], 0)
    norm = float(clip_grad_norm([expected], 0.5))
    assert step(1) == (0, norm, 3)
    assert step(1) == step(1) == (3, norm, 0)
    assert step(2)[0] == 3, "what nobody could know"
    assert step(2)[0] == 0 == step(2)[2]


@pytest.mark.parametrize("adam", ["dense", "lazy"])
@pytest.mark.parametrize("options", [{}, {"device_budget": EVERYTHING}, {"overlap": True}], ids=named)
def test_gradients_written_past_the_count_of_versions_are_gradients(options: dict, adam: str) -> None:
    """Through .grad.data, as older code does, into rows that have no gradient, and between two backward passes."""

    def left(past: bool) -> list[Tensor]:
        meft = tiny_meft(**{"neurons": 96, "experts": 12, "kept": 1, "adam": adam, **options})
        optimizer = meft.make_optimizer(lr=1e-2)
        for step in range(3):
            micro_batch(meft, 2 * step)
            with torch.no_grad():
                for store in meft.stores:
                    grad = store.values.grad
                    (grad.data if past else grad).add_(0.1)
            micro_batch(meft, 2 * step + 1)
            meft.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for store in meft.stores for p in store.parameters()]

    assert all(map(torch.equal, left(True), left(False)))


@pytest.mark.parametrize("shown", [False, True])
def test_clipping_before_there_is_a_gradient_leaves_those_to_come_as_they_are(shown: bool) -> None:
    store = new_store()
    DenseRowAdamW([store], lr=1e-2)
    assert not shown or not store.values.grad.any()
    assert clip_grad_norm([store], 0.0) == 0
    arrive(store, [1, 4])
    assert clip_grad_norm([store], torch.inf) > 1 and store.values.grad[[1, 4]].any()


def test_keys_that_were_read_are_caught_up_after_the_step() -> None:
    """In the background, before anybody waits for them; the same bits as when they are asked for."""

    def run(overlap: bool) -> tuple[list[float], list[int]]:
        meft = tiny_meft(neurons=96, experts=12, kept=2, overlap=overlap)
        optimizer = meft.make_optimizer(lr=1e-2)
        losses, late = [], []
        for step in range(6):
            losses.append(micro_batch(meft, step))
            optimizer.step()
            optimizer.zero_grad()
            for updates in optimizer.updates:
                updates.store.queue.wait()
                late.append(int(((updates._done_RH < updates.steps) & ~updates._still_RH)[:, 0].sum()))
        return losses, late

    (losses, late), (wanted, on_demand) = run(True), run(False)
    assert losses == wanted
    assert sum(late) < sum(on_demand)
