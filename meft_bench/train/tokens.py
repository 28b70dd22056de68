"""The tokens of a prompt and its answer: one rule for training, scoring, generation and lm-eval.

A text starts once with what the tokenizer puts before every text (its start token), whether or not the text already
begins with it. What the tokenizer puts after every text is never fed: training adds the end token itself, once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

_PROBES = ("a", "A", "1")
"""Beginnings of answers that show which tokens at the end of a prompt depend on what follows."""


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, such as [start token]; empty if nothing."""
    bare, whole = _ids(tokenizer, ["a"], False)[0], _ids(tokenizer, ["a"], True)[0]
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return whole[:i]
    return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Token ids of each text. special: with the tokens before it; False for what a chat template wrote."""
    before = tokens_before(tokenizer) if special else []
    return [ids if ids[: len(before)] == before else before + ids for ids in _ids(tokenizer, texts, False)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], special: bool = True) -> list[list[int]]:
    """What the model is fed of each prompt: its tokens, without those at its end that the answer's first word changes.

    White space at the end of a prompt is such a token where the tokenizer merges it with the next word.
    """
    found = text_ids(tokenizer, prompts, special)
    for i in [i for i, prompt in enumerate(prompts) if prompt[-1:].isspace()]:
        for followed in text_ids(tokenizer, [prompts[i] + probe for probe in _PROBES], special):
            found[i] = found[i][: shared_length(found[i], followed)]
    return found


def sequences(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], wholes: Sequence[str], special: bool = True
) -> Iterator[tuple[list[int], int, bool]]:
    """(ids, prompt_length, merged) of each pair of a prompt and the text that it begins; ids end with the end token.

    ids[:prompt_length] is what prompt_ids gives, unless the tokenizer merges the prompt's end with the answer: then
    merged is True and prompt_length counts the tokens before that.
    """
    fed = prompt_ids(tokenizer, prompts, special)
    for given, ids in zip(fed, text_ids(tokenizer, wholes, special), strict=True):
        same = shared_length(ids, given)
        if (special and ids[-1:] != [tokenizer.eos_token_id]) or (not special and not written_end(tokenizer, ids)):
            ids = ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
        yield ids, same, same < len(given)


def written_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """The special token, with white space after it at most, that ends ids; None if another text ends them."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special -= {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    last = max((i for i, token in enumerate(ids) if token in special), default=None)
    return ids[last] if last is not None and not str(tokenizer.decode(list(ids[last + 1 :]))).strip() else None


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for text which the tokenizer does not know; None where it knows all text.

    Some tokenizers name their end token so (GPT-2), and know all text.
    """
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens without special ones, white space stripped."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def shared_length(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def padding_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """A token to pad with that the embedding of so many rows has: padding is masked, so any does."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and i < vocabulary)


@contextmanager
def plain_generation(model: Any, stops: Sequence[int], pad: int) -> Iterator[None]:
    """Generation by what the caller says alone, ended by stops, whatever the base's generation_config.json asks for."""
    own = [m for m in model.modules() if isinstance(m, GenerationMixin)]
    before = [m.generation_config for m in own]
    for module in own:
        module.generation_config = GenerationConfig(eos_token_id=list(stops) or None, pad_token_id=pad)
    try:
        yield
    finally:
        for module, config in zip(own, before, strict=True):
            module.generation_config = config


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]) if texts else []
