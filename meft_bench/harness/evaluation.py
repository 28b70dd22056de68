"""The bridge to lm-eval: load one of our tasks, generate with an adapted model, return scores item by item."""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from meft_bench.harness.spec import RunSpec, package_dir


@dataclass(frozen=True)
class SplitScores:
    """One evaluated split: document ids and, per metric, one score per document in the same order."""

    ids: list[str]
    scores: dict[str, list[float]]
    outputs: list[str]
    """The first few generated texts, so that a record shows what the model wrote."""


def load_task(spec: RunSpec, data_dir: str | None) -> ConfigurableTask:
    """The task of a spec with its documents. Raises ValueError for broken YAML or data."""
    metadata: dict[str, Any] = {
        "seed": spec.seed,
        "train_rows": spec.train_rows,
        "eval_rows": spec.eval_rows,
        "data_dir": data_dir,
    }
    with _quiet():
        manager = TaskManager(include_path=str(package_dir("tasks")), include_defaults=False, metadata=metadata)
        if spec.task not in manager.all_tasks:
            # lm-eval leaves out a file it cannot read without a word.
            raise ValueError(f"tasks/{spec.task}.yaml is missing or broken: lm-eval does not list the task")
        return manager.load([spec.task])["tasks"][spec.task]


def keep_recallable(task: ConfigurableTask, trained: set[str]) -> None:
    """Ask "recall" only of documents that were trained on: rows too long for training have nothing to recall."""
    recall = task.dataset["recall"]
    task.dataset["recall"] = recall.select([i for i, doc_id in enumerate(recall["id"]) if doc_id in trained])


def evaluate_split(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: ConfigurableTask,
    split: str,
    max_length: int,
    batch_size: int = 128,
) -> SplitScores:
    """Generate for every document of the split and score it; lm-eval does both."""
    name = task.config.task
    task.config.test_split = split  # which documents lm-eval takes for the test
    with _quiet(), torch.no_grad():
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            device=str(next(model.parameters()).device),
        )
        result = evaluator.evaluate(lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0)
    samples = sorted(result["samples"][name], key=lambda s: s["doc_id"])
    metrics = list(task.aggregation())
    return SplitScores(
        ids=[s["doc"]["id"] for s in samples],
        scores={m: [float(s[m]) for s in samples] for m in metrics},
        outputs=[f"{s['doc']['prompt']} -> {s['resps'][0][0].strip()}" for s in samples[:3]],
    )


@contextmanager
def _quiet():
    """lm-eval logs dataset advice at WARNING for every task; only errors matter here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
