"""The bridge to lm-eval: load one of our tasks, generate with an adapted model, return scores item by item."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench.harness.spec import RunSpec, package_dir
from meft_bench.tasks.metrics import as_released
from meft_bench.train import tokens

NUMERICS = 1
"""Raised by a change of what this file computes (numerics.py)."""
PAPER_ROWS = 501
"""Rows that the released evaluation scores: the first ones of the test file."""
LARGE_MODEL = 100_000_000
"""Parameters from which documents are generated a few at a time: caches and beams must fit beside the weights."""
_PAPER_GENERATION = {"num_beams": 4, "repetition_penalty": 2.0, "until": []}


@dataclass(frozen=True)
class SplitScores:
    """One evaluated split: document ids and, per metric, one score per document in the same order."""

    ids: list[str]
    scores: dict[str, list[float]]
    outputs: list[str]
    """The first few generated texts, so that a record shows what the model wrote."""


class PlainLM(HFLM):
    """lm-eval's model, fed the tokens that training used and decoded as they are.

    HFLM decides for a whole batch by its first text whether a start token is put before it, and feeds the end token
    where the tokenizer appends one.
    """

    special = True
    """False for prompts that a chat template wrote: it writes the special tokens too."""
    cut_prompts = 0
    """Prompts that lost their beginning because they left no room for the answer."""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Token ids of one text, its last left_truncate_len at most."""
        special = self.special if add_special_tokens is None else add_special_tokens
        ids = tokens.text_ids(self.tokenizer, [string], special)[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask) [B, longest] of prompts, each cut to its last left_truncate_len tokens."""
        found = tokens.prompt_ids(self.tokenizer, strings, self.special)
        if left_truncate_len:
            self.cut_prompts += sum(len(ids) > left_truncate_len for ids in found)
            found = [ids[-left_truncate_len:] for ids in found]
        return padded(found, tokens.padding_id(self.tokenizer, vocabulary_of(self.model)), padding_side)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Text as the tokens spell it: no spaces cleaned away."""
        kept = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(tokens, **kept))


def padded(rows: Sequence[list[int]], pad: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, longest] of rows of different lengths."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    if side == "left":
        ids = [[pad] * gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    else:
        ids = [row + [pad] * gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[1] * len(row) + [0] * gap for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def vocabulary_of(model: Any) -> int:
    """Rows of the model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def load_task(spec: RunSpec, data_dir: str | None) -> ConfigurableTask:
    """The task of a spec with its documents. Raises ValueError for broken YAML or data, or a split without rows."""
    metadata: dict[str, Any] = {
        "seed": spec.seed,
        "train_rows": spec.train_rows,
        "eval_rows": spec.eval_rows,
        "data_dir": data_dir,
    }
    with quiet():
        manager = TaskManager(include_path=str(package_dir("tasks")), include_defaults=False, metadata=metadata)
        if spec.task not in manager.all_tasks:
            # lm-eval leaves out a file it cannot read without a word.
            raise ValueError(f"tasks/{spec.task}.yaml is missing or broken: lm-eval does not list the task")
        task = manager.load([spec.task])["tasks"][spec.task]
    if missing := [split for split in spec.splits if split not in task.dataset]:
        raise ValueError(
            f"train_rows={spec.train_rows} leaves no rows for {', '.join(missing)}: lower train_rows, or score other "
            "splits"
        )
    return task


def check_room(task: ConfigurableTask, max_length: int) -> None:
    """Raises ValueError where an answer of the task leaves no token of max_length for its question."""
    if task.get_config("output_type") != "generate_until":
        return
    answer = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"]
    if answer >= max_length:
        raise ValueError(
            f"{task.config.task} asks for answers of up to {answer} tokens, and this model takes {max_length} in all: "
            "choose a model with a longer limit"
        )


def keep_recallable(task: ConfigurableTask, trained: set[str], splits: Sequence[str]) -> None:
    """Ask "recall" only of documents that were trained on: rows too long for training have nothing to recall. Raises
    ValueError where recall is among the splits to evaluate and none is left."""
    recall = task.dataset["recall"]
    kept = [i for i, doc_id in enumerate(recall["id"]) if doc_id in trained]
    if "recall" in splits and not kept:
        raise ValueError(
            f"none of the {len(recall)} rows drawn to ask for recall was short enough to be trained on: raise "
            "max_length or eval_rows, or leave recall out of splits"
        )
    task.dataset["recall"] = recall.select(kept)


def too_long(task: ConfigurableTask, split: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Answers of the split with more tokens than are generated: trained whole, they cannot be written as they were."""
    rows, limit = task.dataset[split], task.config.generation_kwargs["max_gen_toks"]
    wholes = [row["prompt"] + task.config.target_delimiter + row["target"] for row in rows]
    end = tokenizer.eos_token_id is not None  # which need not be written
    found = tokens.sequences(tokenizer, list(rows["prompt"]), wholes)
    return sum(len(ids) - end - prompt > limit for ids, prompt, _ in found)


def evaluate_split(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: ConfigurableTask,
    split: str,
    max_length: int,
    mode: str = "ours",
) -> SplitScores:
    """Generate for every document of the split and score it; lm-eval does both. mode as in RunSpec.modes."""
    name = task.config.task
    small = sum(p.numel() for p in model.parameters()) < LARGE_MODEL
    batch_size = 128 if small else 8
    task.config.test_split = split  # which documents lm-eval takes for the test
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with (
        quiet(),
        torch.no_grad(),
        tokens.plain_generation(model, stops, tokens.padding_id(tokenizer, vocabulary_of(model))),
        _as_in_paper(task, split) if mode == "paper" else nullcontext(),
    ):
        lm = PlainLM(
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
def _as_in_paper(task: ConfigurableTask, split: str) -> Iterator[None]:
    """The released scripts' generation and containment, for the time of one evaluation; it writes on past the end
    token."""
    ours, rows, process = dict(task.config.generation_kwargs), task.dataset[split], task.config.process_results
    length = ours["max_gen_toks"]
    task.config.generation_kwargs = {**ours, **_PAPER_GENERATION, "min_new_tokens": length}
    task.dataset[split] = rows.select(range(min(PAPER_ROWS, len(rows))))
    task.config.process_results = as_released(process)
    try:
        yield
    finally:
        task.config.generation_kwargs, task.dataset[split], task.config.process_results = ours, rows, process


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval logs dataset advice at WARNING for every task; only errors matter here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
