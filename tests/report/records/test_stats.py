"""Intervals against hand values, and the sign and pairing of differences."""

import math

import pytest
from scipy.stats import nct, norm, t

from meft_bench.harness.suites import cell
from meft_bench.report.records.stats import (
    compare,
    holm,
    mean_interval,
    p_above,
    paired_bootstrap,
    power,
    seed_interval,
    spread,
    wilson,
)

from ..made_records import make_record


@pytest.mark.parametrize(("right", "n"), [(8, 10), (0, 20), (20, 20), (413, 1000)])
def test_wilson_is_the_closed_formula(right: int, n: int) -> None:
    z, p = norm.ppf(0.975), right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(right, n) == pytest.approx((middle - half, middle + half))


def test_wilson_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 600)[1] > 0.005, "no success in 600 does not prove a zero"


@pytest.mark.parametrize(("right", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(right, n)


def test_the_mean_interval_takes_wilson_for_zeros_and_ones_and_resamples_otherwise() -> None:
    assert mean_interval([1, 0, 1, 1]) == wilson(3, 4)
    scores = [0.5, 1, 0, 0.25] * 50
    low, high = mean_interval(scores)
    spread = 1.96 * math.sqrt(sum((s - 0.4375) ** 2 for s in scores) / 200 / 200)
    assert (low, high) == pytest.approx((0.4375 - spread, 0.4375 + spread), abs=0.01)
    assert mean_interval(scores) == (low, high), "the seed is fixed"
    with pytest.raises(ValueError, match="at least one item"):
        mean_interval([])


def test_a_difference_has_the_sign_of_first_minus_second() -> None:
    better, worse = [1] * 45 + [0] * 5, [1] * 20 + [0] * 30
    up, down = paired_bootstrap(better, worse), paired_bootstrap(worse, better)
    assert (up.mean, up.verdict, down.mean, down.verdict) == (0.5, "higher", -0.5, "lower")
    assert 0 < up.low < 0.5 < up.high and up.n == 50
    assert paired_bootstrap(better, better).verdict == "inconclusive"


def test_pairing_narrows_the_interval() -> None:
    first = [1, 0] * 50
    second = [0 if i < 10 else s for i, s in enumerate(first)]  # loses five, wins none
    d = paired_bootstrap(first, second)
    unpaired = 2 * 1.96 * math.sqrt(0.25 / 100 + 0.45 * 0.55 / 100)
    assert d.verdict == "higher" and d.high - d.low < unpaired / 2


def test_unequal_lists_are_no_pairs() -> None:
    for first, second in (([1], [1, 0]), ([], [])):
        with pytest.raises(ValueError, match="same items"):
            paired_bootstrap(first, second)


def _pair() -> tuple[dict, dict]:
    return make_record(cell("meft", "10%", task="facts"), 15), make_record(cell("lora", "2%", task="facts"), 5)


def test_items_are_matched_by_id_not_by_place() -> None:
    first, second = _pair()
    expected = compare([(first, second)], "test", "contains")
    block = second["quality"]["test"]
    block["ids"].reverse()
    block["metrics"]["contains"]["items"].reverse()
    again = compare([(first, second)], "test", "contains")
    assert (again.mean, again.low, again.high) == (expected.mean, expected.low, expected.high)
    del block["ids"][:12], block["metrics"]["contains"]["items"][:12]  # the last twelve are gone
    assert compare([(first, second)], "test", "contains").n == 8


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("train_rows", 7), ("data", "local@x"), ("task", "cloze")])
def test_equal_ids_of_other_data_are_not_compared(name: str, value: object) -> None:
    first, second = _pair()
    second["spec"][name] = value
    with pytest.raises(ValueError, match=name):
        compare([(first, second)], "test", "contains")


def test_a_missing_score_is_said() -> None:
    first, second = _pair()
    with pytest.raises(ValueError, match="has no accuracy on test"):
        compare([(first, second)], "test", "accuracy")
    second["quality"]["test"]["ids"] = [f"other-{i}" for i in range(20)]
    with pytest.raises(ValueError, match="share no item"):
        compare([(first, second)], "test", "contains")


def test_items_of_several_seeds_are_pooled_pair_by_pair() -> None:
    pairs = [
        (make_record(cell("meft", "10%", task="facts", seed=s), 15 + s),
         make_record(cell("lora", "2%", task="facts", seed=s), 5))
        for s in (0, 1)
    ]  # fmt: skip
    pooled = compare(pairs, "test", "contains")
    assert pooled.n == 40 and pooled.mean == pytest.approx((10 + 11) / 40)
    with pytest.raises(ValueError, match="seed"):  # a pair of two seeds has no common items
        compare([(pairs[0][0], pairs[1][1])], "test", "contains")


def test_a_question_that_every_seed_is_asked_is_one_item() -> None:
    """Rows of a test file are the same for every seed: three seeds that answer alike say no more than one."""
    pairs = [
        tuple(make_record(cell(row, "10%", "llama-7b", task="nq", model="m", data="d", seed=s), right)
              for row, right in (("meft", 15), ("parallel_adapter", 5)))
        for s in (0, 1, 2)
    ]  # fmt: skip
    assert compare(pairs, "test", "contains") == compare(pairs[:1], "test", "contains")
    assert compare(pairs, "test", "contains").n == 20


def test_seed_intervals_are_students() -> None:
    assert seed_interval([0.5]) is None and spread([0.5]) is None
    low, high = seed_interval([0.1, 0.2, 0.3])
    # t(0.975, 2 degrees) = 4.303, sd = 0.1
    assert (low, high) == pytest.approx((0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5), abs=1e-4)
    assert p_above([0.1, 0.2, 0.3], low) == pytest.approx(0.025, abs=1e-6)
    assert p_above([0.1, 0.2, 0.3], 0.2) == pytest.approx(0.5)
    assert p_above([0.2] * 3, 0.1) == 0.0 and p_above([0.2] * 3, 0.2) == 1.0, "no spread decides by itself"


def test_holm_is_the_textbook_procedure() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_power_grows_with_the_effect_and_the_seeds() -> None:
    assert power(0.0, 0.1, 3) == pytest.approx(0.05, abs=1e-6)
    assert 0.05 < power(0.05, 0.1, 3) < power(0.05, 0.1, 5) < power(0.5, 0.1, 5) <= 1
    assert power(-0.2, 0.1, 5) == pytest.approx(power(0.2, 0.1, 5))
    assert power(0.1, 0.0, 3) == 1.0
    # Textbook values of the paired t-test: d = 1 with 10 pairs, d = 0.5 with 20.
    assert power(0.3, 0.3, 10) == pytest.approx(0.803, abs=1e-3)
    assert power(0.15, 0.3, 20) == pytest.approx(0.565, abs=1e-3)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_power_is_a_number_however_large_the_effect(k: int) -> None:
    found = [power(shift / k**0.5, 1.0, k) for shift in (*range(0, 40), 60, 100, 200, 1e4)]
    assert all(0.05 - 1e-6 <= p <= 1 for p in found) and found == sorted(found)
    assert found[5] == pytest.approx(float(nct.sf(t.ppf(0.975, k - 1), k - 1, 5)), abs=1e-6)
    assert found[-1] == pytest.approx(1.0, abs=1e-2)
