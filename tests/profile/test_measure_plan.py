"""The plan: what is in it, how its files grow, what is kept and what is tried again."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_bench.profile import measure_plan
from meft_bench.profile.measure_plan import PLAN, Planned, run_plan
from tests.profile.children import answer_and_list_modules, die
from tests.profile.tiny import SMALL

TWO = (
    Planned(variant="parallel_adapter", neurons=64, capped=False),
    Planned(variant="meft", neurons=64, capped=False),
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows are measured in this process; lists the variants."""
    measured: list[str] = []

    def in_process(task: str, job: dict[str, Any]) -> dict[str, Any]:
        measured.append(job["spec"].variant)
        return json.loads(json.dumps(measure_plan._TASKS[task](**job)))

    monkeypatch.setattr(measure_plan, "_in_process", in_process)
    return measured


def run(folder: Path, plan: Any = TWO, **changes: Any) -> dict[str, Any]:
    arguments = {
        "device": "cpu",
        "steps": 1,
        "warmup": 1,
        "accumulations": (2,),
        "batch": 2,
        "seq": 16,
        "config": SMALL,
    }
    (path,) = run_plan("small/small", folder, plan=plan, **{**arguments, **changes})
    return json.loads(path.read_text())


def test_the_plan_is_the_one_the_profile_asks_for() -> None:
    assert {(p.variant, p.neurons, p.capped) for p in PLAN} == {
        (v, r, c) for v in ("parallel_adapter", "meft") for r in (1024, 3072, 6144, 8464) for c in (True, False)
    }
    assert measure_plan.ACCUMULATIONS == (1, 8) and measure_plan.STEPS >= 10
    # 98.5 % of 24 GiB, less half a GiB of context.
    assert measure_plan._cap_bytes("24GB") == round(24 * 0.985 * 2**30) - 2**29


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H200", "h200"),
     ("NVIDIA L40S", "l40s"), ("NVIDIA GH200 480GB", "gh200-480gb"), ("NVIDIA RTX A4000", "rtx-a4000"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop-gpu"),
     ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"), ("NVIDIA H100 NVL", "h100-nvl"),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-80gb-hbm3-mig-1g-10gb"), ("none", "none")],
)  # fmt: skip
def test_files_are_named_by_card(name: str, slug: str) -> None:
    assert measure_plan.card_name(name) == slug


def test_a_plan_fills_its_file_and_resumes(tmp_path: Path, here: list[str]) -> None:
    first = run(tmp_path, TWO[:1])
    assert here == ["parallel_adapter"] and [r["state"] for r in first["rows"]] == ["ok"]
    assert list(tmp_path.iterdir()) == [tmp_path / "small_none-measured.json"]
    both = run(tmp_path)
    assert here == ["parallel_adapter", "meft"]
    assert both["rows"][0]["time"]["step_s_by_accumulation"] == first["rows"][0]["time"]["step_s_by_accumulation"]
    ours, resident = both["rows"][1]["time"], both["rows"][0]["time"]
    ratio = resident["step_s_by_accumulation"]["1"] / ours["step_s_by_accumulation"]["1"]
    assert ours["practicality"] == pytest.approx(ratio, abs=1e-4)
    assert both["evidence"] == "measured" and both["settings"]["accumulations"] == [1, 2]
    assert both["settings"]["shape"]["parameters"] == first["rows"][0]["parameters"]["base"]
    assert run(tmp_path) == both and len(here) == 2


def test_a_row_that_fails_is_kept_apart_from_the_others(
    tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (Planned(variant="parallel_adapter_adam8bit", neurons=64, capped=False), TWO[0])
    result = run(tmp_path, missing)
    assert [(r["state"], r.get("reason", "")) for r in result["rows"]] == [
        ("not-run", "8-bit Adam on a GPU needs bitsandbytes: pip install 'meft-bench[peers]'"),
        ("ok", ""),
    ]

    def measure(*args: Any, **kwargs: Any) -> Any:
        raise measure_plan.OutOfMemory("in backward: CUDA out of memory")

    monkeypatch.setattr(measure_plan, "measure", measure)
    again = run(tmp_path, missing)
    states = {r["variant"]: r["state"] for r in again["rows"]}
    assert states == {"parallel_adapter_adam8bit": "oom", "parallel_adapter": "ok"}  # only the one not run is tried
    run(tmp_path, missing)
    assert here.count("parallel_adapter_adam8bit") == 2  # what did not fit is a result


def test_nothing_runs_when_the_results_could_not_be_kept(tmp_path: Path, here: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run(tmp_path / "file")
    assert not here


def test_a_file_of_other_settings_is_left_alone(tmp_path: Path, here: list[str]) -> None:
    run(tmp_path, TWO[:1])
    path = tmp_path / "small_none-measured.json"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="small_none-measured.json was measured with other settings"):
        run(tmp_path, seq=8)
    assert path.read_bytes() == before
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a profile"):
        run(tmp_path)


def test_a_row_runs_in_a_process_of_its_own_without_what_evaluation_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = measure_plan._spec(TWO[1], "small", 2, 16)
    arguments = {"device": "cpu", "steps": 1, "warmup": 1, "accumulations": (1,), "cap_bytes": None}
    monkeypatch.setattr(measure_plan, "_answer", answer_and_list_modules)
    answer = measure_plan._in_process("measure", {"spec": spec, "config": SMALL, "arguments": arguments})
    assert answer["state"] == "ok" and answer["row"]["key"] == spec.key
    assert "torch" in answer["loaded"] and not {"datasets", "lm_eval", "peft"} & set(answer["loaded"])


def test_a_process_may_die_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_plan, "_answer", die)
    assert measure_plan._in_process("measure", {}) == {
        "state": "oom",
        "reason": "the system killed the process, as it does when host memory runs out",
    }


def test_no_simulated_number_depends_on_what_measures() -> None:
    """Else a change here could move simulated rows, which the profile's number would not say."""
    folder = Path(measure_plan.__file__).parent
    measuring = {
        "base.py",
        "counters.py",
        "measured.py",
        "measured_row.py",
        "measure_plan.py",
        "passes.py",
        "session.py",
        "watch.py",
    }
    assert all((folder / name).is_file() for name in measuring)
    others = [f for f in folder.glob("*.py") if f.name not in measuring | {"cli.py"}]
    for file in others:
        for name in measuring:
            assert f"meft_bench.profile.{name[:-3]} import" not in file.read_text(), (file.name, name)
