"""The whole report: what it writes, when, and that equal records give equal bytes in every process."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from meft_bench.harness import suites
from meft_bench.harness.spec import PACKAGE
from meft_bench.report.build import build_report, check_report
from meft_bench.report.figures import bases, catalogue
from meft_bench.report.records.paper import load_reported

from .made_records import broken, make_record, results_of

NAMES = ("about", "findings", "picture", "table", "limits")
TABLES = (
    "table1",
    "table1_paper",
    "sizes",
    "ablations",
    "traffic",
    "real",
    "claims",
    "paper_tables",
    "neurons",
    "union",
    "smollm2",
    "sweep",
    "frontier",
    "neighbours",
    "profile",
)
README = "".join(f"<!-- results:{n} -->\n<!-- /results:{n} -->\n" for n in NAMES)
REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")
SMOKE = {"smoke": suites.smoke()}


def _some_of_everything() -> tuple[list, list]:
    """Cells with scores, a gap, a divergence and a stale run."""
    cells = suites.smoke()
    records = [make_record(c, i % 20, stale=i == 2) for i, c in enumerate(cells)]
    return cells, [*records[:5], broken(records[5], "diverged", "nan"), *records[7:]]


def drawn_digest() -> str:
    """Of every figure; run in another process, too."""
    files = catalogue.draw(results_of(*_some_of_everything()), REPORTED, {})
    return hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    records = [make_record(c) for c in SMOKE["smoke"]]
    written = build_report(SMOKE, records, tmp_path, readme)
    tables = [f"tables/{n}.{s}" for n in TABLES for s in ("md", "csv")]
    drawn = [f"figures/{n}.png" for n in (*catalogue.FIGURES, bases.NAME)]
    made = [*tables, *drawn, "README.md", "report.html"]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in written) == sorted(made)
    assert build_report(SMOKE, records, tmp_path, readme) == []
    assert check_report(SMOKE, records, tmp_path, readme) == []
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".writing")]

    (tmp_path / "tables" / "traffic.md").write_text("by hand")
    readme.write_text(readme.read_text().replace("Suite `smoke`", "Suite `best`"))
    assert check_report(SMOKE, records, tmp_path, readme) == ["tables/traffic.md", "README table"]
    changed = build_report(SMOKE, records, tmp_path, readme)
    assert [p.name for p in changed] == ["traffic.md", "README.md"]


def test_bad_markers_stop_the_report_before_it_writes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.replace("results:table", "results:tables"))
    with pytest.raises(ValueError, match="markers do not fit"):
        build_report(SMOKE, [], tmp_path, readme)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_report_needs_a_main_suite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="full or smoke"):
        build_report({"real": []}, [], tmp_path)


def test_the_paper_suite_has_a_table_of_its_own(tmp_path: Path) -> None:
    cells = {**SMOKE, "paper": suites.paper("local/llama@1", "local@2", "cuda")}
    assert "tables/suite_paper.md" in check_report(cells, [], tmp_path)


def test_one_changed_score_changes_the_page_and_a_lost_record_the_verdict(tmp_path: Path) -> None:
    cells = {"full": suites.full()}
    records = [make_record(c, 12 if c.row == "meft" else 5) for c in cells["full"]]
    build_report(cells, records, tmp_path)
    page, claims = (tmp_path / "report.html").read_bytes(), (tmp_path / "tables" / "claims.md").read_text()
    assert "supported" in claims
    best = next(c for c in cells["full"] if (c.row, c.share, c.spec.task) == ("meft", "10%", "facts"))
    build_report(cells, [r for r in records if r["run_key"] != best.spec.run_key], tmp_path)
    assert (tmp_path / "report.html").read_bytes() != page
    line = next(t for t in (tmp_path / "tables" / "claims.md").read_text().splitlines() if "NQ" in t)
    assert "not run" in line


def test_a_broken_benchmark_is_named(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "retrieval.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="cannot read the benchmark retrieval.json.*make bench"):
        build_report(SMOKE, [], tmp_path)


def test_figures_do_not_depend_on_process_or_settings() -> None:
    """The other process has another hash seed and an ASCII locale, and must never have loaded torch."""
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None}):
        here = drawn_digest()
    code = (
        "import json, sys\n"
        "import meft_bench.report.build\n"
        "heavy = [m for m in ('torch', 'pandas', 'scipy', 'matplotlib') if m in sys.modules]\n"
        "from tests.report.test_build import drawn_digest\n"
        "print(json.dumps([heavy, drawn_digest(), 'torch' in sys.modules]))"
    )
    # tests/__init__.py and tests/report/__init__.py are empty; tests/conftest.py, which loads torch, is pytest's alone.
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {**os.environ, "PYTHONHASHSEED": "1", **ascii_only, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    heavy, there, torch_loaded = json.loads(done.stdout)
    assert heavy == [] and not torch_loaded
    assert there == here
