"""What a table may say: every place filled, no number without its interval, never the paper's among ours."""

import copy
import csv
import io
from pathlib import Path

import pytest
import yaml

from meft_bench.harness import rates as harness_rates
from meft_bench.harness import suites
from meft_bench.harness.rows import HEADLINE, ROWS, TABLE_ROWS
from meft_bench.harness.spec import PACKAGE
from meft_bench.harness.suites import cell
from meft_bench.report.blocks import short_table
from meft_bench.report.figures import marks
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.results import Column, headline
from meft_bench.report.records.stats import mean_interval
from meft_bench.report.records.traffic import in_units_of_m
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.traffic import traffic_table
from meft_bench.report.text import csv_table, markdown_table

from ..made_records import N, broken, make_record, results_of

REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")
CELLS = suites.default()
RECORDS = [make_record(c) for c in CELLS]


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _row(text: str, row: str, share: str) -> dict[str, str]:
    return next(r for r in _rows(text) if r["row"] == row and share in (r.get("share"), r.get("share_in_paper")))


def _cells_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[c.strip() for c in line.replace("\\|", "").strip("|").split("|")] for line in lines]


def test_one_line_per_row_and_share_in_the_order_of_rows() -> None:
    lines = [(r["row"], r["share"]) for r in _rows(tables.table1(results_of(CELLS, RECORDS), "default").csv)]
    assert len(lines) == len(set(lines)) == 2 + 2 * (len(TABLE_ROWS) - 2)
    assert [row for row, _ in lines] == sorted((row for row, _ in lines), key=list(ROWS).index)
    assert [share for row, share in lines if row == "meft"] == ["2%", "10%"], "0.5% and 40% are the figure's"


def test_the_readmes_table_has_one_size_of_every_method_and_the_numbers_of_table1() -> None:
    body = _cells_of(short_table(results_of(CELLS, RECORDS), "default"))
    assert body[0][:2] == ["Method", "Trained"] and len(body[0]) == 6, "one column a task"
    expected = [("base", "0%"), *((row, "10%") for row in HEADLINE), ("full", "100%")]
    assert {(marks.title(row), s) for row, s in expected} <= {(line[0], line[1]) for line in body[1:]}
    assert len(body) <= 9, "a small one"
    whole = _row(tables.table1(results_of(CELLS, RECORDS), "default").csv, "meft", "10%")
    assert f"{float(whole['facts_test_contains']):.3f} [" in next(b for b in body if b[:2] == ["MEFT", "10%"])[2]
    empty = short_table(results_of(CELLS, []), "default")
    assert "not run yet. `make replicate` fills" in empty
    assert all(c == "not run" for line in _cells_of(empty)[1:] for c in line[2:])


def test_places_without_a_record_say_so_and_why() -> None:
    table = tables.table1(results_of(CELLS, []), "default")
    body = _cells_of(table.markdown)[1:]
    assert all(cell and cell != "0" for line in body for cell in line)
    assert {c for line in body for c in line[5:]} == {"not run (no record)", "not run (not in suite)"}
    assert "`make replicate` fills these places" in table.markdown
    row = _row(table.csv, "lora", "10%")
    assert row["facts_test_contains"] == row["facts_test_contains_n"] == row["trainable_parameters"] == "not run"
    assert row["facts_test_contains_evidence"] == "not-run"
    assert row["cloze_test_contains_state"] == "not run: not in suite"


def test_a_score_stands_with_interval_n_and_evidence() -> None:
    table = tables.table1(results_of(CELLS, RECORDS), "default")
    assert f"facts test, contains (n = {N})" in table.markdown
    assert "0.250 [0.112, 0.469]" in table.markdown  # Wilson of 5 in 20
    assert table.markdown.count("measured") == 1, "one label for all, in the caption"
    row = _row(table.csv, "meft", "10%")
    assert (row["facts_test_contains"], row["facts_test_contains_low"], row["facts_test_contains_n"]) == (
        "0.2500",
        "0.1119",
        str(N),
    )
    assert row["tools_test_iou"] == "0.2750"


def test_mixed_evidence_and_counts_stand_in_the_cells() -> None:
    records = copy.deepcopy(RECORDS)
    meft = next(r for r, c in zip(records, CELLS, strict=True) if (c.row, c.share) == ("meft", "10%"))
    meft["quality"]["evidence"] = "capped"
    meft["quality"]["test"]["n"] = 19
    text = tables.table1(results_of(CELLS, records), "default").markdown
    assert "0.250 [0.112, 0.469] (n = 19, capped)" in text
    assert f"0.250 [0.112, 0.469] (n = {N}, measured)" in text
    assert "Evidence of every score" not in text


@pytest.mark.parametrize("state", ["oom", "diverged", "failed"])
def test_a_run_that_ended_badly_is_shown_with_its_reason(state: str) -> None:
    lost = next(i for i, c in enumerate(CELLS) if (c.row, c.share) == ("full", "100%"))
    records = [broken(r, state, "it | broke\nat step 7") if i == lost else r for i, r in enumerate(RECORDS)]
    table = tables.table1(results_of(CELLS, records), "default")
    line = next(line for line in _cells_of(table.markdown) if line[0] == "Full fine-tuning")
    assert line[5:8] == [state] * 3
    assert f"- Full fine-tuning 100% on facts: {state}: it | broke at step 7" in table.markdown
    assert _row(table.csv, "full", "100%")["facts_test_contains"] == state


def test_stale_records_are_marked_and_fresh_ones_are_not() -> None:
    records = [make_record(c, stale=c.row == "lora") for c in CELLS]
    body = _cells_of(tables.table1(results_of(CELLS, records), "default").markdown)[1:]
    for line in body:
        assert ("†" in line[5]) == (line[0] == ROWS["lora"].title)
    assert "stale" not in tables.table1(results_of(CELLS, RECORDS), "default").markdown


def test_learning_rates_say_whether_the_sweep_chose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell("base", "0%", task="facts"), cell("lora", "2%", task="facts", learning_rate=0.02)]
    for swept, expected in (({"lora 2%": 0.02}, "0.02"), ({"lora 2%": 0.01}, "0.02 (not swept)")):
        monkeypatch.setattr(tables, "learning_rates", lambda sizes, swept=swept: swept)
        table = tables.table1(results_of(cells, []), "default").csv
        assert _row(table, "lora", "2%")["learning_rate"] == expected
        assert _row(table, "base", "0%")["learning_rate"] == "not trained"


def test_two_different_runs_of_one_seed_are_refused() -> None:
    cells = [cell("lora", "2%", task="facts", steps=n) for n in (10, 20)]
    with pytest.raises(ValueError, match="two different runs claim lora 2% facts, seed 0"):
        results_of(cells, [])


def test_seeds_are_averaged_and_their_spread_stands_apart_from_the_items() -> None:
    cells = [cell("meft", "10%", task="facts", seed=s) for s in (0, 1, 2)]
    column = headline("facts")
    score = results_of(cells, [make_record(c, right) for c, right in zip(cells, (4, 6, 8), strict=True)]).score(
        ("meft", "10%"), column
    )
    assert (score.value, score.seeds, score.n) == (pytest.approx(0.3), 3, N)
    assert score.seed_sd == pytest.approx(0.1)
    assert (score.low, score.high) == pytest.approx(mean_interval([1] * 18 + [0] * 42))
    assert score.text() == f"0.300 ±0.100 [{score.low:.3f}, {score.high:.3f}]"
    # A seed that is planned and has no score is said; one that diverged is no zero.
    two = results_of(cells, [make_record(cells[0], 4), broken(make_record(cells[1]), "diverged", "nan")])
    short = two.score(("meft", "10%"), column)
    assert short.value == pytest.approx(0.2) and short.seed_sd is None
    assert "(1 of 3 seeds: diverged, no record)" in short.text()
    assert list(two.records_of(("meft", "10%"), "facts")) == [0, 1]


def test_variants_have_places_of_their_own() -> None:
    plain, many = cell("meft", "10%", task="facts"), cell("meft", "10%", task="facts", train_rows=1800, variant="1800")
    results = results_of([plain, many], [make_record(plain, 3), make_record(many, 9)])
    assert results.score(("meft", "10%"), headline("facts")).value == pytest.approx(0.15)
    assert results.score(("meft", "10%"), headline("facts"), "1800").value == pytest.approx(0.45)
    assert [c.variant for c in results.cells_of(("meft", "10%"))] == [""]


def test_learning_rates_of_tasks_that_differ_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"lora 2%": 0.01, "lora 2% cloze": 0.025}
    for module in (tables, harness_rates):
        monkeypatch.setattr(module, "learning_rates", lambda sizes="embedded": rates)
    cells = [cell("lora", "2%", task=t) for t in ("facts", "cloze", "tools")]
    text = tables.learning_rate(results_of(cells, []), ("lora", "2%"))
    assert text == "facts 0.01; cloze 0.025; tools 0.01 (as on facts)"


def test_a_split_or_metric_that_was_not_scored_is_not_run() -> None:
    results = results_of(CELLS, RECORDS)
    score = results.score(("meft", "10%"), Column("facts", "validation", "contains"))
    assert (score.state, score.reason, score.value) == ("not run", "no contains on validation", None)
    assert results.score(("meft", "10%"), Column("facts", "test", "accuracy")).state == "not run"


def test_the_papers_numbers_stay_in_their_own_columns() -> None:
    results = results_of(CELLS, RECORDS)
    changed = copy.deepcopy(REPORTED)
    for row in changed["table1"]["rows"]:
        row |= {task: 0.777 for task in changed["table1"]["columns"] if task in row}
    before, after = (tables.paper_table(results, r) for r in (REPORTED, changed))
    for old, new in zip(_rows(before.csv), _rows(after.csv), strict=True):
        for name in old:
            if name.startswith("paper_"):
                assert new[name] in ("0.777", "not reported") and name.endswith("_reported")
            else:
                assert new[name] == old[name] and "0.777" not in new[name]
    header, *body = _cells_of(after.markdown)
    for line in body:
        for title, text in zip(header, line, strict=True):
            assert ("0.777" in text) <= (title.startswith("paper, LLaMA-7B, ") and title.endswith(" (reported)"))
    assert "0.777" not in tables.table1(results, "default").markdown


def test_each_paper_row_stands_beside_our_row_of_the_same_name_and_share() -> None:
    own = [make_record(c, right=11 if (c.row, c.share) == ("meft", "10%") else 2) for c in CELLS]
    table = tables.paper_table(results_of(CELLS, own), REPORTED)
    assert len(_rows(table.csv)) == len(REPORTED["table1"]["rows"])
    row = _row(table.csv, "meft", "10%")
    assert (row["paper_LLaMA-7B_nq_reported"], row["ours_facts_test_contains"]) == ("0.413", "0.5500")
    assert _row(table.csv, "base", "0%")["paper_LLaMA-7B_toolbench_reported"] == "not reported"
    assert "R = 8464" in table.markdown, "the file's notes are told"


def test_traffic_splits_main_terms_from_overhead() -> None:
    table = traffic_table(results_of(CELLS, RECORDS), "default")
    row = next(r for r in _rows(table.csv) if (r["row"], r["share"], r["task"]) == ("meft", "10%", "facts"))
    assert int(row["hidden_bytes_per_step"]) == 16 * 8 * 4 * 4
    assert int(row["rows_bytes_per_step"]) == round(2.5 * 96 * 2 * 8 * 4)
    assert (row["index_bytes_per_step"], row["score_bytes_per_step"]) == ("512", "512"), "both directions counted"
    parts = sum(int(v) for k, v in row.items() if k.endswith("_bytes_per_step"))
    assert parts == int(row["bytes_per_step"])
    assert float(row["kept_share_of_neurons"]) == pytest.approx(8 / 96, abs=1e-4)
    assert row["union_share_mean"] == "0.6250" and row["union_share_by_layer"].startswith("1.0000 0.7500")
    assert "single thread, noisy" in table.markdown and "**measured**" in table.markdown


def test_traffic_in_units_of_m_is_two_for_whole_matrix_transfers() -> None:
    c = cell("parallel_adapter_offload", "2%", task="facts", accumulation=4)
    record = make_record(c)
    record["parameters"]["groups"] = {"keys": 21 * 8 * 4, "values": 21 * 8 * 4}
    assert in_units_of_m(record) == pytest.approx(2.0)


def test_traffic_lists_what_was_not_run_and_leaves_out_what_has_no_link() -> None:
    lost = [r for r, c in zip(RECORDS, CELLS, strict=True) if c.row != "meft"]
    table = traffic_table(results_of(CELLS, lost), "default")
    assert "- MEFT 40% on facts: no record" in table.markdown
    states = {(r["row"], r["state"]) for r in _rows(table.csv)}
    assert states == {("meft", "not run: no record"), ("meft_no_ke", "ok"), ("parallel_adapter_offload", "ok")}


def test_real_rows_show_test_and_recall_and_dropped_rows() -> None:
    cells = suites.real("local/stories260K@abc", "local@def")
    table = tables.real(results_of(cells, [make_record(c) for c in cells]))
    assert "not tuned on this one" in table.markdown and "ToolBench 3" in table.markdown
    row = _row(table.csv, "meft", "10%")
    assert all(f"{headline(t, s).key}_high" in row for t in ("nq", "gsm8k") for s in ("test", "recall"))
    assert "Not run" in tables.real_not_run().markdown and "not run" in tables.real_not_run().csv


def test_an_empty_cell_is_refused() -> None:
    for make in (markdown_table, csv_table):
        with pytest.raises(AssertionError):
            make(["a", "b"], [["1", ""]])


@pytest.mark.parametrize(
    ("text", "said"),
    [("table1: {}", "lacks 'columns'"), (":\n  - [", "is not YAML"), ("table1: {columns: {mmlu: facts}}", "mmlu")],
)
def test_broken_paper_numbers_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "reported.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"reported.yaml.*{said}"):
        load_reported(tmp_path / "reported.yaml")


def test_a_series_of_unequal_length_is_refused(tmp_path: Path) -> None:
    changed = copy.deepcopy(REPORTED)
    changed["figure6"]["1024"]["accuracy"].pop()
    (tmp_path / "reported.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match="figure6: 9 points on the axis, 8 scores"):
        load_reported(tmp_path / "reported.yaml")
