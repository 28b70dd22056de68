"""FFSplit splits a feed-forward network into the few neurons whose output is large for every token and the others. For
MEFT the question is which rows are worth their place on the device.

MEFT trains on the embedded model while every micro-batch's neurons are logged. Rows are then chosen once, by what is
known after three quarters of the steps, and counted over the last quarter: how many of the rows that a micro-batch
needs lie there (hits), and what still crosses. A kept row crosses once each way in a step, since the step changes it;
any other in every micro-batch that uses it. R neurons, U rows that a micro-batch uses.
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.neighbours.finding import Finding, t_interval

if TYPE_CHECKING:
    from torch import Tensor

NUMERICS = 2
TITLE = "FFSplit"
PAPER = "2401.04044"
CLAIM = (
    "Splitting the FFN by the few neurons of large output norm makes a model 43.1 % smaller and 1.25 to 1.56 times as "
    "fast, with negligible loss of accuracy."
)
TESTED = (
    "Which rows to keep on the device: those of the largest output norm, those used most, or any; hits, bytes and "
    "what still crosses, while MEFT trains on the embedded model."
)
MINUTES = 4
USES = ("meft", "facts", "training", "embedded")

RULES = {
    "norm": "by output norm (FFSplit's rule)",
    "use": "by use in the quarter before",
    "fading": "by use that fades by a tenth a step (as the engine counts)",
    "random": "at random",
    "foresight": "by use in the quarter to come (no rule can know it)",
}
_SHOWN = 0.25
_FADE = 0.9
"""As engine/slots.py."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained, and the shares of R that are kept."""

    neurons: int = 1536
    experts: int = 128
    probed: int = 8
    kept: int = 8
    steps: int = 120
    batch: int = 32
    accumulation: int = 8
    train_rows: int = 900
    learning_rate: float = 1.6e-3
    looked_at: int = 64
    """Training rows whose output norms are taken."""
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75)


_QUICK = Sizes(neurons=24, experts=6, probed=2, kept=4, steps=8, batch=4, accumulation=2, train_rows=20, looked_at=4,
               seeds=(0,), shares=(0.25,))  # fmt: skip


def run(quick: bool) -> dict[str, Any]:
    from tqdm import tqdm

    from meft_bench.bench import common

    sizes = _QUICK if quick else Sizes()
    rows, runs = [], []
    with common.threads(1):
        for seed in tqdm(sizes.seeds, desc="seeds", leave=False, disable=quick):
            used_MLR, norm_LR, row_bytes, losses = logged(seed, sizes)
            runs.append({"seed": seed, "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4),
                         "union_share": round(float(used_MLR.double().mean()), 5)})  # fmt: skip
            rows += [{**row, "device_bytes": row["rows"] * norm_LR.shape[0] * row_bytes}
                     for row in counted(used_MLR, norm_LR, seed, sizes)]  # fmt: skip
    return {"evidence": "measured", "settings": dataclasses.asdict(sizes), "runs": runs, "rows": rows}


# ---- the log ----


def logged(seed: int, sizes: Sizes) -> tuple["Tensor", "Tensor", int, list[float]]:
    """(bool [M, L, R]: which rows each of M micro-batches used in each of L layers; output norms [L, R] after three
    quarters of the steps; device bytes of a kept row; the losses)."""
    import torch

    from meft_bench.harness import evaluation
    from meft_bench.harness.spec import RunSpec
    from meft_bench.meft.engine import budget
    from meft_bench.meft.layer import MeftAdapter
    from meft_bench.train import loop, models
    from meft_bench.train.methods import complete_options, find_method, parse_options

    given = {"neurons": sizes.neurons, "experts": sizes.experts, "probed": sizes.probed, "kept": sizes.kept}
    spec = RunSpec(
        task="facts", method="meft", options=complete_options("meft", given), train_rows=sizes.train_rows, eval_rows=4,
        steps=sizes.steps, batch_size=sizes.batch, accumulation=sizes.accumulation, seed=seed,
        learning_rate=sizes.learning_rate,
    )  # fmt: skip
    torch.manual_seed(seed)
    task = evaluation.load_task(spec, None)
    loaded = models.load_model(spec.model, None, spec.dtype, spec.device)
    attached = find_method("meft").attach(loaded.model, parse_options("meft", spec.options), seed)
    adapters = [m for m in attached.model.modules() if isinstance(m, MeftAdapter)]
    examples = loop.render(task.training_docs(), loaded.tokenizer, task.config.target_delimiter)
    used: list[list[Tensor]] = [[] for _ in adapters]
    norm_LR = torch.zeros(len(adapters), sizes.neurons)

    def watch(note: Callable[[int, Any, Any], None] | None) -> None:
        for number, adapter in enumerate(adapters):
            adapter.on_select = None if note is None else _noting(note, number)

    def note_use(layer: int, h_TD: "Tensor", chosen: Any) -> None:
        used[layer].append(torch.zeros(sizes.neurons, dtype=torch.bool).index_fill_(0, chosen.union_U, True))

    def note_norms(layer: int, h_TD: "Tensor", chosen: Any) -> None:
        store = adapters[layer].store
        keys_RD, values_RD = store.keys.detach(), store.values.detach()
        norm_LR[layer] += output_norms(h_TD, chosen, keys_RD, values_RD, adapters[layer].config.activation)

    def on_step(done: int, log: Any) -> None:
        if done == 3 * sizes.steps // 4:
            watch(note_norms)
            batch = loop.collate(examples[: sizes.looked_at], loaded.tokenizer.pad_token_id, torch.device("cpu"))
            with torch.no_grad():
                attached.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            watch(note_use)

    watch(note_use)
    batches = loop.shuffled(attached, examples, spec, loaded.tokenizer.pad_token_id)
    _, log = loop.train(attached, spec, batches, on_step=on_step)
    price = budget.prices(adapters[0].config, adapters[0].store.values.shape[1], torch.float32)
    return torch.stack([torch.stack(layer) for layer in used], 1), norm_LR, price.row, log.loss


def _noting(note: Callable[[int, Any, Any], None], layer: int) -> Callable[[Any, Any], Any]:
    def see(h_TD: Any, chosen: Any) -> Any:
        note(layer, h_TD, chosen)
        return chosen

    return see


def output_norms(
    h_TD: "Tensor", chosen: Any, keys_RD: "Tensor", values_RD: "Tensor", activation: str
) -> "Tensor":  # fmt: skip
    """[R]: of each neuron |act(gate key . h)| |value|, summed over the tokens that keep it."""
    from meft_bench.meft.dense import activate

    there_TK = chosen.local_TK >= 0
    neuron_TK = chosen.union_U[chosen.local_TK.clamp(min=0)]
    output_TK = (h_TD.float()[:, None] * keys_RD[neuron_TK]).sum(2)
    if chosen.gates_TN is not None:
        output_TK = output_TK * chosen.gates_TN.gather(1, chosen.expert_TK)
    size_TK = activate(output_TK, activation).abs() * values_RD.norm(dim=1)[neuron_TK]
    total_R = values_RD.new_zeros(values_RD.shape[0])
    return total_R.index_add_(0, neuron_TK[there_TK], size_TK[there_TK])


# ---- what is counted ----


def counted(used_MLR: "Tensor", norm_LR: "Tensor", seed: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Hits and crossings of every rule at every share, over all layers of the last quarter."""
    import torch

    micro = used_MLR.shape[0]
    before, last = used_MLR[micro // 2 : 3 * micro // 4], used_MLR[3 * micro // 4 :]
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Any] = {
        "norm": norm_LR,
        "use": before.float().sum(0),
        "random": torch.rand(norm_LR.shape, generator=generator),
        "foresight": last.float().sum(0),
    }
    made = []
    for share in sizes.shares:
        rows = round(share * sizes.neurons)
        for rule in RULES:
            if rule == "fading":
                kept_MLR = fading(used_MLR, rows, sizes.accumulation)[3 * micro // 4 :]
            else:
                kept_MLR = best(scores[rule], rows).expand(last.shape)
            made.append({"seed": seed, "rule": rule, "share": share, "rows": rows,
                         **outcome(last, kept_MLR, sizes.accumulation)})  # fmt: skip
    return made


def best(score_LR: "Tensor", rows: int) -> "Tensor":
    """bool [L, R]: the rows of the highest score in each layer."""
    import torch

    kept_LR = torch.zeros(score_LR.shape, dtype=torch.bool)
    return kept_LR.scatter_(1, score_LR.argsort(dim=1, descending=True, stable=True)[:, :rows], True)


def fading(used_MLR: "Tensor", rows: int, accumulation: int) -> "Tensor":
    """bool [M, L, R]: in every step the rows of the highest count so far, which loses a tenth after a step."""
    import torch

    count_LR, kept = torch.zeros(used_MLR.shape[1:]), []
    for step in used_MLR.split(accumulation):
        kept.append(best(count_LR, rows).expand(step.shape))
        count_LR = (count_LR + step.float().sum(0)) * _FADE
    return torch.cat(kept)


def outcome(used_MLR: "Tensor", kept_MLR: "Tensor", accumulation: int) -> dict[str, float]:
    """hit_share: of the rows that micro-batches used, those that were kept. crossing_share: rows that crossed, of those
    that cross where none is kept."""
    hits, needed = int((used_MLR & kept_MLR).sum()), int(used_MLR.sum())
    once = sum(int((step & kept).any(0).sum()) for step, kept in
               zip(used_MLR.split(accumulation), kept_MLR.split(accumulation), strict=True))  # fmt: skip
    return {"hit_share": round(hits / needed, 5), "crossing_share": round((needed - hits + once) / needed, 5)}


# ---- what came out ----


def findings(found: dict[str, Any]) -> list[Finding]:
    shares = sorted({row["share"] for row in found["rows"]})
    shown = min(shares, key=lambda share: abs(share - _SHOWN))
    by_share = [
        [
            100 * (u - n)
            for u, n in zip(*(_values(found, rule, s, "hit_share") for rule in ("use", "norm")), strict=True)
        ]
        for s in shares
    ]
    by_seed = [statistics.fmean(gains) for gains in zip(*by_share, strict=True)]
    mean, budgets = statistics.fmean(by_seed), ", ".join(f"{100 * s:g}" for s in shares)
    says = f"Use finds {abs(mean):.1f} points of the needed rows {'more' if mean >= 0 else 'less'} than output norm, "
    last = _finding(f"{says}mean over {budgets} % of the rows kept.", by_seed, "points, 95 % t-interval over seeds")
    return [*(_of_rule(found, rule, shown) for rule in RULES), last]


def _of_rule(found: dict[str, Any], rule: str, share: float) -> Finding:
    hits = [100 * v for v in _values(found, rule, share, "hit_share")]
    crossing = statistics.fmean(_values(found, rule, share, "crossing_share"))
    kib = next(r["device_bytes"] for r in found["rows"] if r["share"] == share) / 1024
    says = (f"{100 * share:g} % of the rows ({kib:,.0f} KiB), chosen {RULES[rule]}, hold {statistics.fmean(hits):.1f} "
            f"% of what a micro-batch needs; {100 * crossing:.0f} % of the traffic is left.")  # fmt: skip
    return _finding(says, hits, "% of needed rows, 95 % t-interval over seeds")


def _finding(says: str, values: list[float], covers: str) -> Finding:
    interval = t_interval(values)
    return Finding(says=says, evidence="measured", n=len(values), of="seeds", interval=interval,
                   covers=covers if interval else "", digits=1)  # fmt: skip


def _values(found: dict[str, Any], rule: str, share: float, name: str) -> list[float]:
    """By seed."""
    rows = [r for r in found["rows"] if (r["rule"], r["share"]) == (rule, share)]
    return [r[name] for r in sorted(rows, key=lambda r: r["seed"])]
