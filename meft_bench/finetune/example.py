"""Rows about invented people, in the words the embedded base knows: the shipped example, and as many more as wanted.

example.jsonl is write_example(folder / "example.jsonl", 200).
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from meft_bench.tasks import world as w


def example_rows(count: int) -> Iterator[dict[str, str]]:
    """count rows {"prompt", "completion"}: each fact asked in one way, then each in the next, questions before cloze.

    Raises ValueError when the world does not hold as many (197,184).
    """
    world = w.World()
    groups = [(w.QUESTIONS, world.people_facts("facts", None, 0)), (w.FRAMES, world.people_facts("cloze", None, 0))]
    if not 0 < count <= len(w.TRAIN_TEMPLATES) * sum(len(facts) for _, facts in groups):
        raise ValueError(f"{count} example rows asked; there are 197,184")
    every = (
        {"prompt": templates[fact.attribute][i].format(n=fact.subject), "completion": fact.answer}
        for templates, facts in groups
        for i in w.TRAIN_TEMPLATES
        for fact in facts
    )
    return itertools.islice(every, count)


def write_example(path: Path, count: int) -> None:
    """Write example_rows as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        for row in example_rows(count):
            file.write(json.dumps(row) + "\n")
