"""docs/comparison.md is what its records render to, and the records are what they say."""

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meft_bench.meft.config import MeftOptions
from tests.docs.pages import ROOT

FOLDER = ROOT / "docs" / "comparison"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """docs/comparison/run.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")
    for name in ("run", "render"):
        sys.modules.pop(name, None)


@pytest.fixture
def render(run: Any) -> Any:
    return importlib.import_module("render")


def rates() -> dict[str, Any]:
    return json.loads((ROOT / "results" / "comparison" / "lomo_rates.json").read_text())


def test_the_page_is_what_the_records_give(run: Any) -> None:
    assert run.rendered() == (ROOT / "docs" / "comparison.md").read_text()


def test_a_changed_record_changes_the_page(run: Any, render: Any) -> None:
    records = run.read_records()
    for name, value in (("score", 0.123456), ("median_step_s", 9.0), ("peak_above_base_bytes", 10**12)):
        changed = copy.deepcopy(records)
        next(r for r in changed if r["name"] == "peft_lora-ffn")[name] = value
        assert render.page(changed, run.ROWS, rates()) != run.rendered(), name


def test_records_say_how_they_were_made(run: Any) -> None:
    records = run.read_records()
    assert {r["name"] for r in records} == set(run.ROWS)
    for name in run.ROWS:
        rows = [r for r in records if r["name"] == name]
        assert len({r["seed"] for r in rows}) >= 3, name
        for r in rows:
            assert (FOLDER / r["script"]).is_file()
            if r["evidence"] == "not-run":
                assert r["reason"] and "score" not in r
                continue
            assert r["evidence"] == "measured" and r["provenance"]["packages"]["torch"] and r["provenance"]["commit"]
            assert r["split"] == "test" and r["items"] == 600 and r["steps"] == run.STEPS


def test_the_job_is_the_same(run: Any) -> None:
    records = [r for r in run.read_records() if r["evidence"] == "measured"]
    wanted = sum(MeftOptions(neurons=96, experts=16, probed=4, kept=8).parameter_groups(128, 4).values())
    for r in records:
        if r["name"] == "lomo-full":
            assert r["trainable"] == 1_068_928
        else:
            assert abs(r["trainable"] / wanted - 1) < 0.05, r["name"]
    tokens = {(r["seed"], r["tokens"]) for r in records if r["name"] not in ("meft_trainer", "meft_command")}
    assert len(tokens) == len({seed for seed, _ in tokens})  # same rows in the same order
    for r in records:  # those that shuffle for themselves read as many rows, give or take an incomplete epoch
        assert r["tokens"] == pytest.approx(next(t for seed, t in tokens if seed == r["seed"]), rel=0.02), r["name"]


def test_what_could_not_run_is_no_number(run: Any, render: Any) -> None:
    line = next(row for row in run.rendered().splitlines() if row.startswith("| torchao"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if "not run" in line:
        assert "CUDA" in line and all(cell.startswith("not run") for cell in cells[2:])
    failed = {"evidence": "not-run", "reason": "ValueError: broken", "script": "lomo.py", "seed": 0}
    assert render._row("lomo-adapter", [failed])[1] == "not run (failed: ValueError: broken)"


def test_rows_with_fewer_seeds_are_refused(run: Any, render: Any) -> None:
    with pytest.raises(ValueError, match="other seeds"):
        render.page(run.read_records()[:-1], run.ROWS, rates())


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('"""What it is."""\n\nimport job\nimport torch  # why\n\n# a comment\nx = 1\njob.finish(x)\n', 2),
        ("call(\n    1,\n    2,\n)\n", 4),
        ('class A:\n    """Doc."""\n\n    x = 1\n', 2),
        ('text = """two\nlines"""\n', 2),
        ("if job.VARIANT:\n    job.rate()\n", 2),
    ],
)
def test_lines_are_counted_as_the_page_says(render: Any, tmp_path: Path, text: str, lines: int) -> None:
    (tmp_path / "script.py").write_text(text)
    assert render.code_lines(tmp_path / "script.py") == lines


def test_lines_of_a_shell_script(render: Any, tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("# why\n\nmeft-bench train \\\n  --data x\n")
    assert render.code_lines(tmp_path / "script.sh") == 2


def test_the_reason_of_a_failed_script_is_its_error(run: Any) -> None:
    said = "Traceback\n  File x\nAssertionError: only CUDA\n[rank0] clean up\n"
    assert run._reason(said) == "AssertionError: only CUDA"
    assert run._reason("no such thing\n") == "no such thing" and run._reason("") == "no message"
