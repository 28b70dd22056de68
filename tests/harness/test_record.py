"""Records: the schema catches what it must, files are replaced whole, a real run's record is valid."""

import json
import os

import pytest

from meft_bench.harness import worker
from meft_bench.harness.record import check_record, read_record, read_records, write_json, write_record

from .conftest import short_spec


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of one short MEFT run."""
    folder = tmp_path_factory.mktemp("run")
    return worker.run(short_spec("meft"), worker.Places(run_dir=folder)), folder


def test_a_run_writes_a_valid_record(record):
    made, folder = record
    assert made["state"] == "ok"
    assert read_record(folder / "record.json") == json.loads(json.dumps(made))
    assert read_records(folder.parent)[0]["run_key"] == made["run_key"]


def test_quality_has_items_and_interval_inputs(record):
    quality = record[0]["quality"]
    for split in ("test", "recall"):
        block = quality[split]
        assert block["n"] == 12 == len(block["ids"]) == len(set(block["ids"]))
        for metric in block["metrics"].values():
            assert len(metric["items"]) == 12
            assert metric["mean"] == pytest.approx(sum(metric["items"]) / 12, abs=1e-4)


def test_traffic_equals_the_sum_of_its_purposes(record):
    traffic = record[0]["traffic"]
    assert traffic["total_bytes"] == sum(traffic["by_purpose"].values())
    assert traffic["per_optimizer_step_bytes"] == pytest.approx(traffic["total_bytes"] / 8, abs=1)
    layers = traffic["rows_moved_by_layer"]
    rows = 4 * 2 * 128 * 8 * sum(layer["mean"] for layer in layers)  # fp32, key and value, D = 128, 8 micro-batches
    assert traffic["by_purpose"]["h2d_rows_bytes"] == pytest.approx(rows, rel=1e-3)


def test_training_traffic_leaves_evaluation_out(record, tmp_path):
    fewer = worker.run(short_spec("meft", splits=("test",), eval_rows=2), worker.Places(run_dir=tmp_path))
    assert fewer["traffic"] == record[0]["traffic"]


def test_warmup_steps_are_left_out_of_speed(record):
    timing = record[0]["timing"]
    assert len(timing["step_s"]) == 8 and timing["warmup_steps_excluded"] == 5
    assert timing["median_step_s"] == sorted(timing["step_s"][5:])[1]
    assert timing["tokens_supervised"] < timing["tokens_real"] <= timing["tokens_padded"]


def test_accounted_bytes_are_exact(record):
    made = record[0]
    size = 4 * made["parameters"]["trainable"]
    accounted = made["memory"]["accounted"]
    assert accounted["host_parameters_bytes"] == accounted["host_gradients_bytes"] == size
    assert 2 * size <= accounted["host_moments_bytes"] <= 2 * size + 4 * 3 * 4  # and one step count per tensor


def test_no_path_host_or_user_name(record):
    text = json.dumps(record[0])
    assert os.sep + "home" not in text and str(record[1]) not in text and os.uname().nodename not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("quality"), "lacks quality"),
        (lambda r: r.update(state="fine"), "state 'fine'"),
        (lambda r: r["timing"].update(evidence="guessed"), "timing.evidence"),
        (lambda r: r["memory"].update(device_peak_by_phase_reason=""), "null without device_peak_by_phase_reason"),
        (lambda r: r["traffic"].update(total_bytes=None), "traffic.total_bytes is null without"),
        (lambda r: r.update(schema=0), "schema 0"),
        (lambda r: r["curve"]["loss"].append(None), "null in a list"),
    ],
)
def test_broken_records_are_refused(record, change, message):
    broken = json.loads(json.dumps(record[0]))
    change(broken)
    with pytest.raises(ValueError, match=message):
        check_record(broken)


def test_divergence_is_a_result(tmp_path):
    spec = short_spec("full", learning_rate=1e30)
    made = worker.run(spec, worker.Places(run_dir=tmp_path))
    assert made["state"] == "diverged" and "loss is" in made["state_reason"]
    assert made["quality"] is None and made["quality_reason"] == made["state_reason"]
    check_record(made)


def test_base_model_needs_no_training(tmp_path):
    from meft_bench.harness.spec import RunSpec

    made = worker.run(RunSpec(task="facts", method="base", steps=0, eval_rows=12), worker.Places(run_dir=tmp_path))
    assert made["state"] == "ok" and made["parameters"]["trainable"] == 0
    # Nobody told the base about these people.
    assert made["quality"]["test"]["metrics"]["contains"]["mean"] < 0.2


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_nothing_invalid_is_written(tmp_path):
    with pytest.raises(ValueError, match="lacks schema"):
        write_record(tmp_path / "r.json", {})
    assert not list(tmp_path.iterdir())


def test_broken_file_is_named(tmp_path):
    (tmp_path / "record.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match="record.json"):
        read_record(tmp_path / "record.json")


def test_runs_too_large_are_refused_with_their_size(tmp_path):
    spec = short_spec("parallel_adapter")
    huge = type(spec).from_dict({**spec.to_dict(), "options": {"neurons": 100_000_000, "activation": "relu"}})
    with pytest.raises(ValueError, match=r"needs about 152\d\.\d GiB of memory"):
        worker.run(huge, worker.Places(run_dir=tmp_path))
