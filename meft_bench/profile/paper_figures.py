"""The paper's own figures recomputed from a profile's rows: 0.56 M, 3.57 times, 48 to 24 GB, 63 %."""

from typing import Any

from meft_bench.profile import best

NEURONS, LARGE, TOKENS = 3072, 6144, 512
"""R of the paper's 24 GB runs, R of its traffic figure, and T of both (2 x 256)."""
GIB = 2**30


def recomputed(rows: list[dict[str, Any]], hidden: int, layers: int, tokens: int) -> list[dict[str, Any]]:
    """Entries {"figure", "printed", "unit", "ours": [{"label", "value", "evidence"}]}; a row that is missing leaves its
    line out, and micro-batches of another T than the paper's leave none. Units of M are 16-bit elements over trained
    keys and values (2 D R L)."""
    if tokens != TOKENS:
        return []
    whole = 2 * hidden * LARGE * layers
    entries = [_implied(hidden, layers, whole)]
    entries.append(_entry("elements moved an iteration, rows and gradients (R=6144)", 0.56, "M",
                          [_line(r, _rows_in_m(r, whole), r["evidence"]) for r in _meft(rows, LARGE)]))  # fmt: skip
    entries.append(_entry("elements moved an iteration, all of it (R=6144)", 0.56, "M",
                          [_line(r, _all_in_m(r, whole, "1"), r["evidence"]) for r in _meft(rows, LARGE)
                           if "1" in r["traffic"]["by_accumulation"]]))  # fmt: skip
    for count in ("1", "4", "16", "32"):
        step = "1 micro-batch a step" if count == "1" else f"{count} micro-batches a step"
        title = f"times less traffic than the adapter streamed whole, {step} (R=6144)"
        entries.append(_entry(title, 3.57 if count == "1" else None, "x", _ratios(rows, count)))
        title = f"times less traffic than an optimizer on the host, {step} (R=6144)"
        entries.append(_entry(title, None, "x", _ratios(rows, count, "parallel_adapter_host_optimizer")))
    device = [_line(r, r["memory"]["device_total_bytes"] / GIB, r["evidence"]) for r in _at(rows, NEURONS)]
    entries.append(_entry("device memory at R=3072", 24, "GiB", device))
    for neurons in (NEURONS, LARGE):
        speed = [_line(r, r["time"]["practicality"], r["time"]["evidence"]) for r in _meft(rows, neurons)
                 if r["time"].get("practicality")]  # fmt: skip
        entries.append(_entry(f"speed of the resident adapter's (R={neurons}, 1 micro-batch)", 0.63, "share", speed))
    return entries


def _implied(hidden: int, layers: int, whole: int) -> dict[str, Any]:
    """U that 0.56 M means: Eq. 8 as printed (2 D U + T D a layer), and with gradients counted (4 D U + T D)."""
    elements = 0.56 * whole
    printed = (elements / layers - TOKENS * hidden) / (2 * hidden)
    counted = (elements / layers - TOKENS * hidden) / (4 * hidden)
    ours = [
        {"label": "elements", "value": round(elements), "evidence": "reported"},
        {"label": "bytes at 16 bits", "value": round(2 * elements), "evidence": "reported"},
        {"label": "U / R by Eq. 8 as printed", "value": round(printed / LARGE, 4), "evidence": "reported"},
        {"label": "U / R with gradients counted", "value": round(counted / LARGE, 4), "evidence": "reported"},
    ]
    return _entry("what 0.56 M implies (R=6144, T=512)", 0.56, "M", ours)


def _entry(figure: str, printed: float | None, unit: str, ours: list[dict[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"figure": figure, "printed": printed, "unit": unit, "ours": ours}
    return entry if printed is not None else {**entry, "printed_reason": "the paper gives no figure for this"}


def _line(row: dict[str, Any], value: float, evidence: str) -> dict[str, Any]:
    label = row["title"] + (", checkpointing" if row["checkpointing"] else "")
    if row["union"]:
        label += f", U/R {row['union']['union_share']:.2f} {best.union_words(row['union']) or 'logged'}"
    return {"label": label, "value": round(value, 4), "evidence": evidence}


def _at(rows: list[dict[str, Any]], neurons: int, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    names = names or ("parallel_adapter", "parallel_adapter_adam8bit", "parallel_adapter_host_optimizer", "meft")
    return [r for r in rows if r["state"] == "ok" and r["neurons"] == neurons and r["variant"] in names]


def _meft(rows: list[dict[str, Any]], neurons: int) -> list[dict[str, Any]]:
    return [r for r in _at(rows, neurons, ("meft", "meft_no_ke")) if not r["checkpointing"]]


def _rows_in_m(row: dict[str, Any], whole: int) -> float:
    link = row["traffic"]["link_bytes"]
    return (link["h2d rows"] + link["d2h grads"]) / 2 / whole


def _all_in_m(row: dict[str, Any], whole: int, count: str) -> float:
    moved = row["traffic"]["by_accumulation"][count]
    return (moved["h2d_bytes_per_step"] + moved["d2h_bytes_per_step"]) / 2 / whole


def _ratios(rows: list[dict[str, Any]], count: str, name: str = "parallel_adapter_streamed") -> list[dict[str, Any]]:
    against = [r for r in _at(rows, LARGE, (name,)) if not r["checkpointing"]]
    if not against or count not in against[0]["traffic"]["by_accumulation"]:
        return []
    most = _all_in_m(against[0], 1, count)
    return [_line(r, most / _all_in_m(r, 1, count), r["evidence"]) for r in _meft(rows, LARGE)]
