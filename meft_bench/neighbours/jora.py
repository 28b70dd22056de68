"""JORA fine-tunes on questions with retrieved passages, whose prompts are long. What do long prompts change for MEFT?

Two things are measured. How many neurons a micro-batch of so many tokens uses, in trained adapters: from the records
of the full suite, whose micro-batches of facts reach 8,192 tokens. There the embedded model's rows end at 64 tokens, so
a prompt of 4,096 tokens stands for 64 rows. And the same at R = 3072 in one long row of random tokens, with fresh
adapters on random weights of a stories260K's width: near the upper end. The rest is simulated with that U, at
LLaMA-2-7B's shape (LLaMA-7B's with 4,096 positions): device memory, activations, bytes that cross for a token and
tokens/s. One prompt a micro-batch, 8 to a step.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.neighbours.finding import Finding, extent, t_interval

if TYPE_CHECKING:
    from meft_bench.harness.spec import RunSpec

NUMERICS = 2
TITLE = "JORA"
PAPER = "2403.11366"
CLAIM = (
    "LoRA on long retrieved prompts, sharded over four GPUs, trains more than 12 times as fast as with Hugging Face "
    "and DeepSpeed and takes less than half the memory of each GPU."
)
TESTED = (
    "A question with retrieved passages of 256 to 4,096 tokens on one card: share of neurons used, activations, bytes "
    "a token and tokens/s of MEFT, the resident adapter and LoRA."
)
MINUTES = 6
USES = (
    "meft",
    "parallel_adapter",
    "lora",
    "facts",
    "training",
    "evaluation",
    "probes",
    "embedded",
    "profile",
    "simulator",
)

METHODS = {"meft": "MEFT", "parallel_adapter": "the resident Parallel Adapter", "lora_attention": "LoRA of rank 16"}
_SHARES = ("40%", "150%")
_ROW = 64
"""Tokens of a row of the embedded model."""
_RANK = 16
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the prompts, and of what is simulated."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    neurons: int = 3072
    accumulation: int = 8
    cards: tuple[str, ...] = ("24GB", "80GB")
    methods: tuple[str, ...] = tuple(METHODS)
    checkpointing: tuple[bool, ...] = (False, True)
    positions: int = 4096


_QUICK = Sizes(
    lengths=(16, 32), neurons=64, accumulation=1, methods=("meft", "parallel_adapter"), checkpointing=(False,)
)


def specs(quick: bool) -> list["RunSpec"]:
    """MEFT on facts at two sizes, as the full suite has it."""
    from meft_bench.harness import suites

    cells = [c for c in suites.full() if c.row == "meft" and c.share in _SHARES and not c.variant]
    return [c.spec for c in cells if c.spec.task == "facts"]


def run(quick: bool, records: list[dict[str, Any]]) -> dict[str, Any]:
    from meft_bench.bench import common

    sizes = _QUICK if quick else Sizes()
    with common.threads(1):
        random = [random_union(length, sizes) for length in sizes.lengths]
    shares = {row["tokens"]: statistics.fmean(row["share_by_layer"]) for row in random}
    places = [(m, n, c) for c in sizes.checkpointing for m in sizes.methods for n in sizes.lengths]
    return {
        "evidence": "simulated",
        "evidence_of": {"trained": "measured", "random": "measured", "rows": "simulated"},
        "settings": dataclasses.asdict(sizes),
        "trained": [row for record in records for row in trained_unions(record, sizes.lengths)],
        "random": random,
        "rows": _simulated(places, shares, sizes, quick),
    }


# ---- neurons in use ----


def trained_unions(record: dict[str, Any], lengths: Sequence[int]) -> Iterable[dict[str, Any]]:
    """U / R of a run's adapters, mean over layers, at micro-batches of as many tokens as the prompts have."""
    for point in record["probes"]["union_grid"]:
        if point["length"] == _ROW and point["tokens"] in lengths:
            yield {"run_key": record["run_key"], "seed": record["spec"]["seed"],
                   "neurons": record["spec"]["options"]["neurons"], "kept": record["spec"]["options"]["kept"],
                   "tokens": point["tokens"], "share": round(statistics.fmean(point["share_by_layer"]), 5)}  # fmt: skip


def random_union(tokens: int, sizes: Sizes) -> dict[str, Any]:
    """U / R by layer of fresh adapters on a random model of 64 x 5 layers that reads one row of random tokens."""
    import torch
    from transformers import LlamaConfig

    from meft_bench.meft import routing
    from meft_bench.meft.config import MeftOptions
    from meft_bench.meft.sites import find_ffns
    from meft_bench.meft.store import NeuronStore
    from meft_bench.profile import shapes
    from meft_bench.profile.variants import KNOWN, size_options

    options = MeftOptions(**size_options(KNOWN["meft"], sizes.neurons, None))
    config = LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=512, max_position_embeddings=sizes.positions)  # fmt: skip
    torch.manual_seed(0)
    model = shapes.build(config, "cpu", torch.float32, random=True).eval()
    shares: list[float] = []

    def select(module: Any, args: Any) -> None:
        h_TD = args[0].flatten(0, -2)
        store = NeuronStore(options, 64, torch.Generator().manual_seed(len(shares)), torch.device("cpu"))
        router = store.router.detach() if store.router is not None else None
        chosen = routing.select(h_TD, store.keys.detach(), router, options, None)
        shares.append(round(chosen.union_U.numel() / options.neurons, 5))

    for site in find_ffns(model):
        site.entry.register_forward_pre_hook(select)
    with torch.no_grad():
        model.get_decoder()(input_ids=torch.randint(512, (1, tokens)), use_cache=False)
    return {"tokens": tokens, "neurons": options.neurons, "kept": options.kept, "share_by_layer": shares}


# ---- simulated ----


def _simulated(
    places: list[tuple[str, int, bool]], shares: dict[int, float], sizes: Sizes, quick: bool
) -> list[dict[str, Any]]:
    if quick:
        made = [_row(place, shares[place[1]], sizes, quick) for place in places]
    else:
        from meft_bench.profile.pool import Pool

        with Pool({}, None) as pool:
            jobs = [(place, shares[place[1]], sizes, quick) for place in places]
            made = [row for _, row in pool.each(_row, jobs, "prompts")]
    return sorted(made, key=lambda r: (r["method"], r["checkpointing"], r["tokens"]))


def _row(place: tuple[str, int, bool], share: float, sizes: Sizes, quick: bool) -> dict[str, Any]:
    """One method on one prompt: memory, bytes and speed on every card."""
    import torch

    from meft_bench.profile import shapes
    from meft_bench.profile.setting import Setting
    from meft_bench.profile.simulated_row import simulated_row
    from meft_bench.profile.spec import ProfileSpec, Union
    from meft_bench.simulate import cards
    from meft_bench.train.models import shape_of

    method, tokens, checkpointing = place
    config = shapes.model_config("llama-7b")
    config.max_position_embeddings = sizes.positions
    if quick:
        config.update({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 32})  # fmt: skip
    union = Union(rows=round(share * sizes.neurons), source="random weights", evidence="measured")
    spec = ProfileSpec(
        model="llama-7b", variant=method, neurons=sizes.neurons, batch=1, seq=tokens, checkpointing=checkpointing,
        union=union if method == "meft" else None, accumulation=sizes.accumulation,
        rank=_RANK if method.startswith("lora") else None,
    )  # fmt: skip
    first, *others = (cards.card(name) for name in sizes.cards)
    setting = Setting(config=config, shape=shape_of(shapes.build(config, "meta", torch.float32, random=False)),
                      card=first, host=cards.host("desktop"), accumulations=(sizes.accumulation,))  # fmt: skip
    row, _ = simulated_row(spec, setting, others)
    count, peak = str(sizes.accumulation), row["memory"]["device_peak_bytes"]
    times = [row["time"], *(row.get("elsewhere") or {}).values()]
    return {
        "method": method, "tokens": tokens, "checkpointing": checkpointing,
        **({"union_share": share} if method == "meft" else {}),
        "device_peak_bytes": peak, "activation_bytes": row["memory"]["by_category"].get("activations", 0),
        "bytes_per_token": row["traffic"]["by_accumulation"][count]["bytes_per_token"],
        "tokens_per_s": {c: t["tokens_per_s_by_accumulation"][count] for c, t in zip(sizes.cards, times, strict=True)},
        "fits": {c.name: peak + c.context_bytes.value <= c.usable_bytes.value for c in (first, *others)},
    }  # fmt: skip


# ---- what came out ----


def findings(found: dict[str, Any]) -> list[Finding]:
    rows, cards = found["rows"], found["settings"]["cards"]
    sizes = sorted({row["neurons"] for row in found["trained"]})
    made = [_trained(found["trained"], neurons) for neurons in sizes]
    made.append(_random(found["random"]))
    plain = {m: [r for r in rows if r["method"] == m and not r["checkpointing"]] for m in METHODS}
    made += [_crossing(plain["meft"]), *(_speed(plain, card) for card in cards), _memory(plain)]
    return [*made, *(_longest(rows, card) for card in cards)]


def _trained(rows: list[dict[str, Any]], neurons: int) -> Finding:
    own = [r for r in rows if r["neurons"] == neurons]
    short, long = (pick(r["tokens"] for r in own) for pick in (min, max))
    few, many = ([100 * r["share"] for r in own if r["tokens"] == tokens] for tokens in (short, long))
    interval = t_interval(many)
    return Finding(
        says=f"Trained adapters of {neurons:,} neurons ({own[0]['kept']} a token) use {statistics.fmean(few):.0f} % of "
        f"them for {short:,} tokens and {statistics.fmean(many):.0f} % for {long:,} (in rows of {_ROW}, where the "
        "embedded model ends).",
        evidence="measured",
        n=len(many),
        of="seeds",
        interval=interval,
        covers=f"% at {long:,} tokens, 95 % t-interval over seeds" if interval else "",
        digits=1,
    )


def _random(rows: list[dict[str, Any]]) -> Finding:
    short, long = (pick(rows, key=lambda r: r["tokens"]) for pick in (min, max))
    few, many = (statistics.fmean(r["share_by_layer"]) for r in (short, long))
    return Finding(
        says=f"Fresh adapters of {long['neurons']:,} neurons ({long['kept']} a token) on random weights use "
        f"{100 * few:.0f} % for a prompt of {short['tokens']:,} random tokens and {100 * many:.0f} % for one of "
        f"{long['tokens']:,}.",
        evidence="measured",
        n=len(long["share_by_layer"]),
        of="layers",
        interval=extent([100 * share for share in long["share_by_layer"]]),
        covers=f"% at {long['tokens']:,} tokens, lowest to highest layer",
        digits=1,
    )


def _crossing(rows: list[dict[str, Any]]) -> Finding:
    moved = [r["bytes_per_token"] / 1e6 for r in rows]
    return _simulated_finding(
        f"MEFT moves {moved[0]:.2f} MB for a token of a prompt of {rows[0]['tokens']:,} tokens and {moved[-1]:.2f} MB "
        f"in one of {rows[-1]['tokens']:,}: the rows are the same, and more tokens share them.",
        moved, "MB a token",
    )  # fmt: skip


def _speed(plain: dict[str, list[dict[str, Any]]], card: str) -> Finding:
    pairs = zip(plain["meft"], plain["parallel_adapter"], strict=True)
    shares = [100 * a["tokens_per_s"][card] / b["tokens_per_s"][card] for a, b in pairs]
    short, long = plain["meft"][0], plain["meft"][-1]
    return _simulated_finding(
        f"At the speeds of a {card} card MEFT trains at {shares[0]:.0f} % of the resident adapter's tokens/s on "
        f"prompts of {short['tokens']:,} tokens ({short['tokens_per_s'][card]:,.0f} a second), at {shares[-1]:.0f} % "
        f"on {long['tokens']:,} ({long['tokens_per_s'][card]:,.0f}).",
        shares, "% of the resident's",
    )  # fmt: skip


def _memory(plain: dict[str, list[dict[str, Any]]]) -> Finding:
    pairs = list(zip(plain["meft"], plain["parallel_adapter"], strict=True))
    saved = [100 * (1 - a["device_peak_bytes"] / b["device_peak_bytes"]) for a, b in pairs]
    short, long = pairs[0][0], pairs[-1][0]
    return _simulated_finding(
        f"MEFT's activations take {short['activation_bytes'] / _GB:.1f} GB at {short['tokens']:,} tokens and "
        f"{long['activation_bytes'] / _GB:.1f} GB at {long['tokens']:,}; what it saves of the resident adapter's "
        f"device memory goes from {saved[0]:.0f} to {saved[-1]:.0f} %.",
        saved, "% of the resident's memory",
    )  # fmt: skip


def _longest(rows: list[dict[str, Any]], card: str) -> Finding:
    """The longest prompt of each method that fits."""

    def reach(method: str, checkpointing: bool) -> str:
        fits = [r["tokens"] for r in rows
                if (r["method"], r["checkpointing"]) == (method, checkpointing) and r["fits"][card]]  # fmt: skip
        return f"{max(fits):,}" if fits else "none"

    kinds = sorted({r["checkpointing"] for r in rows})
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    said = [f"{METHODS[m]} {' and '.join(reach(m, c) for c in kinds)}" for m in methods]
    how = " without and with activation checkpointing" if len(kinds) == 2 else ""
    return Finding(
        says=f"The longest prompt tried that fits a {card} card{how}, in tokens: {'; '.join(said)}.",
        evidence="simulated", n=len({r["tokens"] for r in rows}), of="lengths",
    )  # fmt: skip


def _simulated_finding(says: str, values: list[float], unit: str) -> Finding:
    return Finding(says=says, evidence="simulated", n=len(values), of="lengths", interval=extent(values),
                   covers=f"{unit}, lowest to highest length", digits=2 if unit.startswith("MB") else 0)  # fmt: skip
