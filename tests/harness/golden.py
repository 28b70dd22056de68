"""Small runs whose numbers are kept in golden.json: every method, every task, the probes; beside them simulated rows of
the profile, and what the benchmarks and the neighbours count.

A change that moves one of them raises NUMERICS of the part that it changed (meft_bench/harness/numerics.py), and then
makes the file again:  python -m tests.harness.golden
A benchmark, a run, a simulated row or a neighbour alone: python -m tests.harness.golden changes lora flexgen
"""

import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meft_bench.bench import cli as bench
from meft_bench.bench import kernels, layer, pretrained, ranks, residency, retrieval, step, threads
from meft_bench.bench.changes import frame
from meft_bench.bench.retrieval import Wide
from meft_bench.harness import numerics, worker
from meft_bench.harness.numerics import bench_numerics, profile_numerics
from meft_bench.harness.spec import DATA_SETS, NATURAL_TASKS, REAL_TASKS, SYNTHETIC_TASKS, RunSpec, folder_digest
from meft_bench.meft.engine import native
from meft_bench.neighbours.suite import module_name
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.variants import VARIANTS
from meft_bench.provenance import cpu_model
from meft_bench.simulate import cards
from meft_bench.simulate.device import register
from meft_bench.train.methods import complete_options
from meft_bench.train.models import embedded_dir, weights_digest
from tests.methods import METHODS, short_spec
from tests.profile.small import shape_of_config, small_config, small_spec
from tests.tasks.test_real_docs import write_all

FILE = Path(__file__).parent / "golden.json"
PROBED = ("meft", "parallel_adapter")


def prepare(folder: Path) -> Path:
    """A few rows of every real task, and in "long" the embedded model with room for their answers; returns folder."""
    write_all(folder)
    shutil.copytree(embedded_dir(), folder / "long")
    config = json.loads((folder / "long" / "config.json").read_text(encoding="utf-8"))
    (folder / "long" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 256}), encoding="utf-8"
    )
    return folder


def specs(folder: Path) -> dict[str, RunSpec]:
    """Name -> run; folder as prepare() leaves it."""
    found = {name: short_spec(name, splits=("recall",)) for name in METHODS}
    found |= {f"{name}, probed": short_spec(name, splits=("test",), steps=2) for name in PROBED}
    found["base"] = RunSpec(task="facts", method="base", steps=0, train_rows=30, eval_rows=12, splits=("recall",))
    for task in (*SYNTHETIC_TASKS, *NATURAL_TASKS):
        found[f"meft on {task}"] = short_spec("meft", task=task, splits=("recall",))
    few = {"train_rows": 6, "eval_rows": 4, "batch_size": 2, "steps": 4, "splits": ("recall",)}
    long = f"local/long@{weights_digest(folder / 'long')}"
    for task in REAL_TASKS:
        data = f"local@{folder_digest(folder, DATA_SETS[task])}"
        found[f"meft on {task}"] = short_spec("meft", task=task, data=data, model=long, **few)
    return found


def numbers_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a run computed, without times and bytes of this machine."""
    quality = {k: v for k, v in record["quality"].items() if k != "evidence"}
    made = {"curve": record["curve"], "quality": quality, "probes": record["probes"]}
    return {"numerics": record["numerics"], **{name: block for name, block in made.items() if block}}


def run(spec: RunSpec, prepared: Path, folder: Path) -> dict[str, Any]:
    """The numbers of one run, on one thread."""
    places = worker.Places(run_dir=folder, data_dir=str(prepared), model_dir=str(prepared / "long"))
    return json.loads(json.dumps(numbers_of(worker.run(spec, places))))


def machine() -> dict[str, str]:
    """Where golden.json holds to the last digit."""
    return {"torch": torch.__version__, "cpu": cpu_model(), "host_kernels": ",".join(native.status().split(",")[:2])}


# ---- simulated rows, counted benchmarks ----

SIMULATED = ("lora_all", "parallel_adapter", "full", "meft", "meft_no_sparse", "meft_budget_25", "meft_budget_50")
_SMALL = {"hidden": 16, "tokens": 6, "kept": 4}
_STEP = {"length": 8, "hidden": 16, "ffn": 32, "heads": 2, "vocabulary": 12, "neurons": 64, "kept": 2, "experts": 16,
         "probed": 4, "warmup": 1}  # fmt: skip
_WIDE = Wide(neurons=(64, 256), hidden=16, narrow_neurons=64, neighbours_neurons=64, updated=10)
BENCHMARKS: dict[str, Callable[[Path], Any]] = {
    "changes": lambda folder: frame.changes_benchmark(folder, 1, neurons=64, touched=20, **_SMALL),
    "kernels": lambda folder: kernels.kernels_benchmark(folder, 1, neurons=(64,), touched=20, **_SMALL),
    "layer": lambda folder: layer.layer_benchmark(folder, 1, sizes=((16, 1024),), tokens=4),
    "retrieval": lambda folder: retrieval.retrieval_benchmark(folder, 1, neurons=(64, 256), wide=_WIDE, **_SMALL),
    "threads": lambda folder: threads.threads_benchmark(folder, 1, most=1, neurons=64, touched=20, **_SMALL),
    "step": lambda folder: step.step_benchmark(folder, 1, **_STEP),
    "ranks": lambda folder: ranks.ranks_benchmark(folder, 1, **_STEP),
    "pretrained": lambda folder: pretrained.pretrained_benchmark(folder, 1, embedded_contenders(), "embedded"),
}
_MACHINE = {"provenance", "cpu", "about", "not_installed", "neighbours", "events"}
"""What a benchmark says of the machine and its packages."""


def simulated(variant: str) -> dict[str, Any]:
    """One row of the profile, of a small model on a small card, and the numbers that made it."""
    config = small_config(layers=4)
    setting = Setting(config=config, shape=shape_of_config(config), card=cards.card("12GB"), host=cards.host("desktop"))
    row, _ = simulated_row(small_spec(variant), setting)
    return json.loads(json.dumps({"numerics": profile_numerics([VARIANTS[variant].method]), "row": row}))


def embedded_contenders() -> list[tuple[str, RunSpec]]:
    """Two of the benchmark on a pretrained model, on the embedded one and its task."""
    options = {"meft": {"neurons": 96, "experts": 16, "probed": 4, "kept": 8}, "lora": {"rank": 8}}
    return [
        (row, RunSpec(task="facts", method=row, options=complete_options(row, own), train_rows=12, eval_rows=6,
                      steps=3, batch_size=4, learning_rate=1e-3))
        for row, own in options.items()
    ]  # fmt: skip


def counted(part: str, folder: Path) -> dict[str, Any]:
    """What a small run of a benchmark counts, and the names of what it times."""
    torch.manual_seed(0)
    if part == "residency":
        sizes = residency.Sizes(hidden=16, neurons=64, kept=4, length=8, micro_batches=3, repeated=2, device="cpu")
        made: Any = {"windows": [residency.window(sizes, "repeating", share) for share in (0.0, 0.25)]}
        return json.loads(json.dumps({"numerics": bench_numerics(part), "counted": _counts(made)}))
    BENCHMARKS[part](folder)
    made = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    return {"numerics": made.pop("numerics"), "counted": _counts(made)}


def neighbour_names(simulated: bool) -> list[str]:
    """The neighbours that train nothing in the harness: those that use the simulator, or the others."""
    untrained = [n for n in numerics.neighbour_names() if not hasattr(importlib.import_module(module_name(n)), "specs")]
    return [n for n in untrained if ("simulator" in numerics.neighbour_facts(n)["USES"]) == simulated]


def neighbour(name: str) -> dict[str, Any]:
    """What a neighbour counts at the sizes of a test (all of it where it only simulates), and the numbers that made
    it."""
    torch.manual_seed(0)
    made = json.loads(json.dumps(importlib.import_module(module_name(name)).run(True)))
    counted = made if set(made.get("evidence_of", {"": made["evidence"]}).values()) == {"simulated"} else _counts(made)
    return {"numerics": numerics.neighbour_numerics(name), "counted": counted}


def _counts(value: Any) -> Any:
    """value with its whole numbers and texts; of times and ratios that they are there."""
    if isinstance(value, dict):
        return {k: _counts(v) for k, v in value.items() if k not in _MACHINE | {"kernels", "threads"}}
    if isinstance(value, list):
        return [_counts(v) for v in value]
    return "real" if isinstance(value, float) else value


def make() -> None:
    """Write golden.json from runs made now."""
    register()
    rows = {variant: simulated(variant) for variant in SIMULATED}  # torch takes the device before a first backward pass
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(Path(name) / "prepared")
        runs = {case: run(spec, prepared, Path(name) / case) for case, spec in specs(prepared).items()}
        made = {"machine": machine(), "runs": runs, "simulated": rows}
        made["counted"] = {part: counted(part, Path(name)) for part in bench.PARTS}
    every = [*neighbour_names(True), *neighbour_names(False)]
    write({**made, "neighbours": {name: neighbour(name) for name in every}})


def remake(parts: list[str]) -> None:
    """Write golden.json with what these benchmarks and neighbours count and these runs give now; on the machine of the
    others."""
    register()
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    kept["simulated"] |= {variant: simulated(variant) for variant in SIMULATED if variant in parts}
    if machine() != kept["machine"]:
        raise SystemExit(f"golden.json was made on another machine: {kept['machine']}")
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(Path(name) / "prepared")
        runs = {case: spec for case, spec in specs(prepared).items() if case in parts}
        kept["runs"] |= {case: run(spec, prepared, Path(name) / case) for case, spec in runs.items()}
        benchmarks = [part for part in parts if part in bench.PARTS]
        kept["counted"] |= {part: counted(part, Path(name)) for part in benchmarks}
    others = [name for name in parts if name not in {*runs, *benchmarks, *SIMULATED}]
    kept.setdefault("neighbours", {}).update({name: neighbour(name) for name in others})
    write(kept)


def write(made: dict[str, dict[str, Any]]) -> None:
    """One line per run, row and part, so that changes of different ones merge."""
    blocks = []
    for block, entries in sorted(made.items()):
        lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in sorted(entries.items())]
        blocks.append(f"{json.dumps(block)}: {{\n" + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    remake(sys.argv[1:]) if sys.argv[1:] else make()
