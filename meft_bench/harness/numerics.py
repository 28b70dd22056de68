"""The small numbers that say which code made a result, and whether the result still counts. No torch here.

Each part that can change the numbers of a run holds one in its own file: every method, the training loop, the
evaluation, the probes, each benchmark, each neighbour, the profile and the simulator as NUMERICS, every task as lm-
eval's `version` in its YAML. Whoever changes what such a part computes, counts or times raises it. A result says which
numbers it was made with, and counts while they are the same. tests/harness/test_golden.py repeats small runs, so that
forgetting to raise one fails.

Records are refused by `publish` when they do not count. Benchmarks, profiles and the comparison are written into
results/ at once, so the pages that show them say why one does not count, and `publish` names it.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from meft_bench.harness.spec import PACKAGE, TASKS, package_dir
from meft_bench.named import named_in
from meft_bench.train.contract import OURS, assignment, describe, method_names

_SHARED = {"training": "train/loop.py", "evaluation": "harness/evaluation.py", "probes": "harness/probes.py"}
"""Parts that every run goes through, and their files."""
_ROOMS = {
    "bench": "bench/common.py",
    "profile": "profile/__init__.py",
    "simulator": "simulate/__init__.py",
    "budgets": "simulate/drawn.py",
    "scale": "profile/scale/__init__.py",
    "selection": "profile/trained/__init__.py",
}
_NUMBER = r"NUMERICS = (\d+)"
_TASK_NUMBER = r"  version: (\d+)\.0"
NEIGHBOURS = PACKAGE / "neighbours"
_NEIGHBOUR_FACTS = ("NUMERICS", "TITLE", "PAPER", "CLAIM", "TESTED", "MINUTES", "USES")


@cache
def numerics(task: str, method: str, model: str = "embedded") -> dict[str, int | str]:
    """A run's parts, each with its number today; "base" is the digest of the embedded model's weights, where those are
    used; "forgetting" where a pretrained model's is measured."""
    numbers: dict[str, int | str] = {
        "method": describe(method).numerics,
        "task": _number(package_dir("tasks") / f"{task}.yaml", _TASK_NUMBER),
        **{name: _number(PACKAGE / file, _NUMBER) for name, file in _SHARED.items()},
    }
    if model == "embedded":
        made = json.loads((PACKAGE / "embedded" / "record.json").read_text(encoding="utf-8"))
        numbers["base"] = made["weights_sha256"][:12]
    if named_in(model):
        numbers["forgetting"] = _number(PACKAGE / "harness" / "forgetting.py", _NUMBER)
    return numbers


def bench_numerics(part: str) -> dict[str, int | str]:
    """Of one benchmark: its own number, that of the timing that all share, and MEFT's."""
    own = {"part": _number(_bench_file(part), _NUMBER), "bench": _room("bench")}
    return {**own, OURS: describe(OURS).numerics}


def profile_numerics(methods: Iterable[str], simulated: bool = True) -> dict[str, int | str]:
    """Of a profile: its own number, the simulator's and that of MEFT's device budgets where it is one, and each
    method's by name."""
    methods = sorted(set(methods))
    budgets = ("budgets",) if OURS in methods else ()
    rooms = ("profile", "simulator", *budgets) if simulated else ("profile",)
    return {**{name: _room(name) for name in rooms}, **{name: describe(name).numerics for name in methods}}


def scale_numerics() -> dict[str, int | str]:
    """Of a result of `make profile GPUS=...`: its own number, the simulator's and MEFT's."""
    return {"scale": _room("scale"), "simulator": _room("simulator"), OURS: describe(OURS).numerics}


def selection_numerics(task: str, model: str) -> dict[str, int | str]:
    """Of a trained model's logged selection (`make selection`): its own number, and those of what trained it."""
    made = numerics(task, OURS, model)
    return {"selection": _room("selection"), **{part: made[part] for part in _TRAINED if part in made}}


_TRAINED = ("method", "task", "training", "base")


def comparison_numerics(name: str) -> dict[str, int | str]:
    """Of one script of docs/comparison, which runs a method of ours or a peer's on the embedded model."""
    job = PACKAGE.parent / "docs" / "comparison" / "job.py"
    script, _, variant = name.partition("-")
    ours = numerics("facts", variant if script == "baseline" else OURS if script.startswith(OURS) else "base")
    return {"comparison": _number(job, _NUMBER), **{part: n for part, n in ours.items() if part != "probes"}}


def neighbour_names() -> list[str]:
    """The neighbours, in the order of their files: those of meft_bench/neighbours that give a number."""
    files = sorted(NEIGHBOURS.glob("*.py"))
    return [f.stem for f in files if re.search(rf"^{_NUMBER}$", f.read_text(encoding="utf-8"), re.MULTILINE)]


def neighbour_facts(name: str) -> dict[str, Any]:
    """What a neighbour's file tells without being imported (neighbours/__init__.py). Raises ValueError for one that
    does not tell it."""
    file, told = NEIGHBOURS / f"{name}.py", {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        constant, value = assignment(node)
        if constant in _NEIGHBOUR_FACTS and value is not None:
            told[constant] = ast.literal_eval(value)
    if missing := [constant for constant in _NEIGHBOUR_FACTS if constant not in told]:
        raise ValueError(f"{file.name} does not define {', '.join(missing)}: see docs/neighbours.md")
    return told


def neighbour_numerics(name: str) -> dict[str, int | str]:
    """Of one neighbour: its own number, and those of the parts that it says it uses."""
    facts = neighbour_facts(name)
    return {"part": facts["NUMERICS"], **{used: _used(used) for used in facts["USES"]}}


def _used(name: str) -> int | str:
    if name in _SHARED:
        return _number(PACKAGE / _SHARED[name], _NUMBER)
    if name in _ROOMS:
        return _room(name)
    if name == "embedded":
        return numerics("facts", "base")["base"]
    task = package_dir("tasks") / f"{name}.yaml"
    return _number(task, _TASK_NUMBER) if task.is_file() else describe(name).numerics


def methods_in(content: Mapping[str, Any]) -> list[str]:
    """The methods that a profile's file says it ran; those that are no more are left out."""
    made = content.get("numerics")
    names = made if isinstance(made, Mapping) else ()
    return [name for name in method_names() if name in names]


# ---- whether a result counts ----


def why_not(content: Mapping[str, Any], today: Mapping[str, int | str]) -> str:
    """Why a benchmark's, profile's or comparison's file does not count, in words; "" when it does."""
    if content.get("numerics") != today:
        return "made by an earlier version of the code"
    return changed(content.get("provenance"))


def bench_why_not(part: str, content: Mapping[str, Any]) -> str:
    """why_not of a benchmark's file, by its stem."""
    known = _bench_file(part).is_file()
    return why_not(content, bench_numerics(part) if known else {"part": "a benchmark that is no more"})


def neighbour_why_not(name: str, content: Mapping[str, Any]) -> str:
    """why_not of a neighbour's file, by its stem."""
    if content.get("quick"):
        return "made at the sizes of a test"
    known = name in neighbour_names()
    return why_not(content, neighbour_numerics(name) if known else {"part": "a neighbour that is no more"})


def profile_why_not(content: Mapping[str, Any]) -> str:
    """why_not of a profile's file."""
    return why_not(content, profile_numerics(methods_in(content), content.get("evidence") == "simulated"))


def changed(provenance: Any) -> str:
    """Why nobody could make a result again from its commit, in words; "" when it was made from a clean checkout."""
    dirty = provenance.get("dirty") if isinstance(provenance, Mapping) else None
    if dirty is False:
        return ""
    return "made from changed files" if dirty else "made outside a checkout"


def goes_on(content: Mapping[str, Any], today: Mapping[str, int | str], now: Mapping[str, Any]) -> bool:
    """Whether what is made now (numbers today, provenance now) may stand in one file with what is there: made with
    numbers that are among today's, and from changed files only if these are changed as well."""
    made = content.get("numerics")
    if not isinstance(made, Mapping) or not made or not made.items() <= today.items():
        return False
    return not changed(content.get("provenance")) or bool(changed(now))


def selection_why_not(content: Mapping[str, Any]) -> str:
    """why_not of a trained model's logged selection."""
    said = content.get("settings")
    task, model = (said.get("task"), said.get("model")) if isinstance(said, Mapping) else (None, None)
    if task not in TASKS or not isinstance(model, str):
        return why_not(content, {"task": "a task that is no more"})
    return why_not(content, selection_numerics(task, model))


def scale_why_not(content: Mapping[str, Any]) -> str:
    """why_not of a result of `make profile GPUS=...`."""
    return why_not(content, scale_numerics())


# ---- numbers in files ----


def _bench_file(part: str) -> Path:
    """Where a benchmark's number stands: in its file, or in its package's first."""
    file = PACKAGE / "bench" / f"{part}.py"
    return file if file.is_file() else PACKAGE / "bench" / part / "__init__.py"


def _room(name: str) -> int:
    return _number(PACKAGE / _ROOMS[name], _NUMBER)


def _number(file: Path, pattern: str) -> int:
    """The number that a line of the file gives; the file is not imported, since most of them import torch."""
    found = re.search(rf"^{pattern}$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{file.name} has no line for {pattern}"
    return int(found.group(1))
