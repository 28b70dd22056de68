"""A base shrunk without training, and what it frees spent on neurons that train: quality at equal device bytes."""

from collections.abc import Sequence
from typing import Any

from meft_bench.harness.rates import swept_rate
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import HEADLINE_METRIC, RunSpec
from meft_bench.harness.suites import EMBEDDED_TASKS
from meft_bench.neighbours.finding import Finding
from meft_bench.train.methods import complete_options

NUMERICS = 1
TITLE = "Search for Efficient LLMs"
PAPER = "2409.17372"
CLAIM = (
    "Subnets of LLaMA-7B at 90 and 80 % of its parameters, found without training, beat those of training-free "
    "structured pruning."
)
TESTED = (
    "The embedded base at 90 and 80 % (FFN neurons by importance, outputs reformed, no search), the freed bytes spent "
    "on neurons of the Parallel Adapter, against the whole base at equal device bytes, on facts."
)
MINUTES = 4
USES = ("parallel_adapter", "parallel_adapter_shrunk", "facts", "training", "evaluation", "probes", "embedded")
SHARES = (0.9, 0.8)
_SIZES = ("2%", "10%")
"""Of the adapter on the whole base."""
_SEEDS = (0, 1, 2)
BASE_BYTES, TRAINED_BYTES = 4, 16
"""Of a parameter in fp32: frozen; trained, with its gradient and two moments."""
_SHRUNK, _WHOLE = "parallel_adapter_shrunk", "parallel_adapter"


def specs(quick: bool) -> list[RunSpec]:
    """For each size and seed: the whole base; each share with the bytes spent; each share with them left over."""
    return [spec for _, spec in _cells(quick)]


def _cells(quick: bool) -> list[tuple[dict[str, Any], RunSpec]]:
    """(which, its run) in the order of specs()."""
    task: dict[str, Any] = dict(EMBEDDED_TASKS["facts"])
    if quick:
        task |= {"train_rows": 20, "eval_rows": 6, "steps": 3, "batch_size": 8}
    cells = []
    for size in _SIZES[:1] if quick else _SIZES:
        neurons, rate = SIZES["embedded"][_WHOLE][size], swept_rate(_WHOLE, size, "facts")
        assert rate is not None
        ways = [(1.0, False), *((share, spent) for share in SHARES for spent in (True, False))]
        for share, spent in ways:
            trained = neurons + (freed_neurons(share) if spent else 0)
            options = {"neurons": trained} if share == 1 else {"neurons": trained, "share": share}
            method = _WHOLE if share == 1 else _SHRUNK
            for seed in _SEEDS[:1] if quick else _SEEDS:
                which = {"size": size, "share": share, "spent": spent, "neurons": trained, "seed": seed}
                spec = RunSpec(method=method, options=complete_options(method, options), learning_rate=rate, seed=seed,
                               splits=("test",), **task)  # fmt: skip
                cells.append((which, spec))
    return cells


def freed_neurons(share: float) -> int:
    """Neurons a layer of the Parallel Adapter whose parameters, gradients and moments fit into what the embedded base
    at this share leaves free."""
    from meft_bench.train.models import embedded_dir, model_shape
    from meft_bench.train.shrink import removed_neurons

    shape = model_shape(embedded_dir(), None)
    removed = removed_neurons(shape.parameters, shape.layers, 3 * shape.hidden, share)
    # A neuron of a gated FFN has three rows, one of the adapter two; both are in every layer.
    return removed * 3 * BASE_BYTES // (2 * TRAINED_BYTES)


def device_bytes(base: int, trained: int) -> int:
    """Of a frozen base of that many parameters in fp32, and of the trained ones with their state."""
    return base * BASE_BYTES + trained * TRAINED_BYTES


def run(quick: bool, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores and device bytes of every run, and what shrinking alone does to the base."""
    shrunk = {str(share): _shrunk_base(share, quick) for share in (1.0, *SHARES)}
    rows = []
    for (which, spec), record in zip(_cells(quick), records, strict=True):
        assert record["state"] == "ok", record["run_key"]
        base = shrunk[str(which["share"])]["parameters"]
        trained = record["parameters"]["trainable"]
        score = record["quality"]["test"]["metrics"][HEADLINE_METRIC[spec.task]]["mean"]
        rows.append({
            **which, "run_key": record["run_key"], "score": score, "base": base, "trained": trained,
            "device_bytes": device_bytes(base, trained),
            "base_text_nats_per_token": record["probes"]["base_text"]["nats_per_token"],
        })  # fmt: skip
    return {"evidence": "measured", "shrunk": shrunk, "rows": rows, "compared": compared(rows)}


def _shrunk_base(share: float, quick: bool) -> dict[str, Any]:
    """The base at this share, untrained: parameters, and its loss on fresh draws of its own pretraining text."""
    from meft_bench.harness.probes import base_text
    from meft_bench.train.models import load_model
    from meft_bench.train.shrink import shrink_ffns

    loaded = load_model("embedded", None, "float32", "cpu")
    shrink_ffns(loaded.model, share)
    text = base_text(loaded.model.eval(), loaded)
    return {"parameters": sum(p.numel() for p in loaded.model.parameters()), **text}


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each size, share and way of spending: mean score, and its differences from the whole base's, seed by seed."""
    whole = {(r["size"], r["seed"]): r for r in rows if r["share"] == 1}
    ways = dict.fromkeys((r["size"], r["share"], r["spent"]) for r in rows if r["share"] != 1)
    found = []
    for size, share, spent in ways:
        mine = [r for r in rows if (r["size"], r["share"], r["spent"]) == (size, share, spent)]
        theirs = [whole[size, r["seed"]] for r in mine]
        found.append({
            "size": size, "share": share, "spent": spent, "neurons": mine[0]["neurons"],
            "whole_neurons": theirs[0]["neurons"],
            "score": round(_mean(r["score"] for r in mine), 4),
            "whole_score": round(_mean(r["score"] for r in theirs), 4),
            "differences": [round(a["score"] - b["score"], 4) for a, b in zip(mine, theirs, strict=True)],
            "bytes_of_whole": round(mine[0]["device_bytes"] / theirs[0]["device_bytes"], 4),
        })  # fmt: skip
    return found


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def findings(found: dict[str, Any]) -> list[Finding]:
    """What shrinking costs the base, and for each size and share what the freed bytes buy."""
    nats = [found["shrunk"][str(share)]["nats_per_token"] for share in (1.0, *SHARES)]
    parts = ", ".join(f"{n:.3f} at {100 * s:.0f} %" for n, s in zip(nats[1:], SHARES, strict=True))
    base = Finding(says=f"Untrained, the base's loss on its own text is {nats[0]:.3f} nats whole, {parts}",
                   evidence="measured", n=len(nats), of="bases")  # fmt: skip
    return [base, *(_finding(c, found["compared"]) for c in found["compared"] if c["spent"])]


def _finding(one: dict[str, Any], others: Sequence[dict[str, Any]]) -> Finding:
    unspent = next(o for o in others if (o["size"], o["share"], o["spent"]) == (one["size"], one["share"], False))
    says = (
        f"{100 * one['share']:.0f} % of the base and {one['neurons']} neurons a layer: {one['score']:.3f}; all of it "
        f"and {one['whole_neurons']}: {one['whole_score']:.3f} (at {100 * one['bytes_of_whole']:.1f} % of its bytes); "
        f"with the bytes left over {unspent['score']:.3f}"
    )
    low, high = min(one["differences"]), max(one["differences"])
    return Finding(says=says, evidence="measured", n=len(one["differences"]), of="seeds", interval=(low, high),
                   covers="difference of scores, lowest to highest seed", digits=3)  # fmt: skip
