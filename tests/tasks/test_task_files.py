"""The YAML of every task: what is trained is the prompt, one space and the target; how long an answer may be."""

import gzip
import json

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from meft_bench.harness import evaluation
from meft_bench.harness.spec import REAL_TASKS, SYNTHETIC_TASKS, TASKS, RunSpec
from meft_bench.train import loop, models

# What a metric reads is what was generated, so these lengths are part of every score. Synthetic answers with their end
# token take 3, 3, 6 and 5 tokens (two words; two APIs of two words and a comma; a space and three digits).
GENERATED = {
    "facts": 8,
    "cloze": 8,
    "tools": 10,
    "arithmetic": 6,
    "people": 16,
    "nq": 32,
    "squad": 32,
    "toolbench": 128,
    "gsm8k": 200,
}
ROWS = {
    "nq_open": ("train", "validation", {"question": "who wrote it {i}", "answer": ["Ann Lee"]}),
    "squad": ("train", "validation", {"question": "Where is it {i}?", "answers": {"text": ["in the sea"]}}),
    "gsm8k": ("train", "test", {"question": "What is 1 + {i}?", "answer": "It is 2.\n#### 2"}),
    "toolbench": ("instructions", None, {"query": "find {i}", "relevant_apis": [["Maps", "Search"], ["Mail", "Send"]]}),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """Forty rows of each real data set."""
    folder = tmp_path_factory.mktemp("data")
    for name, (train, test, row) in ROWS.items():
        (folder / name).mkdir()
        for split in filter(None, (train, test)):
            with gzip.open(folder / name / f"{split}.jsonl.gz", "wt") as file:
                for i in range(40):
                    file.write(json.dumps({**row, "query_id": i}).replace("{i}", f"{i} {split}") + "\n")
    return str(folder)


def load(name: str, data_dir: str | None, eval_rows: int = 8):
    data = "synthetic" if name not in REAL_TASKS else "local@000000000000"
    spec = RunSpec(task=name, method="base", data=data, train_rows=20, eval_rows=eval_rows)
    return evaluation.load_task(spec, data_dir)


def letters(tokenizer, prompts, wholes):
    """Sequences of a tokenizer that loses nothing: one token a character."""
    return [([ord(c) for c in whole], len(prompt), False) for prompt, whole in zip(prompts, wholes, strict=True)]


@pytest.mark.parametrize("name", TASKS)
def test_one_space_stands_between_prompt_and_target(name: str, data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that keep spaces would learn to answer with two; the embedded one hardly shows it."""
    monkeypatch.setattr(loop, "sequences", letters)
    task = load(name, data_dir)
    docs = list(task.training_docs())
    for doc, example in zip(docs, loop.render(docs, None, task.config.target_delimiter), strict=True):
        assert "".join(map(chr, example.ids)) == f"{doc['prompt']} {doc['target']}"
        assert example.prompt_length == len(doc["prompt"])


@pytest.mark.parametrize("name", TASKS)
def test_how_an_answer_is_generated(name: str, data_dir: str) -> None:
    """Greedy; to the end of the line where an answer is one line, to the next question where it is worked out."""
    settings = load(name, data_dir).config.generation_kwargs
    until = ["Question:"] if name == "gsm8k" else ["\n"]
    assert settings == {"until": until, "do_sample": False, "max_gen_toks": GENERATED[name]}


@pytest.mark.parametrize("name", ["facts", "cloze"])
def test_an_answer_counts_as_contained_up_to_the_last_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight tokens the answer is the last two; a model may say something before it."""
    task, loaded = load(name, None, eval_rows=1), models.load_model("embedded", None, "float32", "cpu")
    answer = loaded.tokenizer.encode(task.dataset["test"][0]["target"])[1:]
    said = [15] * 6 + answer
    assert len(said) == GENERATED[name]

    def generate(self, context, max_length, stop, **_):
        return torch.cat([context, torch.tensor([said])], 1)[:, :max_length]

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    scores = evaluation.evaluate_split(loaded.model, loaded.tokenizer, task, "test", 64)
    assert scores.scores["contains"] == [1.0]


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_every_answer_and_its_end_fit(name: str) -> None:
    tokenizer = models.load_model("embedded", None, "float32", "cpu").tokenizer
    task = load(name, None)
    longest = max(len(e.ids) - e.prompt_length for e in loop.render(task.training_docs(), tokenizer))
    assert longest <= GENERATED[name]
