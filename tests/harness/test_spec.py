"""Specs: keys, canonical form, validation; suites are complete and of the sizes they claim."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import pytest

from meft_bench.harness import suites
from meft_bench.harness.rates import learning_rates
from meft_bench.harness.rows import ROWS
from meft_bench.harness.spec import RunSpec, canonical_json, folder_digest
from meft_bench.train.methods import complete_options, find_method, parse_options
from meft_bench.train.models import model_shape


def spec(**fields) -> RunSpec:
    return RunSpec(**{"task": "facts", "method": "full", **fields})


def test_key_is_stable_and_follows_every_field():
    assert spec().run_key == RunSpec.from_dict(spec().to_dict()).run_key
    assert len(spec().run_key) == 12
    changed = [
        {"seed": 1},
        {"steps": 7},
        {"learning_rate": 0.5},
        {"options": {"x": 1}},
        {"splits": ("test",)},
        {"dtype": "bfloat16"},
    ]
    assert len({spec(**c).run_key for c in changed} | {spec().run_key}) == len(changed) + 1


def test_canonical_json_ignores_order():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "poetry"}, "unknown task 'poetry'; known: facts"),
        ({"train_rows": -5}, "train_rows=-5 must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"steps": True}, "steps=True"),
        ({"accumulation": 3}, "accumulation=3 does not divide batch_size=64"),
        ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
        ({"warmup_share": 1.0}, "warmup_share"),
        ({"dtype": "float8"}, "dtype='float8' is unknown; choose one of float32, bfloat16"),
        ({"splits": ("train",)}, "splits='train' is unknown"),
        ({"task": "nq"}, "nq needs real rows"),
        ({"data": "hub"}, "facts makes its own rows"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        spec(**fields)


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="unknown spec field colour"):
        RunSpec.from_dict({"task": "facts", "method": "full", "colour": 1})
    with pytest.raises(ValueError, match="the spec lacks method"):
        RunSpec.from_dict({"task": "facts"})


def test_folder_digest_follows_content(tmp_path):
    (tmp_path / "squad").mkdir()
    with pytest.raises(ValueError, match="no squad"):
        folder_digest(tmp_path, ["squad"])
    file = tmp_path / "squad" / "train.jsonl"
    file.write_text("{}")
    before = folder_digest(tmp_path, ["squad"])
    file.write_text("{ }")
    assert folder_digest(tmp_path, ["squad"]) != before


ALL = {"default": suites.default, "smoke": suites.smoke}


@pytest.mark.parametrize("name", ALL)
def test_suites_write_out_every_option(name):
    for cell in ALL[name]():
        assert cell.spec.options == complete_options(cell.spec.method, cell.spec.options), cell


def test_sizes_are_near_their_share():
    shape = model_shape("embedded")
    for cell in suites.default():
        if cell.row in ("base", "full") or (cell.row, cell.share) == ("lora", "40%"):
            continue  # LoRA cannot grow past the model's width
        options = parse_options(cell.spec.method, cell.spec.options)
        share = 100 * sum(find_method(cell.spec.method).count(options, shape).values()) / shape.parameters
        assert share == pytest.approx(float(cell.share.rstrip("%")), rel=0.25), cell


def test_every_default_cell_has_a_swept_learning_rate():
    rates = learning_rates()
    borrowed = ("base", "parallel_adapter_offload")  # nothing to train; the resident adapter's mathematics
    missing = {f"{c.row} {c.share}" for c in suites.default() if c.row not in borrowed} - set(rates)
    assert not missing


def test_sweep_never_looks_at_the_test_split():
    cells = suites.sweep({m: find_method(m).LEARNING_RATES for m in {r.method for r in ROWS.values()}})
    assert cells and all(c.spec.splits == ("validation",) for c in cells)
    assert len({c.spec.run_key for c in cells}) == len(cells)


def test_planning_needs_no_torch():
    code = (
        "import sys; from pathlib import Path; from meft_bench.harness import suites, runner; "
        "runner.plan([c.spec for c in suites.default()], Path('nowhere')); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_keys_of_specs_without_later_fields_stay_what_they_were() -> None:
    """The field modes came later; a spec that does not use it has the key it had before."""
    spec = RunSpec(task="facts", method="base", steps=0)
    old = {k: v for k, v in spec.to_dict().items() if k != "modes"}
    assert spec.run_key == hashlib.sha256(canonical_json(old).encode()).hexdigest()[:12]
    assert RunSpec.from_dict(old) == spec and replace(spec, modes=("ours", "paper")).run_key != spec.run_key


@pytest.mark.parametrize("modes", [(), ("theirs",)])
def test_unknown_modes_are_refused(modes) -> None:
    with pytest.raises(ValueError, match="modes"):
        RunSpec(task="facts", method="base", modes=modes)
