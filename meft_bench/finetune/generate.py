"""Answers of a saved adapter to prompts: greedy, in batches."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from meft_bench.finetune import adapters
from meft_bench.finetune.base import device_and_dtype
from meft_bench.finetune.data import chat_prompt
from meft_bench.finetune.rows import BrokenRow
from meft_bench.finetune.workplace import TRAINING
from meft_bench.harness import models


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A base with a saved adapter on it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    chat: bool
    """The adapter was trained on conversations, so prompts are put in the chat template."""


def load_adapted(folder: Path, model: str | None = None, device: str = "auto", dtype: str = "auto") -> Adapted:
    """Load the adapter's base (or the one named) and the adapter onto it.

    Raises ValueError or FileNotFoundError, before memory is taken, for an adapter folder that is broken or does not
    belong to the base.
    """
    about = adapters.read_about(folder)
    device, dtype = device_and_dtype(device, dtype)
    if about["method"] == "full":
        loaded = models.load_model(folder, None, dtype, device)
        return _adapted(loaded.model.eval(), loaded, folder)
    found, revision = adapters.find_base(about, model)
    adapters.check_base(about, models.model_shape(found, revision), folder)
    loaded = models.load_model(found, revision, dtype, device)
    return _adapted(adapters.load(loaded.model, folder, about), loaded, folder)


def _adapted(model: nn.Module, loaded: models.LoadedModel, folder: Path) -> Adapted:
    if (folder / adapters.CHAT_TEMPLATE).is_file():
        # transformers renders templates in a sandbox: a stranger's is text, not code.
        loaded.tokenizer.chat_template = (folder / adapters.CHAT_TEMPLATE).read_text()
    chat = _trained_on_messages(folder)
    return Adapted(model=model, tokenizer=loaded.tokenizer, max_length=loaded.max_length, chat=chat)


def _trained_on_messages(folder: Path) -> bool:
    file = folder / TRAINING
    return file.is_file() and (adapters.read_json(file).get("data") or {}).get("kind") == "messages"


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line, or of a .jsonl file's prompt (or question) column. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not text in UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(_prompt_column(line, f"{path.name}, line {number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"{path.name} holds no prompts")
    return prompts


def _prompt_column(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        prompt = row.get("prompt", row.get("question"))
    except (ValueError, AttributeError) as error:
        raise BrokenRow(f"{where} is no JSON object: {error}") from None
    if not isinstance(prompt, str):
        raise BrokenRow(f"{where} lacks prompt or question: it has {', '.join(row) or 'nothing'}")
    return prompt


def answers(adapted: Adapted, prompts: Sequence[str], new_tokens: int, batch_size: int = 16) -> Iterator[str]:
    """An answer per prompt, in order. Raises ValueError for a prompt that leaves no room in the model's length."""
    texts = list(prompts)
    if adapted.chat:
        texts = [chat_prompt([{"role": "user", "content": p}], adapted.tokenizer, None) for p in prompts]
    tokens = adapted.tokenizer(texts, add_special_tokens=not adapted.chat, verbose=False)["input_ids"]
    for number, ids in enumerate(tokens, 1):
        if not ids or len(ids) >= adapted.max_length:
            raise ValueError(f"prompt {number} has {len(ids)} tokens; the model takes 1 to {adapted.max_length - 1}")
    adapted.model.eval()
    with tqdm(total=len(tokens), desc="generating", unit="prompt", leave=False, disable=len(tokens) < 2) as bar:
        for i in range(0, len(tokens), batch_size):
            made = greedy(adapted.model, adapted.tokenizer, tokens[i : i + batch_size], new_tokens, adapted.max_length)
            bar.update(len(made))
            yield from made


def greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new_tokens: int, max_length: int
) -> list[str]:
    """Greedy continuations of token sequences, padded on the left, cut at the end token, white space stripped."""
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(1, min(new_tokens, max_length - longest)),
            pad_token_id=pad,
        )
    return [text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]
