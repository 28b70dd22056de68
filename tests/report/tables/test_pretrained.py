"""The tables on a pretrained model say what was lost, by whom, over how many runs, and what no run has shown."""

import csv
import io

import pytest

from meft_bench.harness import smollm2
from meft_bench.harness.suites import SEEDS
from meft_bench.report.tables import pretrained

from ..made_records import real_record, results_of

SUITE = smollm2.cells("local/smollm2-135m@000000000000", "local@000000000000")
CELLS = [c for c in SUITE if c.spec.seed in SEEDS]  # each place with as many seeds


@pytest.fixture
def results():
    chosen = [c for c in CELLS if (c.row, c.share, c.spec.task) in (("meft", "10%", "people"), ("lora", "10%", "nq"))]
    records = []
    for i, cell in enumerate(chosen):
        records.append(real_record(cell, divergence=1.0 + i, kept=10 - i))
    return results_of(CELLS, records)


def rows(table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv)))


def test_forgetting_is_the_mean_over_runs_and_takes_each_fact_once(results) -> None:
    table = pretrained.forgetting(results)
    found = {(r["method"], r["task"]): r for r in rows(table)}
    assert set(found) == {("MEFT", "people"), ("LoRA, attention q v (alpha 16)", "NQ")}
    for row in found.values():
        assert (
            row["learnt"].startswith("0.250 ±0.000 [")
            and row["runs"] == "3"
            and row["kept_greedy"].endswith("of 10")
            and "±" in row["held_out_nats"]
        )
    means = sorted(float(r["held_out_nats"].split(" ")[0]) for r in found.values())
    assert means[0] != means[1] and "4.250 nats a token" in table.markdown


def test_every_interval_of_the_forgetting_table_is_said_to_be_what_it_is(results) -> None:
    about = pretrained.forgetting(results).markdown.partition("|")[0]
    assert "its 95 % interval is over the questions of all runs" in about and "the 95 % interval over facts" in about


def test_the_union_of_the_first_seed_stands_by_tokens(results) -> None:
    found = rows(pretrained.union(results))
    assert {r["neurons"] for r in found} == {"360"} and len({r["tokens"] for r in found}) > 1
    assert all(float(r["lowest"]) <= float(r["mean"]) <= float(r["highest"]) for r in found)


def test_scores_stand_with_test_and_recall_and_what_is_missing_is_not_run(results) -> None:
    scores, *_ = pretrained.pretrained(results)
    assert scores.name == "smollm2" and "not run" in scores.markdown and "never trained" in scores.markdown
    assert scores.markdown.startswith("**Not complete: 6 of ")
    for title in ("people, other wording", "people, as taught", "NQ, new questions", "NQ, as taught"):
        assert f"| {title} (n = 20) |" in scores.markdown or f"| {title} |" in scores.markdown


def test_runs_that_are_not_all_there_are_counted_so() -> None:
    (cell, *_) = [c for c in CELLS if (c.row, c.share, c.spec.task) == ("meft", "10%", "people")]
    (row,) = rows(pretrained.forgetting(results_of(CELLS, [real_record(cell)])))
    assert row["runs"] == "1 of 3"
    assert pretrained.not_run().name == "smollm2" and "SUITE=smollm2" in pretrained.not_run().markdown
