"""docs/comparison.md is what its records render to, and the records are what they say."""

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meft_bench.harness.rows import ROWS
from meft_bench.harness.suites import GRID_FACTOR
from meft_bench.meft.config import MeftOptions
from meft_bench.train.contract import describe
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
    lines = {line.split(" | ")[0].strip("| "): line for line in run.rendered().splitlines() if line.startswith("|")}
    for name, title in run.ROWS.items():
        rows = [r for r in records if r["name"] == name]
        assert len({r["seed"] for r in rows}) >= 3 or (not rows and "not run yet" in lines[title]), name
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
        if r["name"] in ("lomo-full", "baseline-adalomo", "galore"):
            assert r["trainable"] == 1_068_928
        elif r["name"] == "baseline-lsp_offload":
            assert r["trainable"] == 851_968  # embeddings and norms stay frozen
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
    nothing = render._row("galore", [])
    assert nothing[1] == "not run yet: python docs/comparison/run.py" and set(nothing[2:]) == {"not run"}


def test_bytes_of_methods_that_train_the_base_leave_its_weights_out(render: Any) -> None:
    kept = {"device_parameters_bytes": 400, "device_gradients_bytes": 70, "device_moments_bytes": 5, "host_bytes": 900}
    record = {"trainable": 100, "accounted_bytes": kept, "steps": 2}
    moved = {**record, "bytes_by_purpose": {"d2h grads": 60, "h2d updates": 20}}
    assert render._device("baseline-adalomo", [record]) == ["75 (simulated)", "0"]
    assert render._device("baseline-lsp_offload", [moved]) == ["75 (simulated)", "40"]
    assert render._device("baseline-product_keys", [record]) == ["475 (simulated)", "0"]
    assert render._device("galore", [{"trainable": 100, "state_bytes": 33}]) == ["433 (simulated)", "0"]


def test_a_row_of_a_baseline_has_the_numbers_of_its_method(run: Any) -> None:
    made = run.comparison_numerics("baseline-lsp_offload")
    assert made["method"] == describe("lsp_offload").numerics and "probes" not in made
    for name in (n for n in run.ROWS if n.startswith("baseline-")):
        assert describe(name.partition("-")[2]).name in ROWS


def test_the_rates_beside_lomo_s_chosen_ones_are_no_further_than_any_row_s(run: Any) -> None:
    """With rates four times apart its usual use was shown at twice its best rate, and 0.1 below its score there."""
    for variant, chosen in rates()["chosen"].items():
        tried = sorted(run.LOMO_RATES[variant])
        at = tried.index(chosen)
        below, above = tried[at - 1], tried[at + 1]
        assert chosen / below <= GRID_FACTOR + 1e-9 and above / chosen <= GRID_FACTOR + 1e-9, (variant, below, above)


def test_rates_are_chosen_once_and_kept_one_by_one(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that is stopped between two rates goes on with the next one."""
    monkeypatch.setattr(run, "RECORDS", tmp_path)
    tried: list[str] = []

    def one(name: str, seed: int, **more: str) -> dict[str, Any]:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(f"{name} {more['COMPARISON_RATE']}")
        return {"score": 0.25 if len(tried) == 1 else 0.5}

    monkeypatch.setattr(run, "one", one)
    with pytest.raises(KeyboardInterrupt):
        run.choose_rates()
    assert tried == ["lomo-adapter 0.1", "lomo-adapter 0.5"]
    assert json.loads((tmp_path / "lomo_rates.json").read_text())["chosen"] == {"adapter": 0.5}
    tried.clear()
    with pytest.raises(KeyboardInterrupt):
        run.choose_rates()
    assert tried == ["lomo-adapter 2.0", "lomo-adapter 8.0"]


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


def test_the_job_tells_what_meft_trains_and_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model

    from meft_bench import MeftConfig

    monkeypatch.syspath_prepend(str(FOLDER))
    job = importlib.import_module("job")
    try:
        model = get_peft_model(job.base(), MeftConfig(r=32, n_experts=4, p=2, k=4, task_type="CAUSAL_LM"))
        model(**next(job.batches())).loss.backward()
        told, base = job.trained(model), job.loaded.model.config
    finally:
        sys.modules.pop("job", None)
    width, layers = base.hidden_size, base.num_hidden_layers
    assert told["layers"] == layers and told["trainable"] == layers * (2 * 32 + 4) * width
    assert told["bytes_by_purpose"]["h2d rows"] == told["bytes_by_purpose"]["d2h grads"] > 0
