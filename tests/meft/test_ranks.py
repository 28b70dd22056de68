"""W ranks train as one process does that accumulates their micro-batches: the same bits on one node, and to rounding
over several, whatever the options."""

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meft_bench.meft.engine.residency import KeptLoan, KeptRows
from meft_bench.meft.engine.topology import PER_NODE
from tests.meft.rank_runs import start, trained
from tests.meft.tiny_models import named

# A case: micro-batches of each rank in a step, and options.
CASES: list[dict[str, Any]] = [
    {"micro_batches": 2},
    {"gate": "softmax", "weight_decay": 0.1},
    {"gate": "none", "micro_batches": 3},
    {"key_experts": False, "scoring": "int8"},
    {"reading": "union", "micro_batches": 2},
    {"reading": "union", "gate": "none", "selection": "relu_first", "adam": "lazy"},
    {"adam": "lazy", "micro_batches": 2, "weight_decay": 0.1},
    {"moments": "bf16", "scoring": "bf16"},
    {"frozen_keys": True, "micro_batches": 2},
    {"overlap": True, "micro_batches": 3},
    {"wire": "bf16", "betas": (0.5, 0.7)},
]
# Rows kept on the device, some or all; neurons found there; a budget that would pay for moments there.
KEPT: list[dict[str, Any]] = [
    {"device_budget": 5_000, "retrieval": "host", "micro_batches": 2},
    {"device_budget": 5_000, "retrieval": "device", "adam": "lazy"},
    {"device_budget": 30_000, "overlap": True, "micro_batches": 2},
    {"device_budget": 10_000_000, "key_experts": False},
    {"lookahead": 1, "micro_batches": 2},
]
NAMES = [named(case) for case in CASES]


def _all(rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [trained(rank, world, **case) for case in cases]


def _started(
    world: int, cases: list[dict[str, Any]], folder: Path, **environment: str
) -> list[list[dict[str, Tensor]]]:
    made = start(world, functools.partial(_all, cases=cases), folder, environment)
    for one in made:
        assert isinstance(one, list), one
    return made


@functools.cache
def _alone(world: int, case: tuple) -> dict[str, Tensor]:
    about = dict(case)
    return trained(0, 1, about.pop("micro_batches", 1) * world, **about)


def _check(world: int, case: dict[str, Any], found: dict[str, Tensor], tolerance: float | None) -> None:
    wanted = _alone(world, tuple(case.items()))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tolerance is None:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return _started(2, CASES + KEPT, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return _started(3, CASES, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_two_ranks_have_the_bits_of_one_process(two, number):
    for rank in two:
        _check(2, CASES[number], rank[number], None)


@pytest.mark.parametrize("number", range(len(KEPT)), ids=[named(case) for case in KEPT])
def test_rows_kept_on_each_device_follow_the_other_ranks(two, number):
    """Equal to rounding: with more than one micro-batch a device adds up its own before they meet."""
    for rank in two:
        _check(2, KEPT[number], rank[len(CASES) + number], 2e-6)


LATE: list[dict[str, Any]] = [
    {"device_budget": bytes_, "retrieval": "host", "micro_batches": 3} for bytes_ in (3_000, 5_000, 9_000)
]


def _late(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Each rank is held up at moments of its own."""
    chance = random.Random(rank)
    for owner, name in ((KeptLoan, "add_gradients"), (KeptRows, "collect")):
        setattr(owner, name, _held_up(getattr(owner, name), chance))
    return _all(rank, world, LATE)


def _held_up(work: Callable[..., Any], chance: random.Random) -> Callable[..., Any]:
    def later(*given: Any) -> Any:
        time.sleep(chance.choice((0.0, 0.0, 0.002, 0.01)))
        return work(*given)

    return later


def test_ranks_that_keep_other_rows_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    """They add up in turns, and each keeps and lacks rows of its own."""
    found = start(2, _late, tmp_path)
    for rank in found:
        assert isinstance(rank, list), rank
        for case, made in zip(LATE, rank, strict=True):
            _check(2, case, made, 2e-6)


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_three_ranks_have_the_bits_of_one_process(three, number):
    for rank in three:
        _check(3, CASES[number], rank[number], None)


# ---- over nodes ----

NODES = [
    {"micro_batches": 2},
    {"gate": "softmax", "weight_decay": 0.1},
    {"reading": "union", "gate": "none", "selection": "relu_first", "adam": "lazy"},
    {"moments": "bf16", "frozen_keys": True},
    {"device_budget": 30_000, "overlap": True, "micro_batches": 2},
]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    return _started(2, [*NODES, {"wire": "bf16"}], tmp_path_factory.mktemp("1+1"), **{PER_NODE: "1"})


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return _started(4, NODES[:3], tmp_path_factory.mktemp("2+2"), **{PER_NODE: "2"})


@pytest.mark.parametrize("number", range(len(NODES)), ids=[named(case) for case in NODES])
def test_two_nodes_agree_with_one_process(two_nodes, number):
    """Each node has rows of its own, which are the same bits: the same sums in the same order."""
    for rank in two_nodes:
        _check(2, NODES[number], rank[number], 2e-6)
        assert all(torch.equal(rank[number][name], t) for name, t in two_nodes[0][number].items())


def test_two_nodes_with_two_ranks_each_agree_with_one_process(four):
    for number, case in enumerate(NODES[:3]):
        for rank in four:
            _check(4, case, rank[number], 2e-6)
            assert all(torch.equal(rank[number][name], t) for name, t in four[0][number].items())


def test_a_narrow_wire_between_nodes_rounds_sums_alike_everywhere(two_nodes):
    first, second = (rank[len(NODES)] for rank in two_nodes)
    wanted = _alone(2, (("wire", "bf16"),))
    assert not torch.equal(first["0.values"], wanted["0.values"])
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-3)
