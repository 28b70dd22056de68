"""The benchmark of a whole training step: each variant of the paper's Figure 5 split into its parts, and one step's
events (Figure 9). What is timed is in timed_step.py."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.bench.common import open_folder, write_result
from meft_bench.bench.timed_step import BASELINE, COMPONENTS, LR, VARIANTS, Mark, Sizes, Step, Trainer, Variant
from meft_bench.provenance import cpu_model, provenance
from meft_bench.train.methods import require_positive

NUMERICS = 1
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""


def step_benchmark(output: Path, repeats: int = 7, **sizes: Any) -> str:
    """Time the variants' steps in turn; write step.json and step.md into output, return the Markdown.

    sizes are fields of Sizes. Each repeat runs every variant once on the same fresh tokens, so a drifting machine moves
    all of them; a ratio compares two steps of one repeat. Times are seconds of wall clock; within a repeat the six
    components add up to the total, their medians need not. Raises ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats)
    known = {f.name for f in dataclasses.fields(Sizes)}
    if unknown := sorted(set(sizes) - known):
        raise ValueError(f"step has no size {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    settings = Sizes(**sizes)
    open_folder(output)
    trainers = [Trainer(variant, settings) for variant in VARIANTS]
    generator = torch.Generator().manual_seed(0)
    steps: dict[str, list[Step]] = {variant.name: [] for variant in VARIANTS}
    for repeat in tqdm(range(settings.warmup + repeats), desc="step", unit="round", leave=False):
        ids_BL = torch.randint(settings.vocabulary, (settings.batch, settings.length), generator=generator)
        for trainer in trainers:
            step = trainer.step(ids_BL.to(settings.device))
            if repeat >= settings.warmup:
                steps[trainer.variant.name].append(step)
    # The step of Figure 9 is a timed one: the one whose total is the median.
    typical = sorted(steps["meft"], key=lambda s: s.total_s)[(repeats - 1) // 2]
    threads, config = torch.get_num_threads(), settings.config(key_experts=True)
    result = {
        "evidence": "measured",
        "about": _about(settings),
        "settings": {**dataclasses.asdict(settings), "experts": config.experts, "probed": config.probed,
                     "repeats": repeats, "threads": threads, "learning_rate": LR},
        "variants": [_summary(v, steps[v.name], steps[BASELINE]) for v in VARIANTS],
        "events": events(typical),
        "provenance": provenance(threads),
    }  # fmt: skip
    return write_result(output, "step", result, _markdown(result))


def events(step: Step) -> list[dict[str, Any]]:
    """The step as events that follow one another without gap: spans on their lanes, all between them on "device".

    start_s and end_s are seconds since the step's start.
    """
    found, origin = [], step.marks[0].start_s

    def add(lane: str, name: str, mark: Mark, start_s: float, end_s: float) -> None:
        start, end = round(start_s - origin, 6), round(end_s - origin, 6)
        if end > start:
            found.append({"lane": lane, "name": name, "layer": mark.layer, "phase": mark.phase,
                          "start_s": start, "end_s": end})  # fmt: skip

    ends = [m.start_s for m in step.marks[1:]] + [step.end_s]
    for mark, end_s in zip(step.marks, ends, strict=True):
        at = mark.start_s
        for span in (s for s in step.spans if mark.start_s <= s.start_s < end_s):
            add("device", mark.part, mark, at, span.start_s)
            add(span.lane, span.name, mark, span.start_s, span.end_s)
            at = span.end_s
        add("device", mark.part, mark, at, end_s)
    return found


def _summary(variant: Variant, steps: list[Step], baseline: list[Step]) -> dict[str, Any]:
    totals = [s.total_s for s in steps]
    parts = [s.components_s() for s in steps]
    return {
        "name": variant.name,
        "title": variant.title,
        "median_s": {name: round(statistics.median(p[name] for p in parts), 6) for name in COMPONENTS},
        "components_s": {name: [round(p[name], 6) for p in parts] for name in COMPONENTS},
        "total_s": round(statistics.median(totals), 6),
        "total_low_s": round(min(totals), 6),
        "total_high_s": round(max(totals), 6),
        "totals_s": [round(t, 6) for t in totals],
        "ratio_to_parallel_adapter": [round(s.total_s / b.total_s, 4) for s, b in zip(steps, baseline, strict=True)],
        "rows_moved_by_layer": [s.rows_moved for s in steps],
        "h2d_bytes": [s.h2d_bytes for s in steps],
        "d2h_bytes": [s.d2h_bytes for s in steps],
    }


def _about(sizes: Sizes) -> str:
    rest = (
        '"device" is all of forward and backward that is not in another component: the model, the adapters, and the '
        "casts and the router's gradient product that the host makes. All-rows variants gather through the same "
        "index_select as the others. A random-weight Llama on random tokens: rows_moved_by_layer says how sparse."
    )
    if sizes.device == "cuda":
        return (
            f"One GPU ({torch.cuda.get_device_name()}) and its host ({cpu_model()}): copies are to and from "
            f"page-locked memory, and the host works when the device has done its part, so nothing overlaps. {rest}"
        )
    return (
        f"CPU only ({cpu_model()}): the device is an arena in the same host memory, so transfers are memory copies, "
        f"not PCIe. {rest}"
    )


def _markdown(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"One training step, B x length = {s['batch']} x {s['length']}, D={s['hidden']}, {s['layers']} layers, "
        f"R={s['neurons']}, N={s['experts']}, P={s['probed']}, K={s['kept']}, {s['dtype']}, {s['threads']} threads; "
        f"milliseconds, medians of {s['repeats']} repeats, the total with its lowest and highest (measured).",
        "",
        result["about"],
        "",
        f"| variant | rows moved, % of R | {' | '.join(COMPONENTS)} | total | times the Parallel Adapter's |",
        "|---|---:|" + "---:|" * (len(COMPONENTS) + 2),
    ]
    for v in result["variants"]:
        rows = [u for step in v["rows_moved_by_layer"] for u in step]
        share = f"{100 * statistics.mean(rows) / s['neurons']:.0f}" if rows else "–"
        parts = " | ".join(f"{1000 * v['median_s'][name]:.1f}" for name in COMPONENTS)
        total = f"{1000 * v['total_s']:.1f} ({1000 * v['total_low_s']:.1f}–{1000 * v['total_high_s']:.1f})"
        ratio = statistics.median(v["ratio_to_parallel_adapter"])
        lines.append(f"| {v['title']} | {share} | {parts} | {total} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"
