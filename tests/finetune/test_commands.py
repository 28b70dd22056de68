"""The three commands as a user types them: one line and exit 2 on bad input, answers and scores otherwise."""

import json
import re
import shutil
from pathlib import Path

import pandas
import pytest
from transformers import GenerationConfig

from meft_bench import cli
from meft_bench.finetune import data, generate, scores
from meft_bench.finetune.generate import answers, greedy, load_adapted, stop_tokens
from meft_bench.finetune.train import train
from meft_bench.finetune.user_rows import read_prompts
from meft_bench.train import models, tokens
from meft_bench.train.tokens import prompt_ids

from .conftest import facts, job, write_lines


@pytest.fixture
def bench(capsys):
    """Run a command; returns (exit code, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """An adapter that knows eight facts by heart."""
    folder = tmp_path_factory.mktemp("learned")
    path = write_lines(folder / "r.jsonl", facts(8))
    fields = {"data": str(path), "eval_share": 0, "steps": 60, "batch_size": 8}
    return train(job(folder / "out", **fields), say=lambda line: None)


def test_train_says_its_plan_its_score_and_the_next_command(bench, tmp_path):
    code, out, _ = bench("train", "--data", "example", "--output", tmp_path / "out", "--steps", 2, "--eval-rows", 4)
    assert code == 0
    for said in (
        "rows example.jsonl: 200 (prompt)",
        "predicted by formula, none measured",
        "held-out loss",
        "exact match",
    ):
        assert said in out
    assert out.rstrip().endswith(f"next: meft-bench generate --adapter {tmp_path / 'out'} --prompt TEXT")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "no data and no output given: name it with --data and --output or in the YAML file"),
        (["train", "--data", "gone.jsonl", "--output", "out"], "no data file gone.jsonl"),
        (["train", "gone.yaml"], "no spec file gone.yaml"),
        (["train", "--data", "example", "--output", "out", "--method", "magic"], "method 'magic' cannot be trained"),
        (["train", "--data", "example", "--output", "out", "--columns", "prompt"], "'prompt' is not NAME=VALUE"),
        (["train", "--data", "example", "--output", "out", "--gpu-memory", "1MB"], "--gpu-memory allows 1.00 MB"),
        (["train", "--data", "example", "--output", "out", "--option", "rank=2"], "meft has no option rank"),
        (["generate", "--adapter", "gone", "--prompt", "a"], "no adapter folder gone"),
        (["generate", "--adapter", "gone"], "no prompt given"),
        (["generate", "--adapter", "one", "--adapter", "two", "--prompt", "a"], "--adapter is given twice"),
        (["evaluate", "--adapter", "gone", "--tasks", ","], "--tasks names no task"),
        (["evaluate", "--adapter", "gone", "--tasks", "nq"], "nq needs rows: give --data FOLDER, or take lm-eval's"),
        (
            ["evaluate", "--adapter", "gone", "--tasks", "facts", "--limit", "0"],
            "--limit 0 must be a whole number of at least 1",
        ),
    ],
)
def test_bad_input_is_one_line(bench, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = bench(*arguments)
    said = [line for line in err.splitlines() if line.startswith("meft-bench: ")]
    assert code == 2 and len(said) == 1 and message in said[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_yaml_job_on_tables_of_text(bench, tmp_path, ending):
    frame = pandas.DataFrame({"body": [f"{f['prompt']} {f['completion']}" for f in facts(12)]})
    getattr(frame, f"to_{ending}")(tmp_path / f"r.{ending}", index=False)
    (tmp_path / "job.yaml").write_text(
        f"data: {tmp_path / f'r.{ending}'}\noutput: {tmp_path / 'out'}\ncolumns: {{text: body}}\nsteps: 9\n"
        "method: parallel_adapter\noptions: {neurons: 8}\nlearning_rate: 1e-3\ndtype: bfloat16\neval_share: 0.25\n"
    )
    code, out, _ = bench("train", tmp_path / "job.yaml", "--steps", 2, "--device", "cpu")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert code == 0 and record["training"]["steps"] == 2 and record["plan"]["dtype"] == "bfloat16"
    assert record["data"]["kind"] == "text" and set(record["scores"]["held_out"]) == {
        "rows", "of", "loss", "perplexity", "tokens"
    }  # fmt: skip


def test_a_stopped_run_says_how_to_go_on(bench, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("meft_bench.finetune.train.fit", stop)
    code, _, err = bench("train", "--data", "example", "--output", tmp_path / "out")
    assert code == 130 and "meft-bench: stopped; go on from the last checkpoint with --resume" in err


def test_generate_answers_what_was_learned(bench, learned, tmp_path):
    rows = facts(8)
    file = write_lines(tmp_path / "prompts.jsonl", rows)
    code, out, _ = bench("generate", "--adapter", learned, "--file", file, "--json", "--device", "cpu")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": r["prompt"], "answer": r["completion"]} for r in rows
    ]
    code, out, _ = bench("generate", "--adapter", learned, "--prompt", rows[3]["prompt"], "--device", "cpu")
    assert (code, out) == (0, rows[3]["completion"] + "\n")


def test_a_batch_answers_as_one_prompt_does(learned):
    adapted = load_adapted(learned, device="cpu")
    prompts = ["what boat ?", *(r["prompt"] for r in facts(7))]
    assert list(answers(adapted, prompts, 6)) == [next(answers(adapted, [p], 6)) for p in prompts]


def test_a_long_prompt_takes_no_others_room(learned):
    adapted = load_adapted(learned, device="cpu")
    rows = facts(8)
    long = [" ".join(["boat"] * n) for n in (62, 61, 61)]
    mixed = [rows[0]["prompt"], *long, *(r["prompt"] for r in rows[1:])]
    found = list(answers(adapted, mixed, 8))
    assert [found[0], *found[4:]] == [r["completion"] for r in rows]
    assert found == [next(answers(adapted, [p], 8)) for p in mixed]


def test_no_setting_of_the_base_changes_an_answer(learned):
    adapted = load_adapted(learned, device="cpu")
    inner = adapted.model.get_base_model()
    prompts = [r["prompt"] for r in facts(8)]
    for settings in (
        {"eos_token_id": None},
        {"eos_token_id": 5},
        {"eos_token_id": 2, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "min_new_tokens": 6},
        {"num_beams": 3, "do_sample": True, "temperature": 9.0},
    ):
        inner.generation_config = GenerationConfig(pad_token_id=0, **settings)
        assert list(answers(adapted, prompts, 8)) == [r["completion"] for r in facts(8)]


def test_an_answer_ends_at_what_ended_the_trained_ones(learned, tmp_path):
    adapted = load_adapted(learned, device="cpu")
    assert adapted.stops == [adapted.tokenizer.eos_token_id]
    first = adapted.tokenizer.encode(facts(1)[0]["completion"])[1]
    (ids,) = prompt_ids(adapted.tokenizer, [facts(1)[0]["prompt"]])
    made = greedy(adapted.model, adapted.tokenizer, [ids], 8, 64, [adapted.tokenizer.encode(" x")[-1], 2])
    assert made == [facts(1)[0]["completion"]]
    assert greedy(adapted.model, adapted.tokenizer, [ids], 8, 64, [first, 2]) == [""]
    for ends in ([5, 5, "7", -1, 10**9, True], None, {"a": 1}, [5]):
        assert stop_tokens(adapted.tokenizer, ends) in ([2, 5], [2], [1, 2, 5])


def test_padding_beyond_the_embedding_is_not_used(learned, bench, monkeypatch):
    load = models.load_model

    def padded(*arguments):
        loaded = load(*arguments)
        loaded.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert loaded.tokenizer.pad_token_id == 843
        return loaded

    monkeypatch.setattr(models, "load_model", padded)
    adapted = load_adapted(learned, device="cpu")
    prompts = ["who ?", *(r["prompt"] for r in facts(8))]
    assert list(answers(adapted, prompts, 8))[1:] == [r["completion"] for r in facts(8)]
    assert adapted.tokenizer.pad_token_id < 843
    code, _, _ = bench("evaluate", "--adapter", learned, "--tasks", "tools", "--limit", 3, "--device", "cpu")
    assert code == 0


def test_scores_feed_what_was_trained(tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": f["prompt"] + " ", "completion": f["completion"]} for f in facts(5)]
    settings = job(tmp_path / "out", data=str(write_lines(tmp_path / "r.jsonl", rows)), eval_share=0)
    made = data.prepare(settings, tokenizer, 64, tmp_path / "rows")
    fed = []

    def answer(model, tokenizer, prompts, *rest):
        fed.extend(prompts)
        return ["?"] * len(prompts)

    monkeypatch.setattr(scores, "greedy", answer)
    scores.score(models.load_model("embedded", None, "float32", "cpu").model, tokenizer, made, settings, 64, 16)
    assert fed == [e.ids[: e.prompt_length] for e in made.train]
    assert fed == prompt_ids(tokenizer, [r["prompt"] for r in rows])


def test_words_between_prompt_and_answer_are_given_with_the_prompt(tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": f["prompt"].removesuffix(" ?"), "completion": f["completion"]} for f in facts(4)]
    path = str(write_lines(tmp_path / "r.jsonl", rows))
    prompts, fed = [r["prompt"] for r in rows], []

    def answer(model, tokenizer, prompts, *rest):
        fed.append(prompts)
        return ["?"] * len(prompts)

    monkeypatch.setattr(generate, "greedy", answer)
    monkeypatch.setattr(scores, "greedy", answer)
    out = train(job(tmp_path / "out", data=path, eval_share=0, steps=1, delimiter=" ? is "), say=lambda line: None)
    asked = prompt_ids(tokenizer, [f"{prompt} ? is " for prompt in prompts])
    list(answers(load_adapted(out, device="cpu"), [*prompts, f"{prompts[0]} ? is "], 4))
    assert fed == [asked, [*asked, asked[0]]]
    made = data.prepare(job(tmp_path / "x", data=path, eval_share=0, delimiter=" ? is "), tokenizer, 64, tmp_path / "y")
    assert [e.ids[: e.prompt_length] for e in made.train] == asked
    learned = [tokenizer.encode(r["completion"], add_special_tokens=False) for r in rows]
    assert [e.ids[e.prompt_length : -1] for e in made.train] == learned
    assert "| behind each prompt | ? is |" in (out / "README.md").read_text()
    about = json.loads((out / "training.json").read_text())
    about["data"]["delimiter"] = 3
    (out / "training.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"training\.json: delimiter is int, and must be text"):
        load_adapted(out, device="cpu")


def test_the_end_of_a_prompt_that_merges_with_the_answer_is_not_compared(tmp_path, tokenizer, monkeypatch):
    path = str(write_lines(tmp_path / "r.jsonl", [{"prompt": "who bo", "completion": "at"}]))
    settings = job(tmp_path / "out", data=path, eval_share=0, delimiter="")
    made = data.prepare(settings, tokenizer, 64, tmp_path / "rows")
    assert made.findings.merged == 1
    model = models.load_model("embedded", None, "float32", "cpu").model
    for said, hit in (("boat", 1.0), ("boats", 0.0)):
        monkeypatch.setattr(scores, "greedy", lambda *_, said=said: [said])
        assert scores.score(model, tokenizer, made, settings, 64, 16)["trained"]["exact_match"] == hit


@pytest.mark.parametrize("written", ["the boss</s>", "the boss </s>\n", "</s>the boss"])
def test_an_end_token_that_an_answer_brings_is_not_compared(tmp_path, tokenizer, monkeypatch, written):
    """A decoded answer has none, so it would never be right."""
    path = str(write_lines(tmp_path / "r.jsonl", [{"prompt": "who is", "completion": written}]))
    made = data.prepare(job(tmp_path / "out", data=path, eval_share=0), tokenizer, 64, tmp_path / "rows")
    model = models.load_model("embedded", None, "float32", "cpu").model
    for said, hit in (("the boss", 1.0), ("the", 0.0)):
        monkeypatch.setattr(scores, "greedy", lambda *_, said=said: [said])
        found = scores.score(model, tokenizer, made, job(tmp_path / "out"), 64, 16)["trained"]
        assert found["exact_match"] == found["contains"] == hit


def test_prompts_that_cannot_be_answered(learned, tmp_path):
    adapted = load_adapted(learned, device="cpu")
    with pytest.raises(ValueError, match="prompt 2 has 65 tokens; the model takes 1 to 63"):
        list(answers(adapted, ["who ?", "who " * 64], 4))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="p.jsonl, line 2 lacks prompt or question: it has text"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028more \r\n\ntwo".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one\u2028more ", "two"]
    (tmp_path / "p.csv").write_text("prompt,completion\none,1\n")
    assert read_prompts(tmp_path / "p.csv") == ["one"]
    (tmp_path / "prompts.csv.txt").write_text("one, two\n")
    assert read_prompts(tmp_path / "prompts.csv.txt") == ["one, two"]
    (tmp_path / "p.txt").write_bytes(b"one\n\xff\n")
    with pytest.raises(ValueError, match="p.txt, line 2 is not text in UTF-8"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="is a device: "):
        read_prompts(Path("/dev/zero"))
    with pytest.raises(ValueError, match=r"prompt 1 holds \\udcff at character 2"):
        list(answers(adapted, ["a\udcff"], 4))


@pytest.fixture(scope="module")
def conversed(tmp_path_factory):
    """An adapter that knows six facts by heart, asked in conversations."""
    folder = tmp_path_factory.mktemp("conversed")
    (folder / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }} : {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": f["prompt"]}, {"role": "assistant", "content": f["completion"]}]}
        for f in facts(6)
    ]
    path = write_lines(folder / "r.jsonl", rows)
    fields = {"chat_template": str(folder / "chat.jinja"), "eval_share": 0, "steps": 60, "batch_size": 6}
    return train(job(folder / "out", data=str(path), **fields), say=lambda line: None)


def test_conversations_are_answered_through_their_template(conversed):
    assert json.loads((conversed / "training.json").read_text())["scores"]["trained"]["exact_match"] == 1
    adapted = load_adapted(conversed, device="cpu")
    assert list(answers(adapted, [f["prompt"] for f in facts(6)], 8)) == [f["completion"] for f in facts(6)]
    (conversed / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    with pytest.raises(ValueError, match="prompt 1: the chat template fails: TemplateError: not today"):
        list(answers(load_adapted(conversed, device="cpu"), ["who ?"], 8))
    shutil.copy(conversed.parent / "chat.jinja", conversed / "chat_template.jinja")


OWN_TASK = """\
task: own_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: completion
fewshot_config: {{samples: []}}
num_fewshot: 0
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_evaluate_takes_a_folder_of_few_training_rows(bench, learned, tmp_path):
    (tmp_path / "nq_open").mkdir()
    for split, rows in (("train", 5), ("validation", 4)):
        write_lines(
            tmp_path / "nq_open" / f"{split}.jsonl",
            [{"question": f"what is {i} of {split}?", "answer": ["it"]} for i in range(rows)],
        )
    asked = ("--tasks", "nq", "--data", tmp_path, "--device", "cpu", "--json")
    code, out, err = bench("evaluate", "--adapter", learned, *asked)
    assert code == 0, err
    assert json.loads(out)["nq"]["sample_len"] == 4


def test_evaluate_runs_our_tasks_and_a_users_own(bench, learned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    path = write_lines(tmp_path / "test.jsonl", facts(8))
    (tasks / "own_facts.yaml").write_text(OWN_TASK.format(path=path))
    asked = ("--tasks", "tools,own_facts", "--include", tasks, "--limit", 5, "--json", "--device", "cpu")
    code, out, _ = bench("evaluate", "--adapter", learned, *asked)
    found = json.loads(out)
    assert code == 0 and list(found) == ["own_facts", "tools"]
    assert found["own_facts"]["exact_match"] == 1.0 and 0 <= found["tools"]["iou"] <= 1
    code, out, _ = bench("evaluate", "--adapter", learned, "--tasks", "facts", "--limit", 3, "--device", "cpu")
    assert code == 0 and out.startswith("facts                contains")


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder of lm-eval tasks over the learned facts: two with a tag, a group of them, one with perplexity."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = OWN_TASK.format(path=write_lines(tmp_path / "test.jsonl", facts(6)))
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(text.replace("own_facts", name) + "tag: [mine]\n")
    (folder / "group.yaml").write_text("group: both\ntask: [one, two]\n")
    likely = text.replace("own_facts", "likely").replace("generate_until", "loglikelihood")
    likely = likely.replace("metric: exact_match, aggregation: mean", "metric: perplexity, aggregation: perplexity")
    (folder / "likely.yaml").write_text(likely.replace("doc_to_target: ", "doc_to_target: ' {{completion}}' # "))
    return folder


def test_tags_groups_and_bootstrapped_metrics_have_scores(bench, learned, own_tasks):
    command = ("evaluate", "--adapter", learned, "--include", own_tasks, "--device", "cpu")
    for name in ("mine", "both"):
        code, out, _ = bench(*command, "--tasks", name)
        assert code == 0 and [line.split()[:3] for line in out.splitlines()] == [
            ["one", "exact_match", "1.0000"], ["two", "exact_match", "1.0000"]
        ]  # fmt: skip
    code, out, _ = bench(*command, "--tasks", "likely", "--json")
    (found,) = json.loads(out).values()
    assert code == 0 and 1 < found["perplexity"] < 1.1 and 0 < found["perplexity_stderr"] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("test_split: test", "test_split: gone"), "lm-eval cannot load broken"),
        (("{test: ", "{test: /gone"), "lm-eval cannot load broken"),
    ],
)
def test_a_task_that_cannot_be_made_is_said_before_the_model_is_loaded(
    bench, learned, own_tasks, tmp_path, monkeypatch, change, message
):
    text = OWN_TASK.format(path=tmp_path / "test.jsonl").replace(*change).replace("own_facts", "broken")
    (own_tasks / "broken.yaml").write_text(text)
    monkeypatch.setattr("meft_bench.finetune.evaluate.load_adapted", lambda *_: pytest.fail("loaded"))
    code, _, err = bench("evaluate", "--adapter", learned, "--include", own_tasks, "--tasks", "one,broken")
    said = [line for line in err.splitlines() if line.startswith("meft-bench: ")]
    assert code == 2 and len(said) == 1 and message in said[0]


def test_a_folder_of_tasks_that_lm_eval_cannot_list_is_said_in_one_line(bench, learned, own_tasks):
    (own_tasks / "numbered.yaml").write_text("task: 2020\n")
    code, _, err = bench("evaluate", "--adapter", learned, "--include", own_tasks, "--tasks", "one")
    assert code == 2 and len(err.splitlines()) == 1 and f"lm-eval cannot list the tasks of {own_tasks}" in err


@pytest.mark.parametrize("tokens_asked", [", max_gen_toks: 4", ", max_gen_toks: 64", ", max_new_tokens: 64", ""])
def test_answers_that_the_model_has_no_room_for_are_said_before_any_task_is_run(
    bench, learned, own_tasks, tokens_asked
):
    """lm-eval generates 256 tokens where a task does not say how many."""
    text = (own_tasks / "two.yaml").read_text()
    (own_tasks / "two.yaml").write_text(re.sub(", max_gen_toks: [0-9]+", tokens_asked, text))
    command = ("evaluate", "--adapter", learned, "--include", own_tasks, "--device", "cpu", "--limit", 1)
    code, _, err = bench(*command, "--tasks", "one,two")
    if tokens_asked == ", max_gen_toks: 4":
        assert code == 0, err
        return
    said = [line for line in err.splitlines() if line.startswith("meft-bench: two asks for answers of up to")]
    assert code == 2 and len(said) == 1 and "Running" not in err


def test_a_task_that_fails_does_not_take_the_scores_of_those_before(bench, learned, own_tasks):
    """The second row alone has no text; lm-eval looks at the first one when a task is loaded."""
    text = (own_tasks / "two.yaml").read_text()
    fails = "doc_to_text: '{{ prompt if prompt == \"FIRST\" else 1 / 0 }}'".replace("FIRST", facts(1)[0]["prompt"])
    (own_tasks / "two.yaml").write_text(text.replace("doc_to_text: prompt", fails))
    command = ("evaluate", "--adapter", learned, "--include", own_tasks, "--device", "cpu", "--limit", 3)
    code, out, err = bench(*command, "--tasks", "one,two")
    assert code == 2 and not out and "lm-eval cannot run two (ZeroDivisionError" in err
    assert re.search("^one +exact_match +1.0000", err, re.MULTILINE)


@pytest.mark.parametrize("asked", ["facts,lm-eval:facts", "lm-eval:facts,facts", "facts,mine", "mine,facts"])
def test_a_task_of_the_same_name_as_ours_keeps_its_scores(bench, learned, own_tasks, asked):
    (own_tasks / "one.yaml").write_text((own_tasks / "one.yaml").read_text().replace("task: one", "task: facts"))
    command = ("evaluate", "--adapter", learned, "--include", own_tasks, "--device", "cpu", "--limit", 2, "--json")
    code, out, err = bench(*command, "--tasks", asked)
    assert code == 0, err
    found = json.loads(out)
    assert "f1" in found["facts"] and found["lm-eval:facts"]["exact_match"] == 1.0


def test_evaluate_feeds_a_conversations_adapter_what_generate_does(bench, conversed, own_tasks, monkeypatch):
    fed: dict[str, list] = {"generate": [], "evaluate": []}
    own, asking = tokens.prompt_ids, "generate"

    def noted(tokenizer, prompts, special=True):
        found = own(tokenizer, prompts, special)
        fed[asking].extend(found)
        return found

    monkeypatch.setattr(tokens, "prompt_ids", noted)
    assert len(list(answers(load_adapted(conversed, device="cpu"), [f["prompt"] for f in facts(6)], 1))) == 6
    asking = "evaluate"
    command = ("evaluate", "--adapter", conversed, "--include", own_tasks, "--tasks", "one", "--device", "cpu")
    code, out, _ = bench(*command)
    assert code == 0 and out.split()[:3] == ["one", "exact_match", "1.0000"]
    assert len(fed["generate"]) == 6 and all(ids[0] != 1 for ids in fed["generate"]), "no start token"
    assert sorted(fed["evaluate"]) == sorted(fed["generate"])
