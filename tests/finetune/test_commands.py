"""The three commands as a user types them: one line and exit 2 on bad input, answers and scores otherwise."""

import json

import pandas
import pytest

from meft_bench import cli
from meft_bench.finetune.generate import answers, load_adapted, read_prompts
from meft_bench.finetune.train import train

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


def test_prompts_that_cannot_be_answered(learned, tmp_path):
    adapted = load_adapted(learned, device="cpu")
    with pytest.raises(ValueError, match="prompt 2 has 66 tokens; the model takes 1 to 63"):
        list(answers(adapted, ["who ?", "who " * 64], 4))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="p.jsonl, line 2 lacks prompt or question: it has text"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


def test_conversations_are_answered_through_their_template(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": f["prompt"]}, {"role": "assistant", "content": f["completion"]}]}
        for f in facts(6)
    ]
    path = write_lines(tmp_path / "r.jsonl", rows)
    fields = {"chat_template": str(template), "eval_share": 0, "steps": 60, "batch_size": 6, "data": str(path)}
    folder = train(job(tmp_path / "out", **fields), say=lambda line: None)
    assert json.loads((folder / "training.json").read_text())["scores"]["trained"]["exact_match"] == 1
    adapted = load_adapted(folder, device="cpu")
    assert list(answers(adapted, [f["prompt"] for f in facts(6)], 8)) == [f["completion"] for f in facts(6)]


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
