"""Records: the schema catches what it must, files are replaced whole, a real run's record is valid."""

import json
import os

import pytest

from meft_bench.harness import worker
from meft_bench.harness.record import check_record, read_record, read_records, write_record
from meft_bench.write import write_json
from tests.methods import short_spec


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of one short MEFT run."""
    folder = tmp_path_factory.mktemp("runs") / short_spec("meft").run_key
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
        (lambda r: r.update(run_key="0" * 12), "run_key '000000000000' is not that of its spec"),
        (lambda r: r["spec"].update(seed=1), "is not that of its spec"),
        (lambda r: r["spec"].update(colour=1), "spec: unknown spec field colour"),
        (lambda r: r["spec"].update(steps="8"), "spec: steps='8' must be a whole number"),
        (lambda r: r.update(spec={"task": "facts"}), "spec: the spec lacks method"),
        (
            lambda r: r["quality"]["test"]["metrics"]["contains"].update(mean=1.01),
            "contains.mean=1.01 must be a number",
        ),
        (lambda r: r["quality"]["test"]["metrics"]["contains"]["items"].__setitem__(3, -0.5), "items=-0.5 must be"),
        (lambda r: r["quality"]["test"]["metrics"]["contains"]["items"].pop(), "has 11 items for n=12"),
        (lambda r: r["quality"]["test"]["metrics"]["contains"].update(stderr=-1), "stderr=-1 must be"),
        (lambda r: r["quality"]["test"]["metrics"].pop("contains"), "quality.test.metrics lacks contains"),
        (lambda r: r["quality"]["test"]["ids"].pop(), "quality.test has 11 ids for n=12"),
        (lambda r: r["quality"].pop("recall"), "quality lacks recall"),
        (lambda r: r["quality"].update(test=3), "quality.test is int, not dict"),
        (lambda r: r["parameters"].pop("base"), "parameters lacks base"),
        (lambda r: r["parameters"].update(trainable=-1), "parameters.trainable=-1 must be"),
        (lambda r: r["parameters"]["groups"].update(keys="many"), "parameters.groups.keys='many' must be"),
        (lambda r: r["curve"]["loss"].pop(), "curve has lists of different lengths"),
        (lambda r: r["memory"].update(host_peak_rss_bytes="1"), "memory.host_peak_rss_bytes='1' must be"),
        (lambda r: r["timing"]["step_s"].__setitem__(0, -1), "timing.step_s=-1 must be"),
        (lambda r: r["memory"]["phase_s"].update(load="x"), "memory.phase_s='x' must be"),
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


def test_a_broken_or_foreign_record_is_set_aside_and_the_rest_goes_on(record, tmp_path, capsys):
    made, folder = record
    key, text = made["run_key"], (folder / "record.json").read_text(encoding="utf-8")
    strange = {
        "half/record.json": '{"schema": 1',
        f"{'0' * 12}/record.json": text,  # another run's folder
        "deep/record.json": "[" * 100_000,
        "foreign/record.json": '{"model": "x"}',
        "latin/record.json": "ü",
        "aaaaaaaaaaaa.json": json.dumps({**made, "quality": {"evidence": "measured", "test": {}}}),
        "list/record.json": "[]",
    }
    for name, content in {**strange, f"{key}/record.json": text}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="latin-1" if name.startswith("latin") else "utf-8")
    os.makedirs(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe" / "record.json")
    with open(tmp_path / "bbbbbbbbbbbb.json", "wb") as file:
        file.truncate(10**12)
    said: list[str] = []
    assert [r["run_key"] for r in read_records(tmp_path, said.append)] == [key]
    assert len(said) == len(strange) + 2 and all("\n" not in line for line in said)
    for name in (*strange, "pipe/record.json", "bbbbbbbbbbbb.json"):
        assert sum(str(tmp_path / name) in line and "left out" in line for line in said) == 1, name
    assert len(read_records(tmp_path)) == 1 and capsys.readouterr().err == "", "each is named once"


def test_runs_too_large_are_refused_with_their_size(tmp_path):
    spec = short_spec("parallel_adapter")
    huge = type(spec).from_dict({**spec.to_dict(), "options": {"neurons": 100_000_000, "activation": "relu"}})
    with pytest.raises(ValueError, match=r"needs about 152\d\.\d GiB of memory"):
        worker.run(huge, worker.Places(run_dir=tmp_path))


def test_a_block_is_a_line_and_objects_of_a_list_are_a_line_each(record, tmp_path):
    made, folder = record
    lines = (folder / "record.json").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "{" and lines[-1] == "}" and len(lines) == len(made) + 2
    assert [line.split(":")[0] for line in lines[1:-1]] == [f' "{name}"' for name in sorted(made)]
    value = {"rows": [{"b": 1, "a": [1, 2]}, {}], "table": {"y": {}, "x": {"n": 1}}, "text": "é", "none": []}
    write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text().splitlines() == [
        "{", ' "none":[],', ' "rows":[', '  {"a":[1,2],"b":1},', "  {}", " ],",
        ' "table":{', '  "x":{"n":1},', '  "y":{}', " },", ' "text":"\\u00e9"', "}",
    ]  # fmt: skip
    assert json.loads((tmp_path / "a.json").read_text()) == value


def test_equal_records_are_equal_bytes_and_no_number_is_none(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5]})
    write_json(tmp_path / "b.json", {"a": [1.5], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(tmp_path / "c.json", {"a": value})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
