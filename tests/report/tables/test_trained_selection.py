"""U of a trained model in table and figure: what the log says, with its evidence, and whether it counts."""

import json
from pathlib import Path

import pytest

from meft_bench.harness.numerics import selection_numerics
from meft_bench.profile.trained.log import FILE
from meft_bench.report.figures import trained_selection as figure
from meft_bench.report.page.profile import profile_report
from meft_bench.report.tables.trained_selection import load_log, selection_table


def point(tokens: int, low: float, high: float) -> dict:
    return {"tokens": tokens, "samples": 2, "share_by_layer": [low, high], "experts_by_layer": [0.5, 0.75]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entry = {
        "neurons": 384, "kept": 48, "experts": 64, "probed": 8, "steps": 40,
        "before": {"unions": [point(128, 0.8, 0.9)]},
        "after": {"unions": [point(128, 0.4, 0.6), point(512, 0.7, 0.8)], "active_share_by_layer": [0.5, 0.54]},
    }  # fmt: skip
    log = {"schema": 1, "evidence": "measured", "settings": {"model": "local/smollm2-135m@0", "task": "nq"},
           "entries": [entry, {**entry, "neurons": 6144, "kept": 64}], "numerics": selection_numerics("nq", "x/y"),
           "provenance": {"dirty": False}}  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps(log))
    return tmp_path


def test_the_table_holds_every_point(folder: Path) -> None:
    log = load_log(folder)
    assert log is not None
    made = selection_table(log)
    assert "| 384 | 48 | 128 | 0.850 | 0.500 | 0.400 | 0.600 | 0.625 | measured |" in made.markdown
    assert "6144,64,512,not looked at,0.750,0.700,0.800,0.625,measured" in made.csv
    assert "SmolLM2-135M, MEFT trained 40 steps on nq" in made.markdown and "0.52 at R = 384" in made.markdown
    assert "Stale" not in made.markdown


def test_the_report_takes_it_up_beside_the_profiles(folder: Path) -> None:
    report = profile_report(folder, {})
    assert not report.profiles and "trained_selection" in report.tables
    (drawn,) = report.draw(("svg",)).items()
    assert drawn[0] == "trained_selection.svg" and len(drawn[1]) > 5000
    assert drawn[1] == figure.draw(report.selection, ("svg",))["trained_selection.svg"]


def test_without_a_log_nothing_is_shown(tmp_path: Path) -> None:
    assert load_log(tmp_path) is None and figure.draw(None) == {}
    assert "trained_selection" not in profile_report(tmp_path, {}).tables


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"provenance": {"dirty": True}}, "made from changed files"),
        ({"numerics": {}}, "an earlier version of the code"),
    ],
)
def test_what_does_not_count_says_so_first(folder: Path, change: dict, why: str) -> None:
    log = json.loads((folder / FILE).read_text()) | change
    first = selection_table(log).markdown.splitlines()[0]
    assert first.startswith("Stale: ") and why in first
