"""The search for the largest R."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.profile.search import LIMIT, STEP, Found, bisect


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
