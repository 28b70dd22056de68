"""Small runs give the numbers that are kept; where they do not, a NUMERICS was not raised."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_bench.bench import cli as bench
from meft_bench.harness.spec import TASKS
from meft_bench.meft.engine import native
from meft_bench.train.methods import method_names
from tests.harness import golden

KEPT = json.loads(golden.FILE.read_text(encoding="utf-8"))
NAMES = sorted(KEPT["runs"])
CLOSE = 2e-3
"""Of losses and scores on another processor or torch, whose sums run in another order."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return golden.prepare(tmp_path_factory.mktemp("golden") / "prepared")


def test_every_method_and_task_is_there(prepared: Path) -> None:
    specs = golden.specs(prepared)
    assert sorted(specs) == NAMES, "make golden.json again: python -m tests.harness.golden"
    assert {s.method for s in specs.values()} == set(method_names())
    assert {s.task for s in specs.values()} == set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_the_numbers_that_are_kept(name: str, prepared: Path, tmp_path: Path) -> None:
    made, kept = golden.run(golden.specs(prepared)[name], prepared, tmp_path), KEPT["runs"][name]
    assert made["numerics"] == kept["numerics"], "make golden.json again: python -m tests.harness.golden"
    said = f"{name} gives other numbers: raise NUMERICS of what you changed, then python -m tests.harness.golden"
    assert made == kept if golden.machine() == KEPT["machine"] else _near(made, kept), said


def test_elsewhere_losses_are_near_and_a_run_that_trains_nothing_has_none() -> None:
    assert _near({"quality": {"recall": 0.5}}, {"quality": {"recall": 0.25}})
    kept = {"curve": {"loss": [3.0, 2.0]}}
    assert _near({"curve": {"loss": [3.0, 2.002]}}, kept) and not _near({"curve": {"loss": [3.0, 2.1]}}, kept)
    assert not _near({}, kept) and not _near(kept, {})


def test_every_part_of_the_benchmarks_and_the_profile_is_there() -> None:
    assert (set(KEPT["simulated"]), set(KEPT["counted"])) == (set(golden.SIMULATED), set(bench.PARTS))


@pytest.mark.parametrize("part", bench.PARTS)
def test_a_benchmark_counts_what_is_kept(part: str, tmp_path: Path) -> None:
    if part == "changes" and native.kernels().elementwise is None:
        pytest.skip("one of the changes is in the C kernels, which are not here")
    made, kept = golden.counted(part, tmp_path), KEPT["counted"][part]
    assert made["numerics"] == kept["numerics"], "make golden.json again: python -m tests.harness.golden"
    same = golden.machine() == KEPT["machine"]
    said = f"raise NUMERICS of meft_bench/bench/{part}.py, then python -m tests.harness.golden"
    # Elsewhere sums run in another order, and a token may keep another neuron.
    assert made == kept if same else _names(made) == _names(kept), said


def test_every_neighbour_is_there() -> None:
    names = {*golden.neighbour_names(True), *golden.neighbour_names(False)}
    assert set(KEPT["neighbours"]) == names, "of a new one: python -m tests.harness.golden NAME"


@pytest.mark.parametrize("name", golden.neighbour_names(simulated=False))
def test_a_neighbour_counts_what_is_kept(name: str) -> None:
    made, kept = golden.neighbour(name), KEPT["neighbours"][name]
    assert made["numerics"] == kept["numerics"], f"make golden.json again: python -m tests.harness.golden {name}"
    said = f"raise NUMERICS of meft_bench/neighbours/{name}.py, then python -m tests.harness.golden {name}"
    assert made == kept if golden.machine() == KEPT["machine"] else _names(made) == _names(kept), said


def _names(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _names(inner) for name, inner in value.items()}
    return [_names(inner) for inner in value] if isinstance(value, list) else type(value).__name__


def _near(made: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Losses within CLOSE; scores of a few rows could flip."""
    if "curve" not in made or "curve" not in kept:  # nothing was trained
        return ("curve" in made) is ("curve" in kept)
    return made["curve"]["loss"] == pytest.approx(kept["curve"]["loss"], rel=CLOSE)
