"""Larger micro-batches: memory and speed of every method at the stated R and T = 512, 2048 and 4096 tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

from meft_bench.profile import best
from meft_bench.report.records.profiles import (
    COMMAND,
    Profile,
    Row,
    evidence_of,
    ran,
    series_of,
    stale_note,
    title_of,
    with_checkpointing,
)
from meft_bench.report.tables.profile import GIB, amount
from meft_bench.report.text import Table, lowered, table

_FEW, _MANY = "Tokens/s, fewest micro-batches", "Tokens/s, 8 micro-batches"


def tokens_table(profiles: Sequence[Profile]) -> Table:
    """A line for each method and micro-batch of the profiles that have larger ones."""
    header = ("Model", "Card", "Method", "Checkpointing", "Micro-batch", "T", "R", "U/R", "Device GiB", "Fits",
              "Host GiB", _FEW, _MANY, "Of resident, 8", "Evidence")  # fmt: skip
    told = (
        "Every method with micro-batches of more tokens, at the stated R; with checkpointing where it does not fit "
        "without. Of resident: over the speed of a Parallel Adapter of the same R and T that is all on the card, "
        "whether it fits or not. GiB and Fits are of a step of the more micro-batches of the two. U of more tokens "
        "than were logged is assumed: as if every 512 of them drew their neurons independently."
    )
    lines = [line for p in profiles if p.longer for line in _lines(p)]
    return table("profile_tokens", lowered(header), lines, left=5, before=[stale_note(profiles), told],
                 instead=f"Not run: `{COMMAND}`.")  # fmt: skip


def _lines(profile: Profile) -> Iterator[list[str]]:
    counts = profile.settings["accumulations"]
    few, many = str(min(counts)), str(best.stated_accumulation(counts))
    rows = [*_own(profile, int(many)), *((r["batch"], r["seq"], r) for r in profile.longer)]
    resident = {b * s: _speed(r, many) for b, s, r in rows
                if r["variant"] == best.RESIDENT and not r["checkpointing"] and ran(r)}  # fmt: skip
    order = {series: i for i, series in enumerate(dict.fromkeys(series_of(r) for _, _, r in rows))}
    for batch, seq, row in sorted(rows, key=lambda e: (order[series_of(e[2])], e[0] * e[1], e[2]["checkpointing"])):
        start = [profile.model, profile.card, title_of(row), with_checkpointing(row), f"{batch} x {seq}"]
        yield [*start, f"{batch * seq:,}", *_cells(row, few, many, resident.get(batch * seq)), evidence_of(row)]


def _own(profile: Profile, many: int) -> Iterator[tuple[int, int, Row]]:
    """The profile's own rows at the stated R: with checkpointing those of what does not fit without."""
    batch, seq = profile.settings["batch"], profile.settings["seq"]
    rows = profile.at(profile.stated)
    fit = {series_of(r) for r in rows if ran(r) and not r["checkpointing"] and best.memory_at(r, many)["fits"]}
    return ((batch, seq, r) for r in rows if not r["checkpointing"] or series_of(r) not in fit)


def _cells(row: Row, few: str, many: str, resident: float | None) -> list[str]:
    size = "none" if row["neurons"] is None else f"{row['neurons']:,}"
    if not ran(row):
        return [size, *["not run"] * 7]
    memory, union = best.memory_at(row, int(many)), row.get("union") or {}
    speeds = [_speed(row, count) for count in (few, many)]
    share = "none" if resident is None else f"{speeds[1] / resident:.2f}"
    return [
        size,
        f"{union['union_share']:.2f}" if union else "none",
        amount(memory["device_total_bytes"], GIB, 1),
        "yes" if memory["fits"] else "no",
        amount(memory["host_peak_bytes"], GIB, 1),
        *(f"{speed:,.0f}" for speed in speeds),
        share,
    ]


def _speed(row: Row, count: str) -> float:
    speeds: dict[str, Any] = row["time"]["tokens_per_s_by_accumulation"]
    return float(speeds[count])
