"""Valid profiles with chosen numbers, made without any simulation."""

import json
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import profile_numerics

GIB, MIB = 2**30, 2**20
COUNTS = ("1", "4", "16", "32")
HIDDEN, LAYERS, BASE = 4096, 32, 6_738_415_616
VARIANTS = {
    "base": ("Base model, inference only", "none", 0, 1.0),
    "lora_all": ("LoRA, all linear", "lora", 0, 1.2),
    "parallel_adapter": ("Parallel Adapter", "adapter", 0, 1.0),
    "parallel_adapter_streamed": ("Parallel Adapter, streamed whole", "offload", 1, 2.0),
    "parallel_adapter_host_optimizer": ("Parallel Adapter, optimizer on the host", "offload", 2, 1.5),
    "meft": ("MEFT", "meft", 3, 4.0),
    "meft_no_ke": ("MEFT without Key-Experts", "meft", 3, 6.0),
    "meft_no_sparse": ("MEFT without sparse transfer", "meft", 1, 5.0),
    "meft_neither": ("MEFT without both", "meft", 1, 8.0),
}
"""Variant -> title, family, kind of traffic (none, whole a micro-batch, whole a step, rows of the union), step in s."""
WITH_UNION = ("meft", "meft_no_ke")


def make_row(variant: str, neurons: int, checkpointing: bool, union: str = "logged", **changed: Any) -> dict[str, Any]:
    """A row whose device peak is 13 GiB of base, 8 bytes a trained parameter where it is resident, and activations."""
    title, family, kind, step = VARIANTS[variant]
    trained = 0 if variant == "base" else 2 * HIDDEN * LAYERS * neurons
    share = {"logged": 0.9, "assumed": 0.25}[union]
    held = {"base weights": 13 * GIB, "activations": (1 if checkpointing else 4) * GIB}
    if family in ("lora", "adapter"):
        held |= {"adapter parameters": 4 * trained, "moments": 8 * trained}
    host = 0 if family in ("none", "lora", "adapter") else 16 * trained
    row: dict[str, Any] = {
        "key": "0123456789ab",
        "variant": variant,
        "title": title,
        "family": family,
        "neurons": None if variant == "base" else neurons,
        "size": {"rank": neurons // 4, "targets": "all"} if family == "lora" else {"neurons": neurons},
        "checkpointing": checkpointing,
        "state": "ok",
        "evidence": "simulated",
        "modelled": "",
        "parameters": {"trainable": trained, "base": BASE, "percent_of_base": round(100 * trained / BASE, 3)},
        "union": None,
        "union_reason": "not MEFT",
        "memory": {
            "device_peak_bytes": sum(held.values()),
            "device_total_bytes": sum(held.values()) + 450 * MIB,
            "by_category": held,
            "by_phase": {"forward": sum(held.values())},
            "host_peak_bytes": host,
            "host_by_category": {"moments": host} if host else {},
            "fits": sum(held.values()) + 450 * MIB <= 23.6 * GIB,
        },
        "traffic": _traffic(kind, trained, share),
        "time": {
            "evidence": "simulated",
            "step_s_by_accumulation": {c: step * int(c) for c in COUNTS},
            "tokens_per_s_by_accumulation": dict.fromkeys(COUNTS, 512 / step),
            "components_s": {"gpu": 0.6 * step, "gather": 0.3 * step, "h2d": 0.2 * step, "other_host": 0.01},
            "practicality": None if variant == "base" else round(1 / step, 4),
            "practicality_reason": "no resident Parallel Adapter of this size",
        },
    }
    if family == "meft":
        said = {"evidence": {"logged": "measured", "assumed": "assumed"}[union], "source": f"{union} for this test"}
        if variant not in WITH_UNION:
            share, said = 1.0, {"evidence": "simulated", "source": "all R rows move"}
        row["union"] = {"kept_share": 64 / neurons, "union_share": share, "union": round(share * neurons), **said}
    return {**row, **changed}


def make_profile(model: str = "llama-7b", card: str = "24GB", usable: float = 23.6, **changed: Any) -> dict[str, Any]:
    """Two sizes, every variant with and without checkpointing, one line that did not run."""
    rows = [
        make_row(v, n, c, u)
        for v in VARIANTS
        for n in ((3072, 6144) if v != "base" else (1,))
        for u in (("logged", "assumed") if v in WITH_UNION else ("logged",))
        for c in ((False, True) if v != "base" else (False,))
    ]
    lost = {k: rows[0][k] for k in ("key", "neurons", "checkpointing")}
    lost |= {"variant": "full", "title": "Full fine-tuning, AdamW", "family": "full", "size": {}, "state": "not-run"}
    rows.append({**lost, "evidence": "not-run", "reason": "the made simulation broke"})
    return {
        "schema": 1,
        "evidence": "simulated",
        "settings": {
            "model": model,
            "shape": {"hidden": HIDDEN, "layers": LAYERS, "parameters": BASE},
            "card": card,
            "card_title": f"{card} class (made speeds)",
            "memory_bytes": round(usable * GIB),
            "usable_bytes": round(usable * GIB),
            "context_bytes": 450 * MIB,
            "host": "desktop",
            "host_title": "a made desktop",
            "batch": 2,
            "seq": 256,
            "accumulations": [int(c) for c in COUNTS],
            "constants": {"card_pinned": {"value": 25e9, "unit": "bytes/s", "source": "made up here"}},
        },
        "rows": rows,
        "largest": _largest(),
        "paper": [
            {"figure": "elements moved an iteration", "printed": 0.56, "unit": "M",
             "ours": [{"label": "MEFT, U/R 0.25 assumed", "value": 0.61, "evidence": "simulated"}]},
            {"figure": "times less", "printed": None, "printed_reason": "none", "unit": "x", "ours": []},
        ],
        "timeline": {"variant": "meft", "neurons": 3072, "events": [
            {"lane": "gpu", "name": "model", "layer": 0, "phase": "forward", "start_s": 0.0, "end_s": 0.01},
            {"lane": "h2d", "name": "rows", "layer": 0, "phase": "forward", "start_s": 0.01, "end_s": 0.03},
            {"lane": "host", "name": "adam", "layer": 0, "phase": "update", "start_s": 0.03, "end_s": 0.07},
        ]},
        "provenance": {"dirty": False},
        "numerics": profile_numerics(["base", "lora", "meft", "parallel_adapter"]),
        **changed,
    }  # fmt: skip


def write_profiles(folder: Path, *profiles: dict[str, Any]) -> Path:
    """One file each, in a folder "profile" of its own; returns that folder."""
    place = folder / "profile"
    place.mkdir(parents=True, exist_ok=True)
    for p in profiles:
        (place / f"{p['settings']['model']}_{p['settings']['card']}.json").write_text(json.dumps(p))
    return place


def _traffic(kind: int, trained: int, share: float) -> dict[str, Any]:
    once, update = ((0, 0), (2 * trained, 0), (0, 2 * trained), (round(2 * trained * share), 0))[kind]
    by = {c: {"h2d_bytes_per_step": int(c) * once + update, "d2h_bytes_per_step": int(c) * once + update,
              "bytes_per_token": round(2 * (int(c) * once + update) / (int(c) * 512), 1),
              "in_m": round((int(c) * once + update) / trained, 4) if trained else 0.0}
          for c in COUNTS}  # fmt: skip
    return {
        "h2d_bytes_per_micro_batch": once,
        "d2h_bytes_per_micro_batch": once,
        "h2d_bytes_per_update": update,
        "d2h_bytes_per_update": update,
        "by_accumulation": by,
        "link_bytes": None,
        "link_bytes_reason": "made",
    }


def _largest() -> list[dict[str, Any]]:
    made = []
    for variant, neurons, union in (
        ("parallel_adapter", 2048, ""),
        ("meft", 8192, "measured"),
        ("meft", 8192, "assumed"),
    ):
        for saved in (False, True):
            size = neurons * (1 + saved)
            trained = 2 * HIDDEN * LAYERS * size
            made.append({
                "variant": variant, "title": VARIANTS[variant][0], "checkpointing": saved, "union_evidence": union,
                "evidence": "simulated", "state": "ok", "limit": "host memory", "neurons": size,
                "accumulation": 32,
                "size": {"neurons": size}, "trainable": trained, "percent_of_base": round(100 * trained / BASE, 3),
                "device_total_bytes": 23 * GIB, "host_peak_bytes": 40 * GIB, "tokens_per_s": 321.0,
            })  # fmt: skip
    short = {"variant": "lora_all", "title": "LoRA, all linear", "checkpointing": False, "union_evidence": ""}
    why = "not even R=64: device memory is short"
    return [*made, {**short, "evidence": "simulated", "state": "does-not-fit", "reason": why}]
