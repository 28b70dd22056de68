"""Numbers that claims and figures are about, each read from one record or compared between two, seed by seed.

A reference names a place of a suite: "ROW SHARE TASK", with " / VARIANT" behind it where the suite has one, for example
"meft 10% facts" or "meft 10% facts / 4 micro-batches". MEASURES lists what can be read from a record.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.results import Record, Results, headline
from meft_bench.report.records.stats import Difference, compare
from meft_bench.report.records.traffic import (
    LINKED,
    grid_rise,
    grid_share,
    has_traffic,
    in_units_of_m,
    kept_share,
    neuron_shares,
)
from meft_bench.train.contract import describe

FACT_BITS = 10.0
"""One of 32 x 32 answers."""


@dataclass(frozen=True)
class Values:
    """A quantity on every seed that has it, and why the other planned seeds have none."""

    by_seed: dict[int, float]
    absent: str = ""
    """The whole place or benchmark is not there."""
    gaps: dict[int, str] = field(default_factory=dict)
    """Seed -> no record, or no such number in it."""
    ended: dict[int, str] = field(default_factory=dict)
    """Seed -> a run that ended without a score (diverged, oom, failed): a result, not a gap."""
    planned: frozenset[int] = frozenset()
    stale: bool = False
    evidence: str = "not-run"
    items: Difference | None = None
    """For differences of scores: paired over the items of all seeds."""
    run_keys: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Every reason why something is not there, seeds ascending."""
        told = [text for _, text in sorted([*self.gaps.items(), *self.ended.items()])]
        return (*([self.absent] if self.absent else []), *told)

    @property
    def not_run(self) -> bool:
        """True while something that is planned has not been run."""
        return bool(self.absent or self.gaps)


def _unavailable(record: Record, what: str) -> ValueError:
    return ValueError(f"run {record['run_key']} has no {what}")


def union_share(record: Record) -> float:
    """U/R of a training micro-batch, mean over layers."""
    return statistics.fmean(neuron_shares(record))


def beta(record: Record) -> float:
    """The paper's beta, U/K of a training micro-batch: rows moved per neuron that one token keeps, mean over layers."""
    rows = statistics.fmean(layer["mean"] for layer in record["traffic"]["rows_moved_by_layer"])
    return rows / record["spec"]["options"]["kept"]


def bytes_per_step(record: Record) -> float:
    """Bytes over the link per optimizer step, both directions, overhead included."""
    return float(record["traffic"]["per_optimizer_step_bytes"])


def formula_gap(record: Record) -> float:
    """Main terms counted at the link minus the closed formula's (2 wire rows of U each way, T x D hidden states per
    layer), bytes per optimizer step. Eq. 8 with gradients."""
    moved, steps = record["traffic"]["by_purpose"], record["spec"]["steps"]
    width = {"float32": 4, "bfloat16": 2}[record["spec"]["dtype"]]
    parts, layers = record["spec"]["accumulation"], len(record["traffic"]["rows_moved_by_layer"])
    hidden = _hidden_size(record)
    rows = sum(layer["mean"] for layer in record["traffic"]["rows_moved_by_layer"]) * 2 * hidden * width * parts
    tokens = record["timing"]["tokens_padded"] / steps * hidden * width * layers
    counted = {p: moved.get(f"{way}_{p}_bytes", 0) / steps for way, p in (("h2d", "rows"), ("d2h", "grads"))}
    counted["hidden"] = moved.get("d2h_hidden_bytes", 0) / steps
    # rows_moved_by_layer is rounded to 0.01 rows.
    tolerance = 0.005 * layers * 2 * hidden * width * parts
    gaps = [counted["rows"] - rows, counted["grads"] - rows, counted["hidden"] - tokens]
    return max(0.0, max(abs(g) for g in gaps) - tolerance)


def _hidden_size(record: Record) -> int:
    layers, neurons = len(record["traffic"]["rows_moved_by_layer"]), record["spec"]["options"]["neurons"]
    return record["parameters"]["groups"]["values"] // (layers * neurons)


def device_bytes(record: Record) -> float:
    """Bytes a method holds on the device beside the base: parameters, gradients and moments of a resident one; of a
    linked one the rows of all layers, which wait there for backward, with their indices, and the gradients of one
    layer."""
    method = record["spec"]["method"]
    if method not in LINKED or not has_traffic(record):
        held = {name: n for name, n in record["memory"]["accounted"].items() if name.startswith("device_")}
        if describe(method).trains_base:  # its parameters are the base, which every other method holds, too, frozen
            held.pop("device_parameters_bytes", None)
        return float(sum(held.values()))
    moved, layers = record["traffic"]["by_purpose"], len(record["traffic"]["rows_moved_by_layer"])
    micro_batches = record["spec"]["steps"] * record["spec"]["accumulation"]
    down = sum(n for name, n in moved.items() if name in ("h2d_rows_bytes", "h2d_index_bytes", "h2d_score_bytes"))
    return (down + moved.get("d2h_grads_bytes", 0) / layers) / micro_batches


def tokens_per_s(record: Record) -> float:
    """Real tokens trained per second, warm-up left out."""
    return float(record["timing"]["real_tokens_per_s"])


def device_peak_gib(record: Record) -> float:
    """Peak of the device allocator while training, GiB."""
    peaks = record["memory"]["device_peak_by_phase"]
    if peaks is None:
        raise _unavailable(record, "device peak (it ran on the CPU)")
    return peaks["train"]["allocated_bytes"] / 2**30


def active_share(record: Record) -> float:
    """Neurons of a dense Parallel Adapter above zero for a token, mean over layers."""
    return statistics.fmean(record["probes"]["activation"]["active_share"])


def top5_share(record: Record) -> float:
    """Share of a token's activation that its own most active 5 % of neurons carry, mean over layers."""
    return statistics.fmean(record["probes"]["activation"]["top5_share_of_token"])


def base_nats(record: Record) -> float:
    """Loss on the base's own text, nats per token; minus the base model's is forgetting."""
    return float(record["probes"]["base_text"]["nats_per_token"])


def own_text_nats(record: Record) -> float:
    """Loss on text that a pretrained base writes by itself, above the base's own, nats per token."""
    text = record["probes"]["forgetting"]["own_text"]
    return float(text["nats_per_token"] - text["base_nats_per_token"])


def held_out_kl(record: Record) -> float:
    """Kullback-Leibler divergence of a pretrained base's predictions on a text that nobody trained on from those of the
    trained model, nats per token."""
    return float(record["probes"]["forgetting"]["held_out"]["kl_nats_per_token"])


def background_overlap(record: Record) -> float:
    """How alike the new rows and background text use the neurons, 1 is alike, mean over layers."""
    return statistics.fmean(record["probes"]["distinctive"]["overlap_by_layer"])


def dead_share(record: Record) -> float:
    """Neurons that no token of the probed training rows keeps, mean over layers."""
    return statistics.fmean(record["probes"]["neurons"]["dead_share"])


def expert_entropy(record: Record) -> float:
    """Entropy of the kept neurons over experts, 1 is uniform, mean over layers."""
    return statistics.fmean(record["probes"]["neurons"]["expert_entropy"])


def lookahead_recall(record: Record) -> float:
    """Share of the kept neurons that selecting from the layer before finds, mean over layers."""
    return statistics.fmean(record["probes"]["lookahead"]["recall_per_token"])


def reading_gap(record: Record) -> float:
    """Test score under the reading that was not trained, minus that under the trained one."""
    task = record["spec"]["task"]
    metric = headline(task).metric
    other = record["probes"]["other_reading"]["metrics"][metric]["mean"]
    return other - record["quality"]["test"]["metrics"][metric]["mean"]


def bits_recalled(record: Record) -> float:
    """Bits of the taught facts that training questions get back: recall x facts x 10 bits."""
    recall = record["quality"]["recall"]["metrics"]["contains"]["mean"]
    return recall * FACT_BITS * (record["spec"]["train_rows"] // 6 * 6)  # whole people, six facts each


def bits_per_parameter(record: Record) -> float:
    """bits_recalled over trainable parameters."""
    return bits_recalled(record) / record["parameters"]["trainable"]


def retrieval_share(record: Record) -> float:
    """Dot products per token and layer to find the neurons, over R: (N + P m) / R with Key-Experts, 1 without."""
    options = record["spec"]["options"]
    if not options.get("key_experts"):
        return 1.0
    neurons, experts = options["neurons"], options["experts"]
    return (experts + options["probed"] * neurons // experts) / neurons


def bytes_in_m_per_step(record: Record) -> float:
    """Main terms per optimizer step in units of M = 2DRL elements: the paper's 0.56, times micro-batches."""
    return in_units_of_m(record) * record["spec"]["accumulation"]


def eq8_in_m(record: Record) -> float:
    """Equation 8 as printed (2 D U + T D per layer: no gradients), in units of M per micro-batch."""
    moved, spec = record["traffic"]["by_purpose"], record["spec"]
    width = {"float32": 4, "bfloat16": 2}[spec["dtype"]]
    elements = (moved.get("h2d_rows_bytes", 0) + moved.get("d2h_hidden_bytes", 0)) / width
    return elements / (spec["steps"] * spec["accumulation"]) / (2 * record["parameters"]["groups"]["values"])


def train_hours(record: Record) -> float:
    """Wall time of training, hours."""
    return record["memory"]["phase_s"]["train"] / 3600


_READ_FROM: dict[str, tuple[Callable[..., float], ...]] = {
    "traffic": (union_share, beta, kept_share, in_units_of_m, bytes_in_m_per_step, bytes_per_step, formula_gap,
                eq8_in_m),
    "timing": (tokens_per_s,),
    "memory": (device_bytes, device_peak_gib, train_hours),
    "probes": (active_share, top5_share, base_nats, own_text_nats, held_out_kl, dead_share, expert_entropy,
               lookahead_recall, reading_gap, background_overlap, grid_share, grid_rise),
    "quality": (bits_recalled, bits_per_parameter),
    "parameters": (retrieval_share,),
}  # fmt: skip
"""Block of the record -> the measures that come from it and carry its evidence (parameters are counted, so exact)."""
MEASURES: dict[str, Callable[..., float]] = {f.__name__: f for group in _READ_FROM.values() for f in group}
_BLOCK = {f.__name__: block for block, group in _READ_FROM.items() for f in group}


def parse_reference(text: str) -> tuple[str, str, str, str]:
    """(row, share, task, variant) of "ROW SHARE TASK [/ VARIANT]". Raises ValueError for another form."""
    place, _, variant = text.partition(" / ")
    parts = place.split()
    if len(parts) != 3:
        raise ValueError(f"{text!r} is no reference of the form ROW SHARE TASK [/ VARIANT]")
    return parts[0], parts[1], parts[2], variant


def measure(results: Results, name: str, reference: str, **arguments: Any) -> Values:
    """A measure of one place on every seed."""
    return _by_seed(results, reference, lambda record: MEASURES[name](record, **arguments), name, _BLOCK[name])


def score(results: Results, reference: str, split: str = "test", metric: str | None = None) -> Values:
    """A mean score on every seed; the task's headline metric unless another is named."""
    name = metric or headline(parse_reference(reference)[2]).metric

    def read(record: Record) -> float:
        return float(record["quality"][split]["metrics"][name]["mean"])

    return _by_seed(results, reference, read, f"{name} on {split}", "quality")


def _by_seed(results: Results, reference: str, read: Callable[[Record], float], what: str, block: str) -> Values:
    planned = results.places.get(parse_reference(reference))
    if planned is None:
        return Values({}, f"{reference}: not in the suite")
    records, values = _records(results, reference), {}
    gaps: dict[int, str] = {}
    ended: dict[int, str] = {}
    for seed in sorted(planned):
        place, record = f"{reference}, seed {seed}", records.get(seed)
        if record is None:
            gaps[seed] = f"{place}: no record"
        elif record["state"] != "ok":
            ended[seed] = f"{place}: {record['state']}"
        else:
            try:
                values[seed] = read(record)
            except (KeyError, TypeError, ValueError, statistics.StatisticsError) as error:
                gaps[seed] = f"{place}: {error if isinstance(error, ValueError) else f'no {what}'}"
    used = [records[s] for s in values]
    return Values(
        values,
        gaps=gaps,
        ended=ended,
        planned=frozenset(planned),
        stale=any(results.stale(r) for r in used),
        evidence=weakest(r[block].get("evidence", "measured") for r in used),
        run_keys=tuple(r["run_key"] for r in used),
    )


def difference(results: Results, first: str, second: str, split: str = "test", metric: str | None = None) -> Values:
    """Score of the first place minus that of the second, seed by seed, and paired over the items of all seeds."""
    joined = minus(score(results, first, split, metric), score(results, second, split, metric))
    if not joined.by_seed or split != "test":
        return joined
    pairs = [(_records(results, first)[s], _records(results, second)[s]) for s in joined.by_seed]
    try:
        return replace(joined, items=compare(pairs, split, metric or headline(parse_reference(first)[2]).metric))
    except ValueError:
        return joined  # other facts or rows: no common items


def changed_row(row: str) -> str:
    """The row that an ablation changes in one way."""
    return "meft_no_ke" if row.startswith("meft_no_ke_") else "meft"


def forgotten(results: Results, reference: str) -> Values:
    """Loss on the base's own text above the base's, nats per token, seed by seed. The base and its texts are the same
    for every seed, so its mean also serves seeds that it was not run with. On a pretrained model the base's own loss
    stands in each record."""
    if parse_reference(reference)[2] != "facts":
        return measure(results, "own_text_nats", reference)
    base, own = measure(results, "base_nats", "base 0% facts"), measure(results, "base_nats", reference)
    if not base.by_seed:
        return replace(own, by_seed={}, gaps={**own.gaps, **base.gaps}, absent=own.absent or base.absent)
    level = statistics.fmean(base.by_seed.values())
    above = {s: v - level for s, v in own.by_seed.items()}
    return replace(own, by_seed=above, stale=own.stale or base.stale)


def ratio(first: Values, second: Values) -> Values:
    """First over second, seed by seed; a seed whose second is 0 has none."""
    zeros = {s: f"seed {s}: the second quantity is 0" for s, value in second.by_seed.items() if value == 0}
    kept = {s: value for s, value in second.by_seed.items() if value != 0}
    return _combine(first, replace(second, by_seed=kept, ended={**second.ended, **zeros}), lambda x, y: x / y)


def minus(first: Values, second: Values) -> Values:
    """First minus second, seed by seed."""
    return _combine(first, second, lambda x, y: x - y)


def _records(results: Results, reference: str) -> dict[int, Record]:
    row, share, task, variant = parse_reference(reference)
    return results.records_of((row, share), task, variant)


def _combine(a: Values, b: Values, by: Callable[[float, float], float]) -> Values:
    """Seed by seed. A side that is planned with fewer seeds limits the pairs: the other's extra seeds are no gap."""
    planned = a.planned & b.planned if a.planned and b.planned else a.planned | b.planned

    def told(name: str) -> dict[int, str]:
        both = [*getattr(a, name).items(), *getattr(b, name).items()]
        return {s: "; ".join(dict.fromkeys(t for seed, t in both if seed == s)) for s, _ in both
                if s in planned or not planned}  # fmt: skip

    shared = {s: by(a.by_seed[s], b.by_seed[s]) for s in a.by_seed if s in b.by_seed}
    return Values(
        shared,
        "; ".join(dict.fromkeys(t for t in (a.absent, b.absent) if t)),
        told("gaps"),
        told("ended"),
        planned,
        a.stale or b.stale,
        weakest((a.evidence, b.evidence)) if shared else "not-run",
        None,
        tuple(dict.fromkeys((*a.run_keys, *b.run_keys))),
    )
