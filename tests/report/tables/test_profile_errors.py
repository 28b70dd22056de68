"""Errors of predictions: the right pairs, the right sign, and "not run" where nothing was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_bench.report.page.profile import profile_report
from meft_bench.report.records.profiles import load_profiles
from meft_bench.report.tables.profile_errors import (
    FORMULA_PEAK,
    GPU_PEAK,
    GPU_SPEED,
    MODEL_SPEED,
    RUNS,
    comparisons,
    errors_tables,
)

from ..made_profiles import make_profile, make_row, write_profiles


def run(method: str, trained: int, counted: int, **options: Any) -> dict[str, Any]:
    return {
        "spec": {"method": method, "options": options, "model": "embedded@1234"},
        "state": "ok",
        "run_key": "a" * 12,
        "parameters": {"trainable": trained},
        "memory": {"accounted": {"device_parameters_bytes": counted}},
    }


def errors(profiles: list[dict[str, Any]], folder: Path, runs: Any = ()) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {}
    place = write_profiles(folder, profiles[0])
    for number, profile in enumerate(profiles[1:]):
        (place / f"measured-{number}.json").write_text(json.dumps(profile))
    for c in comparisons(load_profiles(place), [], runs):
        found.setdefault(c.kind, []).append(round(c.error, 4))
    return found


def measured(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    made = make_profile() | {"evidence": "measured", "rows": [{**r, "evidence": "measured"} for r in rows]}
    return made | {"settings": {**made["settings"], **settings}}


def test_without_measured_rows_the_table_says_what_would_make_them(tmp_path: Path) -> None:
    assert errors([make_profile()], tmp_path / "a") == {}
    kinds, rows = errors_tables(load_profiles(tmp_path / "a" / "profile"), [], [])
    assert kinds.markdown.count("| not run |") >= 6 and "make gpu" in kinds.markdown
    assert "Nothing can be compared yet." in rows.markdown


def test_a_session_fills_the_table_from_what_was_predicted_before_it(tmp_path: Path) -> None:
    """A GPU that is a quarter faster than was said: the prediction is 20 % too low."""
    row = make_row("meft", 3072, False)
    speed, peak = row["time"]["tokens_per_s_by_accumulation"]["1"], row["memory"]["device_peak_bytes"]
    told = {"tokens_per_s": {"1": 0.8 * speed, "7": 5.0}, "device_bytes": 1.5 * peak, "source": "before"}
    none = make_row("parallel_adapter", 3072, False) | {"predicted": None, "predicted_reason": "because"}
    session = measured([{**row, "predicted": told}, none])
    found = errors([make_profile(), session], tmp_path)
    assert found == {GPU_SPEED: [-0.2], GPU_PEAK: [0.5]}
    (line,) = [t for t in errors_tables(load_profiles(tmp_path / "profile"), [], [])[0].markdown.splitlines()
               if t.startswith("| tokens/s | simulator")]  # fmt: skip
    assert "| 1 | 20.00 | -20.00 | -20.00 |" in line and line.endswith("| measured |")


def test_the_page_shows_the_largest_errors_and_the_file_every_one(tmp_path: Path) -> None:
    row = make_row("parallel_adapter", 3072, False)
    speed = row["time"]["tokens_per_s_by_accumulation"]["1"]
    told = [{**row, "predicted": {"tokens_per_s": {"1": (1 + i / 100) * speed}, "source": "before"}} for i in range(50)]
    errors([measured(told)], tmp_path)
    table = errors_tables(load_profiles(tmp_path / "profile"), [], [])[1]
    lines = [line for line in table.markdown.splitlines() if "steps on a GPU" in line]
    assert [line.split(" | ")[-2] for line in lines] == [f"+{49 - i}.00" for i in range(20)]
    assert table.csv.count("steps on a GPU") == 50 and "All 50 are in the CSV file" in table.markdown


def test_a_measured_profile_is_held_against_the_simulated_row_of_the_same_step(tmp_path: Path) -> None:
    row = make_row("parallel_adapter", 3072, False)
    slower = json.loads(json.dumps(row))
    slower["time"]["tokens_per_s_by_accumulation"] = {
        a: v / 2 for a, v in row["time"]["tokens_per_s_by_accumulation"].items()
    }
    found = errors([make_profile(), measured([slower])], tmp_path / "same")
    assert found == {GPU_SPEED: [1.0] * 4, GPU_PEAK: [0.0]}
    assert errors([make_profile(), measured([slower], card="h100")], tmp_path / "other") == {GPU_PEAK: [0.0]}
    capped = measured([slower]) | {"evidence": "capped"}
    capped["rows"][0]["evidence"] = "capped"
    assert errors([make_profile(), capped], tmp_path / "capped") == {GPU_PEAK: [0.0]}


def test_rows_of_another_u_are_not_of_the_same_step(tmp_path: Path) -> None:
    """Bytes and seconds follow it: a trained model, or few different tokens, have another than random weights."""
    row, trained = make_row("meft", 3072, False), make_profile()
    assert errors([trained, measured([row])], tmp_path / "same") == {GPU_SPEED: [0.0] * 4, GPU_PEAK: [0.0]}
    assert errors([trained, measured([row], drawn_from=16)], tmp_path / "few") == {}
    for other in (r for r in trained["rows"] if r.get("union")):
        other["union"]["model"] = "SmolLM2-135M"
    assert errors([trained, measured([row])], tmp_path / "trained") == {}


def test_formulas_are_held_against_the_replay(tmp_path: Path) -> None:
    profile = make_profile()
    row = make_row("meft", 3072, False)
    speed, total = row["time"]["tokens_per_s_by_accumulation"]["1"], row["memory"]["device_total_bytes"]
    row["formula"] = {"device_bytes": 1.1 * total, "tokens_per_s_by_accumulation": {"1": 1.2 * speed}}
    profile["rows"] = [row]
    assert errors([profile], tmp_path) == {MODEL_SPEED: [0.2], FORMULA_PEAK: [0.1]}


def test_runs_count_what_the_formula_says(tmp_path: Path) -> None:
    """16 bytes a parameter, 12 with moments in bf16; an optimizer of its own has a formula of its own."""
    runs = [run("lora", 100, 1600), run("meft", 100, 1000, moments="bf16"), run("galore", 100, 7), run("gone", 1, 1)]
    assert errors([make_profile()], tmp_path, runs) == {RUNS: [0.0, 0.2]}
    report = profile_report(tmp_path / "profile", {}, runs)
    assert report.tables["profile_errors"].markdown.count("embedded") == 1


@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_runs_that_did_not_end_well_are_left_out(tmp_path: Path, state: str) -> None:
    assert errors([make_profile()], tmp_path, [run("lora", 100, 1600) | {"state": state}]) == {}
