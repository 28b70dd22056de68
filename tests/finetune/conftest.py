"""Shared by the fine-tuning tests: short jobs on the embedded model and files of rows."""

import json
from pathlib import Path

import pytest

from meft_bench.finetune.base_model import load_tokenizer
from meft_bench.finetune.example import example_rows
from meft_bench.finetune.settings import TrainSettings
from meft_bench.finetune.train import train


def job(output: Path, **fields) -> TrainSettings:
    """A few small steps on the shipped example, or with other fields."""
    settings = {"data": "example", "steps": 4, "batch_size": 8, "eval_rows": 8, "device": "cpu"}
    return TrainSettings(output=str(output), **{**settings, **fields})


def write_lines(path: Path, rows) -> Path:
    """rows as JSON lines; text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def facts(count: int) -> list[dict[str, str]]:
    return list(example_rows(count))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("embedded", None)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder of a finished adapter of a method, trained once per session."""
    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp("saved") / method
            made[method] = train(job(folder, method=method), say=lambda line: None)
        return made[method]

    return get
