"""Valid records with chosen scores, made without any training."""

from collections.abc import Iterable
from typing import Any

from meft_bench.harness.record import check_record
from meft_bench.harness.suites import Cell
from meft_bench.report.cells import Record, Results

N = 20
METRICS = {
    "facts": ("contains", "exact_match"),
    "cloze": ("contains", "exact_match"),
    "tools": ("iou",),
    "arithmetic": ("accuracy",),
    "nq": ("contains",),
    "squad": ("contains",),
    "toolbench": ("iou",),
    "gsm8k": ("accuracy",),
}
CODE = "c0de"
LAYER_SHARES = (1.0, 0.75, 0.5, 0.25)
STEPS_TIMED = 10


def make_record(cell: Cell, right: int = 5, n: int = N, code: str = CODE, base: int = 1_000_000) -> Record:
    """A finished run that got the first right of its n items; IoU gives half a point for one more."""
    spec = cell.spec
    record: dict[str, Any] = {
        "schema": 1,
        "run_key": spec.run_key,
        "state": "ok",
        "spec": spec.to_dict(),
        "code_digest": code,
        "provenance": {"threads": 1, "gpu": None, "gpu_reason": "none"},
        "parameters": {
            "groups": {"keys": 4096, "values": 4096},
            "trainable": 8192 if spec.steps else 0,
            "base": base,
            "trainable_percent_of_base": {"0%": 0.0, "100%": 100.0}.get(cell.share, float(cell.share.rstrip("%"))),
        },
        "memory": {"evidence": "measured"},
        "traffic": _traffic(cell),
        "timing": {"evidence": "measured", "step_s": [], "note": "nothing was trained"},
        "quality": {"evidence": "measured", **{split: _split(split, spec.task, right, n) for split in spec.splits}},
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
        }
    check_record(record)
    return record


def broken(record: Record, state: str, why: str) -> Record:
    """The record of the same run, ended as state."""
    ended = {**record, "state": state, "state_reason": why, "quality": None, "quality_reason": why}
    check_record(ended)
    return ended


def results_of(cells: list[Cell], records: Iterable[Record]) -> Results:
    """As the report makes them, with CODE for today's code."""
    return Results(cells, {r["run_key"]: r for r in records}, digest=lambda task, method, model: CODE)


def _split(split: str, task: str, right: int, n: int) -> dict[str, Any]:
    metrics = {}
    for name in METRICS[task]:
        items: list[float] = [1] * right + [0] * (n - right)
        if name == "iou" and right < n:
            items[right] = 0.5
        metrics[name] = {"mean": round(sum(items) / n, 6), "stderr": 0.1, "items": items}
    return {"n": n, "ids": [f"{split}-{i}" for i in range(n)], "metrics": metrics, "examples": []}


def _traffic(cell: Cell) -> dict[str, Any]:
    """Bytes as a run of 4 layers with hidden size 8 would count them, T = 16 tokens a micro-batch."""
    spec = cell.spec
    if spec.method not in ("meft", "parallel_adapter_offload"):
        return {"evidence": "measured", "note": "nothing crosses: the method lives on the device", "total_bytes": 0}
    neurons = spec.options["neurons"]
    union = [neurons * s if spec.method == "meft" else neurons for s in LAYER_SHARES]
    moved = {"h2d_rows_bytes": round(sum(union) * 2 * 8 * 4) * spec.steps}
    moved["d2h_grads_bytes"] = moved["h2d_rows_bytes"]
    if spec.method == "meft":
        moved |= {"d2h_hidden_bytes": 16 * 8 * 4 * 4 * spec.steps, "h2d_index_bytes": 512 * spec.steps}
        moved |= {"d2h_score_bytes": 256 * spec.steps, "h2d_score_bytes": 256 * spec.steps}
    total = sum(moved.values())
    return {
        "evidence": "measured",
        "total_bytes": total,
        "by_purpose": moved,
        "per_micro_batch_bytes": total // spec.steps,
        "per_optimizer_step_bytes": total // spec.steps,
        "per_trained_token_bytes": round(total / spec.steps / 16, 2),
        "rows_moved_by_layer": [{"mean": u, "p95": u} for u in union],
        "tokens_per_micro_batch": 16.0,
    }
