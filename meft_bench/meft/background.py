"""What background text uses: the counts that distinctive updates weigh a neuron's use by (engine/distinctive.py).

They are collected once, before training, from texts that the user gives, or from texts that the base writes by itself,
which resemble what it was pretrained on. B texts of a batch, L tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.meft.engine.distinctive import Background, Distinctive
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.routing import Selection

OWN_TEXTS, OWN_TOKENS, OWN_SEED = 256, 32, 7
"""Texts that the base writes for its background, their tokens at most, and the seed of their draws."""
_BATCH = 32


class BackgroundCounts:
    """The background of every layer of one adapted model, as training and its checkpoints see it."""

    def __init__(self, model: nn.Module, adapters: Sequence[MeftAdapter]) -> None:
        self.model, self.adapters = model, adapters
        self.texts: Sequence[Sequence[int]] | None = None
        """What collect() reads, as lists of token ids; None: texts that the base writes by itself."""

    def collect(self) -> int:
        """count_background of the texts. What crosses for it is no part of training and is not counted."""
        links = {id(a.link): a.link for a in self.adapters}.values()
        before = [link.bytes.copy() for link in links]
        found = count_background(self.model, self.adapters, self.texts)
        for link, counts in zip(links, before, strict=True):
            link.bytes = counts
        return found

    def tensors(self) -> list[Tensor]:
        """For each layer its counts and, as the last number, the texts: int64 [R + 1]."""
        found = [_distinctive(a).background for a in self.adapters]
        return [torch.cat([b.used_R, torch.tensor([b.texts])]) for b in found if b is not None]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of tensors()."""
        return [(a.config.neurons + 1,) for a in self.adapters]

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """The inverse of tensors()."""
        for adapter, tensor in zip(self.adapters, tensors, strict=True):
            _distinctive(adapter).take(Background(tensor[:-1].long().clone(), int(tensor[-1])))


def background_of(model: nn.Module, adapters: Sequence[MeftAdapter]) -> BackgroundCounts | None:
    """What training needs to collect first; None without distinctive updates."""
    return BackgroundCounts(model, adapters) if adapters and adapters[0].distinctive is not None else None


def count_background(
    model: nn.Module, adapters: Sequence[MeftAdapter], texts: Iterable[Sequence[int]] | None = None
) -> int:
    """Before training: count in how many of these texts (lists of token ids; None: texts that the base writes by
    itself) some token keeps each neuron, for every adapter of model; returns the number of texts. Raises ValueError for
    no text at all, and for adapters without distinctive updates."""
    rows = own_background(model) if texts is None else [list(text) for text in texts if len(text)]
    if not rows:
        raise ValueError("no background text: give at least one, of one token or more")
    takers = [_distinctive(adapter) for adapter in adapters]
    for distinctive, used_R in zip(takers, count_uses(model, adapters, rows), strict=True):
        distinctive.take(Background(used_R, len(rows)))
    return len(rows)


@torch.no_grad()
def count_uses(model: nn.Module, adapters: Sequence[MeftAdapter], texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """In how many of these texts some token keeps each neuron, int64 [R] for each adapter. model is left in the mode it
    was in."""
    used, training = [torch.zeros(a.config.neurons, dtype=torch.int64) for a in adapters], model.training
    model.eval()
    try:
        for start in range(0, len(texts), _BATCH):
            some = texts[start : start + _BATCH]
            with _watched(adapters, used, len(some)):
                model(**_padded(some, next(model.parameters()).device))
    finally:
        model.train(training)
    return used


def _distinctive(adapter: MeftAdapter) -> Distinctive:
    if adapter.distinctive is None:
        raise ValueError("this adapter updates all neurons in use: set distinctive or distinctive_above to count for")
    return adapter.distinctive


def own_text(base: nn.Module, start: int, texts: int, tokens: int, seed: int) -> list[list[int]]:
    """Texts that the base writes by itself, drawn at temperature 1 after the token `start`, always the same for the
    same weights and torch: the start and `tokens` more."""
    generator, device = torch.Generator().manual_seed(seed), next(base.parameters()).device
    ids = torch.full((texts, 1), start, device=device)
    cache, fed = None, ids
    with torch.no_grad():
        for _ in range(tokens):
            out = base(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chances = out.logits[:, -1].float().softmax(-1).cpu()
            fed = torch.multinomial(chances, 1, generator=generator).to(device)
            ids = torch.cat([ids, fed], 1)
    return ids.tolist()


def own_background(model: nn.Module) -> list[list[int]]:
    """own_text of a base for its background, each text up to its end token. Adapters that were not trained yet change
    nothing. Raises ValueError for a base whose configuration names neither a start nor an end token."""
    config: Any = model.config
    start = next((t for t in (config.bos_token_id, _first(config.eos_token_id)) if t is not None), None)
    if start is None:
        raise ValueError("the base names no start or end token to write background text from: give texts of your own")
    end, training = _first(config.eos_token_id), model.training
    model.eval()
    try:
        written = own_text(model, start, OWN_TEXTS, OWN_TOKENS, OWN_SEED)
    finally:
        model.train(training)
    return [_until(text, end) for text in written]


def _first(token: Any) -> int | None:
    """Some bases name several end tokens."""
    return token[0] if isinstance(token, list) else token


def _until(text: list[int], end: int | None) -> list[int]:
    return text[: text.index(end, 1) + 1] if end in text[1:] else text


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _watched(adapters: Sequence[MeftAdapter], used: Sequence[Tensor], texts: int) -> Iterator[None]:
    """Adds up in used what one batch of so many texts selects."""
    before = [a.on_select for a in adapters]
    for adapter, used_R in zip(adapters, used, strict=True):
        adapter.on_select = _noting(used_R, texts)
    try:
        yield
    finally:
        for adapter, hook in zip(adapters, before, strict=True):
            adapter.on_select = hook


def _noting(used_R: Tensor, texts: int) -> Any:
    def note(h_TD: Tensor, chosen: Selection) -> Selection:
        neurons = used_R.shape[0]
        numbers = torch.cat([chosen.union_U, chosen.union_U.new_tensor([neurons])])  # an empty place reads the last one
        kept_BX = numbers[chosen.local_TK].view(texts, -1).cpu()
        marks_BR = torch.zeros(texts, neurons + 1, dtype=torch.bool).scatter_(1, kept_BX, True)
        used_R.add_(marks_BR[:, :neurons].sum(0))
        return chosen

    return note
