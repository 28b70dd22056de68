"""A method is one file: put beside the others, it is checked, swept, counted, trained, put in the table and estimated
without another line of code. And the names of methods stand where a line of a table is written, nowhere else."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meft_bench
from meft_bench import baselines
from meft_bench.finetune.plan import Job, make_plan
from meft_bench.harness import asked, estimate, suites, worker
from meft_bench.harness.record import read_record
from meft_bench.harness.rows import ROWS, TABLE_ROWS, Row
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import RunSpec
from meft_bench.report.tables.scores import table1
from meft_bench.train.contract import describe, method_names
from meft_bench.train.counts import Counted
from meft_bench.train.methods import complete_options, find_method, parse_options
from meft_bench.train.models import load_model, model_shape, shape_of
from meft_bench.train.options import check_options
from tests.finetune.conftest import job

from ..report.made_records import results_of

SOURCE = '''
"""A linear adapter of few units beside every FFN."""

from dataclasses import dataclass

import torch
from torch import nn

from meft_bench.meft.sites import add_parallel, free_ffns, hidden_size
from meft_bench.train.methods import Attached, ModelShape, freeze, require_choice, require_positive

TITLE = "Narrow"
NUMERICS = 7
LEARNING_RATES = (1e-3, 3e-3)
SIZE = "units"
CHOICES = {"start": ("zero", "small")}


@dataclass(frozen=True, kw_only=True)
class Options:
    units: int = 4
    start: str = "zero"

    def __post_init__(self) -> None:
        require_positive(units=self.units)
        require_choice("start", self.start, CHOICES["start"])


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    return {"narrow": 2 * options.units * shape.hidden * shape.layers}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    sites, width = free_ffns(model), hidden_size(model)
    freeze(model)
    torch.manual_seed(seed)
    adapters = [nn.Sequential(nn.Linear(width, options.units, bias=False), nn.Linear(options.units, width, bias=False))
                for _ in sites]
    for site, adapter in zip(sites, adapters, strict=True):
        nn.init.zeros_(adapter[1].weight)
        add_parallel(site, adapter.to(next(model.parameters()).device))
    return Attached(model=model, groups={"narrow": [p for adapter in adapters for p in adapter.parameters()]})
'''
MODULE = "meft_bench.baselines.narrow"


@pytest.fixture
def narrow(tmp_path, monkeypatch) -> Iterator[Path]:
    """The new method's file, where methods are looked for."""
    (tmp_path / "narrow.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    monkeypatch.setitem(ROWS, "narrow", Row("Narrow adapter", "narrow", {"start": "small"}))
    monkeypatch.setitem(SIZES["embedded"], "narrow", {"2%": 20, "10%": 100})
    monkeypatch.setattr(suites, "TABLE_ROWS", (*TABLE_ROWS, "narrow"))
    yield tmp_path / "narrow.py"
    sys.modules.pop(MODULE, None)


def test_it_is_checked_before_it_is_imported(narrow):
    about = describe("narrow")
    assert "narrow" in method_names() and (about.title, about.numerics, about.size) == ("Narrow", 7, "units")
    for wrong in ({"units": 0}, {"start": "large"}, {"width": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_options("narrow", wrong)
    check_options("narrow", {"units": 3})
    assert MODULE not in sys.modules and not about.untrained and not about.on_host({})


def test_a_command_line_names_it(narrow):
    import argparse

    named = {"spec": None, "task": "facts", "method": "narrow", "fields": ["train_rows=30"], "option": ["units=3"]}
    spec, _ = asked.asked_run(argparse.Namespace(**named, model=None, data=None, device="cpu"))
    assert spec.options == {"units": 3, "start": "zero"} and spec.learning_rate == 3e-3


def test_its_sizes_are_in_the_suite_and_in_the_sweep(narrow):
    own = [c for c in suites.default() if c.row == "narrow"]
    assert [(c.share, c.spec.options) for c in own] == [
        ("2%", {"units": 20, "start": "small"}), ("10%", {"units": 100, "start": "small"})
    ]  # fmt: skip
    swept = suites.sweep({name: describe(name).learning_rates for name in method_names()})
    rates = {(c.share, c.spec.learning_rate) for c in swept if c.row == "narrow"}
    assert rates == {("2%", 1e-3), ("2%", 3e-3), ("10%", 1e-3), ("10%", 3e-3)}


def test_it_is_counted_and_estimated(narrow):
    options = parse_options("narrow", {"units": 50})
    base = load_model("embedded", None, "float32", "cpu").model
    shape, counted = shape_of(base), Counted.of("embedded")
    groups = find_method("narrow").attach(base, options, 0).parameter_groups()
    assert counted.groups("narrow", options) == groups == find_method("narrow").count(options, shape)
    spec = RunSpec(task="facts", method="narrow", options=complete_options("narrow", {"units": 50}))
    less = RunSpec.from_dict({**spec.to_dict(), "options": complete_options("narrow", {"units": 49})})
    need = [estimate.predict(s, shape, counted)["device_bytes"] for s in (spec, less)]
    assert need[0] - need[1] == 16 * groups["narrow"] // 50


def test_it_is_planned_and_the_nearest_size_is_named(narrow, tmp_path):
    fields = {"method": "narrow", "steps": 1, "batch_size": 4, "options": {"units": 5000}, "gpu_memory": "60MB"}
    made = Job(settings=job(tmp_path, **fields), shape=model_shape("embedded"), vocabulary=1000, rows=10, longest=16,
               dtype="float32", device="cpu", free_host=10**10)  # fmt: skip
    with pytest.raises(ValueError, match=r"the nearest size that fits is --option units=\d+"):
        make_plan(made)
    plan = make_plan(Job(**{**vars(made), "settings": job(tmp_path, **{**fields, "gpu_memory": "10GB"})}))
    assert any("narrow: units 5000" in reason for reason in plan.reasons)


def test_it_trains_and_stands_in_the_table(narrow, tmp_path):
    cell = suites.cell("narrow", "2%", task="facts", steps=6, batch_size=8, train_rows=24, eval_rows=8)
    record = worker.run(cell.spec, worker.Places(run_dir=tmp_path))
    assert record["state"] == "ok" and record["numerics"]["method"] == 7
    assert record["curve"]["loss"][-1] < record["curve"]["loss"][0]
    text = table1(results_of([cell], [read_record(tmp_path / "record.json")]), "default").csv
    assert "Narrow adapter" in text or "narrow" in text
    (line,) = [line for line in text.splitlines() if line.startswith("narrow,")]
    assert f",{record['parameters']['trainable']}" in line.replace('"', "")


@pytest.mark.parametrize("change", [('SIZE = "units"', 'SIZE = str("units")'), ('TITLE = "Narrow"', "")])
def test_what_cannot_be_read_is_one_line(narrow, change):
    (narrow.parent / "odd.py").write_text(SOURCE.replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=r"odd\.py.*(SIZE is read without|does not define TITLE)"):
        describe("odd")


def test_a_constant_may_be_annotated(narrow):
    annotated = SOURCE.replace('TITLE = "Narrow"', 'TITLE: str = "Annotated"')
    (narrow.parent / "typed.py").write_text(annotated, encoding="utf-8")
    assert describe("typed").title == "Annotated"


# ---- where methods are named ----

ROOT = Path(meft_bench.__file__).parent
NAMES = ("meft", "lora", "adapter_h", "parallel_adapter", "parallel_adapter_offload")
"""Not "base" and "full", which mean other things too."""
NAMED = {
    "harness/rows.py": "lines of the tables",
    "harness/sizes.py": "their sizes",
    "harness/suites.py": "which lines stand in which table",
    "harness/smollm2.py": "which lines stand in which table",
    "harness/frontier.py": "which lines stand in which panel",
    "profile/variants.py": "lines of the profile, the plainest of MEFT among them",
    "gpu/rows.py": "the rows of a session on a GPU",
    "profile/paper_figures.py": "the paper's own figures of MEFT and the Parallel Adapter",
    "profile/best.py": "the line that others are compared with, and MEFT's family",
    "bench/layer.py": "keys of its result file",
    "bench/pretrained.py": "the lines that are timed in turn",
    "bench/step.py": "the bars of the paper's Figure 5",
    "bench/timed_step.py": "the bars of the paper's Figure 5",
    "finetune/adapters.py": "MEFT and LoRA load through peft, each in its way",
    "finetune/card.py": "the import that peft needs for MEFT",
    "finetune/cli.py": "the default",
    "finetune/settings.py": "the default",
    "integrations/trainer.py": "an attribute that Trainers get",
    "meft/sites.py": "the name under which an adapter hangs in its layer",
    "profile/scale/peers.py": "a peer at scale, FSDP with LoRA",
    "train/contract.py": "the method that the project is about",
}
"""Why a file names a method, outside report/ and neighbours/, where every table and test names those it is about."""


_ABOUT_METHODS = ("report", "neighbours", "baselines")


def test_methods_are_named_in_few_files():
    found = set()
    for file in [f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] not in _ABOUT_METHODS]:
        strings = [
            n.value for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)
        ]
        if set(NAMES) & {s for s in strings if isinstance(s, str)}:
            found.add(file.relative_to(ROOT).as_posix())
    assert not found - set(NAMED), "ask the method (train/contract.py), or say why the name stands there"
    gone = {name for name in NAMED if (ROOT / name).is_file()} - found
    assert not gone, "these name no method any more: take them off the list"
    assert len(found) <= 25


def test_no_baseline_names_another():
    for folder in baselines.__path__:
        for file in Path(folder).glob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            assert not set(NAMES) & strings - {"lora"}, file.name
