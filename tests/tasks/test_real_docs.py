"""The loaders of real data on tiny files: what they build, and that a bad file is named with its line."""

import gzip
import json
import random
import zlib
from pathlib import Path

import pytest
from datasets import DatasetDict
from meft_bench.tasks import docs

NQ = [{"question": f"who wrote book {i}", "answer": [f"Author {i}", f"A. {i}"]} for i in range(12)]
SQUAD = [
    {"question": f" where is place {i}? ", "context": "unused", "answers": {"text": ["here", "there", "here"]}}
    for i in range(12)
]
GSM8K = [{"question": f"what is {i} and 1000?", "answer": f"{i}+1000=<<{i}+1000=1>>1\n#### 1,00{i}"} for i in range(10)]
METAMATH = [{"query": f"meta {i}", "response": f"think\nThe answer is: {i}"} for i in range(12)]
TOOLS = [
    {"query_id": i // 2, "query": f"need {i}", "relevant_apis": [["Tool", f"api {i}"], ["Other, Inc", "x"]]}
    for i in range(60)
]
NQ_TEST = [{**row, "question": f"of {row['question']}"} for row in NQ]
SQUAD_TEST = [{**row, "question": f"In which land is place {i}?"} for i, row in enumerate(SQUAD)]
GSM8K_TRAIN = [{**row, "question": f"say {row['question']}"} for row in GSM8K]
TASKS = {"nq": docs.nq, "squad": docs.squad, "gsm8k": docs.gsm8k, "toolbench": docs.toolbench}


def write(folder: Path, name: str, split: str, rows: list, packed: bool = False) -> Path:
    path = folder / name / f"{split}.jsonl{'.gz' if packed else ''}"
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def write_all(folder: Path, packed: bool = False) -> Path:
    """A few rows of every real task; returns folder."""
    folder.mkdir(exist_ok=True)
    for name, split, rows in (
        ("nq_open", "train", NQ),
        ("nq_open", "validation", NQ_TEST),
        ("squad", "train", SQUAD),
        ("squad", "validation", SQUAD_TEST),
        ("gsm8k", "train", GSM8K_TRAIN),
        ("gsm8k", "test", GSM8K),
        ("toolbench", "instructions", TOOLS),
    ):
        write(folder, name, split, rows, packed)
    return folder


@pytest.fixture(params=[False, True], ids=["jsonl", "jsonl.gz"])
def folder(tmp_path: Path, request) -> Path:
    return write_all(tmp_path, packed=request.param)


def make(task: str, folder: Path, **metadata) -> DatasetDict:
    return TASKS[task](data_dir=str(folder), **{"train_rows": 6, "eval_rows": 4, **metadata})


@pytest.mark.parametrize("task", TASKS)
def test_splits_sizes_and_ids(task: str, folder: Path) -> None:
    made = make(task, folder)
    assert {split: len(rows) for split, rows in made.items()} == {"train": 6, "recall": 4, "validation": 4, "test": 4}
    for rows in made.values():
        assert len(set(rows["id"])) == len(rows)
    assert not set(made["train"]["prompt"]) & set(made["validation"]["prompt"])
    assert set(made["recall"]["id"]) <= set(made["train"]["id"])


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_which_rows_are_trained_and_not_which_are_tested(task: str, folder: Path) -> None:
    """The paper scores the first rows of the test file, whatever the seed."""
    once, again, other = (make(task, folder, seed=seed).data for seed in (1, 1, 2))
    assert once["train"].table.equals(again["train"].table)
    assert not once["train"].table.equals(other["train"].table)
    assert once["test"].table.equals(other["test"].table)


def test_question_answering_documents(folder: Path) -> None:
    nq = make("nq", folder)["test"][1]
    assert nq == {
        "id": "test-1",
        "prompt": "Question: of who wrote book 1\nAnswer:",
        "target": "Author 1",
        "answers": ["Author 1", "A. 1"],
    }
    squad = make("squad", folder)["test"][0]
    assert squad["prompt"] == "Question: In which land is place 0?\nAnswer:"
    assert squad["answers"] == ["here", "there"] and squad["target"] == "here"


def test_sums_are_worked_out_without_calculator_marks(folder: Path) -> None:
    row = make("gsm8k", folder)["test"][3]
    assert row["answers"] == ["1003"]
    assert row["target"] == "3+1000=1\nThe answer is: 1003"


def test_sums_train_on_metamath_where_the_folder_has_it(folder: Path) -> None:
    assert all("what is" in prompt for prompt in make("gsm8k", folder)["train"]["prompt"])
    write(folder, "metamath", "train", METAMATH)
    made = make("gsm8k", folder)
    for row in made["train"]:
        number = row["prompt"].removeprefix("Question: meta ").removesuffix("\nAnswer:")
        assert row["answers"] == [number] and row["target"] == f"think\nThe answer is: {number}"
    assert all("what is" in prompt for prompt in made["test"]["prompt"])


def test_toolbench_splits_by_query_and_names_tools(folder: Path) -> None:
    made = make("toolbench", folder, train_rows=30, eval_rows=100)

    def queries(*splits: str) -> set[int]:
        return {int(p.split()[2]) // 2 for s in splits for p in made[s]["prompt"]}

    assert not queries("train", "validation") & queries("test")
    assert sum(len(made[s]) for s in ("train", "validation", "test")) == len(TOOLS)
    row = made["train"][0]
    assert row["answers"][1] == "Other, Inc : x" and row["target"] == " ; ".join(row["answers"])
    assert row["prompt"].startswith("Query: need ") and row["prompt"].endswith("\nAPIs:")


# ---- questions that stand twice ----


def _repeating(task: str, folder: Path) -> None:
    """Files of 20 questions: the training file asks each of 12 twice, and 5 of the test's; ToolBench's one file asks
    each request under two ids, so that it lies on both sides of the split."""
    rows = {
        "nq": lambda i, again: {"question": f"who wrote {i}", "answer": [f"Author {i} {again}"]},
        "squad": lambda i, again: {"question": f"Where is {i}?", "answers": {"text": [f"here {again}"]}},
        "gsm8k": lambda i, again: {"question": f"what is {i} and 1?", "answer": f"{again}\n#### {i + 1}"},
    }
    if task == "toolbench":
        found = [{"query_id": i + 100 * again, "query": f"need {i}", "relevant_apis": [["Tool", f"api {i}"]]}
                 for i in range(20) for again in range(2)]  # fmt: skip
        write(folder, "toolbench", "instructions", found)
        return
    name = {"nq": "nq_open"}.get(task, task)
    build, test = rows[task], "test" if task == "gsm8k" else "validation"
    write(folder, name, "train", [build(i, again) for again in range(2) for i in range(17)])
    write(folder, name, test, [build(i, 2) for i in range(12, 20)])


@pytest.mark.parametrize(
    "asked",
    [
        "Who won the Battle of Lake George?",
        "who won the battle of lake george",
        "Who won the battle of  Lake-George ?",
    ],
)
def test_a_tested_question_in_another_spelling_is_not_trained(tmp_path: Path, asked: str) -> None:
    """Such pairs stand in the published files of NQ and SQuAD."""
    row = {"question": "Who won the battle of Lake George?", "answer": ["nobody"]}
    write(tmp_path, "nq_open", "train", [*NQ, {**row, "question": asked}])
    write(tmp_path, "nq_open", "validation", [row])
    made = make("nq", tmp_path, train_rows=len(NQ) + 1)
    assert sorted(made["train"]["prompt"]) == sorted(f"Question: {row['question']}\nAnswer:" for row in NQ)


def test_questions_that_differ_in_a_sign_are_different(tmp_path: Path) -> None:
    asked = ["what is 5 - 3", "what is 5 + 3", "what is 5.3", "what is 53", "what is -5", "what is 5"]
    write(tmp_path, "nq_open", "train", [{"question": q, "answer": ["it"]} for q in asked])
    write(tmp_path, "nq_open", "validation", [{"question": asked[0], "answer": ["it"]}])
    assert len(make("nq", tmp_path, train_rows=len(asked))["train"]) == len(asked) - 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("task", TASKS)
def test_a_question_that_stands_twice_is_trained_or_asked_anew_never_both(tmp_path: Path, task: str, seed: int) -> None:
    _repeating(task, tmp_path)
    made = make(task, tmp_path, train_rows=8, eval_rows=10, seed=seed)
    train, validation, test = (set(made[split]["prompt"]) for split in ("train", "validation", "test"))
    assert train and validation and test
    assert not train & validation and not train & test and not validation & test
    # The test file itself is never touched: its first rows are what the paper scores.
    if task != "toolbench":
        assert len(made["test"]) == 8 and len(made["train"]) == 8


@pytest.mark.parametrize("task", TASKS)
def test_files_without_repeats_are_sampled_as_ever(task: str, folder: Path) -> None:
    """Which rows a seed takes: the records on real rows were made with these."""
    made = make(task, folder, seed=1)
    rows = {
        "nq": NQ, "squad": SQUAD, "gsm8k": GSM8K_TRAIN,
        "toolbench": [r for r in TOOLS if zlib.crc32(str(r["query_id"]).encode()) % 5],
    }[task]  # fmt: skip
    order = random.Random("rows 1").sample(range(len(rows)), min(len(rows), 10))
    asked = [str(row.get("question", row.get("query"))).strip() for row in rows]
    trained = [p.split("\n")[0].split(": ", 1)[1] for p in made["train"]["prompt"]]
    assert trained == [asked[i] for i in order[:6]]


def test_a_repeated_question_leaves_the_others_of_a_seed_where_they_are(folder: Path) -> None:
    """One training row of twelve is asked in the test too: it goes, the rest keep their order."""
    before = make("nq", folder, seed=1, train_rows=11, eval_rows=1)
    asked = before["train"]["prompt"]
    number = int(asked[4].split("book ")[1].split("\n")[0])
    for path in (folder / "nq_open").glob("validation*"):
        path.unlink()
    write(folder, "nq_open", "validation", [*NQ_TEST, NQ[number]])
    after = make("nq", folder, seed=1, train_rows=10, eval_rows=1)["train"]["prompt"]
    assert after == [p for p in asked if p != asked[4]]


@pytest.mark.parametrize("task", TASKS)
def test_a_whole_file_may_be_trained(task: str, folder: Path) -> None:
    """As the paper does; then no row is left for validation, and the test is the same."""
    some = make(task, folder, eval_rows=1000)
    rows = len(some["train"]) + len(some["validation"])
    whole = make(task, folder, train_rows=rows, eval_rows=1000)
    assert set(whole) == {"train", "recall", "test"} and len(whole["train"]) == rows
    assert set(whole["train"]["prompt"]) == {*some["train"]["prompt"], *some["validation"]["prompt"]}
    assert whole["test"].to_list() == some["test"].to_list()


def test_a_training_file_that_is_the_test_is_refused(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path, "nq_open", split, NQ)
    with pytest.raises(ValueError, match="all 12 training rows are asked in the test: give a training file of other"):
        make("nq", tmp_path)


# ---- bad files ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([NQ[0], '{"question": "cut', NQ[1]], "line 2 is not JSON", id="broken line"),
        pytest.param([NQ[0], "", "", "no json"], "line 4 is not JSON", id="blank lines are counted"),
        pytest.param([NQ[0], NQ[1], {"question": "x"}], "line 3 lacks answer$", id="field missing"),
        pytest.param([{"other": 1}], "line 1 lacks question, answer$", id="both fields missing"),
        pytest.param([NQ[0], [1, 2]], "line 2 lacks question, answer$", id="a list for a row"),
        pytest.param(["7"], "line 1 lacks question, answer$", id="a number for a row"),
        pytest.param([], "holds no rows", id="empty file"),
        pytest.param(["", "  "], "holds no rows", id="blank file"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, rows: list, message: str, packed: bool) -> None:
    path = write(tmp_path, "nq_open", "train", rows, packed)
    with pytest.raises(ValueError, match=rf"^{path.name}.*{message}"):
        make("nq", tmp_path)


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, "nq_open", "train", [NQ[0], "", "   ", NQ[1]])
    assert docs.read_rows(path, ("question",)) == NQ[:2]


@pytest.mark.parametrize("keep", [5, 40, -4])
def test_a_truncated_gz_is_named(tmp_path: Path, keep: int) -> None:
    """Cut in the header, in the data, in the checksum."""
    path = write(tmp_path, "nq_open", "train", NQ, packed=True)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cannot read train.jsonl.gz: "):
        make("nq", tmp_path)


def test_a_gz_with_a_flipped_byte_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "nq_open", "train", NQ, packed=True)
    for place in range(10, path.stat().st_size):
        whole = bytearray(gzip.compress("".join(f"{json.dumps(row)}\n" for row in NQ).encode()))
        whole[place] ^= 0xFF
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="train.jsonl.gz"):
            docs.read_rows(path, ("question",))


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl"])
def test_bytes_that_are_not_text_or_gz_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "nq_open", "train", NQ).parent / name
    path.write_bytes(b"\xff\xfe not what it says")
    with pytest.raises(ValueError, match=f"cannot read {name}: "):
        make("nq", tmp_path)


@pytest.mark.parametrize(
    ("task", "layout"),
    [("nq", "nq_open/train"), ("squad", "squad/train"), ("gsm8k", "gsm8k/train"), ("toolbench", "toolbench/instruc")],
)
def test_a_missing_file_is_named(tmp_path: Path, task: str, layout: str) -> None:
    with pytest.raises(ValueError, match=rf"no {layout}.*\.jsonl\[\.gz\] in the data folder"):
        make(task, tmp_path)


def test_a_missing_test_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, "nq_open", "train", NQ)
    with pytest.raises(ValueError, match="no nq_open/validation.jsonl"):
        make("nq", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_more_rows_than_the_file_has_are_refused(task: str, folder: Path) -> None:
    there = len(make(task, folder)["train"]) + len(make(task, folder, eval_rows=1000)["validation"])
    wanted = f"there are {there} training rows, fewer than train_rows={there + 1}: lower train_rows, or give a folder"
    with pytest.raises(ValueError, match=wanted):
        make(task, folder, train_rows=there + 1)


@pytest.mark.parametrize(
    ("task", "name", "split", "field", "rows"),
    [
        ("nq", "nq_open", "train", "question", NQ),
        ("squad", "squad", "train", "question", SQUAD),
        ("gsm8k", "gsm8k", "test", "question", GSM8K),
        ("gsm8k", "gsm8k", "train", "answer", GSM8K_TRAIN),
        ("gsm8k", "metamath", "train", "query", METAMATH),
        ("gsm8k", "metamath", "train", "response", METAMATH),
        ("toolbench", "toolbench", "instructions", "query", TOOLS),
    ],
)
def test_a_field_that_is_no_text_is_named(task: str, name: str, split: str, field: str, rows: list, tmp_path) -> None:
    """Null would be trained as the word None."""
    write(write_all(tmp_path), name, split, [rows[0], {**rows[1], field: None}, *rows[2:]])
    with pytest.raises(
        ValueError, match=f"{name}/{split}, row 2 does not fit: ValueError {field} must be text, not None"
    ):
        make(task, tmp_path)


@pytest.mark.parametrize("row", [{"question": "x", "answer": []}, {"question": "x", "answer": "Paris"}], ids=str)
def test_answers_must_be_a_list_with_something_in_it(tmp_path: Path, row: dict) -> None:
    """A bare string would be taken apart into letters, each of them a right answer."""
    for split in ("train", "validation"):
        write(tmp_path, "nq_open", split, [*NQ, row])
    with pytest.raises(ValueError, match="answer"):
        make("nq", tmp_path, train_rows=9, eval_rows=13)


# ---- the hub ----


def test_toolbench_has_no_copy_on_the_hub() -> None:
    with pytest.raises(ValueError, match="toolbench has no copy on the hub: give a local folder with --data"):
        docs.toolbench()


def test_the_hub_is_asked_for_a_pinned_revision(monkeypatch) -> None:
    asked = []

    def fake(repository: str, subset: str, split: str, revision: str) -> list[dict]:
        asked.append((repository, subset, split, len(revision)))
        return NQ if split == "train" else NQ_TEST

    monkeypatch.setattr(docs, "load_dataset", fake)
    assert len(docs.nq(train_rows=6, eval_rows=4)["train"]) == 6
    source = ("google-research-datasets/nq_open", "nq_open")
    assert asked == [(*source, "train", 40), (*source, "validation", 40)]


def test_an_unreachable_hub_is_one_line_with_the_way_out(monkeypatch) -> None:
    def fail(*_, **__):
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(docs, "load_dataset", fail)
    for load in (docs.nq, docs.squad, docs.gsm8k):
        with pytest.raises(ValueError, match=r"cannot load \S+ from the hub \(ConnectionError\): .*--data") as caught:
            load()
        assert "\n" not in str(caught.value)
