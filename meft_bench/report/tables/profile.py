"""Tables of `meft-bench profile`: what fits, what crosses the link, how fast, and how each number came to be."""

from collections.abc import Sequence
from typing import Any

from meft_bench.profile import best
from meft_bench.report.records.profiles import (
    COMMAND,
    Profile,
    Row,
    about,
    evidence_of,
    find,
    most_of,
    per_step,
    ran,
    size_text,
    title_of,
    tokens_per_s,
    union_of,
    with_checkpointing,
)
from meft_bench.report.text import Table, csv_table, lowered, markdown_table, paragraphs, plain, table

GIB, MIB, KIB = 2**30, 2**20, 2**10
_HEADER = ("Method", "Checkpointing", "Size", "Trainable", "% of base", "Device GiB", "Fits", "Host GiB", "K/R", "U/R",
           "H2D MiB", "D2H MiB", "KiB a token, 1", "KiB a token, 32", "Tokens/s", "Practicality",
           "Evidence")  # fmt: skip
_LEFT = 3
_READING = (
    "Device GiB is the live peak of a step and the CUDA context; Fits compares it with what the card reports as "
    "usable. Both and Host GiB are of the fewest micro-batches a step; where more take more, since gradients are kept "
    "from one to the next, that stands beside them. H2D and D2H are MiB per micro-batch over the link, without what an "
    "optimizer update moves; KiB a token counts both ways and the update, at accumulation 1 and 32. Tokens/s at "
    "accumulation 1 (or the least). Practicality is the step time of the resident Parallel Adapter of the same R and "
    "checkpointing over this one's: above 1 is faster, none where it has no such peer."
)
_LAST = "32"
_BASES = ("variant", "title", "family", "neurons", "size", "checkpointing", "state", "evidence", "modelled")
_BY_ACCUMULATION = ("bytes_per_token", "in_m")


def profile_table(profile: Profile) -> Table:
    """One line per method and checkpointing at the stated R."""
    rows = profile.at(profile.stated)
    return _rows_table(f"profile_{profile.name}", profile, rows, f"R = {profile.stated:,}" if profile.stated else "")


def sweep_table(profile: Profile) -> Table:
    """One line per method, checkpointing and R."""
    sizes = profile.neurons
    told = f"R from {sizes[0]:,} to {sizes[-1]:,}" if sizes else ""
    rows = sorted(profile.rows, key=lambda r: (_first(profile, r["variant"]), r["checkpointing"], r["neurons"] or 0))
    return _rows_table(f"profile_{profile.name}_sweep", profile, rows, told)


def memory_table(profile: Profile) -> Table:
    """The device's and the host's peak by category at the stated R; a category's bytes are those at the peak."""
    rows = [r for r in profile.at(profile.stated) if ran(r) and r["memory"]["by_category"]]
    categories = list(dict.fromkeys(c for r in rows for c in r["memory"]["by_category"]))
    on_host = list(dict.fromkeys(c for r in rows for c in r["memory"].get("host_by_category") or {}))
    header = ["Method", "Checkpointing", *(_capital(c) for c in categories), "Peak", "Peak with context",
              *(f"Host: {c}" for c in on_host), "Host peak", "Evidence"]  # fmt: skip
    body = [[title_of(r), with_checkpointing(r), *_memory_cells(r, categories, on_host), evidence_of(r)] for r in rows]
    md = paragraphs(
        f"Memory by category in GiB at R = {profile.stated}: {plain(about(profile))}. The categories are those of the "
        "moment of the peak and add up to it, on the device and on the host.",
        markdown_table(header, body, left=2) if body else "No row ran.",
    )
    lines = [[r["variant"], r["neurons"] or "none", r["checkpointing"], where, c, n, evidence_of(r)]
             for r in rows
             for where, field in (("device", "by_category"), ("host", "host_by_category"))
             for c, n in (r["memory"].get(field) or {}).items()]  # fmt: skip
    csv = csv_table(("variant", "neurons", "checkpointing", "where", "category", "bytes", "evidence"), lines)
    return Table(f"profile_{profile.name}_memory", md, csv)


def largest_table(profiles: Sequence[Profile]) -> Table:
    """The largest size of every method that fits each card, found by search."""
    header = ("Model", "Card", "Method", "Checkpointing", "Accumulation", "Largest size", "Trainable", "% of base",
              "Device GiB", "Host GiB", "Tokens/s", "The next size lacks", "Evidence")  # fmt: skip
    fields = ("neurons", "trainable", "percent_of_base", "device_total_bytes", "host_peak_bytes", "tokens_per_s",
              "limit", "evidence", "reason")  # fmt: skip
    named = ("model", "card", "variant", "checkpointing", "accumulation", "union", "state", *fields)
    reasons: list[str] = []
    body = [
        [p.model, p.card, title_of(e), with_checkpointing(e), most_of(e), *_largest_cells(e, reasons), p.model, p.card,
         e["variant"], e["checkpointing"], most_of(e), union_of(e) or "none", e["state"],
         *(_plain(e.get(f)) for f in fields)]
        for p in profiles for e in p.largest
    ]  # fmt: skip
    told = (
        "The largest size that fits card and host in steps of so many micro-batches (accumulation; the bytes are "
        "theirs), found by search over R; tokens/s at the fewest of the profile; for methods without a size of their "
        "own R, the size that trains as much. What a larger size lacks stands beside it."
    )
    return table(
        "profile_largest", [*((h, "") for h in header), *(("", n) for n in named)], body, left=6, before=[told],
        after=[_noted(reasons)], instead=f"Not run: `{COMMAND}`.",
    )  # fmt: skip


def constants_table(profiles: Sequence[Profile]) -> Table:
    """Every constant of the cost model with its source, by card and host."""
    lines = list(
        dict.fromkeys(
            (p.settings["card"], p.settings["host"], name, _number(c["value"]), c["unit"], c["source"])
            for p in profiles
            for name, c in p.settings["constants"].items()
        )
    )
    header = ("Card", "Host", "Constant", "Value", "Unit", "Source")
    told = "What simulated times rest on. A simulated time is no better than these; memory and bytes do not use them."
    none = f"Not run: `{COMMAND}`."
    return table("profile_constants", lowered(header), lines, left=3, before=[told], instead=none)


# ---- a line ----


def line_cells(row: Row, notes: list[str]) -> list[str]:
    """A row's cells from Size on; a sentence on what was modelled becomes a numbered note."""
    if not ran(row):
        state = evidence_of(row)
        return [size_text(row), *[state] * (len(_HEADER) - _LEFT - 1), f"{state} (note {_note(row, notes)})"]
    parameters, traffic = row["parameters"], row["traffic"]
    union = row.get("union") or {}
    practicality = row["time"].get("practicality")
    modelled = f" (note {_note(row, notes)})" if row.get("modelled") else ""
    return [
        size_text(row),
        f"{parameters['trainable']:,}",
        f"{parameters['percent_of_base']:.2f}",
        held_cell(row, "device_total_bytes", 2),
        _fits_cell(row),
        held_cell(row, "host_peak_bytes", 2),
        f"{union['kept_share']:.4f}" if union else "none",
        _union_cell(union) if union else "none",
        amount(traffic["h2d_bytes_per_micro_batch"], MIB, 1),
        amount(traffic["d2h_bytes_per_micro_batch"], MIB, 1),
        per_token(row, "1"),
        per_token(row, _LAST),
        f"{tokens_per_s(row):,.0f}",
        "none" if practicality is None else f"{practicality:.2f}",
        evidence_of(row) + modelled,
    ]


def amount(count: float | None, unit: int, digits: int) -> str:
    """Bytes in a unit, or unknown."""
    return "unknown" if count is None else f"{count / unit:,.{digits}f}"


def held_cell(row: Row, name: str, digits: int) -> str:
    """GiB of a row's memory in a step of the fewest micro-batches, then, where that differs, of more than one."""
    one, more = (amount(best.memory_at(row, a)[name], GIB, digits) for a in (1, 2))
    return one if more == one else f"{one}; {more} accumulating"


def _fits_cell(row: Row) -> str:
    one, more = (best.memory_at(row, a)["fits"] for a in (1, 2))
    if one and not more:
        return "not accumulating"
    return "yes" if one else "no"


def per_token(row: Row, accumulation: str) -> str:
    """KiB over the link per trained token; "none" where the profile has no such accumulation."""
    found = per_step(row, accumulation, "bytes_per_token")
    return "none" if found is None else amount(found, KIB, 1)


def _union_cell(union: dict[str, Any]) -> str:
    source = best.union_words(union)
    return f"{union['union_share']:.4f}" + (f", {source}" if source else "")


def _note(row: Row, notes: list[str]) -> int:
    text = row.get("reason") if not ran(row) else row["modelled"]
    text = " ".join(str(text).split()).rstrip(".")
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def _rows_table(name: str, profile: Profile, rows: Sequence[Row], sizes: str) -> Table:
    notes: list[str] = []
    csv_names, csv_rows = _data(profile, rows)
    body = [[r["title"], with_checkpointing(r), *line_cells(r, notes), *data]
            for r, data in zip(rows, csv_rows, strict=True)]  # fmt: skip
    sources = dict.fromkeys(u["source"] for r in rows if ran(r) and (u := r.get("union")) and u.get("source"))
    told = (
        f"{plain(about(profile))}{'; ' + sizes if sizes else ''}. Evidence: **{profile.evidence}** unless a line says "
        f"otherwise. {_READING}"
    )
    from_where = f"U is from: {plain('; '.join(sources))}." if sources else ""
    return table(
        name, [*((h, "") for h in _HEADER), *(("", n) for n in csv_names)], body, left=_LEFT, before=[told],
        after=[_noted(notes), from_where], instead="No rows.",
    )  # fmt: skip


def _noted(notes: Sequence[str]) -> str:
    return "\n".join(f"- Note {i}: {plain(note)}." for i, note in enumerate(notes, 1))


def _data(profile: Profile, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Names and values of the CSV's columns: every number of a row as it is."""
    counts = [str(a) for a in profile.settings["accumulations"]]
    paths = [("parameters", "trainable"), ("parameters", "percent_of_base"), ("union", "kept_share"),
             ("union", "union_share"), ("union", "evidence"), ("memory", "device_peak_bytes"),
             ("memory", "device_total_bytes"), ("memory", "fits"), ("memory", "host_peak_bytes"),
             ("memory", "accumulated", "device_total_bytes"), ("memory", "accumulated", "fits"),
             ("memory", "accumulated", "host_peak_bytes"),
             ("traffic", "h2d_bytes_per_micro_batch"), ("traffic", "d2h_bytes_per_micro_batch"),
             ("traffic", "h2d_bytes_per_update"), ("traffic", "d2h_bytes_per_update"),
             *(("traffic", "by_accumulation", a, f) for a in counts for f in _BY_ACCUMULATION),
             *(("time", "step_s_by_accumulation", a) for a in counts),
             *(("time", "tokens_per_s_by_accumulation", a) for a in counts), ("time", "practicality")]  # fmt: skip
    names = [*_BASES, "reason", *(_column(p) for p in paths)]
    return names, [[*(_plain(_base(r, f)) for f in _BASES), _plain(r.get("reason")),
                    *(_plain(find(r, p)) for p in paths)] for r in rows]  # fmt: skip


def _column(path: tuple[str, ...]) -> str:
    words = [p for p in path if p not in ("by_accumulation", "parameters", "memory", "traffic", "time")]
    return "_".join(words).replace("_by_accumulation", "")


def _base(row: Row, field: str) -> Any:
    return size_text(row) if field == "size" else row.get(field)


def _memory_cells(row: Row, categories: Sequence[str], on_host: Sequence[str]) -> list[str]:
    memory = row["memory"]
    host = memory.get("host_by_category") or {}
    return [
        *(f"{memory['by_category'].get(c, 0) / GIB:.2f}" for c in categories),
        amount(memory["device_peak_bytes"], GIB, 2),
        amount(memory["device_total_bytes"], GIB, 2),
        *(f"{host.get(c, 0) / GIB:.2f}" for c in on_host),
        amount(memory["host_peak_bytes"], GIB, 2),
    ]


def _largest_cells(entry: Row, reasons: list[str]) -> list[str]:
    if not ran(entry):
        state = str(entry["state"]).replace("-", " ")
        return [f"{state} (note {_note(entry, reasons)})", *["none"] * 6, str(entry["evidence"]).replace("-", " ")]
    speed = entry.get("tokens_per_s")
    return [
        size_text(entry),
        f"{entry['trainable']:,}",
        f"{entry['percent_of_base']:.2f}",
        amount(entry.get("device_total_bytes"), GIB, 2),
        amount(entry.get("host_peak_bytes"), GIB, 2),
        "unknown" if speed is None else f"{speed:,.0f}",
        str(entry.get("limit") or "unknown"),
        str(entry["evidence"]),
    ]


def _first(profile: Profile, variant: str) -> int:
    return [r["variant"] for r in profile.rows].index(variant)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)
