"""The finding on what fits a card and how fast, from the profile."""

from collections.abc import Sequence

from meft_bench.profile import best
from meft_bench.report.records.profiles import Profile, Row, most_of, ran, step_s
from meft_bench.report.records.results import STALE_MARK
from meft_bench.report.text import plain

_MANY = 16
"""Micro-batches of a step beside one: what updates once a step costs less of it then."""
_NEARLY = 0.9
"""Of the ordinary adapter's speed: what counts as hardly slower."""


def on_a_card(profiles: Sequence[Profile]) -> str:
    """Size and speed on the first profile's card, with activation checkpointing, from the first that has both."""
    same = [p for p in profiles if (p.model, p.card) == (profiles[0].model, profiles[0].card)]
    found = next((told for p in same if (told := _sizes_and_speed(p))), None)
    return found or "**What fits on a card, and how fast, was not run.** It needs `make profile GPU=24GB FULL=1`."


def _sizes_and_speed(profile: Profile) -> str:
    largest = {n: [e for e in profile.largest if ran(e) and e["checkpointing"] and e["variant"] == n]
               for n in ("meft", "parallel_adapter")}  # fmt: skip
    rows = profile.found("meft", profile.stated, False)
    speeds = _speeds(profile, rows)
    if not all(largest.values()) or not speeds:
        return ""
    ours = sorted(e["percent_of_base"] for e in largest["meft"])  # by the logged U/R, and by the paper's
    theirs = max(e["percent_of_base"] for e in largest["parallel_adapter"])
    head = "What fits on a card, and how fast"
    if ours[0] > theirs and speeds[-1] < 1:
        head = "MEFT makes room on a card and pays for it in speed"
        if _held_speeds(profile)[1][:1] >= [_NEARLY]:
            head = "MEFT makes room on a card, at nearly full speed if neurons used most stay there"
    s, mark = profile.settings, f" {STALE_MARK}" * bool(profile.why_not)
    most = max(most_of(e) for own in largest.values() for e in own)
    return (
        f"**{head}.** For {plain(profile.model)} on a card of the {plain(s['card_title'])}, the largest adapter that "
        f"fits has {_span(ours, 1)} of the model's parameters with MEFT ({_host(largest['meft'])}), and {theirs:.1f} % "
        f"as an ordinary adapter. With {profile.stated:,} neurons a layer MEFT trains at "
        f"{_span([100 * x for x in speeds])} of the ordinary adapter's speed{_with_many(profile, rows)}"
        f"{_held(profile)}."
        f"{_rival(profile)} ({profile.evidence.capitalize()}, "
        f"micro-batches of {s['batch']} x {s['seq']} tokens{f'; the largest fit steps of {most}' * (most > 1)}"
        f"{_aged(profile)}.){mark}"
    )


def _aged(profile: Profile) -> str:
    return f"; {plain(profile.why_not)}" if profile.why_not else ""


def _speeds(profile: Profile, rows: Sequence[Row]) -> list[float]:
    """Of rows that ran: the ordinary adapter's time of a step over theirs, ascending. Not a row's practicality, which
    is rounded already: of .954998 it makes .955, and that would be 96 % here and .95 in a table."""
    pairs = [(profile.row(best.RESIDENT, r["neurons"], r["checkpointing"]), r) for r in rows]
    return sorted(step_s(whole) / step_s(r) for whole, r in pairs if whole is not None)


def _held_speeds(profile: Profile) -> tuple[Sequence[Row], list[float]]:
    """The rows with the largest device budget that fits the card, and their shares of the ordinary adapter's speed,
    ascending."""
    spent = {r["variant"]: s for r in profile.at(profile.stated) if (s := r["size"].get("device_budget"))}
    for rows in (profile.found(name, profile.stated, False) for name in sorted(spent, key=lambda n: -spent[n])):
        speeds = _speeds(profile, rows)
        if speeds and all(best.memory_at(r, _MANY)["fits"] for r in rows):
            return rows, speeds
    return [], []


def _held(profile: Profile) -> str:
    """The speed of those, in words."""
    rows, speeds = _held_speeds(profile)
    if not speeds:
        return ""
    many = _with_many(profile, rows, brief=True)
    return f"; with those used most held on the card, at {_span([100 * x for x in speeds])}{many}"


def _rival(profile: Profile) -> str:
    """The simplest other way to the same end: the optimizer alone on the host, and how far gradients there lead."""
    name = "parallel_adapter_host_optimizer"
    largest = {e["variant"]: e["percent_of_base"] for e in profile.largest if ran(e) and e["checkpointing"]}
    row = profile.row(name, profile.stated, False)
    speeds = [] if row is None else _speeds(profile, [row])
    if row is None or name not in largest or not speeds:
        return ""
    many = _with_many(profile, [row], brief=True)
    farther = largest.get(f"{name}_gradients", 0.0)
    also = f" ({farther:.1f} % with its gradients there too)" if farther > largest[name] else ""
    return (
        f" The ordinary adapter with its optimizer on the host reaches {largest[name]:.1f} %{also}; with "
        f"{profile.stated:,} neurons it trains at {_span([100 * x for x in speeds])} of that speed{many}."
    )


def _with_many(profile: Profile, rows: Sequence[Row], brief: bool = False) -> str:
    """The same share of the speed where a step has many micro-batches; brief: the number alone."""
    whole = profile.row("parallel_adapter", profile.stated, False)
    told = [r["time"]["tokens_per_s_by_accumulation"].get(str(_MANY)) for r in (*rows, *([whole] if whole else []))]
    if whole is None or not all(told):
        return ""
    shares = sorted(100 * speed / told[-1] for speed in told[:-1])
    return f" ({_span(shares)}" + ("" if brief else f" with {_MANY} micro-batches a step") + ")"


def _host(entries: Sequence[Row]) -> str:
    return f"{max(e['host_peak_bytes'] for e in entries) / 2**30:.0f} GiB of host memory"


def _span(shares: Sequence[float], digits: int = 0) -> str:
    """The lowest and highest of ascending percentages."""
    low, high = (f"{x:.{digits}f}" for x in (shares[0], shares[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"
