"""The background file of `meft-bench train`: read line by line, and refused where nobody would read it."""

from pathlib import Path

import pytest

from meft_bench.finetune.background import background_texts
from meft_bench.finetune.settings import TrainSettings


def settings(file: Path | None, **changes) -> TrainSettings:
    given = {"data": "a.jsonl", "output": "out", "options": {"distinctive": 8}, "background": file, **changes}
    return TrainSettings(**given)


def test_lines_are_texts_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("first text\n\n  second \n", encoding="utf-8")
    assert background_texts(settings(tmp_path / "b.txt")) == ["first text", "second"]
    assert background_texts(settings(None)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {}}, "--option distinctive=T"),
        ({"method": "lora", "options": {"rank": 2}}, "--option distinctive=T"),
        ({"file": Path("nowhere.txt")}, "no background file nowhere.txt"),
    ],
)
def test_a_background_that_nobody_reads_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    (tmp_path / "b.txt").write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        background_texts(settings(**{"file": tmp_path / "b.txt", **changes}))


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        background_texts(settings(tmp_path / "b.txt"))
