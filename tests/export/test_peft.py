"""Runs under the names that peft's method_comparison reads, and a task in its layout."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from meft_bench.cli import main
from meft_bench.export import peft_result, peft_task
from meft_bench.harness.suites import EMBEDDED_TASKS, cell
from meft_bench.train.models import load_model
from meft_bench.write import write_new
from tests.report.made_records import make_record

# What method_comparison/processing.py reads of a result, in August 2026.
READ = {
    "run_info": {"experiment_name", "train_config", "peft_config", "total_time", "peft_branch", "created_at"},
    "train_info": {"accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th",
                   "train_time", "file_size", "num_trainable_params", "status", "metrics"},
    "meta_info": {"package_info", "system_info"},
}  # fmt: skip
LAST = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
PACKAGES = {"transformers", "peft", "datasets", "bitsandbytes", "torch"}


def record(row: str, share: str, options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    asked = cell(row, share, **EMBEDDED_TASKS["facts"])
    spec = dataclasses.replace(asked.spec, options={**asked.spec.options, **(options or {})})
    made = make_record(dataclasses.replace(asked, spec=spec))
    steps = made["spec"]["steps"]
    packages = {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0", "datasets": "5.2.0"}
    where = {"commit": "0" * 12, "dirty": False, "system": "Linux x86_64", "cpu": "A", "packages": packages}
    made["provenance"] |= where
    made["timing"]["tokens_real"] = 1234
    made["curve"] = {"step": [10, steps], "loss": [2.0, 0.5], "gradient_norm": [1.0, 1.0]}
    made["memory"]["phase_s"] = {"load": 1.0, "train": 20.0, "evaluate": 2.5}
    return {**made, **changes}


@pytest.fixture
def base_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_result, "_base_nats", lambda: 1.25)


@pytest.mark.parametrize(
    ("row", "share", "name"),
    [
        ("meft", "10%", "meft/embedded-facts-neurons96-lr_0.01-seed0"),
        ("lora_ffn", "10%", "lora/embedded-facts-rank17-lr_0.01-seed0"),
        ("full", "100%", "full-finetuning/embedded-facts-lr_0.0025-seed0"),
    ],
)
def test_a_run_has_the_names_that_are_read(row: str, share: str, name: str, base_nats: None) -> None:
    made = record(row, share)
    result = peft_result.exported(made)
    json.dumps(result)
    for block, names in READ.items():
        assert names <= set(result[block])
    name = f"{name}-{made['run_key']}"
    assert result["run_info"]["experiment_name"] == name
    assert peft_result.file_name(result) == name.replace("/", "--") + ".json"
    train, last = result["train_info"], result["train_info"]["metrics"][-1]
    assert set(last) == LAST and train["status"] == "success"
    steps, batch = made["spec"]["steps"], made["spec"]["batch_size"]
    assert last["test accuracy"] == made["quality"]["test"]["metrics"]["contains"]["mean"]
    assert (last["train loss"], last["train samples"], last["train total tokens"]) == (0.5, steps * batch, 1234)
    assert last["forgetting"] == pytest.approx(made["probes"]["base_text"]["nats_per_token"] - 1.25)
    assert train["metrics"][0] == {"step": 10, "train loss": 2.0, "train samples": 10 * batch}
    assert (train["train_time"], result["run_info"]["total_time"]) == (20.0, 23.5)
    assert train["file_size"] == 4 * made["parameters"]["trainable"] == 4 * train["num_trainable_params"]
    assert {f"{p}-version" for p in PACKAGES} <= set(result["meta_info"]["package_info"])


def test_what_is_not_known_is_null_and_says_why(base_nats: None) -> None:
    result = peft_result.exported(record("meft", "10%"))
    notes = result["meft_bench"]["notes"]
    for name in ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"):
        assert result["train_info"][name] is None and notes[name]
    assert result["run_info"]["created_at"] is None and notes["created_at"]
    on_gpu = record("meft", "10%")
    on_gpu["memory"]["device_peak_by_phase"] = {"load": {"reserved_bytes": 7}, "train": {"reserved_bytes": 99}}
    assert peft_result.exported(on_gpu)["train_info"]["accelerator_memory_max"] == 99
    real = record("meft", "10%")
    real["probes"] = {"forgetting": {"held_out": {"nats_per_token": 2.5, "base_nats_per_token": 2.25}}}
    assert peft_result.exported(real)["train_info"]["metrics"][-1]["forgetting"] == 0.25


def test_the_configurations_are_peft_s(base_nats: None) -> None:
    from peft import PeftConfig

    meft = peft_result.exported(record("meft", "10%"))["run_info"]["peft_config"]
    again = PeftConfig.from_peft_type(**meft)
    assert (type(again).__name__, again.r, again.n_experts, again.p, again.k) == ("MeftConfig", 96, 16, 4, 8)
    lora = peft_result.exported(record("lora_ffn", "10%"))["run_info"]["peft_config"]
    assert lora["peft_type"] == "LORA" and lora["r"] == 17 and any("mlp" in name for name in lora["target_modules"])


def test_what_peft_does_not_have_is_refused(base_nats: None) -> None:
    for row, share in (("parallel_adapter", "10%"), ("galore", "100%"), ("adalomo", "100%"), ("lsp_offload", "100%")):
        with pytest.raises(ValueError, match=f"peft has no method {row}: export takes meft, full, "):
            peft_result.exported(record(row, share))
    with pytest.raises(ValueError, match=r"\(diverged\) has no test scores"):
        peft_result.exported(record("meft", "10%", state="diverged"))
    local = record("lora", "10%")
    local["spec"]["model"] = "local/mine@abc"
    with pytest.raises(ValueError, match="give it with --model"):
        peft_result.exported(local)


# ---- the task ----


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_new({folder / name: content for name, content in peft_task.task_files().items()})
    return folder


def test_the_layout_is_that_of_a_task(task: Path) -> None:
    from peft import PeftConfig

    parameters = json.loads((task / "default_training_params.json").read_text())
    rows = {name: (task / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid", "test")}
    assert {name: len(some) for name, some in rows.items()} == {"train": 2400, "valid": 50, "test": 600}
    assert parameters["max_steps"] * parameters["batch_size"] == len(rows["train"]) * 8
    assert parameters["max_steps"] % parameters["eval_steps"] == 0
    kinds = {}
    for file in (task / "experiments").glob("*/*/adapter_config.json"):
        method = file.relative_to(task).parts[1]
        config = PeftConfig.from_pretrained(str(file.parent))  # as run.py reads it
        kinds[method] = type(config).__name__
    assert kinds == {"meft": "MeftConfig", "lora": "LoraConfig"}
    assert [f.parent.name for f in (task / "experiments").glob("full-finetuning/*/training_params.json")]


def test_the_test_asks_for_what_was_trained_in_other_words(task: Path) -> None:
    splits = {
        name: [json.loads(line) for line in (task / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid", "test")
    }
    asked = {row["query"] for row in splits["train"]}
    answers = {row["response"] for row in splits["train"]}
    for name in ("valid", "test"):
        assert not asked & {row["query"] for row in splits[name]}
        assert {row["response"] for row in splits[name]} <= answers
    assert all(row["response"].startswith(" The answer is: ") for row in splits["test"])


def test_data_py_gives_what_run_py_asks_for(task: Path) -> None:
    spec = importlib.util.spec_from_file_location("task_data_of_a_test", task / "data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = load_model("embedded", None, "float32", "cpu").tokenizer
    tokenizer.model_max_length = 30
    said: list[str] = []
    train, valid, test = module.get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template="Question: {query}\nAnswer:", print_fn=said.append
    )
    assert (len(train), len(valid), len(test)) == (2400 * module.EPOCHS, 50, 600) and "19200" in said[0]
    assert set(train.column_names) == {"input_ids", "attention_mask", "response"}
    first = valid[0]
    text = f"Question: {json.loads((task / 'data' / 'valid.jsonl').read_text().splitlines()[0])['query']}\nAnswer:"
    assert first["input_ids"] == tokenizer([text])["input_ids"][0][:30]
    assert first["attention_mask"] == [1] * len(first["input_ids"])
    assert max(map(len, train[:100]["input_ids"])) <= 30


def test_the_task_is_not_written_over_files_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    assert main(["export", "--task", "--output", str(out)]) == 0 == main(["export", "--task", "--output", str(out)])
    (out / "README.md").write_text("mine")
    (out / "data.py").unlink()
    capsys.readouterr()
    assert main(["export", "--task", "--output", str(out)]) == 2
    assert "README.md is there and holds something else: move it away" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "mine" and not (out / "data.py").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                     base_nats: None) -> None:  # fmt: skip
    made = record("meft", "10%")
    runs = tmp_path / "runs"
    (runs / made["run_key"]).mkdir(parents=True)
    (runs / made["run_key"] / "record.json").write_text(json.dumps(made))
    out = tmp_path / "out"
    more = record("meft", "10%", options={"kept": 4})  # alike in all that the name tells but the key
    (runs / more["run_key"]).mkdir()
    (runs / more["run_key"] / "record.json").write_text(json.dumps(more))
    both = [made["run_key"][:6], more["run_key"]]
    asked = ["export", *both, "--runs", str(runs), "--output", str(out)]
    monkeypatch.chdir(tmp_path)
    assert main(asked) == 0 == main(asked)
    names = [f"meft--embedded-facts-neurons96-lr_0.01-seed0-{m['run_key']}.json" for m in (made, more)]
    assert sorted(f.name for f in (out / "results").iterdir()) == sorted(names)
    said = capsys.readouterr().out
    assert all(said.count(name) == 2 for name in names)
    kept = [json.loads((out / "results" / name).read_text())["run_info"]["peft_config"]["k"] for name in names]
    assert kept == [8, 4]
    (out / "results" / names[0]).write_text("mine")
    assert main(asked) == 2 and f"{names[0]} is there and holds something else" in capsys.readouterr().err
    assert (out / "results" / names[0]).read_text() == "mine"
    assert main(["export", "--output", str(out)]) == 2
    assert "name runs (meft-bench list), or give --task" in capsys.readouterr().err
    assert main(["export", "abcdef", "--runs", str(runs), "--output", str(out)]) == 2
    assert "no record begins with 'abcdef'" in capsys.readouterr().err
