"""Slices of a GPU: which go together, a card's part, and the packing against every partition and assignment."""

import dataclasses
import math
import random

import pytest

from meft_bench.harness.suites import paper
from meft_bench.neighbours import slices
from meft_bench.neighbours.packing import Job, bound, exact, packed, schedule, unused_memory
from meft_bench.profile.pool import Pool
from meft_bench.simulate import cards, mig
from meft_bench.simulate.mig import PROFILES, one_size, partitions

GIB = 2**30


def job(name: str, gib: float, whole: float, alike: float = 0.0) -> Job:
    """Takes `whole` seconds on a GPU; on a slice its compute's share of that, and `alike` on any."""
    fits = (p for p in PROFILES.values() if gib <= p.usable_gib)
    return Job(name=name, nbytes=gib * GIB, seconds={p.name: alike + whole * 7 / p.compute for p in fits})


def test_partitions_are_those_that_go_and_hold_no_more() -> None:
    found = partitions()
    for partition in found:
        assert sum(PROFILES[n].compute for n in partition) <= 7 and sum(PROFILES[n].memory for n in partition) <= 8
    assert ("3g.40gb", "4g.40gb") in found and ("3g.40gb", "3g.40gb") in found and ("7g.80gb",) in found
    assert ("1g.10gb", "2g.20gb", "4g.40gb") in found and ("2g.20gb", "2g.20gb", "3g.40gb") in found
    assert not any("7g.80gb" in p and len(p) > 1 for p in found)
    assert ("4g.40gb", "4g.40gb") not in found and ("4g.40gb",) not in found, "there is but one place for it, and more"
    assert {name: len(p) for name, p in one_size().items()} == {
        "1g.10gb": 7, "1g.20gb": 4, "2g.20gb": 3, "3g.40gb": 2, "4g.40gb": 1, "7g.80gb": 1}  # fmt: skip


def test_a_slice_is_its_part_of_the_card_and_the_host() -> None:
    card, host = cards.card("a100"), cards.host("two-socket")
    half = mig.slice_of(card, PROFILES["3g.40gb"])
    assert half.half_rate.value == pytest.approx(3 / 7 * card.half_rate.value)
    assert half.bandwidth.value == card.bandwidth.value / 2 and half.h2d_pinned.value == pytest.approx(25e9 * 3 / 7)
    assert half.usable_bytes.value < card.usable_bytes.value / 2 and half.name == "a100-3g.40gb"
    assert mig.host_of(host, PROFILES["1g.10gb"]).bandwidth.value == pytest.approx(host.bandwidth.value / 7)
    assert mig.host_of(host, PROFILES["7g.80gb"]) == host


def test_a_case_by_hand() -> None:
    """One job needs a whole GPU for 10 s; four small ones take 4 s on any slice: a second GPU cut up takes them all."""
    jobs = [job("large", 70, 10), *(job(f"small {i}", 5, 0, alike=4) for i in range(4))]
    best = packed(jobs, 2)
    assert best is not None and best.makespan == exact(jobs, 2) == 10 == bound(jobs, 2)
    assert ("7g.80gb",) in best.layout and len({place for place, _ in best.placed}) == 5
    alone = schedule(jobs, [("7g.80gb",)] * 2)
    assert alone is not None and alone.makespan == 14, (
        "whole GPUs: a small one waits for the large one, or three others"
    )
    held = (70 * 10 + 4 * 5 * 4) / (80 * 2 * 10)
    assert unused_memory(jobs, best, 80 * GIB) == pytest.approx(1 - held)
    assert schedule(jobs, [("1g.10gb",) * 7] * 2) is None and packed([Job(name="x", nbytes=1, seconds={})], 2) is None


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_near_the_exact_best_and_never_below_it(seed: int) -> None:
    draw = random.Random(seed)
    jobs = [job(str(i), draw.choice((5, 15, 30, 60)), draw.uniform(1, 9), alike=draw.uniform(0, 9)) for i in range(5)]
    best, least = packed(jobs, 1), exact(jobs, 1)
    assert best is not None and bound(jobs, 1) <= least + 1e-9 <= best.makespan + 2e-9
    assert best.makespan <= 1.25 * least
    for name, partition in one_size().items():
        able = [j for j in jobs if name in j.seconds]
        mixed, alone = packed(able, 1), schedule(able, [partition])
        assert mixed is not None and alone is not None and mixed.makespan <= alone.makespan


def test_two_gpus_against_the_exact_best() -> None:
    draw = random.Random(7)
    jobs = [job(str(i), draw.choice((5, 30, 60)), draw.uniform(1, 9)) for i in range(4)]
    best, least = packed(jobs, 2), exact(jobs, 2)
    assert best is not None and least <= best.makespan <= 1.2 * least


def test_runs_of_equal_cost_are_one_kind() -> None:
    specs = [c.spec for c in paper("llama-7b", "hub", "cuda") if c.spec.steps]
    kinds = {slices.kind_of(s) for s in specs}
    lora = {k for k in kinds if k.method == "lora" and dict(k.size) == {"rank": 256, "targets": "attention"}}
    assert {k.accumulation for k in lora} == {32, 128} and len(lora) == 2, "whatever alpha is"
    assert len(slices._by_program(list(kinds))) == len(kinds) / 2
    assert all("kept" not in dict(k.size) for k in kinds)


def test_a_run_takes_the_memory_of_its_own_number_format() -> None:
    """Full fine-tuning of 7B in fp32, as the paper's suite does it, fits no GPU of 80 GB; half of it would."""
    (spec, *_) = [c.spec for c in paper("llama-7b", "hub", "cuda") if c.spec.method == "full" and c.spec.steps]
    kind = slices.kind_of(spec)
    assert kind.dtype == "float32" and "in fp32" in slices.title(kind)
    sizes = slices.Sizes(cards=("a100",))
    kinds = (kind, dataclasses.replace(kind, dtype="bfloat16"))
    with Pool({}, 1) as pool:
        (_, (wide,)), (_, (half,)) = pool.each(slices._predicted, [((kind,), sizes) for kind in kinds])
    assert 4 * 4 * 6.7e9 < wide["device_bytes"] < 2.1 * half["device_bytes"]
    assert half["device_bytes"] < slices._room(slices.WHOLE) < wide["device_bytes"]
    assert wide["seconds"]["a100"][slices.WHOLE] > half["seconds"]["a100"][slices.WHOLE]


def test_what_came_out_is_computed_from_the_record() -> None:
    one = {"fit": 3, "makespan_s": 7200.0, "mixed_makespan_s": 3600.0, "unused_memory": 0.8}
    row = {"card": "a100", "jobs": 5, "fit": 4, "layout": [["7g.80gb"], ["3g.40gb", "3g.40gb"]], "makespan_s": 3600.0,
           "bound_s": 1800.0, "unused_memory": 0.5, "one_size": {"3g.40gb": one, "7g.80gb": one}}  # fmt: skip
    first, second = slices.findings({"packed": [row]})
    assert first.says.startswith(
        "a100: 2 x 3g.40gb, 1 x 7g.80gb for the runs that fit; 1 hours against 2 on whole GPUs"
    )
    assert "(2.00 times)" in first.says and "50 % against 80 %" in first.says and first.shown_n == "4 of 5 runs"
    assert "3g.40gb 2.00 (3 runs fit)" in second.says and second.interval == (2.0, 2.0)
    assert math.isinf(exact([Job(name="x", nbytes=1, seconds={})], 1))
