"""Rows of every format and layout; the first broken one is named by file and line."""

import gzip
import json

import pandas
import pytest

from meft_bench.finetune.user_rows import BrokenRow, read_prompts, read_rows
from meft_bench.inputs import texts

from .conftest import write_lines

PAIR = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


ANSWER = CHAT["messages"][1]


def talk(*between, **last):
    """A conversation, with other messages before the last answer, and more keys in that."""
    return {"messages": [CHAT["messages"][0], *between, {**ANSWER, **last}]}


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def test_the_same_rows_from_every_format(tmp_path):
    frame = pandas.DataFrame({"question": ["where ?", 'a "b",\nc'], "answer": ["here", "there"], "id": [1, 2]})
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress((tmp_path / "r.jsonl").read_bytes()))
    read = {f: list(read_rows(tmp_path / f, {})) for f in ("r.csv", "r.parquet", "r.jsonl", "r.jsonl.gz")}
    for rows in read.values():
        assert [(r.prompt, r.completion, r.answers) for r in rows] == [
            ("where ?", "here", ["here"]),
            ('a "b",\nc', "there", ["there"]),
        ]
    # The second CSV row spans two lines of the file.
    assert [r.line for r in read["r.csv"]] == [2, 4] and [r.line for r in read["r.jsonl"]] == [1, 2]


def test_layouts_are_found_by_name_and_lines_count_blank_ones(tmp_path):
    path = write_lines(
        tmp_path / "r.jsonl", [{"question": "q", "answer": ["x", "y"]}, "", {"question": "p", "answer": "z"}]
    )
    first, second = read_rows(path, {})
    assert (first.completion, first.answers, second.line) == ("x", ["x", "y"], 3)
    (text,) = read_rows(write_lines(tmp_path / "t.jsonl", [{"text": "all of it", "meta": 1}]), {})
    assert (text.prompt, text.completion, text.answers) == ("", "all of it", [])
    (chat,) = read_rows(write_lines(tmp_path / "c.jsonl", [CHAT]), {})
    assert chat.messages == CHAT["messages"]


def test_columns_named_by_flag(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"frage": "wo ?", "antwort": "hier", "text": "other"}])
    (row,) = read_rows(path, {"prompt": "frage", "completion": "antwort"})
    assert (row.prompt, row.completion) == ("wo ?", "hier")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, "{oops}"], "r.jsonl, line 2 is not JSON"),
        (["[" + json.dumps(PAIR) + ",", "{}]"], "write one JSON object a line, not one array"),
        ([PAIR, "3"], "r.jsonl, line 2 is no object with columns"),
        ([[PAIR, PAIR]], "r.jsonl, line 1 is an array: write one JSON object a line"),
        (
            [{"frage": "a", "b": 1}],
            "r.jsonl, line 1 has the columns frage, b: accepted are prompt with completion, question",
        ),
        ([{**PAIR, "text": "c"}], "line 1 has both prompt with completion and text: say which with --columns"),
        (
            [PAIR, PAIR, {"question": "a", "answer": "b"}],
            "line 3 lacks prompt and completion: it has question, answer, while the first row has prompt",
        ),
        ([PAIR, {"prompt": "a", "completion": None}], "line 2 lacks completion: it has prompt"),
        ([PAIR, {"prompt": "a", "completion": 5}], "line 2: completion is int (5), and must be text"),
        ([{"prompt": "a", "completion": []}], "line 1: completion is an empty list"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: messages must be a list of"),
        ([CHAT, {"messages": "hello"}], "line 2: messages is text that is not JSON"),
        ([PAIR, {**PAIR, "weight": 0}], "line 2: weight is 0, and rows are learned alike: leave it out"),
        ([talk(weight=0)], "line 1: its last answer has weight 0, so nothing of it is to be learned: leave it out"),
        ([talk(weight=0.5)], "line 1: a weight is 0.5, and must be 0 or 1"),
        ([talk(ANSWER | {"weight": 1}, weight=1)], "line 1: answer 2 of 3 messages has weight 1, and only the last"),
        ([talk(content=None)], "line 1: messages must be a list of"),
        ([talk(content=["a"])], "line 1: messages must be a list of"),
        ([talk(tool_calls=deep(200))], "line 1: messages are nested more than 100 deep"),
        ([talk(tool_calls=["\ud83d"])], "line 1: messages holds \\ud83d at character"),
        ([{**CHAT, "tools": "x"}], "line 1: tools is text that is not JSON"),
        ([{**CHAT, "tools": ["x"]}], "line 1: tools must be a list of objects, one a function"),
        ([{"prompt": "a", "completion": "ok \ud83d"}], "line 1: completion holds \\ud83d at character 4, half of a"),
        ([PAIR, {"prompt": ["a"] * 1000, "completion": "b"}], "line 2: prompt is list, and must be text"),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path, rows, message):
    with pytest.raises(BrokenRow) as error:
        list(read_rows(write_lines(tmp_path / "r.jsonl", rows), {}))
    assert message in str(error.value) and "r.jsonl, line" in str(error.value)


def test_every_key_of_a_message_is_kept_for_the_template(tmp_path):
    call = [{"type": "function", "function": {"name": "find", "arguments": {"town": "Orm"}}}]
    rows = [
        talk(content=None, tool_calls=call, name="Ann"),
        {**talk({**ANSWER, "weight": 0}, weight=1), "tools": json.dumps([{"name": "find"}])},
    ]
    called, weighed = read_rows(write_lines(tmp_path / "r.jsonl", rows), {})
    assert called.messages[-1] == {"role": "assistant", "tool_calls": call, "name": "Ann"} and not called.empty
    assert weighed.messages == [CHAT["messages"][0], ANSWER, ANSWER] and weighed.tools == [{"name": "find"}]


@pytest.mark.parametrize(
    ("contents", "empty"),
    [(("", "who ?", "dry"), False), (("be brief", "who ?", " "), True), (("", " ", "dry"), True)],
)
def test_a_conversation_is_empty_without_a_question_or_an_answer(tmp_path, contents, empty):
    messages = [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), contents, strict=True)]
    (row,) = read_rows(write_lines(tmp_path / "r.jsonl", [{"messages": messages}]), {})
    assert row.empty is empty


def test_alpacas_input_is_part_of_the_prompt(tmp_path):
    rows = [{"instruction": "Translate", "input": i, "output": "house"} for i in ("hus", "")]
    columns = {"prompt": "instruction", "completion": "output"}
    one, two = read_rows(write_lines(tmp_path / "r.jsonl", rows), columns)
    assert (one.prompt, two.prompt, one.unused) == ("Translate\nhus", "Translate", ())
    (row,) = read_rows(write_lines(tmp_path / "r.jsonl", [{**PAIR, "input": "x", "id": 0, "note": None}]), {})
    assert (row.prompt, row.unused) == ("a", ("input", "id"))


def test_columns_are_text(tmp_path):
    assert texts(["prompt=01", " completion=no"]) == {"prompt": "01", "completion": "no"}
    assert texts(["text=a=b"]) == {"text": "a=b"}
    (tmp_path / "r.csv").write_text("01,no\nwho,hvem\n")
    (row,) = read_rows(tmp_path / "r.csv", texts(["prompt=01", "completion=no"]))
    assert (row.prompt, row.completion) == ("who", "hvem")
    with pytest.raises(ValueError, match="columns: completion is False, and must be text: put it in quotes"):
        list(read_rows(tmp_path / "r.csv", {"prompt": "01", "completion": False}))
    for text in ("prompt", "=a", "prompt="):
        with pytest.raises(ValueError, match=f"'{text}' is not NAME=VALUE"):
            texts([text])


def test_prompts_alone_from_files_of_rows(tmp_path):
    frame = pandas.DataFrame({"question": ["a\nb", "c"], "answer": ["d", "e"]})
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    assert [list(read_prompts(tmp_path / n)) for n in ("r.csv", "r.parquet")] == [["a\nb", "c"]] * 2
    write_lines(tmp_path / "r.jsonl", [{"prompt": "a"}, {"prompt": 3}])
    with pytest.raises(BrokenRow, match=r"r.jsonl, line 2: prompt is int \(3\), and must be text"):
        list(read_prompts(tmp_path / "r.jsonl"))


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(BrokenRow, match="r.jsonl, line 2 is not JSON in UTF-8.*; save the file as UTF-8"):
        list(read_rows(tmp_path / "r.jsonl", {}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"prompt,completion\na,b\nc\n", "r.csv, line 3 lacks completion"),
        ("r.csv", b"prompt,completion\na,b,c\n", "r.csv, line 2 has more cells"),
        ("r.csv", b"prompt,prompt\na,b\n", "line 1 must name each column once"),
        ("r.csv", b'prompt,completion\na,"b\n', "cannot read r.csv"),
        ("r.csv", b"prompt,completion\na,\xe4\n", "cannot read r.csv: it is not UTF-8 .*: save it as UTF-8"),
        ("r.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2 is not JSON: Expecting value at"),
        ("r.parquet", b"PAR1 nonsense", "r.parquet is no whole Parquet file"),
        ("r.jsonl.gz", b"not gzip", "cannot read r.jsonl.gz"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenRow, match=message):
        list(read_rows(tmp_path / name, {}))


def test_a_name_in_capitals_is_the_same_format(tmp_path):
    path = write_lines(tmp_path / "R.JSONL", [{"prompt": "who ?", "completion": "boat"}])
    assert [row.prompt for row in read_rows(path, {})] == read_prompts(path) == ["who ?"]


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="the data must be .jsonl, .jsonl.gz, .csv or .parquet"):
        list(read_rows(tmp_path / "r.xlsx", {}))
