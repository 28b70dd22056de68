"""Rows become the sequences the harness would make, once, on disk; what cannot be trained on is counted by line."""

import copy
import json
import tracemalloc

import pytest
from tokenizers import normalizers

from meft_bench.finetune import data, encode
from meft_bench.finetune import train as train_module
from meft_bench.finetune.base_model import load_tokenizer
from meft_bench.finetune.example import example_rows, write_example
from meft_bench.finetune.row_files import EXAMPLE
from meft_bench.finetune.train import train
from meft_bench.finetune.user_rows import Row
from meft_bench.train import tokens
from meft_bench.train.loop import Example, render
from meft_bench.train.tokens import prompt_ids

from .conftest import facts, job, write_lines


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepare a file of rows; returns TrainingData."""

    def make(rows, limit=64, name="r.jsonl", **fields):
        path = write_lines(tmp_path / name, rows)
        return data.prepare(job(tmp_path / "out", data=str(path), **fields), tokenizer, limit, tmp_path / "rows")

    return make


def test_sequences_equal_the_harness_rendering(prepared, tokenizer):
    rows = facts(30)
    made = prepared(rows, eval_share=0)
    docs = [{"prompt": r["prompt"], "target": r["completion"], "id": str(i)} for i, r in enumerate(rows, 1)]
    assert list(made.train) == render(docs, tokenizer)
    assert made.train.row(3)["answers"] == [rows[3]["completion"]] and made.findings.ends == [tokenizer.eos_token_id]
    assert made.findings.longest == max(len(e.ids) for e in made.train)


def test_text_rows_learn_everything_after_the_first_token(prepared, tokenizer):
    (example,) = prepared([{"text": "where is the boat"}], eval_share=0).train
    assert example == Example([*tokenizer.encode("where is the boat"), tokenizer.eos_token_id], 1, "1")


def test_messages_learn_the_last_answer(prepared, tokenizer, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    messages = [{"role": "user", "content": "what boat ?"}, {"role": "assistant", "content": "a boat"}]
    made = prepared([{"messages": messages}], eval_share=0, chat_template=str(template))
    end = tokenizer.eos_token_id
    assert made.findings.ends == [end] and made.train[0].ids.count(end) == 2, "the template's own, one a message"
    (example,) = made.train
    assert example.ids[: example.prompt_length] == tokenizer.encode(
        "user : what boat ? </s> assistant :", add_special_tokens=False
    )
    assert tokenizer.decode(example.ids[example.prompt_length :]).strip().startswith("a boat")
    assert made.findings.kind == "messages"


def test_messages_without_a_template_say_so(prepared):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="the tokenizer has no chat template: give a Jinja file with --chat-template"):
        prepared([{"messages": messages}], eval_share=0)


def test_the_split_is_seeded_and_disjoint(prepared):
    one, two = prepared(facts(100), eval_share=0.1), prepared(facts(100), eval_share=0.1, seed=1)
    assert len(one.held_out) == 10 and not set(one.train.indices) & set(one.held_out.indices)
    assert sorted([*one.train.indices, *one.held_out.indices]) == list(range(100))
    assert one.held_out.indices != two.held_out.indices
    assert prepared(facts(100), eval_share=0.1).held_out.indices == one.held_out.indices


def test_rows_that_the_tokenizer_does_not_know_are_named(prepared):
    rows = [
        *facts(3),
        {"prompt": "кто хранит маяк ?", "completion": "boat"},
        {"prompt": "who ?", "completion": "Zürich"},
    ]
    found = prepared(rows, eval_share=0).findings
    assert (found.rows, found.unknown, found.unknown_lines) == (5, 2, [4, 5])


def test_an_unknown_token_that_also_ends_texts_is_none(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.unk_token = other.eos_token
    assert tokens.unknown_id(tokenizer) == tokenizer.unk_token_id and tokens.unknown_id(other) is None


def test_held_out_rows_that_are_trained_on_are_counted(prepared):
    rows = facts(20)
    assert prepared(rows, eval_share=0.2).repeated == 0
    assert prepared([*rows, *rows], eval_share=1 / 40).repeated == 1
    one_of_two = [{**row, "completion": "boat"} for row in rows]
    assert prepared([*rows, *one_of_two], eval_share=1 / 40).repeated == 0, "another answer is another row"
    assert prepared([*rows, *rows], eval_share=0).repeated == 0


def test_empty_rows_are_refused_or_dropped_by_line(prepared):
    rows = [*facts(3), {"prompt": "who ?", "completion": " "}, {"prompt": "", "completion": "b"}, *facts(2)]
    with pytest.raises(ValueError, match=r"r.jsonl: 2 of 7 rows are empty or white space \(lines 4, 5\).*--drop-empty"):
        prepared(rows)
    made = prepared(rows, drop_empty=True)
    assert (made.findings.rows, made.findings.empty, made.findings.empty_lines) == (5, 2, [4, 5])


def test_overlong_rows_are_refused_or_dropped_by_line(prepared):
    rows = [*facts(2), {"prompt": "who ? " * 30, "completion": "b"}, *facts(7)]
    with pytest.raises(ValueError, match=r"1 of 10 rows exceed the model's limit of 20 .*\(line 3\): shorten"):
        prepared(rows, limit=20)
    with pytest.raises(ValueError, match=r"max_length=20 tokens \(line 3\): raise.*--drop-overlong"):
        prepared(rows, limit=20, max_length=20)
    made = prepared(rows, limit=20, drop_overlong=True)
    assert made.findings.overlong_lines == [3] and 3 not in {made.train.row(i)["line"] for i in range(len(made.train))}


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
TALK = [{"role": "user", "content": "what boat ?"}, {"role": "assistant", "content": "a boat"}]
CALL = [{"type": "function", "function": {"name": "find", "arguments": {"town": "boat"}}}]


@pytest.fixture
def talked(prepared, tmp_path):
    """Prepare conversations with a template."""

    def make(rows, template=CHAT, **fields):
        (tmp_path / "chat.jinja").write_text(template)
        return prepared(rows, eval_share=0, chat_template=str(tmp_path / "chat.jinja"), **fields)

    return make


def test_an_answer_that_the_template_does_not_end_is_ended(talked, tokenizer):
    (example,) = talked(
        [{"messages": TALK}], "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    ).train
    assert "</s>" not in tokenizer.decode(example.ids[:-1]) and example.ids[-1] == tokenizer.eos_token_id


def test_an_empty_system_message_is_no_empty_row(talked):
    made = talked([{"messages": [{"role": "system", "content": ""}, *TALK]}])
    assert (made.findings.rows, made.findings.empty) == (1, 0)


def test_calls_are_learned_where_the_template_writes_them(talked, tokenizer):
    template = CHAT.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %} boat{% endfor %}")
    called = [TALK[0], {"role": "assistant", "content": None, "tool_calls": CALL}]
    made = talked([{"messages": called}], template)
    (example,) = made.train
    learned = tokenizer.decode(example.ids[example.prompt_length :], skip_special_tokens=True)
    assert learned.split() == ["boat"] and tokenizer.eos_token_id in example.ids[example.prompt_length :]
    assert made.train.row(0)["answers"] == ["boat"], "what is written of the call is the answer"


def test_tools_are_given_where_the_template_writes_them(talked, tokenizer):
    template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + CHAT
    made = talked([{"messages": TALK, "tools": [{"name": "boat"}]}], template)
    (example,) = made.train
    assert tokenizer.decode(example.ids[: example.prompt_length]).startswith("boat<unk> :") and not made.findings.unused


def test_a_row_of_which_nothing_is_learned_is_empty(tokenizer):
    encoder = encode.Encoder("r.jsonl, line", job("out"), None, tokenizer, 64, None)
    assert list(encoder._sequence(Row(line=7, prompt="a", completion="b"), "prompt", [1, 5], 2, False)) == []
    assert encoder.findings.empty_lines == [7]


def test_batches_are_bounded_by_number_and_by_text():
    rows = [Row(line=n, prompt="a", completion="b" * (700_000 if n < 6 else 1)) for n in range(2_010)]
    assert [len(batch) for batch in data._batches(iter(rows))] == [3, 3, 1000, 1000, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": CALL}]}, "line 2 has tool_calls, which the chat template"),
        ({"messages": TALK, "tools": [{"name": "find"}]}, "line 2 has tools, which the chat template does not write"),
        ({"messages": [TALK[0], {**TALK[1], "thinking": "hm"}]}, "line 2 has thinking, which the chat template"),
    ],
)
def test_what_decides_an_answer_and_is_not_written_is_refused(talked, row, message):
    with pytest.raises(ValueError, match=message):
        talked([{"messages": TALK}, row])


def test_columns_that_are_not_used_are_named(talked, prepared, tmp_path):
    named = [{**TALK[0], "name": "Ann", "thinking": "hm"}, TALK[1]]
    assert talked([{"messages": named, "id": 3, "note": ""}]).findings.unused == ["id", "messages' name",
                                                                             "messages' thinking"]  # fmt: skip
    rows = [{**facts(1)[0], "system": "be brief", "weight": 1, "tools": [1]}, {**facts(2)[1], "source": "x"}]
    made = prepared(rows)
    assert made.findings.unused == ["system", "tools", "source"]
    assert "; not used: system, tools, source" in train_module._rows_text(made)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", r"r.jsonl, line 1: the chat template fails: TemplateError: no system"),
        ("{% for %}", "line 1: the chat template fails: TemplateSyntaxError in its line 1"),
        ("{% for m in messages | reverse %}{{ m.content }} {% endfor %}", "does not write the answer after its prompt"),
    ],
)
def test_templates_that_fail_name_the_row(talked, template, message):
    with pytest.raises(ValueError, match=message) as error:
        talked([{"messages": TALK}], template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [" ", "  ", "\n", "\u2003"])
def test_a_prompt_that_ends_in_white_space_is_fed_as_it_is_trained(prepared, tokenizer, ending):
    (example,) = prepared([{"prompt": f"what boat ?{ending}", "completion": "a boat"}], eval_share=0).train
    fed = prompt_ids(tokenizer, [f"what boat ?{ending}"])[0]
    assert example.ids[: example.prompt_length] == fed and len(example.ids) > len(fed)
    if ending == " ":
        assert fed == tokenizer.encode("what boat ?"), "the white space is the answer's, with its first word"


def test_start_and_end_tokens_stand_once(prepared, tokenizer):
    rows = [
        {"prompt": "what boat ?", "completion": "a boat"},
        {"prompt": "<s> what boat ?", "completion": "a boat</s>"},
    ]
    one, two = prepared(rows, eval_share=0).train
    assert one.ids == two.ids and one.prompt_length == two.prompt_length
    assert [one.ids.count(t) for t in (tokenizer.bos_token_id, tokenizer.eos_token_id)] == [1, 1]


def test_another_end_token_or_template_is_tokenised_anew(prepared, tokenizer, talked):
    assert prepared(facts(2), eval_share=0).train[0].ids[-1] == tokenizer.eos_token_id
    other = load_tokenizer("embedded", None)
    other.eos_token = "<unk>"
    assert data.tokenizer_digest(other) != data.tokenizer_digest(tokenizer)
    settings = job("out", data="r.jsonl", eval_share=0)
    assert data._key(settings, other, None, 64, None, "d") != data._key(settings, tokenizer, None, 64, None, "d")
    assert data._key(settings, other, None, 64, 9, "d") != data._key(settings, other, None, 64, None, "d")
    ruled = load_tokenizer("embedded", None)
    ruled.backend_tokenizer.normalizer = normalizers.Replace("zq", "x")  # no text of a probe shows it
    assert data.tokenizer_digest(ruled) != data.tokenizer_digest(tokenizer)
    first, second = talked([{"messages": TALK}]).train, talked([{"messages": TALK}], CHAT.replace("</s>", "<s>")).train
    assert first[0].ids != second[0].ids


def test_a_token_beyond_the_embedding_names_the_row(tmp_path, tokenizer):
    path = write_lines(tmp_path / "r.jsonl", facts(2))
    with pytest.raises(ValueError, match=r"r.jsonl, line 1 has the token \d+ .*the base's embedding ends at 99"):
        data.prepare(job("out", data=str(path), eval_share=0), tokenizer, 64, tmp_path / "rows", 100)
    assert not (tmp_path / "rows").exists()


def test_texts_far_too_long_are_counted_without_being_tokenised(prepared, monkeypatch, tokenizer):
    seen = []
    own = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda t, texts, special: seen.extend(texts) or own(t, texts, special))
    made = prepared([*facts(3), {"prompt": "who ?", "completion": "boat " * 100_000}], drop_overlong=True)
    assert (made.findings.rows, made.findings.overlong_lines) == (3, [4])
    assert max(map(len, seen)) == encode._LONG


@pytest.mark.parametrize(("rows", "message"), [([], "r.jsonl holds no rows"), (facts(1), "set --eval-share 0")])
def test_too_few_rows(prepared, rows, message):
    with pytest.raises(ValueError, match=message):
        prepared(rows)


def test_rows_are_tokenised_once(prepared, tmp_path, monkeypatch):
    prepared(facts(20))
    made_at = (tmp_path / "rows" / "rows.arrow").stat().st_mtime_ns
    monkeypatch.setattr(data.Encoder, "__call__", lambda *_: pytest.fail("tokenised again"))
    again = prepared(facts(20))
    assert again.findings.rows == 20 and (tmp_path / "rows" / "rows.arrow").stat().st_mtime_ns == made_at
    monkeypatch.undo()
    assert prepared(facts(21)).findings.rows == 21, "another file's rows are not taken for these"


def test_a_broken_row_leaves_no_rows_behind(prepared, tmp_path):
    with pytest.raises(ValueError, match="r.jsonl, line 4 is not JSON"):
        prepared([*facts(3), "{oops"])
    assert not (tmp_path / "rows").exists()


def test_the_table_is_memory_mapped(prepared):
    table = prepared(facts(50)).train.rows
    assert [f["filename"].endswith("rows.arrow") for f in table.cache_files] == [True]


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.jsonl", "no data file nowhere.jsonl"), ("nobody/nothing", "cannot load nobody/nothing from the hub")],
)
def test_data_that_is_not_there(tmp_path, tokenizer, source, message):
    with pytest.raises(ValueError, match=message) as error:
        data.prepare(job(tmp_path / "out", data=source), tokenizer, 64, tmp_path / "rows")
    assert "\n" not in str(error.value)


def test_the_shipped_example_is_its_recipe(tmp_path):
    write_example(tmp_path / "example.jsonl", 200)
    assert EXAMPLE.read_bytes() == (tmp_path / "example.jsonl").read_bytes()


def test_a_hundred_thousand_example_rows_differ():
    rows = {json.dumps(row) for row in example_rows(100_000)}
    assert len(rows) == 100_000
    with pytest.raises(ValueError, match="there are 197,184"):
        list(example_rows(197_185))


def test_memory_does_not_grow_with_the_rows(prepared):
    peaks = []
    for count in (2_000, 10_000):
        rows = facts(count)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        made = prepared(rows)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
        assert made.findings.rows == count
    # Held once as Python objects, 8,000 more rows of some 12 ids would take 3 MB and more.
    assert peaks[1] - peaks[0] < 1.5e6


@pytest.mark.slow
def test_a_hundred_thousand_rows_train(tmp_path):
    write_example(tmp_path / "facts.jsonl", 100_000)
    settings = job(tmp_path / "out", data=str(tmp_path / "facts.jsonl"), steps=2, eval_rows=4)
    said: list[str] = []
    train(settings, say=said.append)
    assert said[0].startswith("rows facts.jsonl: 100,000 (prompt), 95,000 to train on, 5,000 held out")
