"""What a reader should take away: five findings as sentences, each with the numbers it rests on.

Which of its forms a sentence takes is decided by the ledger's verdict, or by the profile's numbers; nothing is judged
here. A finding that was not run says so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meft_bench.report.claims.entries import Claim, Finding, Ledger, Part, Shown
from meft_bench.report.claims.words import seeds_text
from meft_bench.report.figures.marks import title
from meft_bench.report.records.profiles import Profile, Row, ran
from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import STALE_MARK, borrowed_rates
from meft_bench.report.text import paragraphs, plain

_STALE = f"**Stale {STALE_MARK}: made by an earlier version of the code.** The marked numbers hold for that version."
TASKS = {"facts": "facts", "cloze": "sentences with a blank", "tools": "tools", "arithmetic": "sums in words"}
"""The synthetic tasks in plain words."""
_REAL_SIZE = re.compile(r"(\w+ [\d.]+%) is ([\d.]+%)")
"""In a label: a place, and its share of the base's parameters where that is not the nominal one."""


@dataclass(frozen=True, kw_only=True)
class _Sentence:
    """A claim in plain words, by its verdict; tells gives the numbers behind it."""

    claim: str
    supported: str
    contradicted: str
    open: str
    """What is asked, as the subject of "is not settled" or "was not run"."""
    tells: Callable[[dict[str, Claim], Finding], list[str]]


def takeaways(ledger: Ledger, profiles: Sequence[Profile]) -> str:
    """The five findings as Markdown: a numbered list, after a line on old runs where a number is marked."""
    claims = {c.id: c for c in ledger.claims}
    told = [_told(s, claims) for s in _SENTENCES] + [_on_a_card(profiles)]
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(told, 1))
    lines = [line for s in _SENTENCES for line in claims[s.claim].lines]
    return paragraphs(_STALE if STALE_MARK in listed else "", listed, borrowed_rates(lines))


def _told(sentence: _Sentence, claims: dict[str, Claim]) -> str:
    finding = claims[sentence.claim].small
    assert finding is not None, f"{sentence.claim} has no test on the embedded model"
    if finding.decisive is None:
        return f"**{sentence.open} was not run.** It needs `{finding.command}`: {plain(finding.reason)}."
    head = {"supported": sentence.supported, "contradicted": sentence.contradicted}.get(
        finding.verdict, f"{sentence.open} is not settled"
    )
    return f"**{head}.** {' '.join(text for text in sentence.tells(claims, finding) if text)}"


# ---- numbers in words ----


def _difference(shown: Shown, finding: Finding) -> str:
    """MEFT at 10% scored 27.3 points more than the Parallel Adapter at 4% on facts (...)."""
    if shown.mean is None:
        return f"{shown.label}: not run."
    points = 100 * shown.mean
    name, behind = shown.label.partition(" (")[0], _behind(shown, finding, "{:+.1f}", 100)
    first, _, second = name.partition(" minus ")
    if not second:
        return f"{name}: {points:+.1f} points {behind}."
    task, real = parse_reference(first)[2], dict(_REAL_SIZE.findall(shown.label))
    more = f"{abs(points):.1f} points {'more' if points >= 0 else 'less'}"
    return f"{_place(first, real)} scored {more} than {_place(second, real)} on {TASKS.get(task, task)} {behind}."


def _place(reference: str, real: Mapping[str, str]) -> str:
    """MEFT at 10%, and the real size where it is another."""
    row, share, _, _ = parse_reference(reference)
    other = real.get(f"{row} {share}")
    return f"{title(row)} at {share}" + (f" ({other})" if other else "")


def _times(shown: Shown, finding: Finding) -> str:
    """5.33 times the adapter's size (...)."""
    if shown.mean is None:
        return "not run"
    return f"{shown.mean:.2f} times the adapter's own size {_behind(shown, finding, '{:.2f}', 1)}"


def _behind(shown: Shown, finding: Finding, form: str, factor: float) -> str:
    """(95 % interval +17.1 to +37.6; measured, 3 seeds, n = 1,800) and the mark of old code."""
    span = ""
    if shown.interval is not None:
        low, high = (form.format(factor * x) for x in shown.interval)
        span = f"95 % interval {low} to {high}; "
    seeds = seeds_text(finding) if shown is finding.decisive else f"{len(shown.values.by_seed)} seeds"
    items = f", n = {shown.values.items.n:,}" if shown.values.items is not None else ""
    return f"({span}{shown.values.evidence}, {seeds}{items})" + f" {STALE_MARK}" * shown.values.stale


def _decisive(claims: dict[str, Claim], finding: Finding) -> list[str]:
    assert finding.decisive is not None
    return [_difference(finding.decisive, finding)]


def _non_inferior(claims: dict[str, Claim], finding: Finding) -> list[str]:
    """The part that decides, and the loss that would count."""
    part = _part(finding)
    margin = f"A loss of {-100 * part.limits[0]:.0f} points was fixed beforehand as what would count."
    return [_difference(part, finding), margin]


def _with_shown(claims: dict[str, Claim], finding: Finding) -> list[str]:
    shown = claims["t3-lora-ffn-flat"].shows
    return [_difference(_part(finding), finding), *(_difference(s, finding) for s in shown)]


def _traffic(claims: dict[str, Claim], finding: Finding) -> list[str]:
    """One micro-batch, then a step of many, against the bound: what an adapter offloaded whole moves."""
    part, one = _part(finding), claims["s4-traffic-per-iteration"].small
    single = f"One micro-batch moved {_times(one.decisive, one)}. " if one is not None and one.decisive else ""
    steps = parse_reference(part.label.partition(" of ")[2].partition(" (")[0])[3]
    step = f"A step of {steps} moved {_times(part, finding)}"
    return [f"{single}{step}. An adapter that is offloaded whole moves {part.limits[0]:g} times its size a step."]


def _part(finding: Finding) -> Part:
    assert finding.decisive is not None
    return finding.decisive


_SENTENCES = (
    _Sentence(
        claim="equal-device-bytes",
        supported="With the same memory on the device, MEFT learns more facts than an ordinary adapter",
        contradicted="With the same memory on the device, MEFT learns no more facts than an ordinary adapter",
        open="Whether MEFT learns more facts than an ordinary adapter with the same memory on the device",
        tells=_decisive,
    ),
    _Sentence(
        claim="t1-comparable-to-dense",
        supported="At the same size MEFT does as well as the ordinary adapter",
        contradicted="At the same size MEFT does worse than the ordinary adapter",
        open="Whether MEFT does as well as an ordinary adapter of the same size",
        tells=_non_inferior,
    ),
    _Sentence(
        claim="t3-lora-ffn-flat",
        supported="LoRA on the same layers gains nothing from more room, as the paper says",
        contradicted="LoRA on the same layers learns more with more room, although the paper says it does not",
        open="Whether LoRA on the same layers gains nothing from more room",
        tells=_with_shown,
    ),
    _Sentence(
        claim="traffic-per-step",
        supported="MEFT moves fewer bytes than an offloaded adapter, also when gradients are accumulated",
        contradicted="Gradient accumulation undoes the saving in traffic",
        open="Whether the saving in traffic survives gradient accumulation",
        tells=_traffic,
    ),
)


# ---- the card ----


def _on_a_card(profiles: Sequence[Profile]) -> str:
    """Size and speed on the first profile's card, with activation checkpointing, from the first that has both."""
    same = [p for p in profiles if (p.model, p.card) == (profiles[0].model, profiles[0].card)]
    found = next((told for p in same if (told := _sizes_and_speed(p))), None)
    return found or "**What fits on a card, and how fast, was not run.** It needs `make profile GPU=24GB FULL=1`."


def _sizes_and_speed(profile: Profile) -> str:
    largest = {n: [e for e in profile.largest if ran(e) and e["checkpointing"] and e["variant"] == n]
               for n in ("meft", "parallel_adapter")}  # fmt: skip
    rows = profile.found("meft", profile.stated, False)
    speeds = sorted(p for r in rows if (p := r["time"].get("practicality")) is not None)
    if not all(largest.values()) or not speeds:
        return ""
    ours, theirs = (max(e["percent_of_base"] for e in entries) for entries in largest.values())
    head = "What fits on a card, and how fast"
    if ours > theirs and speeds[-1] < 1:
        head = "MEFT makes room on a card and pays for it in speed"
    s = profile.settings
    return (
        f"**{head}.** For {plain(profile.model)} on a card of the {plain(s['card_title'])}, the largest adapter that "
        f"fits has {ours:.1f} % of the model's parameters with MEFT ({_host(largest['meft'])}), and {theirs:.1f} % if "
        f"all of it is on the card. With {profile.stated:,} neurons a layer MEFT trains at {_span(speeds)} of that "
        f"adapter's speed.{_rival(profile)} ({profile.evidence.capitalize()}, micro-batches of {s['batch']} x "
        f"{s['seq']} tokens{_aged(profile)}.)" + f" {STALE_MARK}" * bool(profile.why_not)
    )


def _aged(profile: Profile) -> str:
    return f"; {plain(profile.why_not)}" if profile.why_not else ""


def _rival(profile: Profile) -> str:
    """The simplest other way to the same end: the optimizer alone on the host."""
    name = "parallel_adapter_host_optimizer"
    largest = [e["percent_of_base"] for e in profile.largest if ran(e) and e["checkpointing"] and e["variant"] == name]
    row = profile.row(name, profile.stated, False)
    speed = None if row is None else row["time"].get("practicality")
    if not largest or speed is None:
        return ""
    return (
        f" With its optimizer alone on the host, it reaches {max(largest):.1f} % and {100 * speed:.0f} % of the speed."
    )


def _host(entries: Sequence[Row]) -> str:
    return f"{max(e['host_peak_bytes'] for e in entries) / 2**30:.0f} GiB of host memory"


def _span(shares: Sequence[float]) -> str:
    low, high = (f"{100 * x:.0f}" for x in (shares[0], shares[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"
