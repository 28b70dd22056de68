"""What a pretrained model lost by being taught something else, against the base it began from.

Three looks, the same for every method: the loss and the Kullback-Leibler divergence from the base on a text that nobody
trained on and on text that the base writes by itself, and plain facts that the base states rightly before, asked again
after (greedy, and by likelihood against other answers of the same kind). Nothing here changes the model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from meft_bench.meft import background
from meft_bench.tasks import known
from meft_bench.train import tokens

NUMERICS = 1
"""Raised by a change of what this file computes (numerics.py)."""
_OWN_TEXTS, _OWN_TOKENS, _OWN_SEED = 16, 64, 20240
_BATCH = 16


@torch.no_grad()
def forgetting(model: nn.Module, base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """{"held_out", "own_text": {"nats_per_token", "base_nats_per_token", "kl_nats_per_token", "tokens"}, "known": ...}
    of model against base, both in eval mode on one device."""
    held_out = tokens.text_ids(tokenizer, list(known.HELD_OUT))
    return {
        "evidence": "measured",
        "held_out": _compared(model, base, held_out, 0),
        "own_text": _compared(model, base, own_text(base, tokenizer), 1),
        "known": _known(model, base, tokenizer),
    }


def own_text(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Sequences that the base writes by itself, drawn at temperature 1 from its start token (or its end token, where it
    has no other), always the same for the same weights and torch."""
    start = next(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None)
    return background.own_text(base, start, _OWN_TEXTS, _OWN_TOKENS, _OWN_SEED)


def _compared(model: nn.Module, base: nn.Module, rows: Sequence[list[int]], given: int) -> dict[str, Any]:
    """Losses and divergence over the rows' tokens behind the first, and behind `given` more."""
    own = theirs = divergence = 0.0
    count = 0
    for row in rows:
        ids = torch.tensor([row], device=_device(base))
        ours_TV, base_TV = (m(input_ids=ids, use_cache=False).logits[0, given:-1].float() for m in (model, base))
        wanted_T = ids[0, given + 1 :]
        ours_TV, base_TV = ours_TV.log_softmax(-1), base_TV.log_softmax(-1)
        own -= float(ours_TV.gather(1, wanted_T[:, None]).sum())
        theirs -= float(base_TV.gather(1, wanted_T[:, None]).sum())
        divergence += float((base_TV.exp() * (base_TV - ours_TV)).sum())
        count += wanted_T.shape[0]
    return {
        "nats_per_token": round(own / count, 6),
        "base_nats_per_token": round(theirs / count, 6),
        "kl_nats_per_token": round(divergence / count, 6),
        "tokens": count,
    }


def _known(model: nn.Module, base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of what the base states rightly, greedy and by choice: how much of it the model still does, item by item; "kept"
    is missing where the base states nothing rightly."""
    asked = known.questions()
    before, after = (_answered(m, tokenizer, asked) for m in (base, model))
    block: dict[str, Any] = {"asked": len(asked)}
    for i, way in enumerate(("greedy", "choice")):
        right = [n for n in range(len(asked)) if before[n][i]]
        kept = [int(after[n][i]) for n in right]
        share = {"kept": round(sum(kept) / len(kept), 6)} if kept else {}
        block[way] = {"base_right": len(right), **share, "items": kept}
    return block


def _answered(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Sequence[known.Known]
) -> list[tuple[bool, bool]]:
    """Per question: whether each token of the answer is the likeliest, and whether the answer is likelier per token
    than every other of its kind."""
    pairs = [(q.prompt, f"{q.prompt} {a}") for q in asked for a in (q.answer, *q.others)]
    prompts = tokens.prompt_ids(tokenizer, [p for p, _ in pairs])
    wholes = tokens.text_ids(tokenizer, [w for _, w in pairs])
    scored: list[tuple[float, bool]] = []
    for i in range(0, len(pairs), _BATCH):
        scored += _scored(model, prompts[i : i + _BATCH], wholes[i : i + _BATCH])
    found, at = [], 0
    for question in asked:
        own, *others = scored[at : at + 1 + len(question.others)]
        found.append((own[1], all(own[0] > other[0] for other in others)))
        at += 1 + len(question.others)
    return found


def _scored(model: nn.Module, prompts: list[list[int]], wholes: list[list[int]]) -> list[tuple[float, bool]]:
    """(mean log-likelihood of the answer's tokens, whether greedy generation would write them) of each."""
    longest = max(map(len, wholes))
    ids = torch.zeros(len(wholes), longest, dtype=torch.long, device=_device(model))
    mask = torch.zeros_like(ids)
    for i, whole in enumerate(wholes):
        ids[i, : len(whole)], mask[i, : len(whole)] = torch.tensor(whole), 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return [
        _one(logits[i, len(p) - 1 : len(w) - 1], ids[i, len(p) : len(w)])
        for i, (p, w) in enumerate(zip(prompts, wholes, strict=True))
    ]


def _one(logits_TV: Tensor, wanted_T: Tensor) -> tuple[float, bool]:
    if wanted_T.numel() == 0:
        return -math.inf, False
    chances = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])
    return float(chances.mean()), bool((logits_TV.argmax(-1) == wanted_T).all())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
