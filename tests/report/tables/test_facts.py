"""The extra tables: every place filled, differences paired by seed, the paper's numbers in tables of their own."""

import csv
import io

from meft_bench.harness import suites
from meft_bench.harness.rates import learning_rates_swept
from meft_bench.harness.rows import RATE_OF, ROWS
from meft_bench.harness.spec import PACKAGE
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.quantities import changed_row, forgotten, measure, score
from meft_bench.report.records.results import headline
from meft_bench.report.records.stats import mean_interval, seed_interval
from meft_bench.report.tables import facts as more_tables

from ..made_records import N, make_record, results_of

REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")
CELLS = suites.full()


def _right(cell: suites.Cell) -> int:
    """MEFT 12 of 20 with a spread over seeds, without a gate always 3 fewer, all others 5."""
    if cell.row == "meft":
        return 12 + cell.spec.seed % 3
    return 9 + cell.spec.seed % 3 if cell.row == "meft_gate_none" else 5


RESULTS = results_of(CELLS, [make_record(c, _right(c)) for c in CELLS])


def _line(text: str, title: str, size: str) -> list[str]:
    return next(r for r in csv.reader(io.StringIO(text)) if r[:2] == [title, size])


def test_with_no_records_every_place_says_so() -> None:
    empty = results_of(CELLS, [])
    for table in (more_tables.sizes(empty), more_tables.ablations(empty), more_tables.neurons(empty)):
        assert "not run" in table.markdown and table.csv.count("\n") > 5
    assert "not run" in more_tables.union(empty).csv


def test_an_ablation_is_compared_seed_by_seed_with_the_default_of_its_size() -> None:
    table = more_tables.ablations(RESULTS)
    line = _line(table.csv, "MEFT, router only selects (no gate)", "10%")
    # Always three items fewer: the difference has no spread although both scores have.
    assert line[3] == f"{-3 / N:+.3f} [{-3 / N:+.3f}, {-3 / N:+.3f}]" and "±" in line[2]
    assert _line(table.csv, "MEFT", "10%")[3] == "reference"
    assert _line(table.csv, "MEFT without Key-Experts, K = 2", "10%")[3].startswith("+0.000"), "its own reference"
    assert [changed_row(r) for r in ("meft_no_ke_device", "meft_no_ke", "meft_int8")] == ["meft_no_ke", "meft", "meft"]
    # Read by union, every made record scores 0.25: 13 of 20 on average before.
    assert _line(table.csv, "MEFT", "10%")[4].startswith(f"{0.25 - sum(12 + s % 3 for s in range(5)) / 5 / N:+.3f} [")
    titles = [r[0] for r in csv.reader(io.StringIO(table.csv))]
    assert {ROWS[row].title for row in suites.ABLATIONS} <= set(titles)


def test_sizes_show_bytes_bits_and_forgetting() -> None:
    table = more_tables.sizes(RESULTS)
    line = _line(table.csv, "Parallel Adapter (ReLU)", "10%")
    # 10 % of a million parameters, four fp32 numbers each.
    assert line[3] == f"{100_000 * 16 / 1024:,.0f}"
    # 5 of 20 recalled, 900 facts of 10 bits, 8192 trainable parameters.
    assert line[5] == f"{0.25 * 900 * 10 / 8192:.3f}"
    assert line[6].startswith("+0.3"), "0.02 nats a letter of the row's name, in made_records"


def test_forgetting_is_of_every_seed_that_the_score_is_of() -> None:
    """The base's loss is the same for every seed, so it need not have been run with all of them."""
    values = forgotten(RESULTS, "meft 10% facts")
    assert len(measure(RESULTS, "base_nats", "base 0% facts").by_seed) == 3 and len(values.by_seed) == 5
    table, mean = more_tables.sizes(RESULTS), sum(values.by_seed.values()) / 5
    assert _line(table.csv, "MEFT", "10%")[6].startswith(f"{mean:+.3f} [")
    assert _line(table.csv, "Base model", "0%")[5] == "none trained"


def test_places_with_other_numbers_of_seeds_say_how_many() -> None:
    """Contrasts of Table 1 have five, others three: a reader who compares two of them must see it."""
    for table in (more_tables.sizes(RESULTS), more_tables.ablations(RESULTS)):
        assert _line(table.csv, "MEFT", "10%")[2 + 2 * (table.name == "sizes")].endswith("] (5 seeds)")
    assert _line(more_tables.sizes(RESULTS).csv, "MEFT", "2%")[4].endswith("] (3 seeds)")
    assert _line(more_tables.ablations(RESULTS).csv, "MEFT, router only selects (no gate)", "10%")[2].endswith(
        "(3 seeds)"
    )
    rows = list(csv.reader(io.StringIO(more_tables.paper_tables(RESULTS, REPORTED).csv)))[1:]
    told = {r[1]: r[2] for r in rows if r[0] == "ours_table2"}
    assert told["10% cloze"].endswith("(5 seeds)") and told["0.5% cloze"].endswith("(3 seeds)")
    assert not any("seeds" in r[2] for r in rows if r[0] == "ours_table3"), "all three"


def test_an_interval_over_questions_is_not_called_one_over_seeds() -> None:
    """Behind a score it is over 100 questions; five seeds give another, and the captions tell which is which."""
    for table in (more_tables.sizes(RESULTS), more_tables.ablations(RESULTS)):
        line = _line(table.csv, "MEFT", "10%")
        text = next(x for x in line if "±" in x)
        values = score(RESULTS, "meft 10% facts").by_seed
        over_seeds, right = seed_interval(list(values.values())), round(sum(values.values()) * N)
        low, high = mean_interval([1] * right + [0] * (5 * N - right))
        assert text == RESULTS.score(("meft", "10%"), headline("facts")).text(show_seeds=True)
        assert f"[{low:.3f}, {high:.3f}]" in text and over_seeds is not None and f"[{over_seeds[0]:.3f}" not in text
        about = table.markdown.partition("|")[0]
        assert "behind a score (facts test) are the 95 % interval over the questions of all seeds" in about
        assert "all other brackets are the 95 % t-interval over seeds" in about
    assert "paired over the seeds that both have" in more_tables.ablations(RESULTS).markdown


def test_usage_and_union_tables() -> None:
    used = more_tables.neurons(RESULTS)
    assert _line(used.csv, "MEFT without Key-Experts", "10%")[2] == "no experts"
    assert _line(used.csv, "MEFT", "10%")[6] == "0.083", "K/R beside, as the level of chance"
    union = list(csv.reader(io.StringIO(more_tables.union(RESULTS).csv)))
    assert union[0][3:] == ["R = 96", "R = 384", "R = 1536"]
    shares = [float(r[3]) for r in union[1:] if r[0] == "16"]
    assert shares == sorted(shares) and len(shares) > 2


def test_the_papers_tables_stand_apart_from_ours() -> None:
    table = more_tables.paper_tables(RESULTS, REPORTED)
    rows = list(csv.reader(io.StringIO(table.csv)))[1:]
    theirs = [r for r in rows if r[0].startswith("paper_")]
    assert ["paper_table3_nq", "4", "0.297"] in theirs and ["paper_table2_squad", "6144", "0.295"] in theirs
    assert any(r[0] == "paper_table1_mistral_nq" and r[2] == "0.427" for r in theirs)
    assert all("±" in r[2] for r in rows if r[0] == "ours_table3")


def test_the_sweep_is_shown_whole() -> None:
    tried, chosen = learning_rates_swept()
    table = more_tables.sweep()
    lines = list(csv.reader(io.StringIO(table.csv)))[1:]
    assert len(lines) == len(tried) == len(chosen)
    for line in lines:
        rates = [float(part.split(":")[0]) for part in line[4].split("; ")]
        assert len(rates) >= 3 and float(line[3]) in rates
    # Every row, size and task that is swept has its place; none is at the edge unless it was followed outwards.
    planned = {f"{c.row} {c.share}" for c in suites.full() if c.spec.task == "facts" and not c.variant and c.spec.steps}
    unswept = {n for n in planned if n not in tried and n.split()[0] not in RATE_OF}
    assert not unswept
