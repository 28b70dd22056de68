"""Small parts of the report against values worked out by hand."""

import csv
import io

import pytest

from meft_bench.harness import suites
from meft_bench.harness.estimate import paper_plan
from meft_bench.report.claims import words as claims_table
from meft_bench.report.claims.entries import Shown
from meft_bench.report.page.markdown import to_html
from meft_bench.report.records import quantities
from meft_bench.report.records.paper import _check_table1, figure1_points
from meft_bench.report.records.profiles import load_profiles
from meft_bench.report.records.quantities import Values
from meft_bench.report.records.stats import Difference
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.profile import memory_table
from meft_bench.report.tables.profile_findings import measured_table
from meft_bench.report.tables.traffic import traffic_table
from meft_bench.report.text import csv_table, markdown_table, paragraphs

from .made_profiles import make_profile, make_row, write_profiles
from .made_records import make_record, results_of
from .tables.test_scores import REPORTED


def test_a_table_in_both_forms() -> None:
    lines = [("MEFT", "10%", "0.5"), ("LoRA", "2%", "0.1")]
    assert markdown_table(("Method", "Size", "Score"), lines, left=2) == (
        "| Method | Size | Score |\n| --- | --- | ---: |\n| MEFT | 10% | 0.5 |\n| LoRA | 2% | 0.1 |\n"
    )
    assert csv_table(("a", "b"), [("x, y", 1)]) == 'a,b\n"x, y",1\n'
    assert paragraphs("one\n", "", "two") == "one\n\ntwo\n"


def test_the_page_aligns_numbers_and_refuses_a_block_of_two_kinds() -> None:
    page = to_html(markdown_table(("Method", "Score"), [("MEFT", "0.5")]))
    assert '<td>MEFT</td><td class="num">0.5</td>' in page
    for block in ("| a |\n| --- |\ntext", "- item\ntext", "| a |\n- item"):
        with pytest.raises(ValueError, match="mixes"):
            to_html(block)


def test_mefts_point_beside_the_papers_figure_1() -> None:
    """R = 8464 with N = 368: keys, values and router are 2 R D L + N D L of 6.74 billion parameters."""
    ((percent, accuracy),) = figure1_points(REPORTED, "meft")
    trained = (2 * 8464 + 368) * 4096 * 32
    assert percent == pytest.approx(100 * trained / 6_738_415_616, rel=2e-3) and accuracy == 0.413
    dense = dict(figure1_points(REPORTED, "parallel_adapter"))
    sizes = REPORTED["figure1"]["parallel_adapter"]["size"]
    assert sorted(dense) == pytest.approx(sorted(100 * 2 * r * 4096 * 32 / 6_738_415_616 for r in sizes), rel=2e-3)


@pytest.mark.parametrize(("score", "fine"), [(0, True), (1, True), (-0.001, False), (1.001, False)])
def test_a_reported_score_is_a_share(score: float, fine: bool) -> None:
    block = {"model": "x", "columns": {"nq": "facts"}, "rows": [{"row": "meft", "share": "10%", "nq": score}]}
    if fine:
        _check_table1(block)
    else:
        with pytest.raises(ValueError, match="is no score from 0 to 1"):
            _check_table1(block)


def test_a_difference_has_its_sign_and_a_score_has_none() -> None:
    items = Difference(mean=0.25, low=0.1, high=0.4, n=20)
    shown = {
        "a score": Shown(words="w", label="meft 10% facts", values=Values({0: 0.25})),
        "a difference": Shown(words="w", label="a minus b", values=Values({0: 0.25})),
        "over items": Shown(words="w", label="the same", values=Values({0: 0.25}, items=items)),
        "bytes": Shown(words="w", label="bytes of a step", values=Values({0: 3 * 2**20})),
        "many": Shown(words="w", label="tokens_per_s of meft", values=Values({0: 12345.6})),
    }
    assert {name: claims_table.effect(s) for name, s in shown.items()} == {
        "a score": "0.250",
        "a difference": "+0.250",
        "over items": "+0.250",
        "bytes": "3.0 MiB",
        "many": "12,346",
    }  # fmt: skip
    assert claims_table.effect(Shown(words="w", label="x", values=Values({}))) == "no value"


def test_rows_left_out_are_told_only_where_there_are_any() -> None:
    cells = suites.real("local/stories260K@abc", "local@def")
    records = [make_record(c) for c in cells]
    text = tables.real(results_of(cells, records)).markdown
    assert "Training rows left out because they exceed the length limit: ToolBench 3." in text
    for record in records:
        (record["timing"] or {}).pop("rows_dropped", None)
    assert "left out" not in tables.real(results_of(cells, records)).markdown


def test_a_run_without_times_is_left_out_of_the_times_alone() -> None:
    cells = suites.default()
    records = [make_record(c) for c in cells]
    for record in records:
        if record["spec"]["method"] == "parallel_adapter":
            record["timing"], record["timing_reason"] = None, "not kept"
    table = traffic_table(results_of(cells, records), "default")
    timed = table.markdown.split("Time per optimizer step")[1]
    assert "Parallel Adapter (ReLU)" not in timed and "| MEFT | 10% | facts | 1 |" in timed


def test_the_plan_at_scale_takes_the_sizes_of_its_model() -> None:
    for model, sizes in (("llama-7b", {"12%", "34%"}), ("mistral-7b", {"12%", "14%", "16%"})):
        able, text = paper_plan(model, "owner/model", "unused", "synthetic")
        found = {line.split()[2] for line in text.splitlines() if line.split()[1:2] == ["meft"]}
        assert found == sizes and able == [] and "weights: MODEL=" in text


@pytest.mark.parametrize(("card", "evidence", "timed"), [
    ("24GB", "measured", True), ("48GB", "measured", False), ("24GB", "capped", False),
])  # fmt: skip
def test_times_are_compared_on_the_same_card_alone(tmp_path, card: str, evidence: str, timed: bool) -> None:
    predicted = make_profile()
    run = make_profile(card=card, evidence=evidence, largest=[], paper=[])
    run["rows"] = [make_row("meft", 3072, False, evidence=evidence)]
    folder = write_profiles(tmp_path, predicted)
    write_profiles(tmp_path / "other", run)
    (folder / "measured.json").write_bytes(next((tmp_path / "other" / "profile").glob("*.json")).read_bytes())
    rows = list(csv.reader(io.StringIO(measured_table(load_profiles(folder)).csv)))[1:]
    quantities_of = {row[4] for row in rows}
    assert {"device peak, bytes", "H2D a micro-batch, bytes", "U/R"} <= quantities_of
    assert ("step at accumulation 1, s" in quantities_of) == timed
    assert all(row[7] == "1.0000" for row in rows if row[4] != "host peak, bytes")


def test_a_row_that_does_not_tell_its_host_memory_apart_keeps_its_place(tmp_path) -> None:
    profile = make_profile()
    for row in profile["rows"]:
        row.get("memory", {}).pop("host_by_category", None)
    (loaded,) = load_profiles(write_profiles(tmp_path, profile))
    table = memory_table(loaded)
    assert "| MEFT (U logged) | no |" in table.markdown and "Host:" not in table.markdown


def test_bits_are_of_whole_people() -> None:
    """605 facts asked for are 100 people, six facts each, ten bits a fact; a quarter of the questions is recalled."""
    c = suites.cell("meft", "10%", task="facts", train_rows=605)
    assert quantities.bits_recalled(make_record(c, 5)) == pytest.approx(0.25 * 600 * 10)
