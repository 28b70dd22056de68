"""What `meft-bench run` takes: a flag before the spec, the spec before the environment."""

import json
from pathlib import Path

import pytest

from meft_bench import cli, inputs
from meft_bench.harness.asked import asked_run
from meft_bench.harness.spec import DATA_SETS, RunSpec


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The spec that `run` makes of a YAML file's lines and of flags."""
    monkeypatch.delenv("MEFT_DATA", raising=False)
    monkeypatch.setattr(inputs, "device", lambda name: "cuda" if name == "auto" else name)

    def call(lines: str, *flags: str) -> RunSpec:
        (tmp_path / "spec.yaml").write_text(lines)
        return asked_run(cli._parser().parse_args(["run", str(tmp_path / "spec.yaml"), *flags]))[0]

    return call


def _rows(folder: Path, question: str) -> str:
    """A folder of NQ's rows; its name in a spec."""
    for name in DATA_SETS["nq"]:
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({"question": question, "answer": ["b"]}) + "\n")
    return inputs.data(str(folder), {}, DATA_SETS["nq"])


NQ, FACTS = "task: nq\nmethod: lora\n", "task: facts\nmethod: lora\n"


def test_rows_are_the_flags_else_the_specs_else_the_environments(asked, tmp_path, monkeypatch):
    mine, other = _rows(tmp_path / "mine", "a"), _rows(tmp_path / "other", "c")
    assert asked(f"{NQ}data: hub").data == asked(NQ, "--set", "data=hub").data == "hub"
    assert asked(f"{NQ}data: {tmp_path / 'mine'}").data == mine
    assert asked(f"{NQ}data: hub", "--data", str(tmp_path / "mine")).data == mine
    monkeypatch.setenv("MEFT_DATA", str(tmp_path / "other"))
    assert asked(NQ).data == other and asked(f"{NQ}data: hub").data == "hub"
    with pytest.raises(ValueError, match="facts makes its own rows: leave out --data"):
        asked(FACTS, "--data", str(tmp_path / "mine"))


def test_a_digest_in_the_spec_is_that_of_the_rows(asked, tmp_path, monkeypatch):
    mine, other = _rows(tmp_path / "mine", "a"), _rows(tmp_path / "other", "c")
    with pytest.raises(ValueError, match=f"asks for the rows {mine}, not synthetic: give their folder with --data"):
        asked(f"{NQ}data: {mine}")
    for named in ("hub", str(tmp_path / "other")):
        with pytest.raises(ValueError, match=f"asks for the rows {mine}, not (hub|{other}): give"):
            asked(f"{NQ}data: {mine}", "--data", named)
    assert asked(f"{NQ}data: {mine}", "--data", str(tmp_path / "mine")).data == mine
    monkeypatch.setenv("MEFT_DATA", str(tmp_path / "mine"))
    assert asked(f"{NQ}data: {mine}").data == mine
    (tmp_path / "mine" / "squad").mkdir()
    (tmp_path / "mine" / "squad" / "train.jsonl").write_text("{}\n")
    suite = inputs.data(str(tmp_path / "mine"), {}, sum(DATA_SETS.values(), ()))
    assert suite != mine and asked(f"{NQ}data: {suite}").data == suite, "as a suite names the rows of all its tasks"


def test_the_device_is_the_flags_else_the_specs_else_what_is_here(asked):
    assert asked(f"{FACTS}device: cpu").device == asked(FACTS, "--set", "device=cpu").device == "cpu"
    assert asked(f"{FACTS}device: cuda", "--device", "cpu").device == "cpu"
    assert asked(f"{FACTS}device: cpu", "--device", "cuda").device == "cuda"
    assert asked(FACTS).device == "cuda"
