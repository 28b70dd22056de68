"""What a profile comes to: the headline, the paper's figures recomputed, predicted against measured, and what it adds
to a claim. Every sentence is computed; a simulated number never carries a verdict."""

from collections.abc import Iterable, Iterator, Sequence
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
    series_of,
    simulated,
    stale_note,
    step_of,
    step_s,
    title_of,
    tokens_per_s,
    union_of,
    with_checkpointing,
)
from meft_bench.report.tables.profile import GIB, amount, held_cell, per_token
from meft_bench.report.text import Table, lowered, plain, table

LATENCY_FIVE = ("parallel_adapter", "meft", "meft_no_ke", "meft_no_sparse", "meft_neither")
"""The bars of the paper's Figure 5."""
_HEADLINE = ("lora_all", "adapter_h", "parallel_adapter", "parallel_adapter_adam8bit",
             "parallel_adapter_host_optimizer", "parallel_adapter_zero2", "parallel_adapter_zero3",
             "parallel_adapter_streamed", "qlora", "q4_parallel_adapter", "full", "full_lomo", "meft", "meft_no_ke",
             "meft_no_sparse")  # fmt: skip
_WHOLE = ("parallel_adapter_streamed", "parallel_adapter_host_optimizer", "parallel_adapter_host_optimizer_gradients",
          "parallel_adapter_zero2")  # fmt: skip
"""What moves whole tensors, and so could move less than MEFT once accumulation shares its cost."""
_NOT_RUN = f"Not run: `{COMMAND}`."
_COMPARED = (
    ("device peak, bytes", ("memory", "device_peak_bytes"), False),
    ("host peak, bytes", ("memory", "host_peak_bytes"), False),
    ("H2D a micro-batch, bytes", ("traffic", "h2d_bytes_per_micro_batch"), False),
    ("D2H a micro-batch, bytes", ("traffic", "d2h_bytes_per_micro_batch"), False),
    ("U/R", ("union", "union_share"), False),
    ("step at accumulation 1, s", ("time", "step_s_by_accumulation", "1"), True),
)
"""Quantity, its place in a row, and whether it depends on the card."""


def headline(profiles: Sequence[Profile]) -> Table:
    """The README's table: the methods at the stated R on the first profile, and what follows from it in sentences."""
    if not profiles:
        return table("profile", [("", "state"), ("", "command")], [["not run", COMMAND]], before=[_NOT_RUN])
    profile = profiles[0]
    header = ("Method", "% of base", "Device GiB", "Device GiB, checkpointing", "Host GiB", "KiB a token, 1",
              "KiB a token, 32", "Tokens/s", "Largest that fits, % of base", "Evidence")  # fmt: skip
    body = [line for name in _HEADLINE for line in _headline_lines(profile, name)]
    told = (
        f"{plain(about(profile))}; R = {profile.stated} or the size that trains as much. Evidence: "
        f"**{profile.evidence}**. Device GiB is the peak of a step with the CUDA context, of the fewest micro-batches, "
        "and of more where these take more; KiB a token cross the link both ways, at accumulation 1 and 32; the "
        f"largest that fits is with checkpointing{_in_steps(profile.largest)}."
    )
    after = [plain(" ".join(findings(profile)))]
    return table("profile", lowered(header), body, before=[stale_note(profiles), told], after=after)


def findings(profile: Profile) -> list[str]:
    """Two sentences or so: what fits, what crosses and how fast."""
    return [s for s in (_fits_sentence(profile), _largest_sentence(profile), _traffic_sentence(profile)) if s]


def turning_point(profile: Profile, meft: Row, other: str) -> int | None:
    """The least accumulation at which a row of MEFT moves more bytes per step than other; None if it does not."""
    peer = profile.row(other, meft["neurons"], meft["checkpointing"])
    if peer is None:
        return None
    for count in profile.settings["accumulations"]:
        own, theirs = (per_step(r, count, "bytes_per_token") for r in (meft, peer))
        if own is not None and theirs is not None and own > theirs:
            return int(count)
    return None


def paper_table(profiles: Sequence[Profile]) -> Table:
    """The numbers that the paper prints on memory, traffic and speed, recomputed."""
    lines = [[p.model, p.card, *cells] for p in profiles for entry in p.paper for cells in _paper_lines(entry)]
    header = ("Model", "Card", "Quantity", "Of", "The paper", "Recomputed", "Evidence")
    told = (
        "The paper's own numbers on memory, traffic and speed (reported), recomputed on the steps profiled here. M is "
        "2 D R L, the trainable keys and values, in 16-bit elements. No verdict rests on a simulated number."
    )
    return table("profile_paper", lowered(header), lines, left=4, before=[told], instead=_NOT_RUN)


def measured_table(profiles: Sequence[Profile]) -> Table:
    """Predicted over measured, for every row that was both simulated and run on a GPU."""
    header = ("Model", "Method", "R", "Checkpointing", "Quantity", "Predicted", "Measured", "Predicted / measured",
              "Evidence")  # fmt: skip
    lines = [line for pair in _pairs(profiles) for line in _compared(*pair)]
    none = "No measured run: nothing here was checked on a GPU yet. On a machine with one, `make profile` measures."
    told = (
        "The simulation's predictions beside what a GPU did. Times are compared only where the card is the same and "
        "no cap made it another."
    )
    if any("predicted" in r for p in profiles for r in p.rows):
        told += " What was predicted for the rows of a GPU session, with their U, is in profile_errors_rows."
    return table("profile_measured", lowered(header), lines, left=5, before=[told], instead=none)


def claim_notes(profiles: Sequence[Profile]) -> dict[str, str]:
    """Claim id -> what the simulation says of it, for claims on memory, traffic and speed. No verdict."""
    found = simulated(profiles)
    if not found:
        return {}
    profile = found[0]
    made = {
        "s5-speed": _speed_note(profile),
        "f5-latency-order": _order_note(profile),
        "s1-memory-halved": _memory_note(profile),
        "s4-traffic-per-iteration": _in_m_note(profile, "1"),
        "traffic-per-step": _in_m_note(profile, "32"),
    }
    lead = f"Simulated, so without a verdict; {about(profile)}, without checkpointing: "
    return {name: lead + text for name, text in made.items() if text}


# ---- sentences ----


def _headline_lines(profile: Profile, variant: str) -> list[list[str]]:
    """A line for every source of U."""
    found = [{union_of(r): r for r in profile.found(variant, profile.stated, c)} for c in (False, True)]
    return [_headline_line(profile, found[0].get(u), found[1].get(u)) for u in sorted({*found[0], *found[1]})[::-1]]


def _headline_line(profile: Profile, plain: Row | None, saved: Row | None) -> list[str]:
    row = plain or saved
    assert row is not None
    most = next((e for e in profile.largest if series_of(e) == series_of(row) and e["checkpointing"]), None)
    return [
        title_of(row),
        f"{row['parameters']['percent_of_base']:.1f}",
        _device(plain),
        _device(saved),
        held_cell(row, "host_peak_bytes", 1),
        per_token(row, "1"),
        per_token(row, "32"),
        f"{tokens_per_s(row):,.0f}",
        _largest_cell(most, row["neurons"] is not None),
        evidence_of(row) + (", in part modelled" if row.get("modelled") else ""),
    ]


def _device(row: Row | None) -> str:
    if row is None:
        return "not run"
    fits = best.memory_at(row, 2)["fits"]
    return held_cell(row, "device_total_bytes", 1) + ("" if fits else ", does not fit")


def _largest_cell(entry: Row | None, sized: bool) -> str:
    if not sized:
        return "one size"
    if entry is None:
        return "not run"
    return f"{entry['percent_of_base']:.1f}" if ran(entry) else str(entry["state"]).replace("-", " ")


def _fits_sentence(profile: Profile) -> str:
    told, most = [], max(profile.settings["accumulations"])
    for saved, words in ((False, "without"), (True, "with")):
        fits: dict[str, bool] = {}
        for r in profile.at(profile.stated):
            if ran(r) and r["checkpointing"] is saved and r["parameters"]["trainable"]:
                fits[r["variant"]] = fits.get(r["variant"], True) and best.memory_at(r, most)["fits"]
        if fits:
            told.append(f"{sum(fits.values())} of {len(fits)} methods {words} activation checkpointing")
    steps = f" and {_steps(most)}" if most > 1 else ""
    return f"At R = {profile.stated}{steps} the card holds {' and '.join(told)}." if told else ""


def _largest_sentence(profile: Profile) -> str:
    named = [e for n in ("parallel_adapter", "meft") for e in profile.largest
             if ran(e) and e["checkpointing"] and e["variant"] == n]  # fmt: skip
    if len({e["variant"] for e in named}) < 2:
        return ""
    parts = [f"{title_of(e)} {e['percent_of_base']:.1f} %{_on_host(e['host_peak_bytes'])}" for e in named]
    where = f"With checkpointing{_in_steps(named)}"
    return f"{where} the largest that fits trains, of the base's parameters: {'; '.join(parts)}."


def _in_steps(entries: Iterable[Row]) -> str:
    """Of which steps the sizes that a search found are the largest."""
    counts = {most_of(e) for e in entries}
    return f" in {_steps(counts.pop())}" if counts else ""


def _steps(accumulation: int) -> str:
    return f"steps of {accumulation} micro-batch{'es' * (accumulation > 1)}"


def _on_host(count: int | None) -> str:
    return f" with {count / GIB:.0f} GiB of host memory" if count and count >= GIB else ""


def _traffic_sentence(profile: Profile) -> str:
    return " ".join(_traffic_of(profile, meft) for meft in profile.found("meft", profile.stated, False))


def _traffic_of(profile: Profile, meft: Row) -> str:
    text = (
        f"{title_of(meft)} moves {per_token(meft, '1')} KiB a token at accumulation 1 and {per_token(meft, '32')} at 32"
    )
    turns = {n: turning_point(profile, meft, n) for n in _WHOLE}
    first = [(at, n) for n, at in turns.items() if at is not None]
    if first:
        at, name = min(first)
        row = profile.row(name, profile.stated, False)
        assert row is not None
        text += f"; from accumulation {at} on, {row['title']} moves less" if at > 1 else f"; {row['title']} moves less"
    share = meft["time"].get("practicality")
    return text + (f". It trains at {share:.2f} of the resident adapter's speed." if share is not None else ".")


def _speed_note(profile: Profile) -> str:
    rows = [r for n in profile.neurons for r in profile.found("meft", n, False)]
    told = [f"{p:.2f} at {_at(r)}" for r in rows if (p := r["time"].get("practicality")) is not None]
    return f"MEFT's speed over the resident Parallel Adapter's of the same R is {', '.join(told)}." if told else ""


def _order_note(profile: Profile) -> str:
    rows = {n: profile.found(n, profile.stated, False) for n in LATENCY_FIVE}
    if not all(rows.values()):
        return ""
    steps = sorted((step_s(r), title_of(r)) for own in rows.values() for r in own)
    return f"at R = {profile.stated}, fast to slow: {'; '.join(f'{t} {s:.3f} s' for s, t in steps)}."


def _memory_note(profile: Profile) -> str:
    # The places of the claim's own test: MEFT as released for NQ, the dense adapter of the 48 GB group.
    places = [("meft", 8464), ("parallel_adapter", 3072), ("parallel_adapter", 8464)]
    rows = [r for v, n in places for r in profile.found(v, n, False)]
    told = [f"{r['title']} at {_at(r)} needs {amount(r['memory']['device_total_bytes'], GIB, 1)} GiB" for r in rows]
    return f"{', '.join(told)} of the device in a step of the fewest micro-batches, context counted." if told else ""


def _in_m_note(profile: Profile, accumulation: str) -> str:
    told = []
    for neurons in profile.neurons:
        for row in profile.found("meft", neurons, False):
            if (in_m := per_step(row, accumulation, "in_m")) is not None:
                told.append(f"{in_m:.2f} M at {_at(row)}")
    batches = "a micro-batch" if accumulation == "1" else f"a step of {accumulation} micro-batches"
    return f"all that crosses the link for {batches}, both ways: {', '.join(told)}." if told else ""


def _at(row: Row) -> str:
    """R = 3,072 (U/R 0.26, assumed)."""
    union = union_of(row)
    share = f" (U/R {row['union']['union_share']:.2f}, {union})" if union else ""
    return f"R = {row['neurons']:,}{share}"


# ---- the paper's numbers, predicted and measured ----


def _paper_lines(entry: dict[str, Any]) -> Iterator[list[str]]:
    """(quantity, of what, the paper, recomputed, evidence) of one printed number; one without a row says so."""
    printed = "no figure" if entry["printed"] is None else _number(entry["printed"], entry["unit"])
    for line in entry["ours"]:
        plain = isinstance(line["value"], int) or line["label"].startswith("U / R")
        value = _number(line["value"], "" if plain else entry["unit"])
        yield [entry["figure"], line["label"], printed, value, line["evidence"]]
    if not entry["ours"]:
        yield [entry["figure"], "no row", printed, "not run", "not run"]


def _number(value: float, unit: str) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f"{text} {unit}".strip()


def _pairs(profiles: Sequence[Profile]) -> Iterator[tuple[Profile, Row, Profile, Row]]:
    """(profile, simulated row, profile, measured or capped row) of the same step."""
    rows = [(p, r) for p in profiles for r in p.rows if ran(r)]
    for p, r in rows:
        if r["evidence"] in ("measured", "capped"):
            same = [(q, s) for q, s in rows if s["evidence"] == "simulated" and step_of(q, s) == step_of(p, r)]
            # The bytes do not depend on the card; the nearest match is that of the same card.
            same.sort(key=lambda found: found[0].card != p.card)
            if same:
                yield (*same[0], p, r)


def _compared(profile: Profile, predicted: Row, other: Profile, measured: Row) -> Iterable[list[str]]:
    for title, path, timed in _COMPARED:
        ours, theirs = find(predicted, path), find(measured, path)
        same_card = profile.card == other.card and measured["evidence"] == "measured"
        if ours is None or theirs is None or (timed and not same_card):
            continue
        ratio = f"{ours / theirs:.4f}" if theirs else "both 0" if not ours else "measured 0"
        size = "none" if measured["neurons"] is None else f"{measured['neurons']:,}"
        yield [profile.model, title_of(measured), size, with_checkpointing(measured), title, f"{ours:,}", f"{theirs:,}",
               ratio, evidence_of(measured)]  # fmt: skip
