"""How far predictions are off: everything that a simulator, a cost model or a closed formula predicted, beside what was
measured, or, where nothing was measured, beside the better of two predictions. It fills itself from the records.

An error is the prediction over what it is held against, less 1: above 0 it promises too much of a quantity.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meft_bench.report.records.profiles import (
    Profile,
    ran,
    stale_note,
    step_of,
    title_of,
    with_checkpointing,
)
from meft_bench.report.records.scale import Plan
from meft_bench.report.text import Table, csv_table, lowered, markdown_table, paragraphs, table
from meft_bench.train.contract import describe, method_names
from meft_bench.train.step_bytes import LEAST_STATE_BYTES, STATE_BYTES

SPEED, PEAK, STATE = "tokens/s", "device peak, bytes", "values, gradients and moments, bytes"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Who predicts what, and what it is held against."""

    quantity: str
    by: str
    against: str
    evidence: str
    """Of what it is held against."""
    needs: str
    """What makes the first, where there is none."""


GPU_SPEED = Kind(quantity=SPEED, by="simulator", against="steps on a GPU", evidence="measured", needs="make gpu")
GPU_PEAK = Kind(quantity=PEAK, by="simulator", against="steps on a GPU", evidence="measured", needs="make gpu")
RUNS = Kind(quantity=STATE, by="formula, 16 or 12 a parameter", against="count of runs on the CPU",
            evidence="measured", needs="make replicate")  # fmt: skip
MODEL_SPEED = Kind(quantity=SPEED, by="cost model of the planner", against="replay of the code that trains",
                   evidence="simulated", needs="make profile FULL=1")  # fmt: skip
FORMULA_PEAK = Kind(quantity=PEAK, by="formula of the planner", against="replay of the code that trains",
                    evidence="simulated", needs="make profile FULL=1")  # fmt: skip
SCALE_SPEED = Kind(quantity=SPEED, by="cost model or formula at scale", against="replay of the code that trains",
                   evidence="simulated", needs="make profile GPUS=8")  # fmt: skip
_SHOWN = 20
"""Comparisons of a kind on the page."""
KINDS = (GPU_SPEED, GPU_PEAK, RUNS, MODEL_SPEED, FORMULA_PEAK, SCALE_SPEED)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number that was predicted, and what it is held against."""

    kind: Kind
    model: str
    card: str
    what: str
    """Method, size and step in words."""
    predicted: float
    found: float

    @property
    def error(self) -> float:
        return self.predicted / self.found - 1


def errors_tables(profiles: Sequence[Profile], plans: Sequence[Plan], records: Iterable[dict[str, Any]]) -> list[Table]:
    """The errors by kind, model and card; and every single one."""
    found = comparisons(profiles, plans, records)
    return [_by_kind(found, profiles), _every(found)]


def comparisons(
    profiles: Sequence[Profile], plans: Sequence[Plan], records: Iterable[dict[str, Any]]
) -> list[Comparison]:
    """All that can be compared, by kind."""
    every = [*_on_gpus(profiles), *_of_runs(records), *_of_rows(profiles), *_of_plans(plans)]
    return sorted((c for c in every if c.found), key=lambda c: (KINDS.index(c.kind), c.model, c.card))


# ---- measured ----


def _on_gpus(profiles: Sequence[Profile]) -> Iterator[Comparison]:
    """Rows of a session beside what was predicted before it; rows of other measured profiles beside simulated ones of
    the same step, speeds on the same card alone."""
    rows = [(p, r) for p in profiles for r in p.rows if ran(r)]
    simulated = [(p, r) for p, r in rows if r["evidence"] == "simulated"]
    anywhere = {step_of(p, r): r for p, r in simulated}
    on_card = {(p.card, step_of(p, r)): r for p, r in simulated}
    for p, row in rows:
        if row["evidence"] not in ("measured", "capped"):
            continue
        told = row.get("predicted")
        if "predicted" not in row and (twin := anywhere.get(step_of(p, row))) is not None:
            told = {"device_bytes": twin["memory"]["device_peak_bytes"]}
            same = on_card.get((p.card, step_of(p, row)))
            if same is not None and row["evidence"] == "measured":  # a cap makes it another card
                told["tokens_per_s"] = same["time"]["tokens_per_s_by_accumulation"]
        yield from _of_row(p, row, told or {})


def _of_row(profile: Profile, row: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[Comparison]:
    speeds = row["time"]["tokens_per_s_by_accumulation"]
    for count, predicted in (told.get("tokens_per_s") or {}).items():
        if count in speeds:
            yield _compared(GPU_SPEED, profile, row, predicted, speeds[count], count)
    if told.get("device_bytes") and row["memory"]["device_peak_bytes"]:
        yield _compared(GPU_PEAK, profile, row, told["device_bytes"], row["memory"]["device_peak_bytes"])


def _of_runs(records: Iterable[dict[str, Any]]) -> Iterator[Comparison]:
    """Runs whose optimizer is AdamW in fp32: what they counted of their own tensors."""
    known = set(method_names())
    for record in records:
        spec, accounted = record["spec"], (record.get("memory") or {}).get("accounted") or {}
        if record["state"] != "ok" or spec["method"] not in known or describe(spec["method"]).own_state:
            continue
        least = spec["options"].get("moments") == "bf16"
        predicted = (LEAST_STATE_BYTES if least else STATE_BYTES) * record["parameters"]["trainable"]
        yield Comparison(
            kind=RUNS, model=spec["model"].split("@")[0], card="cpu", predicted=predicted,
            what=f"{describe(spec['method']).title}, run {record['run_key'][:6]}", found=sum(accounted.values()),
        )  # fmt: skip


# ---- one prediction against a better one ----


def _of_rows(profiles: Sequence[Profile]) -> Iterator[Comparison]:
    """What formulas say of simulated rows (profile/formula.py)."""
    for p in profiles:
        for row in (r for r in p.rows if ran(r) and r.get("formula")):
            told, speeds = row["formula"], row["time"]["tokens_per_s_by_accumulation"]
            for count, predicted in (told.get("tokens_per_s_by_accumulation") or {}).items():
                yield _compared(MODEL_SPEED, p, row, predicted, speeds[count], count)
            yield _compared(FORMULA_PEAK, p, row, told["device_bytes"], row["memory"]["device_total_bytes"])


def _of_plans(plans: Sequence[Plan]) -> Iterator[Comparison]:
    for plan in plans:
        for entry in plan.replayed:
            yield Comparison(
                kind=SCALE_SPEED, model=plan.settings["model"], card=plan.settings["card"],
                what=f"{entry['title']}, one of {entry['gpus']} GPU{'s' * (entry['gpus'] > 1)}",
                predicted=entry["modelled_tokens_per_s_per_gpu"], found=entry["replayed_tokens_per_s_per_gpu"],
            )  # fmt: skip


def _compared(
    kind: Kind, profile: Profile, row: Mapping[str, Any], predicted: float, found: float, count: str = ""
) -> Comparison:
    settings = profile.settings
    parts = [title_of(dict(row)), f"R = {row['neurons']:,}" if row["neurons"] else "", _checkpointed(row)]
    parts.append(f"{settings['batch']} x {settings['seq']} tokens" + (f", accumulation {count}" if count else ""))
    return Comparison(kind=kind, model=profile.model, card=profile.card, what=", ".join(filter(None, parts)),
                      predicted=predicted, found=found)  # fmt: skip


def _checkpointed(row: Mapping[str, Any]) -> str:
    return "checkpointing" if with_checkpointing(dict(row)) == "yes" else ""


# ---- the tables ----


def _by_kind(found: Sequence[Comparison], profiles: Sequence[Profile]) -> Table:
    header = ("Quantity", "Predicted by", "Held against", "Model", "Card", "n", "|Error| %, median", "Error %, lowest",
              "Error %, highest", "The farthest", "Evidence")  # fmt: skip
    lines: list[list[str]] = []
    for kind in KINDS:
        own = [c for c in found if c.kind is kind]
        places = dict.fromkeys((c.model, c.card) for c in own)
        lines += [_summary(kind, place, [c for c in own if (c.model, c.card) == place]) for place in places]
        if not own:
            lines.append([kind.quantity, kind.by, kind.against, *["none"] * 2, "0", *["not run"] * 3, kind.needs,
                          "not run"])  # fmt: skip
    told = (
        "The error of every prediction against every measured run that has one, and of the planner's formulas against "
        "the replay, which is the better prediction where nothing was measured. An error is the prediction over what "
        "it is compared with, less 1. Each comparison is in profile_errors_rows."
    )
    return table("profile_errors", lowered(header), lines, left=5, before=[stale_note(profiles), told])


def _summary(kind: Kind, place: tuple[str, str], own: Sequence[Comparison]) -> list[str]:
    errors = [100 * c.error for c in own]
    far = max(own, key=lambda c: abs(c.error))
    median = statistics.median(map(abs, errors))
    return [kind.quantity, kind.by, kind.against, *place, str(len(own)), f"{median:.2f}", f"{min(errors):+.2f}",
            f"{max(errors):+.2f}", far.what, kind.evidence]  # fmt: skip


def _every(found: Sequence[Comparison]) -> Table:
    header = ("Quantity", "Predicted by", "Held against", "Model", "Card", "Of", "Predicted", "Found", "Error %",
              "Evidence")  # fmt: skip
    single = [c for c in found if c.kind is not RUNS]  # the counts of single runs are in their records
    farthest = sorted(single, key=lambda c: -abs(c.error))
    shown = [c for kind in KINDS for c in [c for c in farthest if c.kind is kind][:_SHOWN]]
    told = f"The {_SHOWN} largest errors of each kind. All {len(single):,} are in the CSV file."
    md = paragraphs(told, markdown_table(header, [_line(c) for c in shown], left=6)) if shown else ""
    csv = csv_table([h.lower() for h in header], [_line(c) for c in single])
    return Table("profile_errors_rows", md or "Nothing can be compared yet.", csv)


def _line(c: Comparison) -> list[str]:
    return [c.kind.quantity, c.kind.by, c.kind.against, c.model, c.card, c.what, f"{c.predicted:,.0f}",
            f"{c.found:,.0f}", f"{100 * c.error:+.2f}", c.kind.evidence]  # fmt: skip
