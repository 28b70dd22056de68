"""The paper's own cells at the paper's settings: what they hold, and the smallest of them from end to end, on the CPU,
on a small Llama-shaped checkpoint; with real rows and a real model where MEFT_DATA has them."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from meft_bench import inputs
from meft_bench.harness import suites, worker
from meft_bench.harness.estimate import KNOWN_SHAPES, predict
from meft_bench.harness.evaluation import load_task
from meft_bench.harness.spec import DATA_SETS, REAL_TASKS
from meft_bench.train.contract import describe
from meft_bench.train.methods import find_method, parse_options
from meft_bench.train.models import load_model

REAL = Path(os.environ.get("MEFT_DATA", "no-data"))


def test_the_cells_are_the_papers() -> None:
    for shape, neurons in (("llama-7b", {3072, 8464}), ("mistral-7b", {3072, 3600, 4096})):
        cells = suites.paper("owner/model", "hub", "cuda", shape)
        assert {c.spec.task for c in cells} == set(REAL_TASKS) and {c.spec.seed for c in cells} == set(suites.SEEDS)
        meft = [c.spec for c in cells if c.row == "meft"]
        assert {s.options["neurons"] for s in meft} == neurons and {s.options["kept"] for s in meft} == {64}
        assert {(s.options["probed"], s.max_length, s.learning_rate) for s in meft} == {(8, 256, 1e-4)}
        assert {(c.spec.task, c.spec.batch_size) for c in cells} == {
            ("nq", 64), ("squad", 256), ("toolbench", 64), ("gsm8k", 64)}  # fmt: skip
        assert all(c.spec.modes == ("ours", "paper") and c.spec.batch_size // c.spec.accumulation == 2 for c in cells)
        for c in cells:
            options = parse_options(c.spec.method, c.spec.options)
            size = sum(find_method(c.spec.method).count(options, KNOWN_SHAPES[shape]).values())
            percent = 100 * size / KNOWN_SHAPES[shape].parameters
            assert percent == pytest.approx(float(c.share.rstrip("%")), abs=1.3), (c.row, c.share, percent)
    mistral = suites.paper("owner/model", "hub", "cuda", "mistral-7b")
    released = {(c.spec.task == "nq", c.spec.options["neurons"]) for c in mistral if c.row == "meft_no_ke"}
    assert released == {(True, 4096), (False, 3600)}


def test_a_base_that_is_trained_is_in_fp32() -> None:
    """At the suite's rate most of its steps are lost in bf16, and full fine-tuning would be no baseline."""
    cells = suites.paper("owner/model", "hub", "cuda")
    found = {(describe(c.spec.method).trains_base, c.spec.dtype) for c in cells}
    assert found == {(True, "float32"), (False, "bfloat16")}
    weights = load_model("embedded", None, "bfloat16", "cpu").model.get_input_embeddings().weight.detach().flatten()
    (rate,) = {c.spec.learning_rate for c in cells if c.spec.dtype == "float32"}
    assert ((weights - rate) == weights).float().mean() > 0.9 and not ((weights.float() - rate) == weights).any()
    need = predict(next(c.spec for c in cells if c.row == "full"), KNOWN_SHAPES["llama-7b"])
    assert need["device_bytes"] > 16 * KNOWN_SHAPES["llama-7b"].parameters


def test_every_task_is_trained_on_its_whole_file(tmp_path: Path) -> None:
    """The number of rows that a cell asks for is that of the file, so none is left for validation."""
    cells = {c.spec.task: c for c in suites.paper("owner/model", "hub", "cuda")}
    nq = replace(cells["nq"].spec, eval_rows=8)
    (tmp_path / "nq_open").mkdir()
    for split, rows in (("train", nq.train_rows), ("validation", 8)):
        lines = (json.dumps({"question": f"{split} {i}", "answer": ["a"]}) for i in range(rows))
        (tmp_path / "nq_open" / f"{split}.jsonl").write_text("\n".join(lines))
    task = load_task(nq, str(tmp_path))
    assert len(task.dataset["train"]) == 87_925 and len(task.dataset["test"]) == 8
    (tmp_path / "nq_open" / "train.jsonl").write_text(json.dumps({"question": "one", "answer": ["a"]}))
    with pytest.raises(ValueError, match="there are 1 training rows, fewer than train_rows=87925"):
        load_task(nq, str(tmp_path))


def shortest(cells: list[suites.Cell], task: str) -> suites.Cell:
    """The cell of a task with the fewest trainable parameters, cut to a few steps and rows for the CPU."""
    shape = KNOWN_SHAPES["llama-7b"]

    def size(c: suites.Cell) -> int:
        return sum(find_method(c.spec.method).count(parse_options(c.spec.method, c.spec.options), shape).values())

    cell = min((c for c in cells if c.spec.task == task and c.spec.steps), key=size)
    short = {"steps": 3, "batch_size": 4, "accumulation": 2, "train_rows": 24, "eval_rows": 6, "device": "cpu"}
    return replace(cell, spec=replace(cell.spec, **short))


def check(record: dict) -> None:
    assert record["state"] == "ok" and record["spec"]["dtype"] == "bfloat16"
    assert set(record["quality"]) == {"evidence", "test", "test_paper"}
    assert record["quality"]["test"]["n"] == 6 and len(record["curve"]["loss"]) == 3
    assert record["timing"]["tokens_supervised"] > 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Llama-shaped model of random weights, two layers wide enough for every size, with the embedded tokenizer."""
    tokenizer = load_model("embedded", None, "float32", "cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = tmp_path / "small-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_smallest_cell_and_meft_run_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "nq_open"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        with gzip.open(data / f"{split}.jsonl.gz", "wt") as file:
            for i in range(40):
                file.write(json.dumps({"question": f"how many in all {i} {split}", "answer": [f"{i} birds"]}) + "\n")
    places: dict = {}
    model = inputs.model(str(checkpoint), places)
    digest = inputs.data(str(tmp_path / "data"), places, DATA_SETS["nq"])
    cells = suites.paper(model, digest, "cuda")
    cell = shortest(cells, "nq")
    check(worker.run(cell.spec, worker.Places(run_dir=tmp_path / "run", **places)))

    meft = next(c for c in cells if (c.row, c.share, c.spec.task) == ("meft", "12%", "nq"))
    record = worker.run(
        replace(meft.spec, **{k: getattr(cell.spec, k) for k in ("steps", "batch_size", "train_rows", "eval_rows",
                                                                 "accumulation", "device")}),
        worker.Places(run_dir=tmp_path / "meft", **places),
    )  # fmt: skip
    check(record)
    # K = 64 of R = 3072 and few tokens: the union is a part of R, and bfloat16 halves the wire.
    assert all(64 <= layer["mean"] < 3072 for layer in record["traffic"]["rows_moved_by_layer"])


@pytest.mark.skipif(not (REAL / "models" / "stories260K").is_dir(), reason="MEFT_DATA has no models/stories260K")
@pytest.mark.parametrize("task", REAL_TASKS)
def test_the_smallest_cell_runs_on_real_rows(task: str, tmp_path: Path) -> None:
    places: dict = {}
    model = inputs.model(str(REAL / "models" / "stories260K"), places)
    data = inputs.data(str(REAL), places, sum(DATA_SETS.values(), ()))
    cell = shortest(suites.paper(model, data, "cuda"), task)
    if task == "toolbench":  # long rows: the small tokenizer needs more than 256 tokens for most
        cell = replace(cell, spec=replace(cell.spec, max_length=512))
    check(worker.run(cell.spec, worker.Places(run_dir=tmp_path / "run", **places)))
