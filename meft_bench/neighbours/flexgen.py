"""FlexGen searches how to spend a card's memory; so does the engine's planner (train/policy.py). Is its choice good?

Three questions, all answered by simulation. How far is the planner's choice from the best of a finer grid, by the same
cost model? What does a policy lose that turns one knob only? How far is the cost model from the replay of the engine's
own operations (profile/simulated_row.py), and does it choose the micro-batch that the replay would choose? The last
question is asked at budget 0.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.neighbours.finding import Finding, extent

if TYPE_CHECKING:
    from meft_bench.meft.config import MeftOptions
    from meft_bench.train.policy import Policy, Workload

NUMERICS = 1
TITLE = "FlexGen"
PAPER = "2303.06865"
CLAIM = (
    "With offloading policies that a linear programme finds, OPT-175B generates 1 token a second on one GPU of 16 GB, "
    "at an effective batch of 144."
)
TESTED = (
    "The planner of device budget, micro-batch and accumulation against a finer grid, against policies that turn one "
    "knob only, and its cost model against the replay of the engine's own operations (7B shapes, three cards)."
)
MINUTES = 9
USES = ("meft", "budgets", "profile", "simulator")

KNOBS = {
    "micro-batch": "the micro-batch alone, with no budget",
    "budget": "the budget alone, with micro-batches of one row",
    "accumulation": "accumulation alone, one row after another with no budget",
    "largest first": "the largest micro-batch first, the rest of the memory as budget",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is searched on what."""

    models: tuple[str, ...] = ("llama-7b", "mistral-7b")
    cards: tuple[str, ...] = ("24GB", "48GB", "80GB")
    shares: tuple[float, ...] = (0.1, 0.3)
    """U / R of one row."""
    neurons: int = 3072
    batch: int = 8
    length: int = 256
    levels: int = 24
    """Budgets of the finer grid, evenly spaced up to a resident adapter's memory, beside 0."""


_QUICK = Sizes(models=("tiny",), cards=("24GB",), shares=(0.3,), neurons=64, batch=2, length=16, levels=2)


def run(quick: bool) -> dict[str, Any]:
    sizes = _QUICK if quick else Sizes()
    searches = [(model, card, share) for model in sizes.models for card in sizes.cards for share in sizes.shares]
    replays = [(model, rows) for model in sizes.models for rows in micro_batches(sizes.batch)]
    if quick:
        replays = replays[-1:]
        found = [_searched(place, sizes) for place in searches]
        replayed = [_replayed(place, sizes) for place in replays]
    else:
        from meft_bench.profile.pool import Pool

        with Pool({}, None) as pool:
            found = [row for _, row in pool.each(_searched, [(place, sizes) for place in searches], "policies")]
            replayed = [row for _, row in pool.each(_replayed, [(place, sizes) for place in replays], "replays")]
    return {
        "evidence": "simulated",
        "settings": dataclasses.asdict(sizes),
        "searches": sorted(found, key=lambda row: (row["model"], row["card"], row["union_share"])),
        "replays": sorted((r for rows in replayed for r in rows), key=lambda r: (r["model"], r["card"], r["rows"])),
    }


def micro_batches(batch: int) -> list[int]:
    """Those that make up a batch."""
    return [rows for rows in range(1, batch + 1) if batch % rows == 0]


# ---- the search ----


def _searched(place: tuple[str, str, float], sizes: Sizes) -> dict[str, Any]:
    """One setting: the planner's choice, the best of the finer grid, and what one knob reaches."""
    from meft_bench.train import policy

    model, card, share = place
    options, work = _work(model, card, share, sizes)
    room = int(work.card.usable_bytes.value)
    planned = list(policy.policies(options, work, room))
    every = planned + list(finer(options, work, room, sizes.levels))
    row = {"model": model, "card": card, "union_share": share, "planner_tried": len(planned), "tried": len(every)}
    chosen = policy.fastest(planned)
    if chosen is None:
        return {**row, "fits": False}
    best = max(every, key=lambda p: p.tokens_per_s)
    return {**row, "fits": True, "planned": _told(chosen), "best": _told(best), "one_knob": one_knob(every)}


def finer(options: "MeftOptions", work: "Workload", room: int, levels: int) -> Iterator["Policy"]:
    """Policies of every micro-batch and of evenly spaced budgets, as far as they fit."""
    import torch

    from meft_bench.meft.engine import budget
    from meft_bench.train import policy

    dtype, shape = getattr(torch, work.dtype), work.shape
    whole = budget.whole(options, shape.layers, shape.hidden, dtype, router_there=True)
    for rows in micro_batches(work.batch):
        for level in range(1, levels + 1):
            spent = dataclasses.replace(options, device_budget=math.ceil(level / levels * whole))
            if policy.need(spent, work, rows)[0] <= room:
                yield policy.predict(spent, work, rows)


def one_knob(every: Iterable["Policy"]) -> dict[str, float | None]:
    """KNOBS -> tokens/s of the best policy of that kind; None where none fits."""
    found = list(every)
    largest = max((p.rows for p in found), default=0)
    kinds = {
        "micro-batch": [p for p in found if not p.device_budget],
        "budget": [p for p in found if p.rows == 1],
        "accumulation": [p for p in found if p.rows == 1 and not p.device_budget],
        "largest first": [p for p in found if p.rows == largest],
    }
    return {kind: max((round(p.tokens_per_s, 2) for p in of), default=None) for kind, of in kinds.items()}


def _told(policy: "Policy") -> dict[str, Any]:
    return {"rows": policy.rows, "device_budget_bytes": policy.device_budget, "bought": policy.bought,
            "tokens_per_s": round(policy.tokens_per_s, 2), "wall": policy.wall}  # fmt: skip


# ---- the cost model beside the replay ----


def _replayed(place: tuple[str, int], sizes: Sizes) -> list[dict[str, Any]]:
    """One micro-batch at budget 0 on every card: tokens/s by the cost model and by the replay."""
    from meft_bench.profile.setting import Setting
    from meft_bench.profile.simulated_row import simulated_row
    from meft_bench.profile.spec import ProfileSpec, Union
    from meft_bench.simulate import cards
    from meft_bench.train import policy

    (model, rows), share, rest = place, sizes.shares[-1], sizes.batch // place[1]
    union = round(sizes.neurons * (1 - (1 - share) ** rows))
    spec = ProfileSpec(model=model, variant="meft", neurons=sizes.neurons, batch=rows, seq=sizes.length,
                       union=Union(rows=union, source="assumed", evidence="assumed"))  # fmt: skip
    first, *others = (cards.card(name) for name in sizes.cards)
    config = _config(model)
    setting = Setting(
        config=config, shape=_shape(config), card=first, host=cards.host("desktop"), accumulations=(rest,)
    )
    row, _ = simulated_row(spec, setting, others)
    times = {sizes.cards[0]: row["time"], **dict(zip(sizes.cards[1:], row.get("elsewhere", {}).values(), strict=True))}
    made = []
    for card, speeds in times.items():
        options, work = _work(model, card, share, sizes)
        made.append({
            "model": model, "card": card, "rows": rows, "accumulation": rest,
            "predicted_tokens_per_s": round(policy.predict(options, work, rows).tokens_per_s, 2),
            "replayed_tokens_per_s": speeds["tokens_per_s_by_accumulation"][str(rest)],
        })  # fmt: skip
    return made


def _work(model: str, card: str, share: float, sizes: Sizes) -> tuple["MeftOptions", "Workload"]:
    from meft_bench.meft.config import MeftOptions
    from meft_bench.profile.variants import KNOWN, size_options
    from meft_bench.simulate import cards
    from meft_bench.train import policy

    config = _config(model)
    work = policy.Workload(shape=_shape(config), vocabulary=config.vocab_size, length=sizes.length, batch=sizes.batch,
                           card=cards.card(card), host=cards.host("desktop"), union_share=share)  # fmt: skip
    return MeftOptions(**size_options(KNOWN["meft"], sizes.neurons, None)), work


def _config(model: str) -> Any:
    from meft_bench.profile import shapes

    if model != "tiny":
        return shapes.model_config(model)
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256
    )


def _shape(config: Any) -> Any:
    import torch

    from meft_bench.profile import shapes
    from meft_bench.train.models import shape_of

    return shape_of(shapes.build(config, "meta", torch.float32, random=False))


# ---- what came out ----


def lost(reached: float, best: float) -> float:
    """Percent of the best's tokens/s."""
    return 100 * (1 - reached / best)


def findings(found: dict[str, Any]) -> list[Finding]:
    rows = [row for row in found["searches"] if row["fits"]]
    planned = [lost(r["planned"]["tokens_per_s"], r["best"]["tokens_per_s"]) for r in rows]
    made = [
        _losing(
            f"The planner's policy loses {statistics.median(planned):.1f} % of the tokens/s of the best of a finer "
            f"grid at the median, {max(planned):.1f} % at most; it tries {_between(rows, 'planner_tried')} policies, "
            f"with the finer grid {_between(rows, 'tried')}.",
            planned,
        )
    ]
    for knob, words in KNOBS.items():
        here = [(r["one_knob"][knob], r["best"]["tokens_per_s"]) for r in rows if r["one_knob"][knob] is not None]
        if losses := [lost(reached, best) for reached, best in here]:
            made.append(_losing(f"Choosing {words}, loses {statistics.median(losses):.1f} % at the median.", losses))
    return [*made, *_of_replays(found["replays"])]


def _losing(says: str, losses: list[float], of: str = "settings (model, card, share of neurons used)") -> Finding:
    return Finding(
        says=says,
        evidence="simulated",
        n=len(losses),
        of=of,
        interval=extent(losses),
        covers="% of the best's tokens/s, lowest to highest",
        digits=1,
    )


def _of_replays(replays: list[dict[str, Any]]) -> list[Finding]:
    errors = [100 * (r["predicted_tokens_per_s"] / r["replayed_tokens_per_s"] - 1) for r in replays]
    losses = []
    for place in sorted({(r["model"], r["card"]) for r in replays}):
        own = [r for r in replays if (r["model"], r["card"]) == place]
        chosen = max(own, key=lambda r: r["predicted_tokens_per_s"])
        losses.append(lost(chosen["replayed_tokens_per_s"], max(r["replayed_tokens_per_s"] for r in own)))
    far = statistics.median(abs(e) for e in errors)
    error = Finding(
        says=f"The cost model's tokens/s are {far:.1f} % from the replay's at the median (no budget).",
        evidence="simulated",
        n=len(errors),
        of="micro-batches of models on cards",
        interval=extent(errors),
        covers="% too many (+) or too few (-), lowest to highest",
        digits=1,
    )
    average = statistics.fmean(losses)
    says = f"The micro-batch that the cost model chooses without a budget loses {average:.1f} % of the replay's best."
    return [error, _losing(says, losses, "models on cards")]


def _between(rows: list[dict[str, Any]], name: str) -> str:
    low, high = extent([r[name] for r in rows])
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
