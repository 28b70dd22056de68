"""What the processes of a profile do: rows, what formulas say of it, the search for the largest R of one variant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meft_bench.profile import best, pool, shapes
from meft_bench.profile.formula import of_row
from meft_bench.profile.matrix import UnionSource
from meft_bench.profile.request import ASKED
from meft_bench.profile.runs import made_from, size_if_any
from meft_bench.profile.search import largest_fitting, sized
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import not_run, simulated_row, union_of
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import PLAIN, VARIANTS
from meft_bench.simulate.cards import Card

Made = tuple[dict[str, Any], list[dict[str, Any]]]
"""A row, or why there is none; the events of the step that is drawn."""


def grouped(specs: Iterable[ProfileSpec]) -> list[tuple[ProfileSpec, ...]]:
    """The specs, those that are made from one simulation together."""
    groups: dict[ProfileSpec, list[ProfileSpec]] = {}
    for spec in specs:
        groups.setdefault(made_from(spec), []).append(spec)
    return [tuple(group) for group in groups.values()]


def rows(specs: Iterable[ProfileSpec]) -> list[Made]:
    """The rows of specs."""
    near, others = pool.shared["near"], pool.shared["others"]
    return [_made(s, pool.shared["setting"], others if s.neurons in near else ()) for s in specs]


def longer_rows(specs: Iterable[ProfileSpec]) -> list[Made]:
    """The rows of larger micro-batches, at the fewest of them a step and at the number that stands for a card; no
    events."""
    setting: Setting = pool.shared["setting"]
    counts = sorted({min(setting.accumulations), best.stated_accumulation(setting.accumulations)})
    setting = replace(setting, accumulations=tuple(counts))
    return [({**_made(s, setting, ())[0], "batch": s.batch, "seq": s.seq}, []) for s in specs]


def _made(spec: ProfileSpec, setting: Setting, others: Iterable[Card]) -> Made:
    try:
        row, timeline = simulated_row(spec, setting, others)
    except ValueError as error:
        return not_run(spec, size_if_any(spec, setting.counted), str(error)), []
    except ImportError as error:
        reason = f"needs {error.name}: pip install {error.name}"
        return not_run(spec, size_if_any(spec, setting.counted), reason), []
    except Exception as error:  # one variant's failure is no reason to lose the others
        reason = f"failed: {shapes.first_line(error)}"
        return not_run(spec, size_if_any(spec, setting.counted), reason), []
    row["exact"] = VARIANTS[spec.variant].exact
    return row, timeline.events if _is_drawn(spec) else []


def formula(spec: ProfileSpec, made: Mapping[str, Any]) -> dict[str, Any]:
    """What formulas say of a row that ran."""
    return of_row(spec, made, pool.shared["setting"])


def _is_drawn(spec: ProfileSpec) -> bool:
    """Whether its step is kept as a timeline: MEFT's, at the paper's R with the assumed U."""
    assumed = spec.union is not None and spec.union.evidence == "assumed"
    return spec.variant == PLAIN and spec.neurons == ASKED and not spec.checkpointing and assumed


# ---- the largest R ----


def searched(specs: list[ProfileSpec]) -> list[ProfileSpec]:
    """One spec per variant with a size, checkpointing and kind of U."""
    first: dict[tuple, ProfileSpec] = {}
    for spec in specs:
        if VARIANTS[spec.variant].option is not None and spec.rank is None:
            first.setdefault(search_place(spec), spec)
    return list(first.values())


def search_place(spec: ProfileSpec) -> tuple:
    """What the searches of a profile differ in."""
    return spec.variant, spec.checkpointing, spec.union.evidence if spec.union is not None else ""


def place_of(entry: Mapping[str, Any]) -> tuple:
    """search_place() of a search that was made."""
    return entry["variant"], entry["checkpointing"], entry["union_evidence"]


def still_holds(entry: Mapping[str, Any], spec: ProfileSpec, source: UnionSource) -> bool:
    """Whether a search for spec that was made earlier moved the U that the source gives today: a log may have been made
    anew, or another have taken its place. A share that is assumed stands in the profile's settings."""
    if spec.union is None or spec.union.evidence == "assumed":
        return True
    if entry["state"] != "ok":
        return False
    try:
        today = sized(spec, entry["neurons"], source)
    except ValueError:
        return False
    return entry["union"] == union_of(made_from(today))["union"]


def known_peaks(
    spec: ProfileSpec, specs: Sequence[ProfileSpec], done: dict[str, dict[str, Any]], accumulation: int
) -> dict[int, tuple[int, int]]:
    """R -> (device, host) peaks, in steps of so many micro-batches, of the rows that the search for spec can begin
    from."""
    rows = {s.neurons: done[s.key] for s in specs if search_place(s) == search_place(spec)}
    held = {n: best.memory_at(r, accumulation) for n, r in rows.items() if r["state"] == "ok"}
    return {n: (m["device_peak_bytes"], m["host_peak_bytes"]) for n, m in held.items()}


def search(spec: ProfileSpec, known: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """The entry of the largest R that fits, or why there is none. It fits steps of "accumulation" micro-batches, the
    most of the profile, and so all of its steps."""
    setting, source = pool.shared["setting"], pool.shared["source"]
    most = max(setting.accumulations)
    entry: dict[str, Any] = {
        "variant": spec.variant,
        "title": VARIANTS[spec.variant].title,
        "checkpointing": spec.checkpointing,
        "union_evidence": search_place(spec)[2],
        "accumulation": most,
    }
    try:
        found, row = largest_fitting(spec, setting, pool.shared["host_bytes"], source, known)
        if row is None:
            reason = f"not even R=64: {found.limit} is short"
            return {**entry, "evidence": "simulated", "state": "does-not-fit", "reason": reason}
    except ValueError as error:
        return {**entry, "evidence": "not-run", "state": "not-run", "reason": str(error)}
    held = best.memory_at(row, most)
    return {
        **entry,
        "evidence": "simulated",
        "state": "ok",
        "limit": found.limit,
        "neurons": found.neurons,
        "size": row["size"],
        "union": row["union"],
        "union_reason": row.get("union_reason", ""),
        "trainable": row["parameters"]["trainable"],
        "percent_of_base": row["parameters"]["percent_of_base"],
        "device_total_bytes": held["device_total_bytes"],
        "host_peak_bytes": held["host_peak_bytes"],
        "tokens_per_s": row["time"]["tokens_per_s_by_accumulation"][str(setting.accumulations[0])],
        "tokens_per_s_by_accumulation": row["time"]["tokens_per_s_by_accumulation"],
    }
