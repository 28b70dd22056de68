"""The suite on a pretrained model: sizes at their shares, worth before rest, equal sweeps, a plan with hours."""

from pathlib import Path

import pytest
import yaml

from meft_bench.cli import main
from meft_bench.harness import smollm2
from meft_bench.harness.rates import learning_rates, rates_file, swept_rate
from meft_bench.harness.rows import ROWS, row_options
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import HEADLINE_METRIC, RunSpec
from meft_bench.named import named_in
from meft_bench.report.records import real
from meft_bench.train.contract import describe
from meft_bench.train.methods import ModelShape, find_method, parse_options

SHAPE = ModelShape(hidden=576, layers=30, ffn=1536, query=576, value=192, parameters=smollm2.PARAMETERS)
MODEL, DATA = "local/smollm2-135m@000000000000", "local@000000000000"


def test_every_size_is_the_share_that_it_is_called() -> None:
    for row, shares in SIZES[smollm2.NAME].items():
        for share in shares:
            method, options = ROWS[row].method, row_options(row, share, smollm2.NAME)
            count = sum(find_method(method).count(parse_options(method, options), SHAPE).values())
            assert 100 * count / SHAPE.parameters == pytest.approx(float(share[:-1]), rel=0.03), (row, share)


def test_contrasts_come_first_with_all_seeds_and_every_row_once_a_seed() -> None:
    cells = smollm2.cells(MODEL, DATA)
    keys = [c.spec.run_key for c in cells]
    assert len(keys) == len(set(keys))
    first = cells[: len(cells) // 2]
    for task in ("people", "nq"):
        seeds = {row: {c.spec.seed for c in first if (c.row, c.spec.task) == (row, task)} for row in smollm2._AT_10}
        assert set(map(frozenset, seeds.values())) == {frozenset((0, 1, 2))}
    assert all(c.spec.model == MODEL and named_in(c.spec.model) == smollm2.NAME for c in cells)
    assert {c.spec.task for c in smollm2.cells(MODEL, "synthetic")} == {"people"}


def test_what_claims_compare_on_people_and_the_short_table_have_the_seeds_of_the_embedded_contrasts() -> None:
    claims = yaml.safe_load(Path("results/paper/claims.yaml").read_text())["claims"]
    parts = [part for claim in claims for part in claim.get("pretrained", [])]
    places = {place for part in parts for place in part.get("difference", []) if place.endswith(" people")}
    wanted = {tuple(place.split()[:2]) for place in places} | set(real.HEADLINE)
    assert wanted == set(smollm2.CONTRASTED)
    found = smollm2.cells(MODEL, DATA)
    for line in smollm2.CONTRASTED:
        assert {c.spec.seed for c in found if (c.row, c.share) == line and c.spec.task == "people"} == {0, 1, 2, 3, 4}


def test_every_row_is_swept_on_as_many_rates_on_the_development_split() -> None:
    grids = {name: describe(name).learning_rates for name in {row.method for row in ROWS.values()}}
    cells = smollm2.sweep(MODEL, grids)
    counted: dict[tuple[str, str], int] = {}
    for c in cells:
        assert c.spec.splits == ("validation",) and c.spec.task == "people" and c.spec.seed == 0
        counted[c.row, c.share] = counted.get((c.row, c.share), 0) + 1
    assert set(counted.values()) == {3}
    wanted = {(c.row, c.share) for c in smollm2.cells(MODEL, DATA) if c.spec.steps}
    assert set(counted) == {line for line in wanted if line[1] not in smollm2.UNION_SIZES}


def test_rates_of_a_model_are_its_own() -> None:
    assert rates_file("embedded") != rates_file(smollm2.NAME)
    assert swept_rate("meft", "10%", "facts") == learning_rates()["meft 10%"]
    assert swept_rate("meft", "77%", "people", smollm2.NAME) is None


def test_the_plan_says_hours_by_the_work_that_is_left() -> None:
    specs = [c.spec for c in smollm2.cells(MODEL, DATA)]
    assert smollm2.work(specs[0]) > smollm2.work(next(s for s in specs if not s.steps)) > 0
    said = smollm2.plan_text(specs[:4], 7, 2)
    assert "4 runs to make, 7 are there" in said and "hours" in said


def test_a_task_without_data_takes_none() -> None:
    with pytest.raises(ValueError, match="leave out --data"):
        RunSpec(task="people", method="base", data=DATA)
    assert HEADLINE_METRIC["people"] == "contains"


def test_the_suite_asks_for_a_model_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replicate", "--suite", "smollm2", "--model", "./gone"]) == 2
    assert "no model folder" in capsys.readouterr().err
    assert main(["replicate", "--suite", "smollm2", "--model", "embedded"]) == 2
    assert "leave out --model" in capsys.readouterr().err


def test_lines_without_a_swept_rate_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = smollm2.cells(MODEL, "synthetic")
    monkeypatch.setattr(smollm2, "swept_rate", lambda row, *place: None if row == "lora" else 1e-3)
    assert smollm2.unswept(cells).startswith("2 of 18 lines have no swept learning rate (lora 10%, lora 2%, ...)")
    monkeypatch.setattr(smollm2, "swept_rate", lambda *place: 1e-3)
    assert smollm2.unswept(cells) == ""
