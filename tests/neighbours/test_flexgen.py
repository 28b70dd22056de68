"""The planner beside brute force: what is searched, what one knob reaches, the sentences from numbers made by hand."""

import dataclasses
from types import SimpleNamespace

import pytest

from meft_bench.neighbours import flexgen

TINY = dataclasses.replace(flexgen._QUICK, batch=4)


def made(rows: int, budget: int, speed: float) -> SimpleNamespace:
    return SimpleNamespace(rows=rows, device_budget=budget, tokens_per_s=speed)


def test_one_knob_keeps_the_others_still() -> None:
    every = [made(1, 0, 10), made(2, 0, 14), made(4, 0, 12), made(1, 100, 15), made(2, 100, 16), made(4, 50, 13)]
    assert flexgen.one_knob(every) == {"micro-batch": 14, "budget": 15, "accumulation": 10, "largest first": 13}
    assert set(flexgen.one_knob([])) == set(flexgen.KNOBS) and not any(flexgen.one_knob([]).values())
    assert flexgen.micro_batches(12) == [1, 2, 3, 4, 6, 12] and flexgen.lost(75, 100) == pytest.approx(25)


def test_the_finer_grid_holds_every_micro_batch_and_what_fits_of_the_budgets() -> None:
    options, work = flexgen._work("tiny", "24GB", 0.3, TINY)
    every = list(flexgen.finer(options, work, 2**40, 2))
    assert [p.rows for p in every] == [1, 1, 2, 2, 4, 4] and len({p.device_budget for p in every}) == 2
    room = every[0].device_bytes
    assert list(flexgen.finer(options, work, room, 2)) == [p for p in every if p.device_bytes <= room] != every


def test_the_best_is_never_slower_than_the_planners() -> None:
    row = flexgen._searched(("tiny", "24GB", 0.3), TINY)
    assert row["fits"] and row["best"]["tokens_per_s"] >= row["planned"]["tokens_per_s"]
    assert row["best"]["tokens_per_s"] >= max(v for v in row["one_knob"].values() if v is not None)
    assert row["tried"] > row["planner_tried"]


def test_what_came_out_is_computed_from_the_record() -> None:
    knobs = {"micro-batch": 80.0, "budget": 90.0, "accumulation": 50.0, "largest first": None}
    searches = [
        {"model": "a", "card": c, "fits": True, "planner_tried": 10, "tried": n, "one_knob": knobs,
         "planned": {"tokens_per_s": speed}, "best": {"tokens_per_s": 100.0}}
        for c, n, speed in (("x", 20, 100.0), ("y", 30, 96.0))
    ]  # fmt: skip
    replays = [
        {"model": "a", "card": "x", "rows": rows, "predicted_tokens_per_s": p, "replayed_tokens_per_s": r}
        for rows, p, r in ((1, 12.0, 10.0), (2, 18.0, 20.0), (4, 22.0, 16.0))
    ]
    said = flexgen.findings({"searches": [*searches, {"fits": False}], "replays": replays})
    assert said[0].says.startswith("The planner's policy loses 2.0 %") and "20 to 30" in said[0].says
    assert said[0].interval == pytest.approx((0, 4)) and said[0].n == 2 and "tries 10 policies" in said[0].says
    assert [f.interval[0] for f in said[1:4]] == pytest.approx([20, 10, 50]) and len(said) == 6
    assert said[4].interval == pytest.approx((-10, 37.5)) and "are 20.0 % from" in said[4].says
    assert "loses 20.0 %" in said[5].says and all(f.evidence == "simulated" for f in said)
