"""Small runs whose numbers are kept in golden.json: every method, every task, the probes.

A change that moves one of them raises NUMERICS of the part that it changed (meft_bench/harness/numerics.py), and then
makes the file again:  python -m tests.harness.golden
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from meft_bench.harness import worker
from meft_bench.harness.spec import DATA_SETS, REAL_TASKS, SYNTHETIC_TASKS, RunSpec, folder_digest
from meft_bench.meft.engine import native
from meft_bench.provenance import cpu_model
from meft_bench.train.models import embedded_dir, weights_digest
from tests.methods import METHODS, short_spec
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
    for task in SYNTHETIC_TASKS:
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


def make() -> None:
    """Write golden.json from runs made now."""
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(Path(name) / "prepared")
        runs = {case: run(spec, prepared, Path(name) / case) for case, spec in specs(prepared).items()}
    FILE.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=None, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make()
