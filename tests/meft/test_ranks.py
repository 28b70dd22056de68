"""W ranks train as one process does that accumulates their micro-batches: the same bits on one node, and to rounding
over several, whatever the options."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_three_ranks_have_the_bits_of_one_process(three, number):
    for rank in three:
        _check(3, CASES[number], rank[number], None)
