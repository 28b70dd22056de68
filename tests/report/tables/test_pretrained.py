"""The tables on a pretrained model say what was lost, by whom, over how many runs, and what no run has shown."""

import csv
import io

import pytest

from meft_bench.harness import smollm2
from meft_bench.report.tables import pretrained

from ..made_records import make_record, results_of

CELLS = smollm2.cells("local/smollm2-135m@000000000000", "local@000000000000")


def forgot(loss: float, kept: list[int]) -> dict:
    text = {"nats_per_token": loss, "base_nats_per_token": 4.25, "kl_nats_per_token": loss - 4.0, "tokens": 500}
    known = {"base_right": len(kept), "kept": sum(kept) / len(kept), "items": kept}
    return {"held_out": text, "own_text": text, "known": {"asked": 100, "greedy": known, "choice": known}}


@pytest.fixture
def results():
    chosen = [c for c in CELLS if (c.row, c.share, c.spec.task) in (("meft", "10%", "people"), ("lora", "10%", "nq"))]
    records = []
    for i, cell in enumerate(chosen):
        record = make_record(cell)
        record["probes"]["forgetting"] = forgot(5.0 + i, [1] * (10 - i) + [0] * i)
        records.append(record)
    return results_of(CELLS, records)


def rows(table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv)))


def test_forgetting_is_the_mean_over_runs_and_pools_their_items(results) -> None:
    table = pretrained.forgetting(results)
    found = {(r["method"], r["task"]): r for r in rows(table)}
    assert set(found) == {("MEFT", "people"), ("LoRA, attention q v (alpha 16)", "NQ")}
    for row in found.values():
        assert row["runs"] == "3" and row["kept_greedy"].endswith("of 30") and "±" in row["held_out_nats"]
    means = sorted(float(r["held_out_nats"].split(" ")[0]) for r in found.values())
    assert means[0] != means[1] and "4.250 nats a token" in table.markdown


def test_the_union_of_the_first_seed_stands_by_tokens(results) -> None:
    found = rows(pretrained.union(results))
    assert {r["neurons"] for r in found} == {"360"} and len({r["tokens"] for r in found}) > 1
    assert all(float(r["lowest"]) <= float(r["mean"]) <= float(r["highest"]) for r in found)


def test_scores_stand_with_test_and_recall_and_what_is_missing_is_not_run(results) -> None:
    scores, *_ = pretrained.pretrained(results)
    assert scores.name == "smollm2" and "not run" in scores.markdown and "never trained" in scores.markdown
    assert pretrained.not_run().name == "smollm2" and "SUITE=smollm2" in pretrained.not_run().markdown
