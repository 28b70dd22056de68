"""U of a trained real model as a table, from the log of `make selection`."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import selection_why_not
from meft_bench.profile.trained.log import COMMAND, FILE, read_log, title_of
from meft_bench.report.text import Table, plain, table

NAME = "trained_selection"
_COLUMNS = (
    ("R", "neurons"), ("K", "kept"), ("Tokens", "tokens"), ("U/R before training", "before"), ("U/R after", "after"),
    ("lowest layer", "lowest"), ("highest layer", "highest"), ("experts in use", "experts"), ("Evidence", "evidence"),
)  # fmt: skip


def load_log(folder: Path) -> dict[str, Any] | None:
    """The log of a folder with what it has, None where there is none; raises ValueError for a broken one."""
    path = folder / FILE
    log = read_log(path) if path.is_file() else None
    return log if log is not None and log["entries"] else None


def about(log: Mapping[str, Any]) -> str:
    """Model, task and steps in words; first, whether the log counts."""
    settings, first = log["settings"], log["entries"][0]
    why = selection_why_not(log)
    stale = f"Stale: {why} ({COMMAND}). " if why else ""
    return plain(f"{stale}{title_of(settings['model'])}, MEFT trained {first['steps']} steps on {settings['task']}")


def selection_table(log: Mapping[str, Any]) -> Table:
    """A row for every R and number of tokens."""
    rows = [_row(entry, point, log["evidence"]) for entry in log["entries"] for point in entry["after"]["unions"]]
    kept = "; ".join(f"{_active(e):.2f} at R = {e['neurons']:,}" for e in log["entries"] if _has_active(e))
    told = (
        f"{about(log)}. U: the neurons that a micro-batch of so many real tokens needs, means over the layers and over "
        "as many micro-batches as were looked at. Several micro-batches of one step together touch the U of all their "
        "tokens. Measured."
    )
    active = f"Share of all neurons whose key fires for a token, after training: {kept}." if kept else ""
    return table(NAME, list(_COLUMNS), rows, left=0, before=[told, *([active] if active else [])])


def _row(entry: Mapping[str, Any], point: Mapping[str, Any], evidence: str) -> Sequence[str]:
    before = {p["tokens"]: p["share_by_layer"] for p in (entry.get("before") or {}).get("unions", ())}
    earlier = before.get(point["tokens"])
    by_layer, experts = point["share_by_layer"], point.get("experts_by_layer")
    return [
        f"{entry['neurons']}", f"{entry['kept']}", f"{point['tokens']}",
        "not looked at" if earlier is None else f"{statistics.fmean(earlier):.3f}", f"{statistics.fmean(by_layer):.3f}",
        f"{min(by_layer):.3f}", f"{max(by_layer):.3f}",
        "no experts" if experts is None else f"{statistics.fmean(experts):.3f}", evidence,
    ]  # fmt: skip


def _has_active(entry: Mapping[str, Any]) -> bool:
    return bool(entry["after"].get("active_share_by_layer"))


def _active(entry: Mapping[str, Any]) -> float:
    return statistics.fmean(entry["after"]["active_share_by_layer"])
