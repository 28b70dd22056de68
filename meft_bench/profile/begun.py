"""A profile as it begins: its settings, and the rows of earlier files that were made with the same and still count."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import changed, goes_on, methods_in, profile_numerics
from meft_bench.profile import results, shapes
from meft_bench.profile.request import Request
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import BETWEEN_STEPS
from meft_bench.profile.variants import VARIANTS
from meft_bench.provenance import provenance
from meft_bench.simulate.cards import GIB, Card, constants

Row = dict[str, Any]
_BUDGETS = "budgets"


def begun(request: Request, setting: Setting, paths: Iterable[Path]) -> tuple[dict[str, Any], dict[str, Row]]:
    """(the profile at the first path if the same numbers and settings made it, else a new one; key -> row of all files
    of which that is so)."""
    settings = _settings(request, setting)
    methods, now = {VARIANTS[name].method for name in request.variants}, provenance(1)
    numerics = profile_numerics(methods)
    profile = {
        "schema": results.SCHEMA,
        "evidence": "simulated",
        "complete": False,
        "settings": settings,
        "numerics": numerics,
        "rows": [],
        "longer": [],
        "largest": [],
        "paper": [],
        "provenance": now,
    }
    rows: dict[str, Row] = {}
    for i, path in enumerate(paths):
        before = results.read_profile(path) if path.is_file() else None
        if before is None or before["settings"] != settings:
            continue
        today = profile_numerics(methods.union(methods_in(before)))
        before = _without_old_budgets(before, today)
        if goes_on(before, today, now):
            if i == 0:
                profile = {**before, "numerics": numerics}
            elif changed(before["provenance"]):
                profile["provenance"] = now
            kept = [*before["rows"], *before.get("longer", ())]
            rows |= {r["key"]: r for r in kept if r["key"] not in rows}
            if "timeline" in before:
                profile.setdefault("timeline", before["timeline"])
    return profile, rows


def _without_old_budgets(profile: dict[str, Any], today: dict[str, int | str]) -> dict[str, Any]:
    """The profile without rows and searches with a device budget, where these have another number today: the others may
    go on without them."""
    made = profile.get("numerics")
    if not isinstance(made, dict) or made.get(_BUDGETS) == today.get(_BUDGETS):
        return profile
    parts = {part: profile.get(part, ()) for part in ("rows", "longer", "largest")}
    kept = {part: [r for r in rows if not VARIANTS[r["variant"]].budget] for part, rows in parts.items()}
    return {**profile, **kept, "numerics": {part: n for part, n in made.items() if part != _BUDGETS}}


def _settings(request: Request, setting: Setting) -> dict[str, Any]:
    """What every row of the profile rests on."""
    config, text = setting.config, setting.config.get_text_config()
    return {
        "model": shapes.short_name(request.model),
        "shape": {
            "hidden": setting.shape.hidden,
            "layers": setting.shape.layers,
            "ffn": setting.shape.ffn,
            "heads": text.num_attention_heads,
            "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            "vocabulary": text.vocab_size,
            "parameters": setting.shape.parameters,
            "architecture": (config.architectures or [type(config).__name__.removesuffix("Config")])[0],
        },
        "card": request.card.name,
        "card_title": request.card.title,
        "memory_bytes": int(request.card.memory_bytes.value),
        "usable_bytes": int(request.card.usable_bytes.value),
        "context_bytes": int(request.card.context_bytes.value),
        "host": request.host.name,
        "host_title": request.host.title,
        "host_memory_bytes": round(request.host_gib * GIB),
        "batch": request.batch,
        "seq": request.seq,
        "asked": sorted(set(request.neurons)),
        "accumulations": list(setting.accumulations),
        "union": request.union,
        "elsewhere": {c.name: _about(c) for c in request.others},
        "constants": constants(request.card, request.host),
        "after_step": BETWEEN_STEPS,
    }


def _about(card: Card) -> dict[str, Any]:
    return {"title": card.title, "usable_bytes": int(card.usable_bytes.value)}
