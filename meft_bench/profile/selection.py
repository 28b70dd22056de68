"""U, the rows a micro-batch moves, logged from the selection that MEFT's own code makes.

The log is made with a randomly initialised model of the profiled width: its first decoder layers read random tokens,
and the host's routing picks neurons from freshly initialised adapters. Trained adapters concentrate more, and text
repeats its tokens, so this U is near the upper end; it is what can be known without weights.
"""

import hashlib
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from meft_bench.harness.numerics import goes_on, profile_numerics
from meft_bench.meft import routing
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.sites import decoder_layers, find_ffns
from meft_bench.meft.store import NeuronStore
from meft_bench.profile import shapes
from meft_bench.profile.spec import Union
from meft_bench.profile.variants import PLAIN, SIZES, VARIANTS, WITHOUT_KE, size_options
from meft_bench.provenance import provenance
from meft_bench.reading import JSON_BYTES, read_json
from meft_bench.train.contract import OURS
from meft_bench.write import write_json

SCHEMA = 1
_LAYERS = 2


def log_selection(model: str, batch: int, seq: int, path: Path, sizes: Iterable[int] = SIZES) -> dict[str, Any]:
    """Select with and without Key-Experts at every R of sizes and add the counts to the log at path; returns the log.

    Each R is in the file as soon as it is counted. Needs about 4 GiB of host memory and half a minute at a width of
    4096. Raises ValueError for a broken log.
    """
    log, now = begun_log(path), provenance(torch.get_num_threads())
    about = (
        f"Randomly initialised decoder ({_LAYERS} layers), uniformly random tokens, freshly initialised adapters; rows "
        "that do not fire are dropped."
    )
    hidden = _ffn_inputs(shapes.model_config(model), batch, seq)
    for neurons in tqdm(list(sizes), desc="selection", unit="size", leave=False):
        made = [_entry(model, batch * seq, neurons, name, hidden) for name in (PLAIN, WITHOUT_KE)]
        places = {_place(e) for e in made}
        log = {**begun_log(path), "about": about, "provenance": now}  # anew: another command may have added its own
        log["entries"] = sorted([e for e in log["entries"] if _place(e) not in places] + made, key=_place)
        write_json(path, log)
    return log


def begun_log(path: Path) -> dict[str, Any]:
    """The log at path if it may be gone on with, made with today's numbers; else an empty one. Raises ValueError for a
    broken log."""
    numerics = profile_numerics([OURS], simulated=False)
    if path.is_file() and goes_on(log := read_log(path), numerics, provenance(torch.get_num_threads())):
        return log
    return {"schema": SCHEMA, "evidence": "measured", "entries": [], "numerics": numerics}


def _entry(model: str, tokens: int, neurons: int, variant: str, hidden: list[Tensor]) -> dict[str, Any]:
    config = MeftOptions(**size_options(VARIANTS[variant], neurons, None))
    return {
        "model": logged_name(model),
        "tokens": tokens,
        "neurons": config.neurons,
        "kept": config.kept,
        "experts": config.experts or 0,
        "probed": config.probed or 0,
        "key_experts": config.key_experts,
        "union_by_layer": [_union_size(h_TD, config, seed) for seed, h_TD in enumerate(hidden)],
    }


@cache
def logged_name(model: str) -> str:
    """How the log calls a model: a known shape by its name, a folder or hub id by its last part and its config, since
    two folders may share a name."""
    name = shapes.short_name(model)
    if model in shapes.KNOWN:
        return name
    config = shapes.model_config(model).to_json_string(use_diff=False)
    return f"{name}@{hashlib.sha256(config.encode()).hexdigest()[:8]}"


def read_log(path: Path) -> dict[str, Any]:
    """A selection log. Raises ValueError naming the file when it is missing or broken."""
    try:
        log = read_json(path, JSON_BYTES, "selection log")
        if log["schema"] != SCHEMA:
            raise ValueError(f"schema {log['schema']} is not {SCHEMA}")
        for entry in log["entries"]:
            unions = entry["union_by_layer"]
            counts = [entry["tokens"], entry["neurons"], *unions]
            if not unions or not all(type(n) is int and n >= 0 for n in counts) or 0 in counts[:2]:
                raise ValueError(f"an entry of {entry['model']} has other counts than whole numbers")
            _place(entry)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path.name} is no selection log ({error}): delete it, and meft-bench profile writes one"
        ) from None
    return log


def logged_union(log: dict[str, Any], model: str, tokens: int, neurons: int, key_experts: bool) -> Union | None:
    """U at R, the mean over the logged layers; between two logged R, U / R is interpolated over log R and the source
    says so. None when nothing fits: another model, another T, or R outside the log."""
    shares = {
        e["neurons"]: sum(e["union_by_layer"]) / len(e["union_by_layer"]) / e["neurons"]
        for e in log["entries"]
        if (e["model"], e["tokens"], e["key_experts"]) == (logged_name(model), tokens, key_experts)
    }
    source = f"random initialisation, logged selection of {tokens} tokens"
    if neurons in shares:
        return Union(rows=round(shares[neurons] * neurons), source=source, evidence="measured")
    below = max((r for r in shares if r < neurons), default=None)
    above = min((r for r in shares if r > neurons), default=None)
    if below is None or above is None:
        return None
    weight = math.log(neurons / below) / math.log(above / below)
    share = shares[below] * (1 - weight) + shares[above] * weight
    between = f"{source}, interpolated between R={below} and R={above}"
    return Union(rows=round(share * neurons), source=between, evidence="measured")


def assumed_union(share: float, neurons: int, why: str) -> Union:
    """U = share of R, called assumed. Raises ValueError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"union share {share} must be above 0 and at most 1")
    return Union(rows=round(share * neurons), source=f"assumed: {why}", evidence="assumed")


def _place(entry: dict[str, Any]) -> tuple:
    return entry["model"], entry["tokens"], not entry["key_experts"], entry["neurons"]


@torch.no_grad()
def _ffn_inputs(config: Any, batch: int, seq: int) -> list[Tensor]:
    """What each FFN reads, [T, D] fp32, in a random model of a few layers."""
    torch.manual_seed(0)
    model = shapes.build(shapes.with_layers(config, _LAYERS), "cpu", torch.bfloat16, random=True).eval()
    seen: list[Tensor] = []
    for site in find_ffns(model):
        site.entry.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).float()))
    ids = torch.randint(config.get_text_config().vocab_size, (batch, seq))
    model.get_decoder()(input_ids=ids, use_cache=False)
    assert len(seen) == len(decoder_layers(model))
    return seen


def _union_size(h_TD: Tensor, config: MeftOptions, seed: int) -> int:
    store = NeuronStore(config, h_TD.shape[1], torch.Generator().manual_seed(seed), torch.device("cpu"))
    router = store.router.detach() if store.router is not None else None
    return int(routing.select(h_TD, store.keys.detach(), router, config, None).union_U.numel())
