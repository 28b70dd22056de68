"""Tables, findings and the page of a profile: right values, reasons for what is missing, the same bytes."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from meft_bench.harness import suites
from meft_bench.harness.spec import PACKAGE
from meft_bench.report import build
from meft_bench.report.page import page as html
from meft_bench.report.page.markdown import to_html
from meft_bench.report.page.profile import profile_report, section
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.profiles import Profile, load_profiles
from meft_bench.report.tables.profile_best import best_table, speed_table
from meft_bench.report.tables.profile_findings import claim_notes, headline, measured_table
from meft_bench.report.text import Table

from ..made_profiles import BASE, GIB, HIDDEN, LAYERS, make_profile, make_row, write_profiles

REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")


def _lines(table: Table, *starts: str) -> list[list[str]]:
    """Cells of the Markdown lines whose first cells are these."""
    cells = [[c.strip() for c in t.strip("| \n").split("|")] for t in table.markdown.splitlines() if t.startswith("|")]
    return [c for c in cells if c[: len(starts)] == list(starts)]


def _csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_profiles(tmp_path, make_profile(), make_profile(card="48GB", usable=47.2))


@pytest.fixture
def tables(folder: Path) -> dict[str, Table]:
    return profile_report(folder, REPORTED).tables


def test_a_line_says_what_its_row_holds(tables: dict[str, Table]) -> None:
    """13 GiB of base, 4 of activations, 12 bytes a trained parameter, 450 MiB of context."""
    trained = 2 * HIDDEN * LAYERS * 3072
    (line,) = _lines(tables["profile_llama-7b_24GB"], "Parallel Adapter", "no")
    device = 17 + 12 * trained / GIB + 450 / 1024
    assert line[2:8] == ["R = 3,072", f"{trained:,}", f"{100 * trained / BASE:.2f}", f"{device:.2f}", "no", "0.00"]
    assert line[8:10] == ["none", "none"] and line[-1] == "simulated"
    (fits,) = _lines(tables["profile_llama-7b_48GB"], "Parallel Adapter", "no")
    assert fits[2:6] == line[2:6]
    logged, assumed = _lines(tables["profile_llama-7b_24GB"], "MEFT", "yes")
    assert logged[8:10] == ["0.0208", "0.9000, logged"] and assumed[9] == "0.2500, assumed"
    assert logged[10] == f"{0.9 * 2 * trained / 2**20:,.1f}" and logged[14:16] == ["128", "0.25"]
    # Every micro-batch moves its rows again: the same bytes a token whatever the accumulation.
    assert logged[12] == logged[13] == f"{2 * 0.9 * 2 * trained / 512 / 1024:,.1f}"
    (host,) = _lines(tables["profile_llama-7b_24GB"], "Parallel Adapter, optimizer on the host", "no")
    assert float(host[12].replace(",", "")) == pytest.approx(32 * float(host[13].replace(",", "")), rel=1e-3)


def test_what_did_not_run_or_is_modelled_says_why(tmp_path: Path) -> None:
    profile = make_profile()
    profile["rows"][1] = make_row("lora_all", 3072, False, modelled="a stand-in for the kernel.")
    table = profile_report(write_profiles(tmp_path, profile), REPORTED).tables["profile_llama-7b_24GB"]
    (full,) = _lines(table, "Full fine-tuning, AdamW")
    assert full[3] == "not run" and full[-1] == "not run (note 2)"
    assert "- Note 1: a stand-in for the kernel.\n- Note 2: the made simulation broke." in table.markdown
    assert _lines(table, "LoRA, all linear", "no")[0][-1] == "simulated (note 1)"
    (row,) = [r for r in _csv(table) if r["variant"] == "full"]
    assert row["state"] == "not-run" and row["reason"] == "the made simulation broke" and row["trainable"] == "none"


def test_the_sweep_has_every_row(tables: dict[str, Table]) -> None:
    rows = _csv(tables["profile_llama-7b_24GB_sweep"])
    assert len(rows) == len(make_profile()["rows"])
    one = next(r for r in rows if (r["variant"], r["neurons"]) == ("parallel_adapter_streamed", "6144"))
    trained = 2 * HIDDEN * LAYERS * 6144
    assert one["trainable"] == str(trained) and one["4_in_m"] == "8.0" and one["step_s_32"] == "64.0"
    assert one["h2d_bytes_per_micro_batch"] == str(2 * trained) and one["d2h_bytes_per_update"] == "0"
    assert one["device_peak_bytes"] == str(17 * GIB)


def test_categories_add_up_to_the_peak(tables: dict[str, Table]) -> None:
    table = tables["profile_llama-7b_24GB_memory"]
    header = _lines(table, "Method")[0]
    for line in _lines(table, "Parallel Adapter"):
        cells = dict(zip(header, line, strict=True))
        parts = ("Base weights", "Activations", "Adapter parameters", "Moments")
        assert sum(float(cells[p]) for p in parts) == pytest.approx(float(cells["Peak"]), abs=0.02)
        assert float(cells["Peak with context"]) - float(cells["Peak"]) == pytest.approx(450 / 1024, abs=0.011)


def test_largest_paper_and_constants(tables: dict[str, Table]) -> None:
    largest = tables["profile_largest"]
    (line,) = _lines(largest, "llama-7b", "48GB", "MEFT (U assumed)", "yes")
    assert line[4:] == ["32", "R = 16,384", f"{2 * HIDDEN * LAYERS * 16384:,}", "63.74", "23.00", "40.00", "321",
                        "host memory", "simulated"]  # fmt: skip
    (short,) = _lines(largest, "llama-7b", "24GB", "LoRA, all linear")
    assert (
        short[5] == "does not fit (note 1)" and "- Note 1: not even R=64: device memory is short." in largest.markdown
    )
    paper = tables["profile_paper"]
    assert _lines(paper, "llama-7b", "24GB", "elements moved an iteration")[0][3:] == [
        "MEFT, U/R 0.25 assumed", "0.56 M", "0.61 M", "simulated"]  # fmt: skip
    assert _lines(paper, "llama-7b", "24GB", "times less")[0][3:] == ["no row", "no figure", "not run", "not run"]
    assert _lines(tables["profile_constants"], "24GB", "desktop", "card_pinned")[0][3:] == [
        "2.5e+10", "bytes/s", "made up here"]  # fmt: skip


def test_the_headline_counts_what_fits_and_finds_where_it_turns(folder: Path) -> None:
    """Rows of the union cross twice for every micro-batch (0.9 M of 16 bits, both ways), the host optimizer's once."""
    profiles = load_profiles(folder)
    assert [p.card for p in profiles] == ["24GB", "48GB"]
    table = headline(profiles)
    assert _lines(table, "MEFT (U logged)")[0][8] == "63.7" and _lines(table, "MEFT (U assumed)")
    # The two resident ones need 26 GiB of the 24 without it; a method with two lines counts once.
    held = "At R = 3072 and steps of 32 micro-batches the card holds"
    assert f"{held} 6 of 8 methods without activation checkpointing and 8 of 8 methods with" in table.markdown
    assert "With checkpointing in steps of 32 micro-batches the largest that fits trains" in table.markdown
    assert "MEFT (U logged) 63.7 % with 40 GiB of host memory" in table.markdown
    assert (
        "from accumulation 4 on, Parallel Adapter, optimizer on the host moves less. It trains at 0.25"
        in table.markdown
    )


def test_what_fits_alone_but_not_accumulating_says_so(tmp_path: Path) -> None:
    """A step of one micro-batch fits, one of more does not: everywhere that a fit is told."""
    profile = make_profile()
    for row in profile["rows"]:
        if row["variant"] in ("parallel_adapter", "parallel_adapter_host_optimizer"):
            several = {"device_total_bytes": 25 * GIB, "host_peak_bytes": 30 * GIB, "fits": False}
            row["memory"]["accumulated"] = {"device_peak_bytes": 24 * GIB, **several}
    tables = profile_report(write_profiles(tmp_path, profile), REPORTED).tables
    title = "Parallel Adapter, optimizer on the host"
    (line,) = _lines(tables["profile_llama-7b_24GB"], title, "no")
    assert line[5:8] == ["17.44; 25.00 accumulating", "not accumulating", "12.00; 30.00 accumulating"]
    (found,) = (r for r in _csv(tables["profile_llama-7b_24GB"])
                if r["variant"] == "parallel_adapter_host_optimizer" and r["checkpointing"] == "False")  # fmt: skip
    assert found["accumulated_host_peak_bytes"] == str(30 * GIB) and found["accumulated_fits"] == "False"
    (head,) = _lines(tables["profile"], title)
    assert head[2] == "17.4; 25.0 accumulating, does not fit" and head[4] == "12.0; 30.0 accumulating"
    assert "holds 5 of 8 methods without activation checkpointing" in tables["profile"].markdown
    fastest = {line[3]: line[4] for line in _lines(tables["profile_best"], "llama-7b", "24GB", "3,072")}
    assert fastest["1"] == "Parallel Adapter, checkpointing" and "Parallel Adapter" != fastest["32"].split(",")[0]


def test_where_meft_is_not_the_answer_is_made_from_rows(tables: dict[str, Table], tmp_path: Path) -> None:
    """4 s a step of MEFT against 1.5 s with the optimizer on the host; slower than MEFT, it is no line."""
    table = tables["profile_not_meft"]
    line = _lines(table, "llama-7b", "24GB", "3,072")[0]
    assert line[3] == "Parallel Adapter, optimizer on the host" and line[5:] == ["0.38"] * 4
    assert "at 16 of 16 places" in table.markdown
    profile = make_profile()
    for r in profile["rows"]:
        if r["family"] == "offload":
            r["time"]["tokens_per_s_by_accumulation"] = dict.fromkeys(r["time"]["tokens_per_s_by_accumulation"], 1.0)
    other = profile_report(write_profiles(tmp_path / "other", profile), REPORTED).tables["profile_not_meft"]
    assert "at 0 of 8 places" in other.markdown and "No such place." in other.markdown


def test_the_best_and_the_speed_have_a_line_for_what_they_say(tables: dict[str, Table]) -> None:
    best = tables["profile_best"]
    line = _lines(best, "llama-7b", "24GB", "3,072", "32")[0]
    # Without checkpointing the resident ones need 26 GiB; with it they fit, and are the fastest.
    assert line[4:6] == ["Parallel Adapter, checkpointing", "512"] and line[6:8] == ["none", "none"]
    assert line[8:11] == ["MEFT (U logged)", "128", "0.25"] and line[11] == "461"
    speed = tables["profile_speed"]
    logged = _lines(speed, "llama-7b", "24GB", "MEFT (U logged)", "no", "3,072")[0]
    assert logged[5] == "0.90" and logged[9:] == ["0.25"] * 4
    assert _lines(speed, "llama-7b", "24GB", "MEFT (U assumed)", "no", "6,144")


def test_files_of_one_card_are_told_apart(tmp_path: Path) -> None:
    """A GPU session leaves one for each micro-batch; and a reader must see that its lines were measured."""
    place = write_profiles(tmp_path, make_profile())
    rows = [make_row(v, 3072, False, evidence="measured") for v in ("parallel_adapter", "meft")]
    for name in ("2x256", "8x512"):
        session = make_profile(card="h100", usable=79.0, evidence="measured", rows=rows, largest=[], paper=None)
        (place / f"llama-7b_h100-session-{name}.json").write_text(json.dumps(session))
    found = load_profiles(place)
    for table in (best_table(found), speed_table(found)):
        cards = {line.split("|")[2].strip() for line in table.markdown.splitlines() if line.startswith("| llama-7b")}
        assert cards >= {"24GB", "h100, measured (session-2x256)", "h100, measured (session-8x512)"}


def test_claims_get_notes_but_no_verdict(folder: Path) -> None:
    notes = claim_notes(load_profiles(folder))
    assert all(n.startswith("Simulated, so without a verdict; llama-7b") for n in notes.values())
    assert "0.25 at R = 3,072 (U/R 0.90, logged)" in notes["s5-speed"]
    order = notes["f5-latency-order"]
    found = [
        order.index(t) for t in ("Parallel Adapter 1.000 s", "MEFT (U logged) 4.000 s", "MEFT without both 8.000 s")
    ]
    assert found == sorted(found)
    assert "0.50 M at R = 6,144 (U/R 0.25, assumed)" in notes["s4-traffic-per-iteration"]
    assert "57.60 M at R = 6,144 (U/R 0.90, logged)" in notes["traffic-per-step"]
    assert "Parallel Adapter at R = 3,072 needs 26.4 GiB" in notes["s1-memory-halved"]
    assert claim_notes([]) == {}


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    assert "No measured run" in measured_table(load_profiles(write_profiles(tmp_path, make_profile()))).markdown
    row = make_row("meft", 3072, False, evidence="capped")
    row["memory"] = {**row["memory"], "device_peak_bytes": 16 * GIB, "host_peak_bytes": None}
    other = make_profile(card="h200", usable=140.0, evidence="capped", rows=[row], largest=[], paper=[], timeline={})
    table = measured_table(load_profiles(write_profiles(tmp_path, other)))
    (line,) = _lines(table, "llama-7b", "MEFT (U logged)", "3,072", "no", "device peak, bytes")
    assert line[5:] == [f"{17 * GIB:,}", f"{16 * GIB:,}", "1.0625", "capped"]
    assert not [t for t in table.markdown.splitlines() if "host peak" in t or "step at" in t], "another card, no time"


def test_without_profiles_it_says_how_to_make_them(tmp_path: Path) -> None:
    report = profile_report(tmp_path / "profile", REPORTED)
    assert report.tables["profile"].markdown == "Not run: `make profile GPU=24GB FULL=1`.\n" and list(
        report.tables
    ) == ["profile"]
    assert report.draw() == {} and report.notes == {}
    assert "<code>make profile GPU=24GB FULL=1</code>" in section(report, {})


def test_tables_are_the_same_bytes_twice_and_the_page_takes_them(folder: Path) -> None:
    one, two = (profile_report(folder, REPORTED) for _ in range(2))
    assert {n: t.files() for n, t in one.tables.items()} == {n: t.files() for n, t in two.tables.items()}
    for table in one.tables.values():
        assert to_html(table.markdown) and "None" not in table.markdown and "nan" not in table.markdown
    text = section(one, {})
    assert text == section(two, {}) and "Not drawn." in text and "profile_llama-7b_24GB_sweep.md" in text


def test_the_report_takes_them_in_and_a_claim_shows_its_note(tmp_path: Path) -> None:
    cells = {"smoke": suites.smoke()}
    without = build._report(cells, [], tmp_path)
    assert "was not run.** It needs `make profile GPU=24GB FULL=1`." in without.blocks["findings"]
    assert without.texts()["tables/profile.md"] == b"Not run: `make profile GPU=24GB FULL=1`.\n"
    write_profiles(tmp_path, make_profile())
    report = build._report(cells, [], tmp_path)
    assert {"tables/profile.md", "tables/profile_largest.csv", "tables/profile_llama-7b_24GB.md"} <= set(report.texts())
    assert "| MEFT (U logged) |" in report.texts()["tables/profile.md"].decode()
    assert "the largest adapter that fits has" in report.blocks["findings"]
    text = html.page(report.ledger, {}, {}, {}, {}, profile=section(report.profile, {}), notes=report.profile.notes)
    article = text.decode().split('id="claim-s5-speed"')[1].split("</article>")[0]
    assert "not run" in article and "Simulated, so without a verdict" in article and "0.25 at R = 3,072" in article
    assert 'id="table-profile_largest"' in text.decode()


def test_another_accumulation_than_1_is_shown(tmp_path: Path) -> None:
    row = make_row("meft", 3072, False)
    row["time"] |= {"step_s_by_accumulation": {"8": 32.0}, "tokens_per_s_by_accumulation": {"8": 128.0}}
    row["traffic"] |= {"by_accumulation": {"8": row["traffic"]["by_accumulation"]["4"]}}
    profile = make_profile(rows=[row])
    profile["settings"]["accumulations"] = [8]
    table = profile_report(write_profiles(tmp_path, profile), REPORTED).tables["profile_llama-7b_24GB"]
    assert _lines(table, "MEFT", "no")[0][12:15] == ["none", "none", "128"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 7}, "schema 7 is not 1"),
        ({"evidence": "guessed"}, "evidence 'guessed' is none of"),
        ({"settings": {}}, "settings lacks model, shape"),
        ({"rows": [{**make_row("meft", 64, False), "memory": None}]}, r"rows\[0\].memory lacks device_peak_bytes"),
        ({"rows": [{**make_row("meft", 64, False), "state": "not-run"}]}, r"rows\[0\] did not run and gives no reason"),
        ({"largest": [{"variant": "meft"}]}, r"largest\[0\] lacks title"),
        ({"paper": [{"printed": 0.5}]}, r"paper\[0\] lacks figure"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write_profiles(tmp_path, make_profile())
    (folder / "broken_24GB.json").write_text(json.dumps({**make_profile(), **change}))
    with pytest.raises(ValueError, match=rf"cannot read the profile broken_24GB.json \(.*{said}.*make profile"):
        profile_report(folder, REPORTED)


def test_what_lies_beside_the_profiles_is_left_alone(tmp_path: Path) -> None:
    folder = write_profiles(tmp_path, make_profile())
    (folder / "selection.json").write_text(json.dumps({"schema": 1, "evidence": "measured", "entries": []}))
    (folder / "llama-7b_24GB.trace.json").write_text(json.dumps({"traceEvents": []}))
    (folder / "calibration.json").write_text(json.dumps({"schema": 1, "evidence": "measured", "checks": []}))
    found = load_profiles(folder)
    assert [type(p) for p in found] == [Profile]
    (folder / "half.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match="cannot read the profile half.json"):
        load_profiles(folder)


@pytest.mark.parametrize(
    "changed, said",
    [({}, ""), ({"provenance": {"dirty": True}}, "was made from changed files"),
     ({"numerics": {"profile": 0}}, "was made by an earlier version of the code"),
     ({"provenance": {}}, "was made outside a checkout")],
)  # fmt: skip
def test_a_profile_that_does_not_count_says_so_before_its_numbers(tmp_path, changed, said) -> None:
    found = load_profiles(write_profiles(tmp_path, make_profile(**changed)))
    first = headline(found).markdown.splitlines()[0]
    assert first.startswith("**Stale:** llama-7b_24GB " + said) if said else "Stale" not in first
