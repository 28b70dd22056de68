"""Rows of the knowledge-injection task for method_comparison's run.py, which imports this file as data.py.

Trains on questions about invented people, each asked in several wordings; validation and test ask for the same answers
in wordings that training never used. Rows are {"query", "response"} in data/*.jsonl beside this file.
"""

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

ROWS = Path(__file__).parent / "data"
EPOCHS = 8
"""run.py goes through the training rows once, so they are laid end to end this often, each time in another order."""


def get_train_valid_test_datasets(*, tokenizer: Any, query_template: str, print_fn: Any) -> tuple[Any, Any, Any]:
    """(train, valid, test) with input_ids and attention_mask; valid and test hold the question alone, and the response
    beside it."""
    train, valid, test = (_read(name) for name in ("train", "valid", "test"))
    shuffle = random.Random(0)
    train = [row for _ in range(EPOCHS) for row in shuffle.sample(train, len(train))]
    print_fn(f"{len(train)} training rows of {EPOCHS} epochs, {len(valid)} for validation, {len(test)} for the test")
    asked = [_tokenised(rows, tokenizer, query_template, False) for rows in (valid, test)]
    return _tokenised(train, tokenizer, query_template, True), *asked


def get_wiki_small(num_samples: int = 100) -> list[str]:
    """Texts on which run.py measures the loss before and after: forgetting."""
    rows = load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True)
    return [row["text"] for row in rows.take(num_samples)]


def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _tokenised(rows: list[dict[str, str]], tokenizer: Any, template: str, answered: bool) -> Any:
    texts = [template.format(query=row["query"]) + (row["response"] if answered else "") for row in rows]
    ids = [found[: tokenizer.model_max_length] for found in tokenizer(texts)["input_ids"]]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}
    return Dataset.from_dict({**columns, "response": [row["response"] for row in rows]})
