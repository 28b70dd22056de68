"""What the learning rates of a method say, on scores made by hand."""

from typing import Any

import pytest

from meft_bench.neighbours import momentum_free as free


def runs(scores: dict[float, tuple[float, ...]], diverged: float | None = None) -> list[dict[str, Any]]:
    return [
        {"rate": rate, "seed": seed, "score": score, "state": "diverged" if rate == diverged else "ok"}
        for rate, some in scores.items()
        for seed, score in enumerate(some)
    ]


def test_the_grid_is_a_factor_apart() -> None:
    assert free.grid(2.0, 2) == [0.32, 0.8, 2.0, 5.0, 12.5]


def test_the_range_of_good_rates_ends_at_the_first_bad_one() -> None:
    scores = {0.1: (0.85, 0.95), 0.25: (0.2, 0.2), 0.6: (0.9, 0.92), 1.5: (1.0, 0.98), 4.0: (0.95, 0.4)}
    found = free.summary(runs(scores))
    assert (found["best_rate"], found["best_score"], found["best_scores"]) == (1.5, 0.99, [1.0, 0.98])
    assert (found["good_from"], found["good_to"], found["good_times"]) == (0.6, 1.5, 2.5)  # 0.1 lies behind a bad one
    assert (found["above"], found["edge"], found["largest_spread"]) == (0.675, False, 0.55)
    assert found["means"][1] == {"rate": 0.25, "score": 0.2}


def test_a_rate_at_which_a_seed_diverged_is_not_good() -> None:
    found = free.summary(runs({1.0: (0.9, 0.9), 2.5: (0.91, 0.9)}, diverged=1.0))
    assert (found["best_rate"], found["good_times"], found["diverged"]) == (2.5, 1.0, 2)
    assert found["above"] is None and found["above_reason"] and found["edge"]


def test_what_came_out_says_it() -> None:
    records = [record(spec.to_dict()) for spec in free.specs(True)]
    found = free.run(True, records)
    says = {f.says.split(":")[0]: f for f in free.findings(found)}
    assert set(says) == {"LOMO", "AdaLomo", "Full fine-tuning"}
    lomo = says["LOMO"]
    assert (
        "0.500 at rate 0.8, within a tenth of it at rates up to 2.5 times" in lomo.says
        and "1 of 3 runs diverged" in lomo.says
        and lomo.interval == (0.5, 0.5)
    )
    assert {r["score"] for r in found["rows"] if r["state"] == "diverged"} == {0.0}


def record(spec: dict[str, Any]) -> dict[str, Any]:
    """Half right; LOMO above its middle rate diverges."""
    diverged = spec["method"] == "lomo" and spec["learning_rate"] > 2
    quality = {"test": {"metrics": {"contains": {"mean": 0.5 if spec["learning_rate"] > 1e-3 else 0.1}}}}
    return {
        "spec": spec,
        "run_key": "0" * 12,
        "state": "diverged" if diverged else "ok",
        "quality": None if diverged else quality,
        "probes": None if diverged else {"base_text": {"nats_per_token": 1.5}},
    }


@pytest.mark.parametrize("quick", [True, False])
def test_every_method_has_every_rate_and_seed(quick: bool) -> None:
    specs = free.specs(quick)
    assert len({s.run_key for s in specs}) == len(specs) == len(free._MIDDLE) * (3 if quick else 15)
