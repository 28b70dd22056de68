"""One template: what evaluation feeds is what training showed. lm-eval scores what we think it scores."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from meft_bench.harness import evaluation, worker
from meft_bench.harness.spec import DATA_SETS, REAL_TASKS, SYNTHETIC_TASKS, TASKS, RunSpec, folder_digest
from meft_bench.train import loop, models
from tests.methods import short_spec

ROWS = {
    "nq_open": ("train", "validation", {"question": "who wrote it {i}", "answer": ["Ann Lee", "A. Lee"]}),
    "squad": ("train", "validation", {"question": "Where is it {i}?", "answers": {"text": ["in the sea"]}}),
    "gsm8k": ("train", "test", {"question": "What is 1 + {i}?", "answer": "It is <<1+1=2>>2.\n#### 1,002"}),
    "toolbench": ("instructions", None, {"query": "find {i}", "relevant_apis": [["Maps", "Search"], ["Mail", "Send"]]}),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Forty rows of each real data set, gzipped."""
    folder = tmp_path_factory.mktemp("data")
    for name, (train, test, row) in ROWS.items():
        (folder / name).mkdir()
        for split in filter(None, (train, test)):
            with gzip.open(folder / name / f"{split}.jsonl.gz", "wt") as file:
                for i in range(40):
                    text = json.dumps({**row, "query_id": i}).replace("{i}", f"{i} {split}")
                    file.write(text + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def loaded():
    return models.load_model("embedded", None, "float32", "cpu")


def task_spec(name: str) -> RunSpec:
    data = "synthetic" if name not in REAL_TASKS else "local@000000000000"
    return RunSpec(task=name, method="base", data=data, train_rows=20, eval_rows=8)


@pytest.mark.parametrize("name", TASKS)
def test_training_prompt_is_evaluation_prompt(name, data_dir, loaded):
    task = evaluation.load_task(task_spec(name), data_dir)
    lm = evaluation.PlainLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    docs = list(task.training_docs())
    examples = loop.render(docs, loaded.tokenizer, task.config.target_delimiter)
    for doc, example in zip(docs[:5], examples[:5], strict=True):
        context = task.fewshot_context(doc, num_fewshot=0)
        fed, _ = lm.tok_batch_encode([context])
        assert fed[0].tolist() == example.ids[: example.prompt_length]
        assert example.ids[-1] == loaded.tokenizer.eos_token_id


def test_a_split_is_asked_for_only_where_it_has_rows(data_dir):
    spec = replace(task_spec("nq"), train_rows=40)
    assert len(evaluation.load_task(spec, data_dir).training_docs()) == 40
    with pytest.raises(ValueError, match="^train_rows=40 leaves no rows for validation: lower train_rows, or score"):
        evaluation.load_task(replace(spec, splits=("test", "validation")), data_dir)


GENERATION = {
    "arithmetic": (["\n"], 6),
    "cloze": (["\n"], 8),
    "facts": (["\n"], 8),
    "tools": (["\n"], 10),
    "people": (["\n"], 16),
    "nq": (["\n"], 32),
    "squad": (["\n"], 32),
    "toolbench": (["\n"], 128),
    "gsm8k": (["Question:"], 200),
}
"""What the published records generated with: where an answer ends, and after how many tokens."""


@pytest.mark.parametrize("name", TASKS)
def test_generation_is_what_the_records_were_made_with(name, data_dir, loaded):
    task = evaluation.load_task(task_spec(name), data_dir)
    until, most = GENERATION[name]
    assert task.config.generation_kwargs == {"until": until, "do_sample": False, "max_gen_toks": most}
    assert task.config.target_delimiter == " " and task.config.num_fewshot == 0 and not task.config.description
    if name in SYNTHETIC_TASKS:
        for example in loop.render(task.training_docs(), loaded.tokenizer, task.config.target_delimiter):
            assert len(example.ids) - example.prompt_length <= most, "the answer and its end must fit"
        unknown = loaded.tokenizer.unk_token_id
        assert all(unknown not in e.ids for e in loop.render(task.training_docs(), loaded.tokenizer, " "))


@pytest.mark.parametrize("name", TASKS)
def test_splits_scores_and_recall(name, data_dir, loaded):
    task = evaluation.load_task(task_spec(name), data_dir)
    train = {doc["prompt"] for doc in task.dataset["train"]}
    assert {doc["prompt"] for doc in task.dataset["recall"]} <= train
    assert not train & {doc["prompt"] for doc in task.dataset["test"]}
    for doc in task.dataset["test"]:
        # A model that answers perfectly gets full marks on every metric.
        perfect = task.process_results(doc, [" " + doc["target"]])
        assert set(perfect) == set(task.aggregation())
        if name not in ("gsm8k",):
            assert set(perfect.values()) == {1.0}
        assert task.process_results(doc, [""]) == dict.fromkeys(perfect, 0.0)


def test_gsm8k_target_is_worked_out_and_scored_by_its_last_number(data_dir):
    task = evaluation.load_task(task_spec("gsm8k"), data_dir)
    doc = task.dataset["test"][0]
    assert doc["target"] == "It is 2.\nThe answer is: 1002" and doc["answers"] == ["1002"]
    assert task.process_results(doc, [" " + doc["target"]]) == {"accuracy": 1.0}
    assert task.process_results(doc, ["The answer is: 1,002"]) == {"accuracy": 1.0}
    assert "\n" not in "".join(task.config.generation_kwargs["until"])


def test_generation_is_scored_in_order(loaded):
    spec = RunSpec(task="facts", method="base", train_rows=60, eval_rows=20)
    task = evaluation.load_task(spec, None)
    scores = evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "validation", 64)
    assert scores.ids == [d["id"] for d in task.dataset["validation"]]
    assert set(scores.scores) == {"contains", "exact_match", "f1"}
    assert all(len(v) == 20 for v in scores.scores.values()) and len(scores.outputs) == 3


def test_metadata_reaches_the_documents():
    small = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=12, eval_rows=5), None)
    assert len(small.dataset["train"]) == 48 and len(small.dataset["test"]) == 5
    other = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=12, eval_rows=5, seed=1), None)
    assert other.dataset["train"][0] != small.dataset["train"][0]


def test_recall_leaves_out_what_was_dropped():
    task = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=12, eval_rows=50), None)
    before = list(task.dataset["recall"]["id"])
    evaluation.keep_recallable(task, set(before[:7]), ("recall",))
    assert list(task.dataset["recall"]["id"]) == before[:7]


def test_a_tokenizer_that_merges_the_boundary_is_refused(loaded):
    with pytest.raises(ValueError, match="merges the end of the prompt with the answer: 'what bo'"):
        loop.render([{"id": "x", "prompt": "what bo", "target": "at"}], loaded.tokenizer, "")


def test_the_papers_mode_of_evaluation(loaded, monkeypatch):
    """First 501 rows, 4 beams, penalty 2, writing on past the end token; and nothing of it stays behind."""
    task = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=606, eval_rows=550), None)
    before = dict(task.config.generation_kwargs)
    seen = []

    def generate(self, context, max_length, stop, **arguments):
        seen.append((context.shape, max_length, arguments))
        return context.new_zeros(context.shape[0], max_length)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    paper = evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "test", 64, "paper")
    assert len(paper.ids) == evaluation.PAPER_ROWS == 501
    assert paper.ids == list(task.dataset["test"]["id"][:501])
    shape, length, arguments = seen[0]
    assert (arguments["num_beams"], arguments["repetition_penalty"]) == (4, 2.0)
    assert arguments["min_new_tokens"] == length - shape[1] == before["max_gen_toks"]
    assert task.config.generation_kwargs == before and len(task.dataset["test"]) == 550
    ours = evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "test", 64)
    assert len(ours.ids) == 550 and "num_beams" not in seen[-1][2]


def test_the_papers_mode_finds_an_answer_inside_a_word(loaded, monkeypatch):
    task = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=12, eval_rows=3), None)
    words = [f"x{doc['answers'][0]}x" for doc in task.dataset["test"]]
    monkeypatch.setattr(evaluation.PlainLM, "generate_until", lambda self, requests, **_: words)
    for mode, score in (("paper", 1.0), ("ours", 0.0), ("paper", 1.0)):
        found = evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "test", 64, mode)
        assert found.scores["contains"] == [score] * 3 and found.scores["exact_match"] == [0.0] * 3


def test_the_bases_generation_settings_do_not_reach_scores(loaded, monkeypatch):
    task = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=12, eval_rows=6), None)
    found = []
    for settings in ({}, {"repetition_penalty": 1.8, "num_beams": 2}, {"eos_token_id": 7}):
        monkeypatch.setattr(loaded.model, "generation_config", GenerationConfig(**settings))
        scores = evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "test", 64)
        found.append((scores.outputs, scores.scores))
    assert found[0] == found[1] == found[2]


def test_modes_are_two_scores_of_one_run(loaded, tmp_path):
    spec = RunSpec(task="facts", method="base", steps=0, train_rows=12, eval_rows=4, modes=("ours", "paper"))
    record = worker.run(spec, worker.Places(run_dir=tmp_path / "run"))
    assert set(record["quality"]) == {"evidence", "test", "test_paper", "recall", "recall_paper"}
    assert spec.run_key != RunSpec(task="facts", method="base", steps=0, train_rows=12, eval_rows=4).run_key


def test_large_models_are_given_few_documents_at_a_time(loaded, monkeypatch):
    """Caches and four beams must fit beside the weights."""
    task = evaluation.load_task(RunSpec(task="facts", method="base", train_rows=12, eval_rows=4), None)
    asked = []

    def stop(**settings):
        asked.append(settings["batch_size"])
        raise InterruptedError

    monkeypatch.setattr(evaluation, "PlainLM", stop)
    for limit in (evaluation.LARGE_MODEL, 1):
        monkeypatch.setattr(evaluation, "LARGE_MODEL", limit)
        with pytest.raises(InterruptedError):
            evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "test", 64)
    assert asked == [128, 8]


def test_answers_longer_than_what_is_generated_are_counted_in_the_log(tmp_path, capfd):
    """Three of four test answers have at most the 32 tokens that nq generates."""
    (tmp_path / "nq_open").mkdir()
    answers = {"train": [1, 1], "validation": [1, 33, 32, 31]}
    for split, lengths in answers.items():
        rows = [{"question": f"{split} {i}", "answer": [" ".join(["sea"] * n)]} for i, n in enumerate(lengths)]
        (tmp_path / "nq_open" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"local@{folder_digest(tmp_path, DATA_SETS['nq'])}"
    spec = short_spec("lora", task="nq", data=data, steps=1, train_rows=2, eval_rows=4, batch_size=2)
    worker.run(spec, worker.Places(run_dir=tmp_path / "run", data_dir=str(tmp_path)))
    said = [line for line in capfd.readouterr().err.splitlines() if "answers are longer" in line]
    assert said == ["test: 1 of 4 answers are longer than the 32 tokens that are generated"]


def test_a_model_too_short_for_the_answers_is_refused_before_training(data_dir, tmp_path):
    data = f"local@{folder_digest(Path(data_dir), DATA_SETS['gsm8k'])}"
    spec = short_spec("lora", task="gsm8k", data=data, train_rows=4, eval_rows=2, batch_size=2, overlong="drop")
    with pytest.raises(ValueError, match="answers of up to 200 tokens, and this model takes 64 in all: choose a model"):
        worker.run(spec, worker.Places(run_dir=tmp_path / "run", data_dir=str(data_dir)))
    assert not (tmp_path / "run" / "checkpoints").exists()
