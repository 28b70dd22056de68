"""Simulated rows are those that are kept beside the golden runs; where they are not, a NUMERICS was not raised.

Here and not in tests/harness: torch takes a simulated device only before its first backward pass.
"""

import json
from typing import Any

import pytest
import torch

from tests.harness import golden

KEPT = json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("variant", golden.SIMULATED)
def test_a_simulated_row_is_the_one_that_is_kept(variant: str) -> None:
    """Nothing of a machine is in it; another torch may make other operations of the same step."""
    made, kept = golden.simulated(variant), KEPT["simulated"][variant]
    assert made["numerics"] == kept["numerics"], "make golden.json again: python -m tests.harness.golden"
    if torch.__version__.split("+")[0] != KEPT["machine"]["torch"].split("+")[0]:
        pytest.skip(f"kept with torch {KEPT['machine']['torch']}")
    said = "raise NUMERICS of the simulator or the profile (their __init__.py), then python -m tests.harness.golden"
    # A small host tensor in a reference cycle may or may not have been collected yet.
    for one, other in zip(*(_memories(found["row"]) for found in (made, kept)), strict=True):
        assert one["host_peak_bytes"] == pytest.approx(other["host_peak_bytes"], abs=4096), said
    assert _exact(made["row"]) == _exact(kept["row"]), said


@pytest.mark.parametrize("name", golden.neighbour_names(simulated=True))
def test_a_simulated_neighbour_counts_what_is_kept(name: str) -> None:
    made, kept = golden.neighbour(name), KEPT["neighbours"][name]
    assert made["numerics"] == kept["numerics"], f"make golden.json again: python -m tests.harness.golden {name}"
    if torch.__version__.split("+")[0] != KEPT["machine"]["torch"].split("+")[0]:
        pytest.skip(f"kept with torch {KEPT['machine']['torch']}")
    assert made == kept, (
        f"raise NUMERICS of meft_bench/neighbours/{name}.py, then python -m tests.harness.golden {name}"
    )


def _memories(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a step of one micro-batch, and of several."""
    return [row["memory"], row["memory"]["accumulated"]]


def _exact(row: dict[str, Any]) -> dict[str, Any]:
    one, several = ({n: v for n, v in m.items() if not n.startswith("host_")} for m in _memories(row))
    return {**row, "memory": {**one, "accumulated": several}}
