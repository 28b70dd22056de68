"""Answers of a saved adapter to prompts: greedy, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from meft_bench.finetune import adapters
from meft_bench.finetune.adapter_about import CHAT_TEMPLATE, check_rows, find_base
from meft_bench.finetune.base_model import device_and_dtype
from meft_bench.finetune.chat import Renderer, TemplateFault, read_template
from meft_bench.finetune.encode import after_prompt
from meft_bench.finetune.user_rows import check_characters
from meft_bench.finetune.workplace import TRAINING
from meft_bench.harness.evaluation import padded, vocabulary_of
from meft_bench.meft.files import read_json
from meft_bench.train import models, tokens
from meft_bench.train.contract import describe


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A base with a saved adapter on it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    chat: bool
    """The adapter was trained on conversations, so prompts are put in the chat template."""
    delimiter: str
    """What was given behind every training prompt, and so is behind these; empty where nothing was."""
    stops: list[int]
    """Tokens that ended its training answers, and so end its own."""


def load_adapted(
    folder: Path, model: str | None = None, device: str = "auto", dtype: str = "auto", rows: str = "fp32"
) -> Adapted:
    """Load the adapter's base (or the one named) and the adapter onto it. rows: "int8" or "int4" for MEFT's rows
    quantised by group of 32 in host memory (meft/quantised.py); they are read in fp32 first.

    Raises ValueError or FileNotFoundError, before memory is taken, for an adapter folder that is broken or does not
    belong to the base, and for rows that are not MEFT's.
    """
    about = adapters.read_about(folder)
    check_rows(about, rows)
    device, dtype = device_and_dtype(device, dtype)
    if describe(about["method"]).saved == "model":
        loaded = models.load_model(folder, None, dtype, device)
        return _adapted(loaded.model.eval(), loaded, folder)
    found, revision = find_base(about, model)
    adapters.check_base(about, models.model_shape(found, revision), folder)
    loaded = models.load_model(found, revision, dtype, device)
    adapted = adapters.load(loaded.model, folder, about)
    if rows != "fp32":
        from meft_bench.integrations.quantised_rows import quantise_rows

        quantise_rows(adapted, rows)
    return _adapted(adapted, loaded, folder)


def _adapted(model: nn.Module, loaded: models.LoadedModel, folder: Path) -> Adapted:
    tokenizer = loaded.tokenizer
    if (folder / CHAT_TEMPLATE).is_file():
        tokenizer.chat_template = read_template(str(folder / CHAT_TEMPLATE))
    pad = tokens.padding_id(tokenizer, vocabulary_of(model))
    if tokenizer.pad_token_id is not None and pad != tokenizer.pad_token_id:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(pad))  # the base has no row for its own
    about = _training_rows(folder)
    return Adapted(
        model=model,
        tokenizer=tokenizer,
        max_length=loaded.max_length,
        chat=about.get("kind") == "messages",
        delimiter=about.get("delimiter", ""),
        stops=stop_tokens(tokenizer, about.get("ends")),
    )


def _training_rows(folder: Path) -> dict[str, Any]:
    """What training.json says of the rows; nothing without one."""
    file = folder / TRAINING
    found = read_json(file).get("data") if file.is_file() else None
    return found if isinstance(found, dict) else {}


def stop_tokens(tokenizer: PreTrainedTokenizerBase, ends: Any) -> list[int]:
    """The tokens that ended training answers (an adapter's file may say anything), and the tokenizer's end token."""
    found = {t for t in ends if isinstance(t, int) and 0 <= t < len(tokenizer)} if isinstance(ends, list) else set()
    return sorted(found | ({tokenizer.eos_token_id} - {None}))


def answers(adapted: Adapted, prompts: Sequence[str], new_tokens: int, batch_size: int = 16) -> Iterator[str]:
    """An answer per prompt, in order, batch_size of them at once. Raises ValueError for a prompt that leaves no room in
    the model's length."""
    texts = [prompt + after_prompt(prompt, adapted.delimiter) for prompt in prompts]
    for number, text in enumerate(texts, 1):
        check_characters(text, f"prompt {number}")
    if adapted.chat:
        texts = _conversations(adapted, texts)
    fed = tokens.prompt_ids(adapted.tokenizer, texts, special=not adapted.chat)
    for number, ids in enumerate(fed, 1):
        if not ids or len(ids) >= adapted.max_length:
            raise ValueError(f"prompt {number} has {len(ids)} tokens; the model takes 1 to {adapted.max_length - 1}")
    adapted.model.eval()
    with tqdm(total=len(fed), desc="generating", unit="prompt", leave=False, disable=len(fed) < 2) as bar:
        for i in range(0, len(fed), batch_size):
            part = fed[i : i + batch_size]
            made = greedy(adapted.model, adapted.tokenizer, part, new_tokens, adapted.max_length, adapted.stops)
            bar.update(len(made))
            yield from made


def _conversations(adapted: Adapted, prompts: Sequence[str]) -> list[str]:
    try:
        with Renderer(adapted.tokenizer) as renderer:
            return renderer.prompts([[{"role": "user", "content": prompt}] for prompt in prompts])
    except TemplateFault as fault:
        raise ValueError(f"prompt {fault.number + 1}: {fault}") from None


def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    new_tokens: int,
    max_length: int,
    stops: Sequence[int],
) -> list[str]:
    """Greedy continuations of token sequences, each cut at the first of stops, white space stripped.

    Each prompt may be answered up to max_length, whatever the others' lengths: those with less room than new_tokens
    are continued beside prompts of their own length only, so that none is cut, or padded beyond max_length, for others.
    """
    found = [""] * len(prompts)
    rooms = [max(1, min(new_tokens, max_length - len(ids))) for ids in prompts]
    pad = tokens.padding_id(tokenizer, vocabulary_of(model))
    for room in sorted(set(rooms)):
        chosen = [i for i, own in enumerate(rooms) if own == room]
        ids, mask = (t.to(next(model.parameters()).device) for t in padded([prompts[i] for i in chosen], pad))
        with torch.no_grad(), tokens.plain_generation(model, stops, pad):
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=room)
        for i, made in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((n for n, token in enumerate(made) if token in stops), len(made))
            found[i] = tokens.decoded(tokenizer, made[:end])
    return found
