"""U of a profile from a trained model's log: that of the nearest logged point, which its source names. No torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from meft_bench.profile.spec import Union
from meft_bench.profile.trained.log import COMMAND, FILE, counts, read_log, title_of


def usable_log(folder: Path, now: Mapping[str, Any]) -> tuple[Path | None, str]:
    """(the folder's log if there is one that counts for what is made now (a provenance), why there is one that does
    not, in words). Raises ValueError for a broken log."""
    path = folder / FILE
    if not path.is_file():
        return None, ""
    log = read_log(path)
    if not counts(log, now):
        return None, f"{FILE} was made with other numbers or from changed files, and does not count ({COMMAND})"
    return (path, "") if log["entries"] else (None, "")


def trained_union(log: Mapping[str, Any], tokens: int, neurons: int, kept: int, key_experts: bool) -> Union:
    """U at R = neurons with U / R of the nearest logged R (then K) and T, by ratio; of two as near, what makes U
    larger. Rows that several micro-batches touch are those of the log. Where the logged point is another than the one
    asked for, the source says so; U is never more than T K."""
    entry = min(log["entries"], key=lambda e: (_apart(e["neurons"], neurons), _apart(e["kept"], kept), e["neurons"]))
    points = {p["tokens"]: fmean(p["share_by_layer"]) for p in entry["after"]["unions"]}
    logged = min(points, key=lambda t: (_apart(t, tokens), -t))
    most = tokens * kept

    def rows(count: int) -> int:
        return min(round(points[logged * count] * neurons), most * count, neurons)

    window = tuple((t // logged, rows(t // logged)) for t in sorted(points) if t >= logged and t % logged == 0)
    return Union(
        rows=rows(1), source=_source(log, entry, logged, (neurons, kept, tokens), key_experts, window[-1][0]),
        evidence="measured", window=window, model=title_of(log["settings"]["model"]),
    )  # fmt: skip


def _source(
    log: Mapping[str, Any], entry: Mapping[str, Any], tokens: int, asked: tuple[int, int, int], key_experts: bool,
    most: int
) -> str:  # fmt: skip
    settings = log["settings"]
    there = entry["neurons"], entry["kept"], tokens
    source = (
        f"logged, {title_of(settings['model'])} after {entry['steps']} steps on {settings['task']}: {_point(*there)}"
    )
    if not key_experts:
        source += " with Key-Experts"
    if there != asked or not key_experts:
        source += f", the nearest to {_point(*asked)}{'' if key_experts else ' without'}"
    return f"{source}; rows touched by up to {most} micro-batches are logged, by more taken as of {most}"


def _point(neurons: int, kept: int, tokens: int) -> str:
    return f"R={neurons}, K={kept}, T={tokens}"


def _apart(a: int, b: int) -> float:
    return abs(math.log(a / b))
