"""Drawn unions: as many rows as were asked for, and over several micro-batches as many as were logged."""

import pytest
import torch

from meft_bench.simulate.drawn import Draws, shares

R, U = 3072, 1910


def independent(micro_batches: int) -> float:
    return R * (1 - (1 - U / R) ** micro_batches)


def like_a_trained_model(micro_batches: int) -> float:
    return {1: 0.62, 8: 0.82}[micro_batches] * R


@pytest.mark.parametrize("touched", [independent, like_a_trained_model])
def test_unions_touch_what_was_logged(touched) -> None:
    draws = Draws(R, U, touched)
    unions = [draws.union_U(number) for number in range(8)]
    for union in unions:
        assert union.shape == (U,) and union.diff().min() > 0 and 0 <= int(union[0]) and int(union[-1]) < R
    assert torch.unique(torch.cat(unions)).numel() == pytest.approx(touched(8), rel=0.03)
    assert torch.equal(draws.union_U(3), unions[3]) and not torch.equal(unions[2], unions[3])


def test_rows_with_the_lowest_numbers_are_used_most() -> None:
    """Those the simulation gives slots to."""
    draws = Draws(R, U, like_a_trained_model)
    uses = torch.stack([torch.bincount(draws.union_U(n), minlength=R) for n in range(16)]).sum(0).float()
    assert uses[:1000].mean() > uses[1000:2000].mean() > uses[2000:].mean()


def test_the_rows_that_are_held_are_nearly_those_used_most() -> None:
    """As the engine finds them after eight micro-batches, in steps of one and of three."""
    draws, held = Draws(R, U, like_a_trained_model), 1000
    most = float(draws.share_R[:held].mean())
    for micro_batches in (1, 3):
        found = draws.used_R(micro_batches, 8).argsort(descending=True)[:held]
        assert 0.95 * most < float(draws.share_R[found.numpy()].mean()) <= most


def test_what_several_micro_batches_touch_beside_held_rows() -> None:
    draws, held = Draws(R, U, like_a_trained_model), 1000
    first = torch.arange(held)
    unions = [draws.union_U(number) for number in range(8)]
    others = [union[~torch.isin(union, first)] for union in unions]
    assert draws.on_host(held, 1) == pytest.approx(sum(o.numel() for o in others) / 8, rel=0.05)
    assert draws.on_host(held, 8) == pytest.approx(torch.unique(torch.cat(others)).numel(), rel=0.05)
    assert draws.on_host(0, 8) == like_a_trained_model(8) and draws.on_host(R, 8) == 0


def test_one_micro_batch_says_nothing_of_how_rows_differ() -> None:
    assert shares(10, 0.3, 0.7, 1).tolist() == [0.3] * 10


def test_where_all_rows_are_used_all_are() -> None:
    assert torch.equal(Draws(8, 8, lambda _: 8).union_U(0), torch.arange(8))
