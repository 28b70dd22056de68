"""Valid records with chosen scores and plausible probes, made without any training."""

from collections.abc import Iterable
from typing import Any

from meft_bench.harness.record import SCHEMA, check_record
from meft_bench.harness.suites import Cell
from meft_bench.report.records.results import Record, Results

N = 20
METRICS = {
    "facts": ("contains", "exact_match"),
    "cloze": ("contains", "exact_match"),
    "tools": ("iou",),
    "arithmetic": ("accuracy",),
    "people": ("contains",),
    "nq": ("contains",),
    "squad": ("contains",),
    "toolbench": ("iou",),
    "gsm8k": ("accuracy",),
}
CODE = {"method": 1}
"""Numerics of the made records."""
LAYER_SHARES = (1.0, 0.75, 0.5, 0.25)
STEPS_TIMED = 10
TOKENS = 16
"""Of a step."""
GRID_BATCHES, GRID_LENGTHS = (1, 4, 16, 64), (8, 16, 32)
CURVE_POINTS = 21


def make_record(cell: Cell, right: int = 5, n: int = N, stale: bool = False, base: int = 1_000_000) -> Record:
    """A finished run that got the first right of its n items; IoU gives half a point for one more."""
    spec = cell.spec
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run_key": spec.run_key,
        "state": "ok",
        "spec": spec.to_dict(),
        "numerics": {} if stale else CODE,
        "provenance": {"threads": 1, "gpu": None, "gpu_reason": "none"},
        "parameters": {
            "groups": {"keys": 4096, "values": 4096},
            "trainable": 8192 if spec.steps else 0,
            "base": base,
            "trainable_percent_of_base": {"0%": 0.0, "100%": 100.0}.get(cell.share, float(cell.share.rstrip("%"))),
        },
        "memory": _memory(cell, base),
        "traffic": _traffic(cell),
        "timing": {"evidence": "measured", "step_s": [], "note": "nothing was trained"},
        "quality": {"evidence": "measured", **{split: _split(split, spec.task, right, n) for split in spec.splits}},
        "probes": _probes(cell),
        "curve": None,
        "curve_reason": "nothing was trained",
    }
    if spec.steps:
        record["timing"] = {
            "evidence": "measured",
            "step_s": [0.1] * STEPS_TIMED,
            "median_step_s": 0.1,
            "real_tokens_per_s": 5000.0,
            "rows_dropped": 3 if spec.task == "toolbench" else 0,
            "tokens_padded": TOKENS * spec.steps,
        }
    check_record(record)
    return record


def forgot(divergence: float, kept: list[int]) -> dict[str, Any]:
    """The block of harness/forgetting.py, the same on both texts and in both ways of asking."""
    text = {"nats_per_token": 4.0 + divergence, "base_nats_per_token": 4.25, "kl_nats_per_token": divergence,
            "tokens": 500}  # fmt: skip
    known = {"base_right": len(kept), "kept": sum(kept) / len(kept), "items": kept}
    return {"held_out": text, "own_text": text, "known": {"asked": 100, "greedy": known, "choice": known}}


def real_record(cell: Cell, right: int = 5, divergence: float = 0.5, kept: int = 8) -> Record:
    """A run of the suite smollm2: right of its N items, and kept of ten plain facts still stated."""
    record = make_record(cell, right, base=134_515_008)
    record["probes"]["forgetting"] = forgot(divergence, [1] * kept + [0] * (10 - kept))
    check_record(record)
    return record


def broken(record: Record, state: str, why: str) -> Record:
    """The record of the same run, ended as state."""
    ended = {**record, "state": state, "state_reason": why, "quality": None, "quality_reason": why}
    check_record(ended)
    return ended


def results_of(cells: list[Cell], records: Iterable[Record]) -> Results:
    """As the report makes them, with CODE for today's code."""
    return Results(cells, {r["run_key"]: r for r in records}, today=lambda task, method, model: CODE)


def _split(split: str, task: str, right: int, n: int) -> dict[str, Any]:
    metrics = {}
    for name in METRICS[task]:
        items: list[float] = [1] * right + [0] * (n - right)
        if name == "iou" and right < n:
            items[right] = 0.5
        metrics[name] = {"mean": round(sum(items) / n, 6), "stderr": 0.1, "items": items}
    return {"n": n, "ids": [f"{split}-{i}" for i in range(n)], "metrics": metrics, "examples": []}


def _traffic(cell: Cell) -> dict[str, Any]:
    """Bytes as a run of 4 layers with hidden size 8 would count them, TOKENS tokens a step."""
    spec = cell.spec
    if spec.method not in ("meft", "parallel_adapter_offload"):
        return {"evidence": "measured", "note": "nothing crosses: the method lives on the device", "total_bytes": 0}
    neurons = spec.options["neurons"]
    union = [neurons * s if spec.method == "meft" else neurons for s in LAYER_SHARES]
    parts = spec.steps * spec.accumulation
    moved = {"h2d_rows_bytes": round(sum(union) * 2 * 8 * 4) * parts}
    moved["d2h_grads_bytes"] = moved["h2d_rows_bytes"]
    if spec.method == "meft":
        moved |= {"d2h_hidden_bytes": TOKENS * 8 * 4 * 4 * spec.steps, "h2d_index_bytes": 512 * spec.steps}
        moved |= {"d2h_score_bytes": 256 * spec.steps, "h2d_score_bytes": 256 * spec.steps}
    total = sum(moved.values())
    return {
        "evidence": "measured",
        "total_bytes": total,
        "by_purpose": moved,
        "per_micro_batch_bytes": total // parts,
        "per_optimizer_step_bytes": total // spec.steps,
        "per_trained_token_bytes": round(total / spec.steps / TOKENS, 2),
        "rows_moved_by_layer": [{"mean": u, "p95": u} for u in union],
        "tokens_per_micro_batch": TOKENS / spec.accumulation,
    }


def _memory(cell: Cell, base: int) -> dict[str, Any]:
    """What fp32 AdamW holds: on the device, or on the host for a method that lives there."""
    percent = {"0%": 0.0, "100%": 100.0}.get(cell.share, float(cell.share.rstrip("%")))
    where = "host" if cell.spec.method in ("meft", "parallel_adapter_offload") else "device"
    own = round(percent / 100 * base) * 4
    sizes = {"parameters": own, "gradients": own, "moments": 2 * own}
    return {
        "evidence": "measured",
        "accounted": {f"{where}_{name}_bytes": size for name, size in sizes.items()},
        "device_peak_by_phase": None,
        "device_peak_by_phase_reason": "ran on the CPU",
        "phase_s": {"train": 1.0},
    }


def _probes(cell: Cell) -> dict[str, Any]:
    """The block of harness/probes.py: smooth curves that differ by layer, size and seed."""
    spec, layers = cell.spec, range(len(LAYER_SHARES))
    block: dict[str, Any] = {"evidence": "measured"}
    if spec.model == "embedded":
        nats = 1.5 + (0.02 * len(cell.row) + 0.01 * spec.seed if spec.steps else 0.0)
        block["base_text"] = {"nats_per_token": round(nats, 6), "perplexity": 4.5, "tokens": 3571}
    if spec.method.startswith("parallel_adapter"):
        block["activation"] = _activation(spec.seed)
    if spec.method == "meft":
        options = spec.options
        kept = options["kept"] / options["neurons"]
        block["union_grid"] = [
            {
                "batch": size,
                "length": length,
                "tokens": size * length,
                "share_by_layer": [round(1 - (1 - kept) ** (size * length * (0.2 + 0.1 * i)), 5) for i in layers],
            }
            for length in GRID_LENGTHS
            for size in GRID_BATCHES
        ]
        block["neurons"] = {
            "tokens": 3000,
            "dead_share": [round(0.05 * i * (1 - kept) + 0.01 * spec.seed, 5) for i in layers],
            "neuron_entropy": [round(0.95 - 0.03 * i, 5) for i in layers],
            "kept_per_token": [options["kept"] * 0.99 for _ in layers],
        }
        if options["key_experts"]:
            block["neurons"]["expert_entropy"] = [round(0.98 - 0.04 * i - 0.01 * spec.seed, 5) for i in layers]
        block["lookahead"] = {
            "layers_ahead": 1,
            "recall_per_token": [round(0.3 + 0.15 * i + 0.02 * spec.seed, 5) for i in layers[:-1]],
            "recall_of_union": [1.0 for _ in layers[:-1]],
        }
        metrics = {name: {"mean": 0.25} for name in METRICS[spec.task]}
        block["other_reading"] = {"reading": "union", "split": "test", "n": N, "metrics": metrics}
    return block


def _activation(seed: int) -> dict[str, Any]:
    places = [i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    powers = [2.0 + i + 0.2 * seed for i in range(len(LAYER_SHARES))]
    return {
        "tokens": 3000,
        "active_share": [round(1 / p, 5) for p in powers],
        "top5_share_of_token": [round(1 - 0.95**p, 5) for p in powers],
        "cumulative_by_layer": [[round(1 - (1 - x) ** p, 5) for x in places] for p in powers],
    }


TIMELINE: dict[str, Any] = {
    "evidence": "measured",
    "about": "made by hand for a test",
    "settings": {"neurons": 1024, "tokens": 512, "device": "cpu"},
    "variants": [
        {
            "name": name,
            "title": title,
            "median_s": {"retrieval": a, "gather": b, "transfer": c, "device": 0.2, "gradients": 0.02, "adam": d},
            "total_s": a + b + c + d + 0.22,
            "total_low_s": a + b + c + d + 0.2,
            "total_high_s": a + b + c + d + 0.26,
        }
        for name, title, a, b, c, d in (
            ("parallel_adapter", "Parallel Adapter, resident", 0.0, 0.0, 0.0, 0.03),
            ("meft", "MEFT", 0.04, 0.03, 0.05, 0.1),
            ("meft_no_ke", "without Key-Experts", 0.2, 0.03, 0.05, 0.1),
            ("meft_no_sparse", "without sparse transfer", 0.04, 0.03, 0.2, 0.15),
            ("meft_neither", "without both", 0.2, 0.03, 0.2, 0.15),
        )
    ],
    "events": [
        {"lane": lane, "name": name, "layer": layer, "start_s": start + at, "end_s": start + at + 0.01, "phase": phase}
        for phase, start in (("forward", 0.0), ("backward", 0.15))
        for layer in range(3)
        for at, lane, name in (
            (0.04 * layer, "host", "retrieval"),
            (0.04 * layer + 0.01, "link", "rows"),
            (0.04 * layer + 0.02, "device", "layer"),
        )
    ]
    + [{"lane": "host", "name": "adam", "layer": None, "start_s": 0.3, "end_s": 0.35, "phase": "update"}],
}
"""results/bench/timeline.json as the figures read it."""

_HEAD = {"evidence": "measured", "cpu": "a processor"}
_SETTINGS = {"hidden": 256, "tokens": 512, "probed": 8, "kept": 64, "touched": 1600, "threads": 2, "repeats": 2,
             "kernels": "native kernels"}  # fmt: skip
KERNELS: dict[str, Any] = {
    **_HEAD,
    "settings": _SETTINGS,
    "rows": [
        {"kernel": kernel, "neurons": neurons, "predicted_s": 0.004,
         "rounds_s": {"rows.py": [0.005, 0.006], "indexed torch": [0.05 * neurons / 4096, None]}}
        for kernel in ("gather_bf16", "accumulate", "advance_fp32", "advance_bf16", "search_experts")
        for neurons in (4096, 8464, 65536)
    ]
    + [{"kernel": None, "neurons": 10**6, "skipped": "needs 300.0 GiB, 8.0 GiB are free"}],
}  # fmt: skip
"""results/bench/kernels.json as its figure reads it."""
_SCALING: dict[str, Any] = {
    "rows": [
        {"neurons": neurons, "with_ke_times_s": [1e-4 * neurons**0.5, 2e-4 * neurons**0.5],
         "without_ke_times_s": [1e-5 * neurons, None]}
        for neurons in (1024, 16384, 65536)
    ],
    "exponent_with_ke": 0.52, "exponent_without_ke": 0.98,
    "count_exponent_with_ke": 0.5, "count_exponent_without_ke": 1.0,
}  # fmt: skip
RETRIEVAL: dict[str, Any] = {**_HEAD, "settings": _SETTINGS, **_SCALING, "wide": {"hidden": 4096, **_SCALING}}
"""results/bench/retrieval.json as its figure reads it."""
