"""The ledger in words: its counts, numbers and conditions as a reader sees them. Nothing that it does not say."""

import re
from collections import Counter
from collections.abc import Callable

from meft_bench.report.claims.entries import VERDICTS, Claim, Finding, Ledger, Part, Shown
from meft_bench.report.records.results import STALE_MARK, borrowed_rates, stale_words

SCALE_TITLES = {"small": "on the embedded model", "pretrained": "on SmolLM2-135M", "scale": "at the paper's scale"}
NO_TEST = "no test"
"""In place of a verdict, where a scale cannot decide a claim."""
SHORT = {
    "t1-best-24g-nq": "MEFT at 10 % beats others at 2 %",
    "t1-comparable-to-dense": "MEFT as good as the dense adapter",
    "t1-comparable-to-full": "MEFT as good as full fine-tuning",
    "f1-parallel-adapter-grows": "Parallel Adapter gains with size",
    "f1-lora-flat": "LoRA (attention) flat with size",
    "t3-lora-ffn-flat": "LoRA (FFN) flat with size",
    "f2-concentrated": "5 % of neurons: most activation",
    "s3-below-5-percent-active": "A token fires below 5 % of neurons",
    "f8-rises-with-batch": "U/R rises with the batch",
    "a-lookahead": "Over half found one layer early",
    "f4-ke-costs-nothing": "Key-Experts cost no accuracy",
    "eq8-counts": "Bytes as Equation 8 says",
}
"""Claim id -> what it says in a few words; others are named by their place in the paper."""
_BYTES = re.compile(r"\bbytes\b|^formula_gap\b")
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def stale_sentence(ledger: Ledger) -> str:
    """What a reader must know before the verdicts where runs of older code carry any of them; "" if none."""
    tested = [f for c in ledger.claims for f in findings_of(c) if f is not None and f.verdict != "not run"]
    return stale_words([f.stale for f in tested], "findings rest on runs that")


def borrowed_sentence(ledger: Ledger) -> str:
    """Which claims read rows that take another row's learning rate; "" if none does."""
    told = [(c.where, rates) for c in ledger.claims if (rates := borrowed_rates(c.lines))]
    if not told:
        return ""
    lines = [line for c in ledger.claims for line in c.lines]
    where = "; ".join(dict.fromkeys(capitalised(name) for name, _ in told))
    return f"{borrowed_rates(lines)} They are read under: {where}."


def counts_sentence(ledger: Ledger) -> str:
    """How many claims have which verdict, on every scale; verdicts that none has are left out."""
    told: list[str] = []
    for where, title in SCALE_TITLES.items():
        number_of = counts(ledger, where)
        tested = sum(number_of[v] for v in VERDICTS)
        each = ", ".join(f"{number_of[v]} {v}" for v in VERDICTS if number_of[v])
        have = "" if any(" have a test " in text for text in told) else "have a test "
        told.append(f"{tested} {have}{title} ({each})" if tested else f"none has a test {title}")
    return f"Of {len(ledger.claims)} claims, {', '.join(told)}."


def counts(ledger: Ledger, where: str) -> Counter[str]:
    """Verdict (or NO_TEST) -> claims."""
    return Counter(verdict_of(f) for _, f in findings(ledger, where))


def findings(ledger: Ledger, where: str) -> list[tuple[Claim, Finding | None]]:
    """Every claim with what was found on this scale."""
    return [(c, getattr(c, where)) for c in ledger.claims]


def findings_of(claim: Claim) -> list[Finding | None]:
    """What was found of a claim on each scale."""
    return [getattr(claim, where) for where in SCALE_TITLES]


def verdict_of(finding: Finding | None) -> str:
    """The verdict, or that this scale has no test of the claim."""
    return NO_TEST if finding is None else finding.verdict


def paper_effect(claim: Claim) -> str:
    """The paper's own number, signed where the claim is about a difference."""
    if claim.paper is None:
        return "not given"
    finding = next((f for f in findings_of(claim) if f is not None), None)
    signed = finding is not None and any(is_difference(p) for p in finding.parts)
    return f"{claim.paper:+.3f}" if signed else f"{claim.paper:g}"


def is_difference(shown: Shown) -> bool:
    """True for a quantity whose sign is its message."""
    return shown.values.items is not None or " minus " in shown.label or "against" in shown.label


def effect(shown: Shown) -> str:
    """Mean over seeds with its t-interval, in a readable unit."""
    if shown.mean is None:
        return "no value"
    form, unit = numbers(shown)
    text = form(shown.mean)
    if shown.interval is not None:
        text += f" [{form(shown.interval[0])}, {form(shown.interval[1])}]"
    return text + unit + f" {STALE_MARK}" * shown.values.stale


def numbers(shown: Shown) -> tuple[Callable[[float], str], str]:
    """(how to write a number of this quantity, the unit behind it); one unit for all numbers of a quantity."""
    largest = max((abs(x) for x in shown.values.by_seed.values()), default=0.0)
    if _BYTES.search(shown.label):
        name, size = next(((n, s) for n, s in _SIZES if largest >= s), _SIZES[-1])
        digits = 0 if size == 1 else 1
        return lambda x: _fixed(x / size, digits), f" {name}"
    if is_difference(shown):
        return lambda x: _fixed(x, 3, "+"), ""
    return lambda x: _fixed(x, 0 if largest >= 1000 else 3), ""


def condition(part: Part) -> str:
    """When the part holds: its bound in words, with its unit where the quantity has one."""
    unit = " byte" if part.limits[-1] == 1 else " bytes"
    return f"holds if {part.condition}" + (unit if _BYTES.search(part.label) else "")


def seeds_text(finding: Finding) -> str:
    """How many seeds, or repeats of a benchmark, the deciding part has."""
    part, count = finding.decisive, finding.seeds
    # A benchmark belongs to no run.
    name = "repeat" if part is not None and count and not part.values.run_keys else "seed"
    return f"{count} {name}{'' if count == 1 else 's'}"


def capitalised(text: str) -> str:
    """The text with a capital at its beginning, all else as it is."""
    return text[:1].upper() + text[1:]


def p_text(p: float | None) -> str:
    """A p-value with three digits."""
    if p is None:
        return "none"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def is_exact(finding: Finding) -> bool:
    """True when every part is a count without spread, which needs no p."""
    return bool(finding.parts) and all(p.exact for p in finding.parts)


def _fixed(value: float, digits: int, sign: str = "-") -> str:
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"  # + 0.0: no minus before a zero
