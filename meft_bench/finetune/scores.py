"""How well the rows were learned: loss and perplexity, and greedy answers where rows have prompt and completion.

Two sets are scored alike: held-out rows, never trained on, and as many trained ones. For facts the two say different
things: an unseen fact cannot be known, a trained one should be.
"""

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from meft_bench.finetune.data import Sequences, TrainingData
from meft_bench.finetune.generate import greedy, stop_tokens
from meft_bench.finetune.settings import TrainSettings
from meft_bench.harness.evaluation import vocabulary_of
from meft_bench.tasks.metrics import contains, exact_match
from meft_bench.train.loop import collate, token_loss
from meft_bench.train.tokens import decoded, padding_id

_MOST_ROWS = 16
"""At once, however large a micro-batch is."""


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: TrainingData,
    settings: TrainSettings,
    limit: int,
    micro_batch: int,
) -> dict[str, dict[str, Any]]:
    """{"held_out", "trained"}: measured loss, perplexity, rows; contains and exact_match where rows have answers.

    limit: tokens a sequence may have. micro_batch: rows of a training step at once; no more are scored at once, so that
    scoring needs no more memory than training.
    """
    model.eval()
    batch = min(micro_batch, _MOST_ROWS)
    stops = stop_tokens(tokenizer, rows.findings.ends)
    found = {}
    for name, sequences in (("held_out", rows.held_out), ("trained", rows.train)):
        if len(sequences):
            chosen = _sample(sequences, settings)
            found[name] = {"rows": len(chosen), "of": len(sequences), **_losses(model, tokenizer, chosen, name, batch)}
            if rows.findings.kind != "text":
                found[name] |= _answers(model, tokenizer, chosen, limit, name, stops, batch)
    return found


def text(found: dict[str, dict[str, Any]]) -> str:
    """The scores for a reader."""
    lines = []
    for name, values in found.items():
        line = f"{name.replace('_', '-'):<8} loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}"
        if "contains" in values:
            line += f", contains {values['contains']:.3f}, exact match {values['exact_match']:.3f}"
        lines.append(f"{line} (measured on {values['rows']} of {values['of']:,} rows)")
    return "\n".join(lines)


def _sample(sequences: Sequences, settings: TrainSettings) -> Sequences:
    if len(sequences) <= settings.eval_rows:
        return sequences
    chosen = random.Random(f"scored {settings.seed}").sample(range(len(sequences)), settings.eval_rows)
    return Sequences(sequences.rows, [sequences.indices[i] for i in sorted(chosen)])


def _losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: Sequences, name: str, batch: int
) -> dict[str, float]:
    """Cross-entropy per supervised token, in nats, over all rows."""
    device, total, tokens = next(model.parameters()).device, 0.0, 0
    with torch.no_grad():
        for i in tqdm(range(0, len(sequences), batch), desc=f"loss of {name} rows", leave=False):
            examples = [sequences[j] for j in range(i, min(i + batch, len(sequences)))]
            padded = collate(examples, padding_id(tokenizer, vocabulary_of(model)), device)
            total += token_loss(model, padded).item()
            tokens += sum(len(e.ids) - e.prompt_length for e in examples)
    loss = total / max(1, tokens)
    return {"loss": round(loss, 6), "perplexity": round(math.exp(min(loss, 700.0)), 6), "tokens": tokens}


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequences,
    limit: int,
    name: str,
    stops: Sequence[int],
    batch: int,
) -> dict[str, float]:
    """Containment (case as written) and normalised exact match of greedy answers to the prompts that were trained.

    What training puts before the answer is not compared: the end of a prompt that the tokenizer merges with it, or
    what a chat template writes there.
    """
    rows = [sequences.row(i) for i in range(len(sequences))]
    special = sorted(set(tokenizer.all_special_tokens) - {tokenizer.unk_token}, key=len, reverse=True)
    new_tokens = max(len(row["ids"]) - row["prompt_length"] for row in rows)
    hits: dict[str, float] = {"contains": 0.0, "exact_match": 0.0}
    for i in tqdm(range(0, len(rows), batch), desc=f"answers to {name} rows", leave=False):
        part = rows[i : i + batch]
        prompts = [row["ids"][: row["prompt_length"]] for row in part]
        for row, output in zip(part, greedy(model, tokenizer, prompts, new_tokens, limit, stops), strict=True):
            wanted = [_without(special, answer) for answer in row["answers"]]
            answer = output.removeprefix(_before(tokenizer, row, wanted[0]))
            hits["contains"] += contains(answer, wanted)
            hits["exact_match"] += exact_match(answer, wanted)
    return {metric: round(sum_ / len(rows), 6) for metric, sum_ in hits.items()}


def _without(special: Sequence[str], answer: str) -> str:
    """An answer that brings its end token with it, as some rows do, without: decoded answers have none."""
    kept = functools.reduce(lambda text, token: text.replace(token, ""), special, answer).strip()
    return kept or answer.strip()


def _before(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], answer: str) -> str:
    """What is learned before the answer; empty where the answer is all."""
    learned = decoded(tokenizer, row["ids"][row["prompt_length"] :])
    return learned[: -len(answer)] if answer and learned.endswith(answer) else ""
