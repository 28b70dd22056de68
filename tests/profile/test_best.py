"""The best that fits, from rows with chosen numbers."""

from typing import Any

import pytest

from meft_bench.profile import best, screen

GIB, MILLION = 2**30, 10**6
SETTINGS = {"card": "24GB", "usable_bytes": 24 * GIB, "host_memory_bytes": 64 * GIB, "accumulations": [1, 8],
            "asked": [64], "elsewhere": {"48GB": {"title": "a", "usable_bytes": 48 * GIB}}}  # fmt: skip


def row(variant: str, family: str, neurons: int, gib: float, speed: float, **changed: Any) -> dict[str, Any]:
    """A row of 10^6 parameters a neuron that takes gib on the device; twice as fast on the other card."""
    speeds = {"1": speed, "8": 2 * speed}
    return {
        "variant": variant, "title": variant, "family": family, "neurons": neurons, "state": "ok", "exact": True,
        "checkpointing": False, "union": None, "parameters": {"trainable": neurons * MILLION, "percent_of_base": 1.0},
        "memory": {"device_total_bytes": round(gib * GIB), "host_peak_bytes": 0},
        "time": {"tokens_per_s_by_accumulation": speeds},
        "elsewhere": {"48GB": {"tokens_per_s_by_accumulation": {a: 2 * s for a, s in speeds.items()}}}, **changed,
    }  # fmt: skip


def answer(rows: list[dict[str, Any]], card: str = "24GB", accumulation: int = 1) -> best.Answer:
    return best.answer(best.points({"settings": SETTINGS, "rows": rows}, card), card, 64, accumulation)


RESIDENT = row("parallel_adapter", "adapter", 64, 30, 100)
MEFT = row("meft", "meft", 64, 14, 95)


def test_what_does_not_fit_is_no_answer_but_the_measure_of_speed() -> None:
    host = row("on_host", "offload", 64, 16, 80)
    found = answer([RESIDENT, MEFT, host])
    assert (found.fastest, found.ours, found.offloaded) == (found.ours, found.fastest, found.offloaded)
    assert found.ours is not None and found.ours.variant == "meft" and found.share(found.ours) == 0.95
    assert found.floor == 90 and found.offloaded is not None and found.offloaded.variant == "on_host"
    other = answer([RESIDENT, MEFT, host], "48GB", 8)
    assert other.fastest is not None and other.fastest.variant == "parallel_adapter" and other.floor == 360
    short = row("meft", "meft", 64, 14, 95, memory={"device_total_bytes": GIB, "host_peak_bytes": 65 * GIB})
    assert answer([RESIDENT, short]).ours is None, "the host does not hold it"


def test_what_fits_alone_may_not_fit_when_gradients_are_kept() -> None:
    """A step of eight micro-batches takes the bytes of several, on the card and on the host."""
    for several in ({"device_total_bytes": 25 * GIB, "host_peak_bytes": 0},
                    {"device_total_bytes": 20 * GIB, "host_peak_bytes": 65 * GIB}):  # fmt: skip
        fast = row("eight_bit", "adapter", 64, 20, 120)
        fast["memory"]["accumulated"] = several
        larger = row("eight_bit", "adapter", 128, 40, 120)
        one, eight = (answer([RESIDENT, MEFT, fast, larger], accumulation=a) for a in (1, 8))
        assert (one.fastest and one.fastest.variant) == "eight_bit" and (
            eight.fastest and eight.fastest.variant
        ) == "meft"
        assert one.largest is not None and one.largest.point.variant == "eight_bit"
        assert eight.largest is not None and eight.largest.point.variant == "meft"
        found = best.points({"settings": SETTINGS, "rows": [MEFT, fast]}, "24GB")
        assert [[p.variant for p in best.frontier(found, a)] for a in (1, 8)] == [["eight_bit"], ["meft"]]
        profile = {"settings": SETTINGS, "rows": [fast]}
        assert list(screen.answer_lines(profile))[2].endswith("nothing of this size fits")


def test_a_line_says_what_several_micro_batches_take() -> None:
    held = {"device_total_bytes": 20 * GIB, "host_peak_bytes": GIB, "fits": True}
    for several, told in (
        ({}, "200 at 8"),
        ({"device_total_bytes": 25 * GIB, "fits": False}, "200 at 8; from 2 on 25.0 GiB, which does not fit"),
        ({"host_peak_bytes": 9 * GIB}, "200 at 8; from 2 on 20.0 GiB, host 9.0"),
        ({"host_peak_bytes": 65 * GIB}, "200 at 8; from 2 on 20.0 GiB, host 65.0, which does not fit"),
    ):
        one = row("eight_bit", "adapter", 64, 20, 100)
        one["memory"] = {**held, "accumulated": {**held, **several}}
        line = screen.row_line(one, 64 * GIB)
        assert line.endswith(told) and " yes  100 at 1" in line
        assert " no  100 at 1" in screen.row_line(one, GIB - 1), "the host does not hold it"


def test_only_exact_ones_are_called_exact() -> None:
    fast = row("eight_bit", "adapter", 64, 14, 120, exact=False)
    found = answer([RESIDENT, MEFT, fast])
    assert (found.fastest and found.fastest.variant) == "eight_bit" and (found.exact and found.exact.variant) == "meft"


@pytest.mark.parametrize(
    ("gib", "speed", "host", "trainable", "limit"),
    [
        # From 95 tokens/s at 64 M to 95/2 at 128 M seconds a token double: 1/90 lies 1/18 of the way.
        (20, 47.5, 0, 64 + 64 / 18, "speed"),
        (34, 94, 0, 64 + 64 / 2, "device memory"),
        (20, 94, 256, 64 + 64 / 4, "host memory"),
        (20, 94, 0, 128, "no larger size was profiled"),
    ],
)
def test_the_largest_lies_on_the_line_to_the_next_size(gib, speed, host, trainable, limit) -> None:
    larger = row("meft", "meft", 128, gib, speed)
    larger["memory"]["host_peak_bytes"] = host * GIB
    most = answer([RESIDENT, MEFT, larger]).largest
    assert most is not None and most.limit == limit
    assert most.ended == (limit if limit == best.NOT_PROFILED else f"{limit} ends it")
    assert most.trainable == pytest.approx(trainable * MILLION) and most.point.variant == "meft"


def test_where_u_was_logged_the_assumed_one_does_not_compete() -> None:
    logged = row("meft", "meft", 64, 14, 50, union={"evidence": "measured", "union_share": 1.0})
    assumed = row("meft", "meft", 64, 14, 99, union={"evidence": "assumed", "union_share": 0.3})
    ours = answer([RESIDENT, logged, assumed]).ours
    assert ours is not None and ours.title == "meft (U logged)"
    given = {"settings": {**SETTINGS, "union": 0.3}, "rows": [RESIDENT, logged, assumed]}
    assert [p.title for p in best.points(given, "24GB")][1:] == ["meft (U assumed)"]
    assert len(best.points(given, "24GB", both=True)) == 3


def test_the_frontier_compares_equal_nominal_sizes() -> None:
    """MEFT's router makes it a little larger than an adapter of the same R: that alone is no advantage."""
    host = row("on_host", "offload", 64, 16, 99)
    router = row("meft", "meft", 64, 14, 95, parameters={"trainable": 70 * MILLION, "percent_of_base": 1.1})
    large = row("meft", "meft", 128, 14, 40)
    found = best.points({"settings": SETTINGS, "rows": [RESIDENT, host, router, large]}, "24GB")
    assert [(p.variant, p.neurons) for p in best.frontier(found, 1)] == [("on_host", 64), ("meft", 128)]


def test_a_line_for_each_card() -> None:
    profile = {"settings": SETTINGS, "rows": [RESIDENT, MEFT]}
    lines = list(screen.answer_lines(profile))
    assert lines[1].startswith("  24GB, accumulation 1: fastest: meft, 95 tokens/s (0.95 x resident); largest at 90 ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "24GB, accumulation 1", "24GB, accumulation 8", "48GB, accumulation 8"]  # fmt: skip
    assert "fastest: parallel_adapter, 400" in lines[3] and "MEFT at best: meft, 380 tokens/s" in lines[3]
    nothing = {"settings": SETTINGS, "rows": [RESIDENT]}
    assert list(screen.answer_lines(nothing))[1].endswith("nothing of this size fits")


def test_of_a_meft_that_was_not_asked_for_nothing_is_said() -> None:
    host = row("on_host", "offload", 64, 16, 80)
    lines = list(screen.answer_lines({"settings": SETTINGS, "rows": [host]}))[1:]
    assert lines and all("on_host" in line and "MEFT" not in line for line in lines)
    large = list(screen.answer_lines({"settings": SETTINGS, "rows": [host, row("meft", "meft", 64, 40, 95)]}))[1:]
    assert ["MEFT does not fit" in line for line in large] == [True, True, False], "40 GiB fit the card of 48"


def test_a_search_that_ends_is_not_said_to_end_the_size() -> None:
    entry = {"title": "lora", "checkpointing": False, "union_evidence": "", "state": "ok", "neurons": 32768}
    limits = (best.SEARCH_ENDED, "host memory")
    profile = {"settings": SETTINGS, "largest": [{**entry, "limit": limit} for limit in limits]}
    told = [line.split("  ")[-1] for line in list(screen.largest_lines(profile))[1:]]
    assert told == ["the search ends there, checkpointing no", "host memory ends it, checkpointing no"]
