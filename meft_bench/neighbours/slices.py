"""PARIS and ELSA cut GPUs into slices for the work at hand. What would that do for the suites' own training runs?

Every run of the paper's suite on LLaMA-7B and of the suite on SmolLM2-135M, with the device memory and the time that
the profile predicts for it on each kind of MIG slice, packed onto the eight GPUs of a node. Nothing is run, and no MIG
is touched. A slice has its part of the GPU's compute, memory, link and host, as if all slices were busy.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.neighbours.finding import Finding
from meft_bench.neighbours.packing import Job, Schedule, bound, packed, schedule, unused_memory
from meft_bench.simulate.mig import PROFILES, one_size

if TYPE_CHECKING:
    from meft_bench.harness.spec import RunSpec

NUMERICS = 3
TITLE = "PARIS and ELSA"
PAPER = "2202.13481"
CLAIM = (
    "A GPU cut into slices of several sizes for the work at hand (1 to 7 sevenths of an A100), with a scheduler that "
    "knows them, serves inference at low latency and high utilisation; the abstract gives no factor."
)
TESTED = (
    "The training runs of two suites (LLaMA-7B and SmolLM2-135M), packed onto MIG slices of 8 GPUs by predicted memory "
    "and time: slices chosen, makespan and unused memory against whole GPUs and slices of one size."
)
MINUTES = 6
USES = ("meft", "parallel_adapter", "parallel_adapter_offload", "adapter_h", "lora", "full", "profile", "simulator")
ONE_SIZE = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "7g.80gb")
WHOLE = "7g.80gb"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is packed onto what."""

    cards: tuple[str, ...] = ("a100", "h100")
    gpus: int = 8
    suites: tuple[str, ...] = ("paper", "smollm2")
    most: int | None = None
    """Kinds of runs of each suite; None takes all."""


_QUICK = Sizes(cards=("a100",), gpus=2, suites=("smollm2",), most=2)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Runs that take the same memory and the same time a step."""

    model: str
    method: str
    size: tuple[tuple[str, Any], ...]
    """The method's options that cost something."""
    rows: int
    length: int
    accumulation: int
    dtype: str = "bfloat16"
    """Of the base."""


def run(quick: bool) -> dict[str, Any]:
    sizes = _QUICK if quick else Sizes()
    runs = [(kind_of(spec), spec.steps) for suite in sizes.suites for spec in _specs(suite) if spec.steps]
    kinds = list(dict.fromkeys(kind for kind, _ in runs))
    if sizes.most:
        kinds = kinds[: sizes.most]
    places = [(group, sizes) for group in _by_program(kinds)]
    if quick:
        rows = [row for place in places for row in _predicted(*place)]
    else:
        from meft_bench.profile.pool import Pool

        with Pool({}, None) as pool:
            rows = [row for _, made in pool.each(_predicted, places, "slices") for row in made]
    known = {row["kind"]: row for row in rows}
    count = Counter((kind, steps) for kind, steps in runs if kind in kinds)
    return {
        "evidence": "simulated",
        "settings": {**dataclasses.asdict(sizes), "tokens": "every row as long as the spec allows", "union": "assumed"},
        "kinds": sorted(({**row, "kind": title(row["kind"])} for row in rows), key=lambda row: row["kind"]),
        "packed": [_packed(card, count, known, sizes) for card in sizes.cards],
    }


# ---- the runs ----


def _specs(suite: str) -> list["RunSpec"]:
    from meft_bench.harness import smollm2, suites

    cells = suites.paper("llama-7b", "hub", "cuda") if suite == "paper" else smollm2.cells(smollm2.NAME, "hub")
    return [cell.spec for cell in cells]


_COSTLESS = ("alpha", "activation", "start", "router_init", "key_std", "selection", "overlap", "gate", "kept",
             "experts", "probed")  # fmt: skip
"""Options that change what is computed, and neither memory nor time by more than the profile tells apart; Key-Experts
have their usual sizes."""


def kind_of(spec: "RunSpec") -> Kind:
    """What decides memory and time."""
    size = tuple(sorted((name, value) for name, value in spec.options.items() if name not in _COSTLESS))
    rows = spec.batch_size // spec.accumulation
    assert spec.max_length is not None
    return Kind(model=spec.model, method=spec.method, size=size, rows=rows, length=spec.max_length,
                accumulation=spec.accumulation, dtype=spec.dtype)  # fmt: skip


def title(kind: Kind) -> str:
    """In words."""
    of = {k: v for k, v in kind.size if k in ("neurons", "rank", "size", "targets", "reading", "key_experts")}
    told = ", ".join(f"{name}={value}" for name, value in of.items())
    wide = " in fp32" * (kind.dtype == "float32")
    return f"{kind.model} {kind.method} ({told}){wide} {kind.accumulation} x {kind.rows} x {kind.length}"


def _by_program(kinds: list[Kind]) -> list[tuple[Kind, ...]]:
    """Kinds that differ in their micro-batches' number alone are simulated once."""
    groups: dict[Kind, list[Kind]] = {}
    for kind in kinds:
        groups.setdefault(dataclasses.replace(kind, accumulation=1), []).append(kind)
    return [tuple(group) for group in groups.values()]


# ---- memory and time, by the simulator ----


def _predicted(group: tuple[Kind, ...], sizes: Sizes) -> list[dict[str, Any]]:
    """{"kind", "device_bytes", "seconds"} of each: bytes without the context, seconds of a step by card and profile."""
    import torch

    from meft_bench.profile.matrix import PAPER_REASON, PAPER_SHARE
    from meft_bench.profile.selection import assumed_union
    from meft_bench.profile.simulated import largest, simulate
    from meft_bench.profile.spec import ProfileSpec
    from meft_bench.simulate import cards, mig, nodes
    from meft_bench.simulate.accumulate import Recorded, TouchedRows, replay_accumulated

    kind, options = group[0], dict(group[0].size)
    neurons = options.get("neurons", 1)
    union = assumed_union(PAPER_SHARE, neurons, PAPER_REASON) if kind.method == "meft" else None
    spec = ProfileSpec(model=kind.model, variant=_VARIANT[kind.method], neurons=neurons, batch=kind.rows,
                       seq=kind.length, union=union)  # fmt: skip
    config, counts = _config(kind.model), tuple(sorted({k.accumulation for k in group}))
    size = _complete(kind.method, options)
    dtype = getattr(torch, kind.dtype)
    run, runs = simulate(spec, config, size, dtype=dtype)
    threes = None
    if counts[-1] > 1:
        run, three = simulate(dataclasses.replace(spec, accumulation=3), config, size, dtype=dtype)
        threes = (three[0].program, three[1].program)
    rows = TouchedRows(neurons, union.touched(neurons), union.rows, neurons) if union else None
    recorded = Recorded((runs[0].program, runs[1].program), run.layers, runs[1].layers == run.layers, threes, rows)
    found: dict[Kind, dict[str, Any]] = {
        k: {"kind": k, "device_bytes": largest(run, "device").bytes, "seconds": {}} for k in group
    }
    for name in sizes.cards:
        card = cards.card(name)
        node = nodes.node(card, cards.host(nodes.usual_host(card)))
        for profile in PROFILES.values():
            there = mig.slice_of(node.card_of(sizes.gpus), profile)
            steps = replay_accumulated(recorded, there, mig.host_of(node.host_of(sizes.gpus), profile), counts)
            for k in group:
                found[k]["seconds"].setdefault(name, {})[profile.name] = round(steps[k.accumulation].step_s, 6)
    return list(found.values())


_VARIANT = {"lora": "lora_all", "adapter_h": "adapter_h", "parallel_adapter": "parallel_adapter",
            "parallel_adapter_offload": "parallel_adapter_streamed", "full": "full", "meft": "meft"}  # fmt: skip


def _complete(method: str, options: dict[str, Any]) -> dict[str, Any]:
    from meft_bench.meft.config import MeftOptions

    if method != "meft":
        return options
    one = MeftOptions(**{**options, "kept": 1})
    return {**options, "kept": min(64, one.candidates)}


def _config(model: str) -> Any:
    from transformers import LlamaConfig

    from meft_bench.harness.smollm2 import NAME
    from meft_bench.profile import shapes

    if model != NAME:
        return shapes.model_config(model)
    return LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                       num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip


# ---- packing ----


def _packed(card: str, count: Counter, known: dict[Kind, dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """The chosen slices of a node, and what slices of one size and whole GPUs would do."""
    from meft_bench.simulate import cards

    context = cards.card(card).context_bytes.value
    jobs = [_job(kind, steps, known[kind], card, context) for (kind, steps), runs in count.items() for _ in range(runs)]
    able = [job for job in jobs if job.seconds]
    gpu_bytes = PROFILES[WHOLE].usable_gib * 2**30
    best = packed(able, sizes.gpus)
    assert best is not None
    told: dict[str, Any] = {
        "card": card, "jobs": len(jobs), "fit": len(able), "layout": [list(p) for p in best.layout],
        "makespan_s": round(best.makespan, 3), "bound_s": round(bound(able, sizes.gpus), 3),
        "unused_memory": round(unused_memory(able, best, gpu_bytes), 4), "one_size": {},
    }  # fmt: skip
    for name in ONE_SIZE:
        told["one_size"][name] = _alone(name, able, sizes.gpus, gpu_bytes)
    return told


def _job(kind: Kind, steps: int, row: dict[str, Any], card: str, context: float) -> Job:
    nbytes = row["device_bytes"] + context
    seconds = {name: steps * s for name, s in row["seconds"][card].items() if nbytes <= _room(name)}
    return Job(name=title(kind), nbytes=nbytes, seconds=seconds)


def _room(name: str) -> float:
    return PROFILES[name].usable_gib * 2**30


def _alone(name: str, jobs: list[Job], gpus: int, gpu_bytes: float) -> dict[str, Any]:
    """The jobs that fit slices of one size on these, and on the mixed slices that are best for them alone."""
    fit = [job for job in jobs if name in job.seconds]
    made = schedule(fit, [one_size()[name]] * gpus)
    best: Schedule | None = packed(fit, gpus)
    assert made is not None and best is not None
    return {
        "fit": len(fit), "makespan_s": round(made.makespan, 3),
        "unused_memory": round(unused_memory(fit, made, gpu_bytes), 4), "mixed_makespan_s": round(best.makespan, 3),
    }  # fmt: skip


# ---- what came out ----


def findings(found: dict[str, Any]) -> list[Finding]:
    made = []
    for row in found["packed"]:
        whole, hours = row["one_size"][WHOLE], row["makespan_s"] / 3600
        layout = Counter(name for partition in row["layout"] for name in partition)
        slices = ", ".join(f"{n} x {name}" for name, n in sorted(layout.items(), key=lambda e: e[0]))
        made.append(Finding(
            says=f"{row['card']}: {slices} for the runs that fit; {hours:,.0f} hours against "
                 f"{whole['makespan_s'] / 3600:,.0f} on whole GPUs ({whole['makespan_s'] / row['makespan_s']:.2f} "
                 f"times), no schedule takes less than {row['bound_s'] / 3600:,.0f}. Memory times time unused: "
                 f"{100 * row['unused_memory']:.0f} % against {100 * whole['unused_memory']:.0f} %.",
            evidence="simulated", n=row["fit"], of=f"of {row['jobs']} runs"))  # fmt: skip
        ratios = {
            name: one["makespan_s"] / one["mixed_makespan_s"]
            for name, one in row["one_size"].items() if one["fit"] and name != WHOLE
        }  # fmt: skip
        if ratios:
            each = "; ".join(f"{name} {ratio:.2f} ({row['one_size'][name]['fit']} runs fit)"
                             for name, ratio in ratios.items())  # fmt: skip
            made.append(Finding(
                says=f"{row['card']}: slices of one size take so many times as long as mixed ones, for the runs that "
                     f"fit: {each}.",
                evidence="simulated", n=len(ratios), of="sizes of slice",
                interval=(min(ratios.values()), max(ratios.values())), covers="times, lowest to highest"))  # fmt: skip
    return made
