"""What a page must say beside its numbers: that runs are old, what a size really is, whose rate a row takes, how many
runs a number stands for, and which files were left out."""

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import pytest

from meft_bench.harness import record, suites
from meft_bench.harness.rates import swept_rate
from meft_bench.harness.rows import ROWS, rate_source
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import PACKAGE
from meft_bench.harness.suites import cell
from meft_bench.report.blocks import short_table
from meft_bench.report.build import _facts, _report
from meft_bench.report.claims.file import load_claims
from meft_bench.report.claims.ledger import judge
from meft_bench.report.claims.takeaways import takeaways
from meft_bench.report.claims.words import borrowed_sentence
from meft_bench.report.figures import catalogue, output
from meft_bench.report.page import page as html
from meft_bench.report.records.results import borrowed_rates, stale_note
from meft_bench.report.tables import facts as more_tables
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.claims import claims_table
from meft_bench.report.tables.traffic import traffic_table

from .made_records import make_record, results_of
from .tables.test_scores import REPORTED

CELLS = suites.full()
BOOK = load_claims(PACKAGE.parent / "results" / "paper" / "claims.yaml")
EMBEDDED = 1_068_928
REAL = {
    ("meft_lazy", "40%"): 38.319,
    ("lora", "40%"): 24.524,
    ("lora_ffn", "2%"): 1.724,
    ("meft", "40%"): 38.319,
    ("parallel_adapter", "10%"): 9.963,
}
"""Of the embedded model's parameters, as its records count them."""
PAGES = {
    "table1": lambda r: tables.table1(r, "full"),
    "short": lambda r: short_table(r, "full"),
    "paper": lambda r: tables.paper_table(r, REPORTED),
    "sizes": more_tables.sizes,
    "ablations": more_tables.ablations,
    "neurons": more_tables.neurons,
    "union": more_tables.union,
    "paper_tables": lambda r: more_tables.paper_tables(r, REPORTED),
    "traffic": lambda r: traffic_table(r, "full"),
}


def results(stale: bool = False, changed: Any = None):
    """Every run of the full suite, at its real size."""
    records = [make_record(c, 5 + c.spec.seed, stale=stale) for c in CELLS]
    for made, c in zip(records, CELLS, strict=True):
        if (real := REAL.get((c.row, c.share))) is not None:
            made["parameters"] |= {"trainable_percent_of_base": real}
        if changed:
            changed(c, made)
    return results_of(CELLS, records)


@pytest.fixture(scope="module")
def fresh():
    return results()


@pytest.fixture(scope="module")
def old():
    return results(stale=True)


def text_of(page: str, found) -> str:
    made = PAGES[page](found)
    return made if isinstance(made, str) else made.markdown


def ledger(found):
    return judge(BOOK, found, results_of(suites.paper("llama-7b", "hub", "cuda"), []), {})


# ---- old code ----


@pytest.mark.parametrize("page", PAGES)
def test_a_table_of_old_runs_says_so_first_once_and_in_plain_words(page: str, fresh, old) -> None:
    text = text_of(page, old)
    first = text.splitlines()[0]
    assert first.startswith("**Stale †: made by an earlier version of the code.** All ")
    assert "today's may differ until they are run again" in first
    assert text.lower().count("stale") == 1 and "missing" not in first
    assert "stale" not in text_of(page, fresh).lower()


def test_some_old_runs_are_counted(fresh) -> None:
    def age(c, record):
        record["numerics"] = {} if c.row == "lora" else record["numerics"]

    found = results(changed=age)
    records = found.records()
    lora = sum(c.row == "lora" for c in CELLS)
    assert f"{lora} of {len(records)} runs behind this table" in stale_note(found, [*records, *records])
    assert stale_note(found, []) == stale_note(fresh, fresh.records()) == ""
    assert _facts("full", found)["stale"].startswith(f"{lora} of {len(records)} runs were made by an earlier version")
    assert "stale" not in _facts("full", fresh)


def test_verdicts_from_old_runs_say_so_first(fresh, old) -> None:
    table = claims_table(ledger(old)).markdown
    assert table.startswith("**Stale †: made by an earlier version of the code.** ")
    assert table.count("made by an earlier version") == 1
    # The page says it once, before the takeaways, for everything that it shows.
    made = {"table1": tables.table1(old, "full"), "sizes": more_tables.sizes(old)}
    facts = _facts("full", old)
    page = html.page(ledger(old), made, {}, {}, facts, takeaways=takeaways(ledger(old), [])).decode()
    assert page.count("<strong>Stale †: made by an earlier version of the code.</strong>") == 1
    assert page.count("made by an earlier version") == 1 and page.count(" †</td>") > 20
    assert page.index("<strong>Stale †") < page.index("<ol>") < page.index('id="verdicts"')
    assert "Stale" not in claims_table(ledger(fresh)).markdown
    assert "Stale" not in html.page(ledger(fresh), {}, {}, {}, {}).decode()


def test_the_page_gives_the_p_of_every_finding_that_has_one(fresh) -> None:
    judged = ledger(fresh)
    findings = [f for c in judged.claims for f in (c.small, c.scale) if f is not None]
    page = html.page(judged, {}, {}, {}, {}).decode()
    assert 0 < sum(f.p is not None for f in findings) < len(findings)
    assert page.count("after Holm over its family") == sum(f.p is not None for f in findings)


# ---- sizes ----


def test_a_size_that_is_another_shows_the_real_share(fresh) -> None:
    assert fresh.size(("lora", "40%")) == "40% (24.5%)" and fresh.size(("lora_ffn", "2%")) == "2% (1.72%)"
    assert fresh.size(("meft", "40%")) == "40% (38.3%)"
    assert fresh.size(("parallel_adapter", "10%")) == "10%" and fresh.size(("base", "0%")) == "0%"
    assert results_of(CELLS, []).size(("lora", "40%")) == "40%", "without a record nothing is known"


@pytest.mark.parametrize("page", ["sizes", "neurons", "traffic"])
def test_tables_show_it(page: str, fresh) -> None:
    text = text_of(page, fresh)
    assert "| 40% (38.3%) |" in text and "| MEFT | 40% |" not in text
    assert ("| 40% (24.5%) |" in text) == (page == "sizes")


def test_the_short_table_shows_it_and_files_for_machines_keep_the_nominal_name(fresh) -> None:
    table = tables.table1(fresh, "full")
    assert "| LoRA, FFN (alpha 16) | 2% (1.72%) |" in table.markdown and "Sizes are nominal" in table.markdown
    row = next(r for r in csv.DictReader(io.StringIO(table.csv)) if (r["row"], r["share"]) == ("lora_ffn", "2%"))
    assert row["percent_of_base"] == "1.724"
    assert "| 40% (24.5%) |" not in more_tables.paper_tables(fresh, REPORTED).markdown, "that is LoRA on the FFN"


def test_claims_show_it(fresh) -> None:
    labels = [p.label for c in ledger(fresh).claims if c.small is not None for p in c.small.parts]
    (label,) = [text for text in labels if text.startswith("lora 40% facts")]
    assert label == "lora 40% facts minus lora 0.5% facts (lora 40% is 24.5%)"


@pytest.mark.parametrize(("name", "said"), [
    ("capacity", "MEFT\n10%"), ("rows_moved", "MEFT 40% (38.3%)"), ("lookahead", "MEFT 40% (38.3%)"),
    ("experts", "40% (38.3%)"), ("ablations", "Adam only for neurons that were used, at 40% (38.3%)"),
    ("figure8", "MEFT 40% (38.3%)"), ("forgetting", "LoRA, FFN 2% (1.72%)"),
])  # fmt: skip
def test_figures_show_it(name: str, said: str, fresh) -> None:
    from matplotlib.text import Text

    with output.settings():
        figure = catalogue._DRAWN[name](fresh, REPORTED, {})
        texts = [t.get_text() for axes in figure.axes for t in axes.findobj(Text)]
    assert any(said in text for text in texts)
    assert not any(text.rstrip().endswith(("MEFT 40%", "at 40%")) or text in ("40%", "LoRA, FFN 2%") for text in texts)


def test_the_real_share_of_lora_at_40_is_24_5() -> None:
    """The rank stops at the width of the model: 4 layers, query and value, 128 x (128 + 128) each."""
    rank = SIZES["embedded"]["lora"]["40%"]
    assert rank == 128 and round(100 * 4 * 2 * rank * (128 + 128) / EMBEDDED, 3) == 24.524


# ---- rates ----


BORROWED = sorted({(c.row, c.share) for c in CELLS if rate_source(c.row)})


def test_twenty_rows_take_the_rate_of_another_and_really_have_it() -> None:
    assert len(BORROWED) == 20
    for c in CELLS:
        if (source := rate_source(c.row)) is not None:
            assert c.spec.learning_rate == swept_rate(source, c.share, c.spec.task)
    text = more_tables.sweep().markdown
    assert "Not swept: 20 rows take another row's rate." in text
    listed = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(listed) == 20
    for row, share in BORROWED:
        source = ROWS[rate_source(row)].title
        assert any(line.startswith(f"- {ROWS[row].title} {share}: ") and line.endswith(source) for line in listed)


@pytest.mark.parametrize("page", ["table1", "sizes", "ablations", "neurons"])
def test_a_page_with_such_a_row_says_whose_rate_it_takes(page: str, fresh) -> None:
    text = text_of(page, fresh)
    rows = [row for row, _ in BORROWED if f"| {ROWS[row].title} |" in text]
    assert rows and text.count("take another row's learning rate:") == 1
    sentence = next(line for line in text.splitlines() if "take another row's learning rate" in line)
    for row in rows:
        name, _, number = ROWS[row].title.partition(" = ")
        assert name in sentence and number in sentence and ROWS[rate_source(row)].title in sentence


def test_pages_without_such_a_row_are_silent(fresh) -> None:
    assert "learning rate" not in text_of("paper_tables", fresh) and borrowed_rates([("meft", "10%")]) == ""
    sentence = borrowed_rates([("meft_n8", "10%"), ("meft_n4", "10%"), ("meft_int8", "10%")])
    assert sentence.endswith("rate: MEFT, N = 4, 8; MEFT, int8 keys for scoring (that of MEFT).") or (
        sentence.endswith("rate: MEFT, int8 keys for scoring; MEFT, N = 4, 8 (that of MEFT).")
    )


def test_the_cell_of_the_rate_names_its_owner(fresh) -> None:
    assert tables.learning_rate(fresh, ("meft_n4", "10%")) == "0.01 (that of MEFT)"
    other = results_of([cell("meft_n4", "10%", task="facts", learning_rate=0.3)], [])
    assert tables.learning_rate(other, ("meft_n4", "10%")) == "0.3 (not swept)"


def test_claims_that_read_such_rows_say_so(fresh) -> None:
    judged = ledger(fresh)
    about = [c for c in judged.claims if borrowed_rates(c.lines)]
    assert {"Figure 6", "Figure 7"} <= {c.where for c in about} < {c.where for c in judged.claims}
    for text in (claims_table(judged).markdown, borrowed_sentence(judged)):
        sentence = next(line for line in text.splitlines() if "take another row's learning rate" in line)
        assert all(c.where.removeprefix(c.where[0]) in sentence for c in about)
    page = html.page(judged, {}, {}, {}, {}).decode()
    assert page.count("take another row&#39;s learning rate") == len(about) + 1, "each claim, and the verdicts' head"


@pytest.mark.parametrize("name", ["figure6", "figure7", "ablations", "forgetting", "pareto"])
def test_figures_with_such_rows_say_so(name: str, fresh) -> None:
    with output.settings():
        figure = catalogue._DRAWN[name](fresh, REPORTED, {})
    assert any("with the learning rate swept for" in axes.get_xlabel().replace("\n", " ") for axes in figure.axes)


def test_the_sweep_stands_in_the_order_of_the_tables() -> None:
    lines = list(csv.reader(io.StringIO(more_tables.sweep().csv)))[1:]
    titles = list(dict.fromkeys(line[0] for line in lines))
    order = [row.title for row in ROWS.values() if row.title in titles]
    assert titles == order
    for title in titles:
        sizes = [float(line[1].rstrip("%")) for line in lines if line[0] == title]
        assert sizes == sorted(sizes)


# ---- traffic over seeds ----


def test_traffic_of_old_runs_is_marked_line_by_line(fresh, old) -> None:
    lines = [line for line in traffic_table(old, "full").markdown.splitlines() if line.startswith(("| MEFT", "| Par"))]
    assert lines and all(line.split("|")[1].endswith("† ") for line in lines)
    assert "†" not in traffic_table(fresh, "full").markdown


def test_traffic_is_the_mean_over_all_seeds_with_its_spread() -> None:
    def seeded(c, record):
        if "by_purpose" in record["traffic"]:
            for name in record["traffic"]["by_purpose"]:
                record["traffic"]["by_purpose"][name] *= 1 + c.spec.seed
            record["traffic"]["per_optimizer_step_bytes"] *= 1 + c.spec.seed
            record["timing"]["median_step_s"] = 0.1 * (1 + c.spec.seed)

    found, one = results(changed=seeded), results()
    table, before = traffic_table(found, "full"), traffic_table(one, "full")

    def row(text: str) -> dict[str, str]:
        rows = csv.DictReader(io.StringIO(text))
        return next(r for r in rows if (r["row"], r["share"], r["task"]) == ("meft", "10%", "facts"))

    ours, single = row(table.csv), row(before.csv)
    assert ours["seeds"] == "5" and single["bytes_per_step_seed_sd"] == "0"
    factors = [1, 2, 3, 4, 5]
    assert float(ours["bytes_per_step"]) == pytest.approx(3 * float(single["bytes_per_step"]))
    deviation = statistics.stdev(factors) * float(single["bytes_per_step"])
    assert float(ours["bytes_per_step_seed_sd"]) == pytest.approx(deviation, rel=1e-3)
    assert float(ours["main_terms_in_m"]) == pytest.approx(3 * float(single["main_terms_in_m"]), abs=1e-3)
    assert (ours["median_step_s"], ours["median_step_s_seed_sd"]) == ("0.30000", "0.1581")
    assert "| MEFT | 10% | facts | 5 |" in table.markdown and "0.300 ±0.158" in table.markdown
    assert "as many runs as the column Seeds says (of seeds 0, 1, 2, 3, 4)" in table.markdown
    assert "± their standard deviation over seeds" in table.markdown


def test_traffic_of_one_seed_or_of_fewer_than_planned_says_so() -> None:
    cells = [c for c in CELLS if (c.row, c.share, c.spec.task) == ("meft", "10%", "facts") and not c.variant]
    found = traffic_table(results_of(cells, [make_record(c) for c in cells[:2]]), "full")
    assert "| MEFT | 10% | facts | 2 of 5 |" in found.markdown
    (single,) = csv.DictReader(io.StringIO(traffic_table(results_of(cells, [make_record(cells[0])]), "full").csv))
    assert (single["seeds"], single["bytes_per_step_seed_sd"]) == ("1 of 5", "one seed")


# ---- files that are no records ----


def test_files_left_out_are_named_at_the_top(tmp_path: Path) -> None:
    broken = ["abc.json: Expecting value <!-- x -->", "def.json: schema 1 is not 2"]
    report = _report({"smoke": suites.smoke()}, [], tmp_path, broken)
    first = report.blocks["findings"].splitlines()[0]
    assert first.startswith("**Left out: 2 files in the records' folders that cannot be read.** abc.json: ")
    assert "def.json: schema 1 is not 2" in first and "<!--" not in first
    assert report.facts["left out"] == "; ".join(broken)
    clean = _report({"smoke": suites.smoke()}, [], tmp_path)
    assert "Left out" not in clean.blocks["findings"] and "left out" not in clean.facts


def test_what_reading_sets_aside_reaches_the_top_of_the_readme(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(record, "_SAID", set())
    runs = tmp_path / "runs"
    for name in ("0123456789ab", "ba9876543210"):
        (runs / name).mkdir(parents=True)
        (runs / name / "record.json").write_text("{broken")
    said: list[str] = []
    assert record.read_records(runs, said.append) == [] and len(said) == 2
    assert [key in line for key, line in zip(("0123456789ab", "ba9876543210"), record.left_out(), strict=True)] == [
        True
    ] * 2
    block = _report({"smoke": suites.smoke()}, [], tmp_path, record.left_out()).blocks["findings"]
    assert block.startswith("**Left out: 2 files") and "0123456789ab/record.json" in block.splitlines()[0]
    assert str(tmp_path) not in block, "no path of this machine in what is published"
