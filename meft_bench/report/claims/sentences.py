"""Claims as sentences that a person would say, each with the numbers it rests on.

Which of its forms a sentence takes is decided by the ledger's verdict; nothing is judged here. A finding that was not
run says so.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meft_bench.report.claims.entries import Claim, Finding, Part, Shown
from meft_bench.report.claims.words import seeds_text
from meft_bench.report.figures.marks import title
from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import STALE_MARK
from meft_bench.report.text import plain

TASKS = {"facts": "facts", "cloze": "sentences with a blank", "tools": "tools", "arithmetic": "sums in words",
         "nq": "Natural Questions", "people": "invented people"}  # fmt: skip
"""The tasks in plain words, where the name is not one."""
_REAL_SIZE = re.compile(r"(\w+ [\d.]+%) is ([\d.]+%)")
"""In a label: a place, and its share of the base's parameters where that is not the nominal one."""
_AS_TAUGHT = " (recall)"
"""In a label: the trained questions were asked again."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A claim in plain words, by its verdict; tells gives the numbers behind it."""

    claim: str
    supported: str
    contradicted: str
    open: str
    """What is asked, as the subject of "is not settled" or "was not run"."""
    tells: Callable[[dict[str, Claim], Finding], list[str]]


def told(sentence: Sentence, claims: dict[str, Claim], where: str = "small", brief: bool = False) -> str:
    """The sentence with its numbers, by what was found on this scale; brief: with the first of them alone."""
    finding: Finding | None = getattr(claims[sentence.claim], where)
    assert finding is not None, f"{sentence.claim} has no test of the kind {where}"
    if finding.decisive is None:
        return f"**{sentence.open} was not run.** It needs `{finding.command}`: {plain(finding.reason)}."
    head = {"supported": sentence.supported, "contradicted": sentence.contradicted}.get(
        finding.verdict, f"{sentence.open} is not settled"
    )
    found = [text for text in sentence.tells(claims, finding) if text]
    return f"**{head}.** {' '.join(found[:1] if brief else found)}"


# ---- numbers in words ----


def difference_words(shown: Shown, seeds: str) -> str:
    """MEFT at 10% scored 27.3 points more than the Parallel Adapter at 4% on facts (...). seeds: "3 seeds"."""
    name = shown.label.partition(" (")[0]
    first, _, second = name.partition(" minus ")
    if not second:
        return f"{name}: {_no_value(shown)}." if shown.mean is None else _alone(name, shown, seeds)
    task, real = parse_reference(first)[2], dict(_REAL_SIZE.findall(shown.label))
    on = TASKS.get(task, task) + " asked as taught" * (_AS_TAUGHT in shown.label)
    if shown.mean is None:
        return f"{_place(first, real)} beside {_place(second, real)} on {on}: {_no_value(shown)}."
    points, behind = 100 * shown.mean, _behind(shown, seeds, "{:+.1f}", 100)
    more = f"{abs(points):.1f} points {'more' if points >= 0 else 'less'}"
    return f"{_place(first, real)} scored {more} than {_place(second, real)} on {on} {behind}."


def _alone(name: str, shown: Shown, seeds: str) -> str:
    assert shown.mean is not None
    return f"{name}: {100 * shown.mean:+.1f} points {_behind(shown, seeds, '{:+.1f}', 100)}."


def _no_value(shown: Shown) -> str:
    """Why there is no number: runs that ended without one are no runs that are missing."""
    states = _states(shown)
    return "not run" if shown.values.not_run or not states else f"no value, as runs ended: {', '.join(states)}"


def _difference(shown: Shown, finding: Finding) -> str:
    return difference_words(shown, _seeds(shown, finding))


def _seeds(shown: Shown, finding: Finding) -> str:
    return seeds_text(finding) if shown is finding.decisive else f"{len(shown.values.by_seed)} seeds"


def _place(reference: str, real: Mapping[str, str]) -> str:
    """MEFT at 10%, and the real size where it is another."""
    row, share, _, _ = parse_reference(reference)
    other = real.get(f"{row} {share}")
    return f"{title(row)} at {share}" + (f" ({other})" if other else "")


def _times(what: str, shown: Shown, finding: Finding) -> str:
    """A step of 16 micro-batches moved 5.33 times the adapter's own size (...). what: "A step of 16 micro-batches"."""
    if shown.mean is None:
        return f"{what}: {_no_value(shown)}."
    behind = _behind(shown, _seeds(shown, finding), "{:.2f}", 1)
    return f"{what} moved {shown.mean:.2f} times the adapter's own size {behind}."


def _behind(shown: Shown, seeds: str, form: str, factor: float) -> str:
    """(95 % interval +17.1 to +37.6; measured, 3 seeds, n = 1,800) and the mark of old code. A seed whose run ended
    without a number is told: where there is one, no verdict falls."""
    span = ""
    if shown.interval is not None:
        low, high = (form.format(factor * x) for x in shown.interval)
        span = f"95 % interval {low} to {high}; "
    items = f", n = {shown.values.items.n:,}" if shown.values.items is not None else ""
    lost = f"; without {len(shown.values.ended)} that ended: {', '.join(_states(shown))}" if shown.values.ended else ""
    return f"({span}{shown.values.evidence}, {seeds}{items}{lost})" + f" {STALE_MARK}" * shown.values.stale


def _states(shown: Shown) -> list[str]:
    """How runs ended that gave no number."""
    return sorted({text.rpartition(": ")[2] for text in shown.values.ended.values()})


def _part(finding: Finding) -> Part:
    assert finding.decisive is not None
    return finding.decisive


def _decisive(claims: dict[str, Claim], finding: Finding) -> list[str]:
    return [_difference(_part(finding), finding)]


def _with_rival(claims: dict[str, Claim], finding: Finding) -> list[str]:
    """What decides and, in the same breath, what LoRA on the FFN learns in no more memory: of two adapters the claim
    names the weaker, and a reader who has that memory would choose between all three."""
    said = [_difference(_part(finding), finding)]
    shown = {s.label: s for s in claims["equal-device-bytes"].shows}
    rival = next(s for label, s in shown.items() if label.startswith("lora_ffn"))
    ours, theirs = (shown[f"device bytes, {name} %"].mean for name in ("MEFT 10", "LoRA on the FFN 4"))
    if rival.mean is not None and ours is not None and theirs is not None and theirs <= ours:
        said.append(f"In no more memory, {_difference(rival, finding)}")
    return [" ".join(said)]


def _non_inferior(claims: dict[str, Claim], finding: Finding) -> list[str]:
    """The part that decides, and the loss that would count."""
    part = _part(finding)
    margin = f"Margin: {-100 * part.limits[0]:.0f} points."
    return [_difference(part, finding), margin]


def _with_shown(claims: dict[str, Claim], finding: Finding) -> list[str]:
    shown = claims["t3-lora-ffn-flat"].shows
    return [_difference(_part(finding), finding), *(_difference(s, finding) for s in shown)]


def _traffic(claims: dict[str, Claim], finding: Finding) -> list[str]:
    """One micro-batch, then a step of many, against the bound: what an adapter offloaded whole moves."""
    part, one = _part(finding), claims["s4-traffic-per-iteration"].small
    single = _times("One micro-batch", one.decisive, one) if one is not None and one.decisive else ""
    steps = parse_reference(part.label.partition(" of ")[2].partition(" (")[0])[3]
    step = _times(f"A step of {steps}", part, finding)
    whole = f"Offloading an adapter whole takes {part.limits[0]:g} times its size a step."
    return [f"{step} {whole}", single]


SAME_MEMORY = Sentence(
    claim="equal-device-bytes",
    supported="With the same memory on the device, MEFT learns more facts than an ordinary adapter",
    contradicted="With the same memory on the device, MEFT learns no more facts than an ordinary adapter",
    open="Whether MEFT learns more facts than an ordinary adapter with the same memory on the device",
    tells=_with_rival,
)
SAME_SIZE = Sentence(
    claim="t1-comparable-to-dense",
    supported="At the same size MEFT does as well as the ordinary adapter",
    contradicted="At the same size MEFT does worse than the ordinary adapter",
    open="Whether MEFT does as well as an ordinary adapter of the same size",
    tells=_non_inferior,
)
LORA_GROWS = Sentence(
    claim="t3-lora-ffn-flat",
    supported="LoRA on the FFN gains nothing from more room, as the paper says",
    contradicted="LoRA on the FFN learns more with more room, although the paper says it does not",
    open="Whether LoRA on the FFN gains nothing from more room",
    tells=_with_shown,
)
TRAFFIC = Sentence(
    claim="traffic-per-step",
    supported="MEFT moves fewer bytes than an offloaded adapter, also when gradients are accumulated",
    contradicted="Gradient accumulation undoes MEFT's saving in traffic",
    open="Whether MEFT's saving in traffic survives gradient accumulation",
    tells=_traffic,
)
LARGER = Sentence(
    claim="t1-best-24g-nq",
    supported="MEFT at 10 % learns more than each other method at 2 %, the paper's headline",
    contradicted="MEFT at 10 % does not learn more than each other method at 2 %, the paper's headline",
    open="Whether MEFT at 10 % learns more than each other method at 2 %",
    tells=_decisive,
)
FULL = Sentence(
    claim="t1-comparable-to-full",
    supported="MEFT does as well as full fine-tuning",
    contradicted="MEFT does worse than full fine-tuning",
    open="Whether MEFT does as well as full fine-tuning",
    tells=_non_inferior,
)
EMBEDDED = (SAME_MEMORY, SAME_SIZE, LORA_GROWS, TRAFFIC)
"""On the embedded model: all of them where no real model was run, else those that it has no test of or that were not
run on it."""
REAL = (LARGER, SAME_SIZE, FULL)
"""On the real model, those of them that were run."""
