"""The search for the largest R."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.profile.matrix import UnionSource
from meft_bench.profile.runs import memory_of
from meft_bench.profile.search import LIMIT, STEP, Found, bisect, largest_fitting
from meft_bench.profile.setting import Setting
from meft_bench.simulate import cards
from tests.profile.small import shape_of_config, small_config, small_spec


def test_the_largest_fits_steps_of_many_micro_batches():
    """With gradients that are kept, 64 more do not; a step of one holds more."""
    config = small_config(layers=2)
    shape, gib = shape_of_config(config), 2**30
    card = cards.card("12GB")
    room = card.usable_bytes._replace(value=card.context_bytes.value + gib // 4)
    found = {}
    for counts in ((1,), (1, 4)):
        setting = Setting(config=config, shape=shape, card=dataclasses.replace(card, usable_bytes=room),
                          host=cards.host("desktop"), accumulations=counts)  # fmt: skip
        spec = small_spec("parallel_adapter_adam8bit")
        best, row = largest_fitting(spec, setting, 64 * gib, UnionSource(log=None), {})
        held = row["memory"].get("accumulated", row["memory"])
        beyond = memory_of(dataclasses.replace(spec, neurons=best.neurons + STEP, accumulation=max(counts)), setting)
        assert held["fits"] and not beyond["fits"] and best.limit == "device memory"
        found[max(counts)] = best.neurons
    assert found[4] < found[1] < LIMIT


def counting(limit: float, slope: float = 1.0, bend: float = 0.0):
    asked = []

    def lacking(neurons: int):
        asked.append(neurons)
        return slope * (neurons - limit) + bend * (neurons**2 - limit**2), "device memory"

    return lacking, asked


@given(st.floats(1, 40000), st.floats(0.1, 1e6), st.floats(0, 10))
def test_finds_the_last_that_fits(limit, slope, bend):
    lacking, asked = counting(limit, slope, bend)
    found = bisect(lacking).neurons
    expected = min(LIMIT, int(limit) // STEP * STEP)
    # Rounding may decide a limit that is a multiple of the step.
    assert found == expected or abs(limit - round(limit / STEP) * STEP) < 1e-6
    assert len(asked) == len(set(asked))


def test_straight_memory_needs_few_looks():
    lacking, asked = counting(10_000.5)
    assert bisect(lacking) == Found(neurons=9984, limit="device memory")
    assert len(asked) <= 4


def test_what_is_known_is_not_asked_again():
    lacking, asked = counting(10_000.5)
    known = {n: lacking(n) for n in (1024, 8448, 16384)}
    asked.clear()
    assert bisect(lacking, known).neurons == 9984
    assert not {1024, 8448, 16384, STEP, LIMIT} & set(asked) and len(asked) <= 2


def test_both_ends():
    assert bisect(counting(5)[0]) == Found(neurons=0, limit="device memory")
    assert bisect(counting(1e9)[0]) == Found(neurons=LIMIT, limit="the search ends there")


@pytest.mark.parametrize("bend", [0.0, 5.0])
def test_curved_memory_is_found_all_the_same(bend):
    lacking, asked = counting(20_000.0, 1.0, bend)
    assert bisect(lacking).neurons == 20_000 // STEP * STEP
    assert len(asked) < 40
