"""The small numbers that say which mathematics made a record. No torch here.

Each part that can change the numbers of a run holds one in its own file: every method, the training loop, the
evaluation and the probes as NUMERICS, every task as lm-eval's `version` in its YAML. Whoever changes what such a part
computes raises it. A record says which numbers it was made with, and counts while they are the same.
tests/harness/test_golden.py repeats small runs, so that forgetting to raise one fails.
"""

import json
import re
from functools import cache
from pathlib import Path

from meft_bench.harness.spec import PACKAGE, package_dir

_SHARED = {"training": "train/loop.py", "evaluation": "harness/evaluation.py", "probes": "harness/probes.py"}
"""Parts that every run goes through, and their files."""


@cache
def numerics(task: str, method: str, model: str = "embedded") -> dict[str, int | str]:
    """Part -> its number today; "base" is the digest of the embedded model's weights, where those are used."""
    own = PACKAGE / "train" if method == "meft" else package_dir("baselines")
    numbers: dict[str, int | str] = {
        "method": _number(own / f"{method}.py", r"NUMERICS = (\d+)"),
        "task": _number(package_dir("tasks") / f"{task}.yaml", r"  version: (\d+)\.0"),
        **{name: _number(PACKAGE / file, r"NUMERICS = (\d+)") for name, file in _SHARED.items()},
    }
    if model == "embedded":
        made = json.loads((PACKAGE / "embedded" / "record.json").read_text(encoding="utf-8"))
        numbers["base"] = made["weights_sha256"][:12]
    return numbers


def _number(file: Path, pattern: str) -> int:
    """The number that a line of the file gives; the file is not imported, since methods import torch."""
    found = re.search(rf"^{pattern}$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{file.name} has no line for {pattern}"
    return int(found.group(1))
