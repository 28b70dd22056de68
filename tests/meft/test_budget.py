"""What a device budget buys: in its order, never more than was given, and everything for the price of everything."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meft_bench.meft.engine.budget import Split, at, prices, split, whole
from tests.meft.tiny_models import small_config

WIDTH, LAYERS = 16, 3
ROW, VALUE, ROUTER, KEYS = 16 * WIDTH, 12 * WIDTH, 6 * WIDTH * 8, 24 * WIDTH * 4
"""Bytes of the small model's parts in fp32: R = 24, N = 6."""

CONFIGS = st.builds(
    small_config,
    gate=st.sampled_from(["score", "softmax", "none"]),
    frozen_keys=st.booleans(),
    moments=st.sampled_from(["fp32", "bf16"]),
    wire=st.sampled_from(["model", "bf16"]),
    key_experts=st.booleans(),
    lookahead=st.sampled_from([0, 0, 1]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def of(budget: int, layers: int = LAYERS, **options) -> Split:
    return split(small_config(device_budget=budget, **options), layers, WIDTH, torch.float32)


def test_it_buys_the_router_then_rows_with_their_moments() -> None:
    row, its_moments = ROW + 24 * WIDTH, 6 * WIDTH * 12  # 12 bytes a parameter: the router's own come first
    extras = [0, ROW, its_moments + row - 1, its_moments + row, its_moments + 3 * row - 1, its_moments + 24 * row]
    bought = [of(LAYERS * (ROUTER + extra), retrieval="host") for extra in extras]
    rows = [0, 1, (its_moments + row - 1) // ROW, 1, 2, 24]
    assert [(b.router, b.rows) for b in bought] == [(True, n) for n in rows]
    assert not any(b.keys for b in bought), "the host selects"
    assert [b.moments for b in bought] == [0, 0, 0, 1, 2, 24], "without them where not one row with them fits"


@pytest.mark.parametrize("options, ranks", [({"distinctive": 2}, False), ({}, True)])
def test_where_no_optimizer_can_be_there_it_buys_rows_alone(options: dict, ranks: bool) -> None:
    config = small_config(device_budget=LAYERS * (ROUTER + 20 * ROW), retrieval="host", **options)
    bought = split(config, LAYERS, WIDTH, torch.float32, host_optimizer=ranks)
    assert (bought.rows, bought.moments) == (20, 0)


def test_frozen_keys_have_neither_gradient_nor_moments() -> None:
    config = small_config(gate="none", frozen_keys=True, retrieval="host")
    price = prices(config, WIDTH, torch.bfloat16)
    assert (price.router, price.row, price.moments) == (0, WIDTH * (2 * 2 + 4), 12 * WIDTH)
    assert prices(small_config(moments="bf16"), WIDTH, torch.bfloat16).moments == 2 * WIDTH * 8


@settings(deadline=None)
@given(CONFIGS, DTYPES, st.integers(1, 4), st.integers(0, 2_000_000), st.booleans())
def test_never_more_than_was_given(config, dtype: torch.dtype, layers: int, budget: int, there: bool) -> None:
    """What lies there at any budget aside."""
    least = split(config, layers, WIDTH, dtype, router_there=there).nbytes
    assert (least > 0) == (config.key_experts and there or config.trains_router and config.lookahead > 0)
    config = small_config(**{**config.to_dict(), "device_budget": budget})
    try:
        bought = split(config, layers, WIDTH, dtype, router_there=there)
    except ValueError as refused:
        needed = int(re.search(r"at least (\d+)", str(refused))[1])
        assert 0 < budget < needed
        enough = split(small_config(**{**config.to_dict(), "device_budget": needed}), layers, WIDTH, dtype)
        assert 0 < enough.nbytes == needed
        return
    assert bought.nbytes <= max(budget, least)
    assert bought.moments in (0, bought.rows)


@settings(deadline=None)
@given(CONFIGS, DTYPES, st.integers(1, 4), st.booleans())
def test_everything_costs_whole_and_not_a_byte_less(config, dtype: torch.dtype, layers: int, there: bool) -> None:
    price = whole(config, layers, WIDTH, dtype, router_there=there)
    assert at(1.0, config, layers, WIDTH, dtype, router_there=there) == price
    assert at(0.0, config, layers, WIDTH, dtype, router_there=there) == 0

    def bought(budget: int) -> Split:
        asked = small_config(**{**config.to_dict(), "device_budget": budget})
        return split(asked, layers, WIDTH, dtype, router_there=there)

    all_of_it = bought(price)
    assert (all_of_it.rows, all_of_it.moments, all_of_it.nbytes) == (24, 24, price)
    assert bought(10 * price) == all_of_it and bought(price - 1) != all_of_it


def test_a_router_that_is_there_anyway_is_not_bought() -> None:
    config = small_config()
    there = split(config, LAYERS, WIDTH, torch.float32, router_there=True)
    assert there == Split(router=True, keys=False, rows=0, moments=0, nbytes=LAYERS * ROUTER)
    assert of(0) == Split(router=False, keys=False, rows=0, moments=0, nbytes=0)
    assert of(0, lookahead=1) == there


@pytest.mark.parametrize("retrieval", ["host", "auto"])
def test_a_router_that_is_not_trained_lies_on_a_gpu_and_is_counted(retrieval: str) -> None:
    config = small_config(gate="none", retrieval=retrieval, device_budget=0)
    weights = LAYERS * 6 * WIDTH * 4
    there = split(config, LAYERS, WIDTH, torch.float32, router_there=True)
    assert there == Split(router=True, keys=False, rows=0, moments=0, nbytes=weights)
    assert split(config, LAYERS, WIDTH, torch.float32).nbytes == 0
    one = small_config(gate="none", retrieval="host", device_budget=weights + LAYERS * ROW)
    assert split(one, LAYERS, WIDTH, torch.float32, router_there=True).nbytes == weights + LAYERS * ROW


def test_what_buys_nothing_is_refused_with_what_would() -> None:
    for options, least in (({}, ROUTER), ({"gate": "none"}, ROW)):
        with pytest.raises(ValueError, match=rf"buys nothing: 3 layers need at least {LAYERS * least} \({least} for"):
            of(LAYERS * least - 1, **options)
        assert of(LAYERS * least, **options).nbytes == LAYERS * least
