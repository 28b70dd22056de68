"""The best that fits: on each card the fastest method at one size, and the largest at one speed. No torch here.

Everything is read from a profile's rows. A row says what it takes on the profiled card, and under "elsewhere" how fast
its same operations are on other cards; its bytes are the same on all of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPEED_SHARE = 0.9
"""The largest adapter is asked for at no less than this share of the resident adapter's speed."""
RESIDENT = "parallel_adapter"
"""The variant that others are compared with: all on the device, exact dense AdamW."""
OURS, OFFLOADED = "meft", "offload"
"""Families: MEFT, and the Parallel Adapter with its optimizer, or all of it, on the host."""
_STATED = 8
"""Micro-batches of the line that stands for a card, where the profile has them."""
NOT_PROFILED = "no larger size was profiled"
SEARCH_ENDED = "the search ends there"
"""Limits that are none of the method's."""
_ASSUMED = "assumed"
_SPEEDS = "tokens_per_s_by_accumulation"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method at a size on a card."""

    variant: str
    title: str
    """With the source of its U, where it depends on one."""
    family: str
    union: str
    """Where U is from: "measured" (logged), "assumed", "simulated" (all rows), or "" without one."""
    union_share: float | None
    """U / R; None for what is not MEFT."""
    exact: bool
    """Dense AdamW with fp32 moments on a base that is not quantised; False where the row does not say."""
    checkpointing: bool
    neurons: int
    """Nominal R."""
    trainable: int
    percent_of_base: float
    device_bytes: Mapping[int, int]
    """By micro-batches accumulated: the peak with the CUDA context."""
    host_bytes: Mapping[int, int]
    """By micro-batches accumulated."""
    tokens_per_s: Mapping[int, float]
    """By micro-batches accumulated."""
    room: int
    """Usable bytes of the card."""
    host_room: int

    def fits(self, accumulation: int) -> bool:
        """Whether card and host both hold a step of so many micro-batches."""
        return self.device_bytes[accumulation] <= self.room and self.host_bytes[accumulation] <= self.host_room

    @property
    def name(self) -> str:
        """The title, and whether activations are checkpointed."""
        return self.title + (", checkpointing" if self.checkpointing else "")


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The most parameters that a method trains at a speed."""

    point: Point
    """The largest profiled size that fits and is fast enough."""
    trainable: int
    """By a straight line to the next profiled size; the point's own where no larger one was profiled."""
    percent_of_base: float
    limit: str
    """What a larger one lacks, or NOT_PROFILED."""

    @property
    def ended(self) -> str:
        """Why it is the largest, in words."""
        return ended(self.limit)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a reader decides by, for one card, size and accumulation."""

    card: str
    neurons: int
    accumulation: int
    fastest: Point | None
    """None: nothing of this size fits."""
    exact: Point | None
    """The fastest that fits of those that keep AdamW and the base as they are."""
    ours: Point | None
    """The fastest MEFT that fits."""
    offloaded: Point | None
    """The fastest Parallel Adapter with its optimizer or more on the host that fits."""
    resident: Point | None
    """The resident adapter without checkpointing, whether it fits or not."""
    floor: float
    """Tokens a second that the largest must reach; 0 without a resident adapter."""
    largest: Largest | None
    ours_ran: bool
    """Whether a MEFT of this size ran, whether it fits or not."""

    def share(self, point: Point | None) -> float | None:
        """A point's speed over the resident adapter's."""
        if point is None or self.resident is None:
            return None
        return point.tokens_per_s[self.accumulation] / self.resident.tokens_per_s[self.accumulation]


def ended(limit: str) -> str:
    """Why a size is the largest, in words."""
    return limit if limit in (NOT_PROFILED, SEARCH_ENDED) else f"{limit} ends it"


def union_words(union: Mapping[str, Any] | None) -> str:
    """Where the U of a row is from: "logged", "logged, SmolLM2-135M", "assumed", or "" where nothing depends on U."""
    union = union or {}
    words = {"measured": "logged", _ASSUMED: "assumed"}.get(str(union.get("evidence", "")), "")
    return f"{words}, {union['model']}" if words and union.get("model") else words


def cards_of(profile: Mapping[str, Any]) -> list[str]:
    """The profiled card, then the others that its rows were replayed on."""
    return [profile["settings"]["card"], *(profile["settings"].get("elsewhere") or {})]


def stated_accumulation(counts: Iterable[int]) -> int:
    """The micro-batches of the line that stands for a card: 8, or the nearest below, or the least."""
    counts = sorted(int(c) for c in counts)
    return max((c for c in counts if c <= _STATED), default=counts[0])


def memory_at(row: Mapping[str, Any], accumulation: int) -> Mapping[str, Any]:
    """What a row's "memory" says of a step of so many micro-batches: from the second on peaks are all alike, and higher
    where gradients are kept for the next."""
    memory: Mapping[str, Any] = row["memory"]
    return memory.get("accumulated", memory) if accumulation > 1 else memory


def accumulations_on(profile: Mapping[str, Any], card: str) -> list[int]:
    """What rows are timed at: every accumulation on the profiled card, the stated one on the others."""
    counts = profile["settings"]["accumulations"]
    return list(counts) if card == profile["settings"]["card"] else [stated_accumulation(counts)]


def points(profile: Mapping[str, Any], card: str, both: bool = False) -> list[Point]:
    """Every row that ran and has a size, as it is on a card. Unless both are wanted, the row with the assumed U is left
    out where U was logged, and the logged one where the user named a share."""
    settings = profile["settings"]
    own = card == settings["card"]
    room = settings["usable_bytes"] if own else settings["elsewhere"][card]["usable_bytes"]
    ran = [r for r in profile["rows"] if r["state"] == "ok" and r["neurons"]]
    found = []
    for row in ran if both else _without_the_other_union(ran, given=settings.get("union") is not None):
        speeds = (row["time"] if own else (row.get("elsewhere") or {}).get(card) or {}).get(_SPEEDS, {})
        counted = row["parameters"]["trainable"] and row["memory"]["device_total_bytes"]
        if counted and speeds.keys() >= {str(a) for a in accumulations_on(profile, card)}:
            found.append(_point(row, speeds, room, settings["host_memory_bytes"]))
    return found


def ends(profile: Mapping[str, Any]) -> list[Point]:
    """The largest size of every method that the search found on the profiled card, with the bytes of the most micro-
    batches."""
    settings = profile["settings"]
    families = {r["variant"]: (r["family"], r.get("exact")) for r in profile["rows"]}
    fit = [e for e in profile["largest"] if e["state"] == "ok" and _SPEEDS in e]
    rows = [_row_of(entry, *families[entry["variant"]]) for entry in fit if entry["variant"] in families]
    return [
        _point(row, row["speeds"], settings["usable_bytes"], settings["host_memory_bytes"])
        for row in _without_the_other_union(rows, given=settings.get("union") is not None)
    ]


def answer(found: Sequence[Point], card: str, neurons: int, accumulation: int) -> Answer:
    """The best of points(profile, card) at R and at the speed of the resident adapter of R."""
    here = [p for p in found if p.neurons == neurons]
    fit = [p for p in here if p.fits(accumulation)]
    resident = next((p for p in here if p.variant == RESIDENT and not p.checkpointing), None)
    floor = SPEED_SHARE * resident.tokens_per_s[accumulation] if resident else 0.0
    return Answer(
        card=card,
        neurons=neurons,
        accumulation=accumulation,
        fastest=_fastest(fit, accumulation),
        exact=_fastest((p for p in fit if p.exact), accumulation),
        ours=_fastest((p for p in fit if p.family == OURS), accumulation),
        offloaded=_fastest((p for p in fit if p.family == OFFLOADED), accumulation),
        resident=resident,
        floor=floor,
        largest=largest_at(found, floor, accumulation) if floor else None,
        ours_ran=any(p.family == OURS for p in here),
    )


def largest_at(found: Sequence[Point], floor: float, accumulation: int) -> Largest | None:
    """The most trainable parameters that fit and reach floor tokens a second; None if nothing does. Between two
    profiled sizes bytes and seconds a token are taken to lie on a straight line."""
    series: dict[tuple[str, str, bool], list[Point]] = {}
    for p in found:
        series.setdefault((p.variant, p.union, p.checkpointing), []).append(p)
    ends = [end for own in series.values() if (end := _end(own, floor, accumulation)) is not None]
    return max(ends, key=lambda e: e.trainable, default=None)


def frontier(found: Iterable[Point], accumulation: int) -> list[Point]:
    """The points that fit and that none beats in both nominal size and speed, from small to large."""
    best: list[Point] = []
    for p in sorted(found, key=lambda p: (-p.neurons, -p.tokens_per_s[accumulation])):
        if p.fits(accumulation) and (not best or p.tokens_per_s[accumulation] > best[-1].tokens_per_s[accumulation]):
            best.append(p)
    return best[::-1]


def _fastest(found: Iterable[Point], accumulation: int) -> Point | None:
    return max(found, key=lambda p: p.tokens_per_s[accumulation], default=None)


def _end(own: list[Point], floor: float, accumulation: int) -> Largest | None:
    own = sorted(own, key=lambda p: p.trainable)
    good = [p for p in own if p.fits(accumulation) and p.tokens_per_s[accumulation] >= floor]
    if not good:
        return None
    low = good[-1]
    high = next((p for p in own if p.trainable > low.trainable), None)
    if high is None:
        percent = low.percent_of_base
        return Largest(point=low, trainable=low.trainable, percent_of_base=percent, limit=NOT_PROFILED)
    share, limit = min(_crossings(low, high, floor, accumulation))
    grown = round(low.trainable + share * (high.trainable - low.trainable))
    percent = low.percent_of_base * grown / low.trainable
    return Largest(point=low, trainable=grown, percent_of_base=percent, limit=limit)


def _crossings(low: Point, high: Point, floor: float, accumulation: int) -> Iterator[tuple[float, str]]:
    """(share of the way from low to high, what ends there)."""
    seconds = [1 / p.tokens_per_s[accumulation] for p in (low, high)]
    lines: tuple[tuple[float, float, float, str], ...] = (
        (low.device_bytes[accumulation], high.device_bytes[accumulation], low.room, "device memory"),
        (low.host_bytes[accumulation], high.host_bytes[accumulation], low.host_room, "host memory"),
        (seconds[0], seconds[1], 1 / floor, "speed"),
    )
    for start, end, most, limit in lines:
        if end > most:
            yield (most - start) / (end - start), limit


def _point(row: Mapping[str, Any], speeds: Mapping[str, float], room: int, host_room: int) -> Point:
    union = (row.get("union") or {}).get("evidence", "")
    words = union_words(row.get("union"))
    held = {int(a): memory_at(row, int(a)) for a in speeds}
    return Point(
        variant=row["variant"],
        title=row["title"] + (f" (U {words})" if words else ""),
        family=row["family"],
        union=union,
        union_share=(row.get("union") or {}).get("union_share"),
        exact=bool(row.get("exact")),
        checkpointing=row["checkpointing"],
        neurons=row["neurons"],
        trainable=row["parameters"]["trainable"],
        percent_of_base=row["parameters"]["percent_of_base"],
        device_bytes={a: memory["device_total_bytes"] for a, memory in held.items()},
        host_bytes={a: memory["host_peak_bytes"] or 0 for a, memory in held.items()},
        tokens_per_s={int(a): v for a, v in speeds.items()},
        room=room,
        host_room=host_room,
    )


def _row_of(entry: Mapping[str, Any], family: str, exact: bool | None) -> dict[str, Any]:
    return {
        **entry,
        "family": family,
        "exact": exact,
        "parameters": entry,
        "memory": entry,
        "speeds": entry[_SPEEDS],
    }


def _without_the_other_union(rows: Sequence[Mapping[str, Any]], given: bool) -> list[Mapping[str, Any]]:
    def union(row: Mapping[str, Any]) -> str:
        return str((row.get("union") or {}).get("evidence", ""))

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["variant"], row["checkpointing"]

    other, kept = ("measured", _ASSUMED) if given else (_ASSUMED, "measured")
    has = {place(r) for r in rows if union(r) == kept}
    return [r for r in rows if union(r) != other or place(r) not in has]
