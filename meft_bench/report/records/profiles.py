"""The records of `meft-bench profile` (results/profile/*.json), checked on reading, and what is asked of them.

One file is one model on one card. Symbols: R neurons per layer, K kept per token, U union of a micro-batch, M trainable
keys and values.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import profile_why_not
from meft_bench.harness.record import EVIDENCE
from meft_bench.profile import best
from meft_bench.reading import read_json
from meft_bench.report.text import plain, visible

SCHEMA = 1
COMMAND = "make profile GPU=24GB FULL=1"
STATED_NEURONS = 3072
"""R of the tables and figures that show one size: the paper's 12 % at LLaMA-7B."""
PRIMARY = ("llama-7b", "24GB")
"""The paper's model and card: the headline, where it is there."""
Row = dict[str, Any]
_SETTINGS = ("model", "shape", "card", "card_title", "memory_bytes", "usable_bytes", "context_bytes", "host",
             "host_title", "batch", "seq", "accumulations", "constants")  # fmt: skip
_ROW = ("variant", "title", "family", "neurons", "size", "checkpointing", "state", "evidence")
_PAPER = ("figure", "printed", "unit", "ours")
_BESIDE = ("entries", "traceEvents", "checks", "points")
"""What tells a selection log, a Chrome trace, a calibration and a result for many GPUs from a profile."""
_ANY_HOST = 2**60
"""Bytes of a host that a file says nothing of."""
_UNIONS = ("", "logged", "assumed")
_BLOCKS = {
    "parameters": ("trainable", "base", "percent_of_base"),
    "memory": ("device_peak_bytes", "device_total_bytes", "by_category", "host_peak_bytes", "fits"),
    "traffic": ("h2d_bytes_per_micro_batch", "d2h_bytes_per_micro_batch", "by_accumulation"),
    "time": ("step_s_by_accumulation", "tokens_per_s_by_accumulation", "components_s"),
}
"""Of a row that ran."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One checked file; name is its stem."""

    name: str
    evidence: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    largest: tuple[Row, ...]
    longer: tuple[Row, ...] = ()
    """Rows of larger micro-batches, each with its "batch" and "seq"."""
    paper: tuple[dict[str, Any], ...]
    timeline: dict[str, Any]
    why_not: str = ""
    """Why it does not count (harness/numerics.py); "" when it does."""

    @property
    def model(self) -> str:
        return str(self.settings["model"])

    @property
    def card(self) -> str:
        return str(self.settings["card"])

    @property
    def neurons(self) -> list[int]:
        """Every R that a row has, ascending."""
        return sorted({r["neurons"] for r in self.rows if r["neurons"] is not None})

    @property
    def stated(self) -> int | None:
        """The R that stands for all where one is shown: STATED_NEURONS, else the nearest below, else the least."""
        sizes = self.neurons
        below = [r for r in sizes if r <= STATED_NEURONS]
        return below[-1] if below else sizes[0] if sizes else None

    def at(self, neurons: int | None) -> list[Row]:
        """Rows of one R and those without a size, in the file's order."""
        return [r for r in self.rows if r["neurons"] in (neurons, None)]

    def found(self, variant: str, neurons: int | None, checkpointing: bool) -> list[Row]:
        """The rows that ran: for what depends on U, one with the logged and one with the assumed, in this order."""
        wanted = (variant, checkpointing)
        rows = [r for r in self.at(neurons) if ran(r) and (r["variant"], r["checkpointing"]) == wanted]
        return sorted(rows, key=lambda r: _UNIONS.index(union_of(r)))

    @property
    def cards(self) -> list[str]:
        """The profiled card, then the others on which its operations were timed."""
        return best.cards_of(self._content)

    def points(self, card: str, both: bool = False) -> list[best.Point]:
        """Its rows on a card, as profile/best.py takes them."""
        return best.points(self._content, card, both)

    def ends(self) -> list[best.Point]:
        """The largest size of every method on the profiled card, where the file has its speed."""
        return best.ends(self._content)

    @property
    def _content(self) -> dict[str, Any]:
        return {"settings": {"host_memory_bytes": _ANY_HOST, **self.settings}, "rows": self.rows,
                "largest": self.largest}  # fmt: skip

    def row(self, variant: str, neurons: int | None, checkpointing: bool) -> Row | None:
        """The first of found, or None."""
        return next(iter(self.found(variant, neurons, checkpointing)), None)


def ran(row: Row) -> bool:
    """Whether it has numbers."""
    return bool(row["state"] == "ok")


def load_profiles(folder: Path) -> list[Profile]:
    """Every full profile of a folder, the primary ones first, of those the ones that count before stale ones, then by
    name; those that are not full are left out. Raises ValueError naming a file that is broken or has another schema."""
    found = [p for path in sorted(folder.glob("*.json")) if (p := _load(path)) is not None]
    return sorted(
        found, key=lambda p: ((p.model, p.card) != PRIMARY, p.evidence != "simulated", bool(p.why_not), p.name)
    )


def simulated(profiles: Iterable[Profile]) -> list[Profile]:
    """Those whose numbers come from the simulated GPU."""
    return [p for p in profiles if p.evidence == "simulated"]


def by_model(profiles: Sequence[Profile]) -> dict[str, list[Profile]]:
    """Model -> its profiles, in the order given."""
    return {model: [p for p in profiles if p.model == model] for model in dict.fromkeys(p.model for p in profiles)}


def union_of(row: Row) -> str:
    """Where the U of a row, or of a largest size, is from: "logged", "assumed", or "" where nothing depends on U."""
    said = row.get("union_evidence") or (row.get("union") or {}).get("evidence")
    return {"measured": "logged", "assumed": "assumed"}.get(str(said), "")


def title_of(row: Row) -> str:
    """The method's name and where its U is from."""
    words = best.union_words(row.get("union") or {"evidence": row.get("union_evidence", "")})
    return f"{row['title']} (U {words})" if words else str(row["title"])


def series_of(row: Row) -> tuple[str, str]:
    """What tells the lines of a figure apart: the variant and where its U is from."""
    return str(row["variant"]), union_of(row)


def step_of(profile: Profile, row: Row) -> tuple[Any, ...]:
    """What a simulated row and a measured one of the same step have alike. Bytes and seconds follow U: a U that was
    logged of a trained model, or counted with few different tokens, is none of a model with random weights."""
    s, union = profile.settings, row.get("union") or {}
    drawn = s.get("drawn_from")
    few = 0 if drawn in (None, s["shape"].get("vocabulary")) else drawn
    return (profile.model, s["batch"], s["seq"], few, *series_of(row), union.get("model", ""), row["neurons"],
            row["checkpointing"])  # fmt: skip


def card_of(profile: Profile, profiles: Iterable[Profile]) -> str:
    """The profiled card, how its numbers came to be unless simulated, and, where several of these profiles are of one
    model on it, what tells this one apart: the rest of its file's name."""
    alike = [p for p in profiles if (p.model, p.card) == (profile.model, profile.card)]
    name = profile.name.removeprefix(f"{profile.model}_{profile.card}").strip("-_")
    words = [profile.card] + [profile.evidence] * (profile.evidence != "simulated")
    return ", ".join(words) + (f" ({name})" if len(alike) > 1 and name else "")


def most_of(entry: Row) -> int:
    """The micro-batches of the steps that a largest size fits."""
    return int(entry.get("accumulation", 1))


def per_step(row: Row, accumulation: int | str, field: str) -> float | None:
    """A number of the traffic at an accumulation; None where the row has none."""
    found = (row["traffic"]["by_accumulation"] or {}).get(str(accumulation), {}).get(field)
    return None if found is None else float(found)


def step_s(row: Row) -> float:
    """Seconds of a step at the least accumulation profiled, usually 1."""
    return _least(row["time"]["step_s_by_accumulation"])


def tokens_per_s(row: Row) -> float:
    """Trained tokens a second at the least accumulation profiled, usually 1."""
    return _least(row["time"]["tokens_per_s_by_accumulation"])


def _least(by_accumulation: dict[str, float]) -> float:
    return float(by_accumulation[min(by_accumulation, key=int)])


def find(row: Row, path: Sequence[str]) -> Any:
    """The value at a path of a row; None where there is none."""
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def evidence_of(row: Row) -> str:
    """How a row came to be, or why it has no numbers (not run, oom), in a word."""
    return str(row["evidence"]) if ran(row) else str(row["state"]).replace("-", " ")


def stale_note(profiles: Iterable[Profile]) -> str:
    """What a reader must know before the numbers of profiles that do not count; "" if all do."""
    found = [f"{p.name} was {p.why_not}" for p in profiles if p.why_not]
    return f"**Stale:** {plain('; '.join(found))}. Make it again with `{COMMAND}` and its like." if found else ""


def about(profile: Profile) -> str:
    """Model, card, host and batch in words."""
    s = profile.settings
    return (
        f"{profile.model} ({s['shape']['parameters']:,} parameters) on {s['card_title']}, host: {s['host_title']}; "
        f"micro-batch {s['batch']} x {s['seq']} tokens"
    )


def with_checkpointing(row: Row) -> str:
    """yes or no."""
    return "yes" if row["checkpointing"] else "no"


def size_text(row: Row) -> str:
    """The option that sets the size: rank 384, R = 3072; "none" where there is none."""
    numbers = {k: v for k, v in (row.get("size") or {}).items() if isinstance(v, int) and not isinstance(v, bool)}
    if "neurons" in numbers:
        return f"R = {numbers['neurons']:,}"
    return ", ".join(f"{name} {value:,}" for name, value in numbers.items()) or "none"


def _load(path: Path) -> Profile | None:
    try:
        content = visible(read_json(path))
        if isinstance(content, dict) and any(name in content for name in _BESIDE):
            return None
        if isinstance(content, dict) and content.get("complete") is False:
            return None  # the answer at one size, or a full profile that is not done
        _check(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot read the profile {path.name} ({why}): run {COMMAND} again") from None
    return Profile(
        name=path.stem,
        evidence=content["evidence"],
        settings=content["settings"],
        rows=tuple(content["rows"]),
        largest=tuple(content["largest"]),
        longer=tuple(content.get("longer") or ()),
        paper=tuple(content.get("paper") or ()),
        timeline=content.get("timeline") or {},
        why_not=profile_why_not(content),
    )


def _check(content: Any) -> None:
    """Raises ValueError or KeyError, naming the place."""
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"schema {content.get('schema')!r} is not {SCHEMA}")
    if content["evidence"] not in EVIDENCE:
        raise ValueError(f"evidence {content['evidence']!r} is none of {', '.join(EVIDENCE)}")
    _has(content, ("settings", "rows", "largest"), "the file")
    _has(content["settings"], _SETTINGS, "settings")
    for i, row in enumerate(content["rows"]):
        _check_row(row, f"rows[{i}]")
    for i, row in enumerate(content.get("longer") or ()):
        _check_row(row, f"longer[{i}]")
        _has(row, ("batch", "seq"), f"longer[{i}]")
    for i, entry in enumerate(content["largest"]):
        _has(entry, ("variant", "title", "checkpointing", "state", "evidence"), f"largest[{i}]")
        fields = ("neurons", "size", "trainable", "percent_of_base", "device_total_bytes", "host_peak_bytes")
        _has(entry, fields if ran(entry) else ("reason",), f"largest[{i}]")
    for i, entry in enumerate(content.get("paper") or ()):
        _has(entry, _PAPER, f"paper[{i}]")


def _check_row(row: Row, where: str) -> None:
    _has(row, _ROW, where)
    if row["evidence"] not in EVIDENCE:
        raise ValueError(f"{where}: evidence {row['evidence']!r} is none of {', '.join(EVIDENCE)}")
    if not ran(row):
        if not row.get("reason"):
            raise ValueError(f"{where} did not run and gives no reason")
        return
    for block, fields in _BLOCKS.items():
        _has(row.get(block) or {}, fields, f"{where}.{block}")


def _has(block: Any, fields: Sequence[str], where: str) -> None:
    missing = [f for f in fields if f not in block]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
