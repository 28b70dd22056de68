"""Scoring with bf16 or int8 copies of the keys: how much of fp32's choice they keep, and how long the choice takes."""

import functools
from typing import Any

import torch
from torch import Tensor

from meft_bench.bench import common
from meft_bench.meft import routing
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.index import NARROW, KeyIndex
from meft_bench.meft.store import NeuronStore

SCORINGS = ("fp32", "bf16", "int8")


def narrow_scoring(config: MeftOptions, hidden: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Recall and seconds of each scoring on the same random tokens; fp32 selects first in every round.

    The router stays fp32, so all probe the same experts. Copying the keys is not timed: a copy costs what its changed
    rows cost.
    """
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    store = NeuronStore(config, hidden, generator, cpu)
    router_ND = store.handle("router").detach()
    keys: dict[str, tuple[Tensor, Tensor | None]] = {"fp32": (store.rows_R2D[:, 0], None)}
    for kind in SCORINGS[1:]:
        index = KeyIndex(store, NARROW[kind], cpu, None)
        store.mark_changed()
        index.refresh()
        keys[kind] = (index.keys_RD, index.scales_R)
    h = [torch.empty(0)]
    chosen: dict[str, routing.Selection] = {}
    recalls: dict[str, list[float]] = {kind: [] for kind in SCORINGS}

    def fresh() -> None:
        h[0] = torch.randn(tokens, hidden, generator=generator)

    def select(kind: str) -> None:
        keys_RD, scales_R = keys[kind]
        chosen[kind] = routing.select(h[0], keys_RD, router_ND, config, None, scales_R=scales_R)

    times: dict[str, list[float | None]] = {kind: [] for kind in SCORINGS}
    for number in range(-common.WARMUP, repeats):
        fresh()
        for kind in SCORINGS:
            taken = common.seconds(functools.partial(select, kind))
            if number >= 0:
                times[kind].append(taken)
                recalls[kind].append(recall(_kept(chosen[kind]), _kept(chosen["fp32"]), config.neurons))
    rows = [
        {
            "scoring": kind,
            "recall": round(sum(recalls[kind]) / repeats, 5),
            "recalls": [round(r, 5) for r in recalls[kind]],
            "seconds": round(common.median(times[kind]), 6),
            "times_s": common.rounded(times[kind]),
            "times_faster_than_fp32": common.ratios(times["fp32"], times[kind]),
        }
        for kind in SCORINGS
    ]
    return {"neurons": config.neurons, "hidden": hidden, "n": repeats, "rows": rows}


def _kept(chosen: routing.Selection) -> Tensor:
    """Neuron numbers [T, K], -1 at empty places."""
    return chosen.union_U[chosen.local_TK.clamp(min=0)].masked_fill(chosen.local_TK < 0, -1)


def recall(found_TK: Tensor, wanted_TK: Tensor, neurons: int) -> float:
    """The share of wanted neuron numbers (-1: none) that were found, of all tokens together."""
    marks_TR = torch.zeros(found_TK.shape[0], neurons + 1, dtype=torch.bool)
    marks_TR.scatter_(1, found_TK.masked_fill(found_TK < 0, neurons), True)
    real_TK = wanted_TK >= 0
    hits_TK = marks_TR.gather(1, wanted_TK.clamp(min=0)) & real_TK
    return float(hits_TK.sum()) / max(1, int(real_TK.sum()))
