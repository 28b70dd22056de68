"""The suite frontier: sizes that are equal where it says so, every curve with every seed, minutes in its plan."""

from collections import Counter

import pytest

from meft_bench.cli import main
from meft_bench.harness import frontier, smollm2, suites
from meft_bench.harness.rates import swept_rate
from meft_bench.harness.rows import PEERS, ROWS, row_options
from meft_bench.harness.spec import RunSpec
from meft_bench.harness.suites import SEEDS
from meft_bench.train.methods import ModelShape, find_method, parse_options

SHAPE = ModelShape(hidden=128, layers=4, ffn=384, query=128, value=128, parameters=1_068_928)


def trainable(row: str, share: str) -> int:
    options = parse_options(ROWS[row].method, row_options(row, share, "embedded"))
    return sum(find_method(ROWS[row].method).count(options, SHAPE).values())


def test_every_curve_is_run_once_a_seed_and_rate_and_shares_the_full_suites_runs() -> None:
    cells = frontier.cells()
    keys = [c.spec.run_key for c in cells]
    assert len(keys) == len(set(keys)) == 3 * (1 + 42 + 2 + 17)
    peers = [c.row in PEERS for c in cells]
    assert peers == [False] * 135 + [True] * 51, "the peers come last"
    assert {c.spec.seed for c in cells} == {0, 1, 2}
    full = {c.spec.run_key for c in suites.full()}
    shared = {(c.row, c.share) for c in cells if c.spec.run_key in full}
    assert {("meft", "10%"), ("parallel_adapter", "10%"), ("lora_ffn", "10%"), ("base", "0%")} <= shared
    at_chosen = {c.row for c in cells if c.row in PEERS and c.spec.run_key in full}
    others = set(PEERS) - {"adapter_h_spread"}  # a start of AdapterH, and no method of its own
    assert at_chosen == others, "each peer also at the rate of its sweep, which the full suite runs"


def test_groups_are_of_equal_size() -> None:
    counts = [trainable(c.row, c.share) for c in frontier.EQUAL_PARAMETERS]
    assert max(counts) < 1.06 * min(counts)
    distinct = [row_options(c.row, c.share, "embedded") for c in frontier.SIZES if "distinctive" in c.row]
    assert {round(o["distinctive"] / o["neurons"], 2) for o in distinct} == {0.25, 0.5}
    assert row_options("meft", "10%", "embedded")["distinctive"] is None


def test_keys_of_runs_without_distinctive_updates_are_what_they_were() -> None:
    """A field that was added later and says nothing new must leave a run's key alone."""
    options = row_options("meft", "10%", "embedded")
    older = {k: v for k, v in options.items() if not k.startswith("distinctive")}
    common = {"task": "facts", "method": "meft"}
    assert RunSpec(**common, options=options).run_key == RunSpec(**common, options=older).run_key


def test_the_plan_tells_minutes() -> None:
    specs = [c.spec for c in frontier.cells()]
    text = frontier.plan_text(specs, 0, 2)
    assert f"{len(specs)} runs to make" in text and "with 2 at a time" in text
    minutes = float(text.split("about ")[1].split()[0])
    assert 20 < minutes <= 45
    older = frontier.plan_text([s for s in specs if s.method not in PEERS], 0, 2)
    assert 4 < minutes - float(older.split("about ")[1].split()[0]) < 15


def test_on_a_pretrained_model_headline_methods_are_tried_at_as_many_rates() -> None:
    cells = frontier.real_cells("local/smollm2-135m@000000000000")
    counted = Counter((c.row, c.share) for c in cells)
    assert {c.spec.task for c in cells} == {"people"} and counted.pop(("base", "0%")) == len(SEEDS)
    assert set(counted) == {(c.row, c.share) for c in frontier.REAL_CURVES} and set(counted.values()) == {9}


def test_on_a_pretrained_model_no_rate_lies_above_the_one_that_was_swept_for_the_score() -> None:
    """Those runs are the suite smollm2's too and are not made again. Methods that were not swept begin at MEFT's."""
    model = "local/smollm2-135m@000000000000"
    there = {c.spec.run_key for c in smollm2.cells(model, "synthetic")}
    for curve in frontier.REAL_CURVES:
        chosen = swept_rate(curve.row, curve.share, "people", smollm2.NAME)
        if curve.row.startswith("meft_distinctive"):
            assert chosen is None and curve.rates[0] == swept_rate("meft", "10%", "people", smollm2.NAME)
        else:
            assert curve.rates[-1] == chosen
            again = [c for c in frontier.real_cells(model) if (c.row, c.share) == (curve.row, curve.share)]
            assert sum(c.spec.run_key in there for c in again) == len(SEEDS)


def test_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replicate", "--suite", "frontier", "--model", "embedded"]) == 2
    assert "smollm2-135m" in capsys.readouterr().err
