"""The ledger in short: one line per claim, and the overview for the README. Nothing that the ledger does not say."""

import re
from collections import Counter
from collections.abc import Callable

from meft_bench.report.claims.ledger import VERDICTS, Claim, Finding, Ledger, Part, Shown
from meft_bench.report.records.results import STALE_MARK, borrowed_rates
from meft_bench.report.text import Table, csv_table, markdown_table, paragraphs, plain

SCALE_TITLES = {"small": "on the embedded model", "scale": "at the paper's scale"}
NO_TEST = "no test"
"""In place of a verdict, where a scale cannot decide a claim."""
_BYTES = re.compile(r"\bbytes\b|^formula_gap\b")
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def claims_table(ledger: Ledger) -> Table:
    """Every claim: where, what, the paper's effect, the verdict on the embedded model with its number, and at scale."""
    header = ("Where", "Claim", "Paper's effect", "Embedded model", "Effect [95 % over seeds]", "Seeds", "n",
              "Paper's scale")  # fmt: skip
    body = [
        [c.where, c.says, paper_effect(c), verdict_of(c.small), _effect_cell(c.small), _seeds(c.small), _items(c.small),
         _scale_cell(c.scale)]
        for c in ledger.claims
    ]  # fmt: skip
    about = (
        f"{counts_sentence(ledger)} The effect is that of the part that decides (named where a claim has several), "
        "its mean over seeds with the 95 % t-interval over seeds; n is the number of paired items of all seeds. "
        "Verdicts are about the mechanism on the embedded model, and are corrected by Holm within a family of claims."
    )
    told = (stale_sentence(ledger), about, borrowed_sentence(ledger))
    return Table("claims", paragraphs(*told, markdown_table(header, body, left=len(header))), _csv(ledger))


def overview_markdown(ledger: Ledger) -> str:
    """The counts, then what is contradicted and why, supported, or undecided, one line each."""
    parts = [stale_sentence(ledger), counts_sentence(ledger), borrowed_sentence(ledger)]
    for where, title in SCALE_TITLES.items():
        for verdict in ("contradicted", "supported", "inconclusive"):
            found = [(c, f) for c, f in findings(ledger, where) if f is not None and f.verdict == verdict]
            if found:
                parts += [f"**{verdict.capitalize()} {title}:**", "\n".join(_line(c, f) for c, f in found)]
    return paragraphs(*parts)


def stale_sentence(ledger: Ledger) -> str:
    """What a reader must know before the verdicts where runs of older code carry any of them; "" if none."""
    tested = [f for c in ledger.claims for f in (c.small, c.scale) if f is not None and f.verdict != "not run"]
    old = sum(f.stale for f in tested)
    if not old:
        return ""
    which = f"All {old}" if old == len(tested) else f"{old} of {len(tested)}"
    return (
        f"**Stale {STALE_MARK}: made by an earlier version of the code.** {which} findings below rest on runs that "
        "were made before a part of the code that computes them changed. They hold for that version; for today's they "
        "must be run again."
    )


def borrowed_sentence(ledger: Ledger) -> str:
    """Which claims read rows that take another row's learning rate; "" if none does."""
    told = [(c.where, rates) for c in ledger.claims if (rates := borrowed_rates(c.lines))]
    if not told:
        return ""
    lines = [line for c in ledger.claims for line in c.lines]
    where = "; ".join(dict.fromkeys(capitalised(name) for name, _ in told))
    return f"{borrowed_rates(lines)} They are read under: {where}."


def counts_sentence(ledger: Ledger) -> str:
    """How many claims have which verdict, on either scale."""
    told = []
    for where, title in SCALE_TITLES.items():
        number_of = counts(ledger, where)
        tested = sum(number_of[v] for v in VERDICTS)
        told.append(f"{title} {tested} have a test: " + ", ".join(f"{number_of[v]} {v}" for v in VERDICTS))
    return f"Of {len(ledger.claims)} claims, {'; '.join(told)}."


def counts(ledger: Ledger, where: str) -> Counter[str]:
    """Verdict (or NO_TEST) -> claims."""
    return Counter(verdict_of(f) for _, f in findings(ledger, where))


def findings(ledger: Ledger, where: str) -> list[tuple[Claim, Finding | None]]:
    """Every claim with what was found on this scale."""
    return [(c, c.small if where == "small" else c.scale) for c in ledger.claims]


def verdict_of(finding: Finding | None) -> str:
    """The verdict, or that this scale has no test of the claim."""
    return NO_TEST if finding is None else finding.verdict


def paper_effect(claim: Claim) -> str:
    """The paper's own number, signed where the claim is about a difference."""
    if claim.paper is None:
        return "not given"
    finding = claim.small or claim.scale
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
    """The bound in words, with its unit where the quantity has one."""
    unit = " byte" if part.limits[-1] == 1 else " bytes"
    return part.condition + (unit if _BYTES.search(part.label) else "")


def seeds_text(finding: Finding) -> str:
    """How many seeds, or repeats of a benchmark, the deciding part has."""
    part = finding.decisive
    count = finding.seeds if part is None else len(part.values.by_seed)
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


def _line(claim: Claim, finding: Finding) -> str:
    """One claim with the number it hangs on."""
    told = "" if finding.decisive is None else f" {_decided(finding.decisive)}, {seeds_text(finding)}."
    because = f" Because {_ended(claim.because)}" if claim.because and finding.verdict == "contradicted" else ""
    # Without it, an interval beyond its bound among the undecided reads like a mistake.
    why = f" {_ended(plain(capitalised(finding.reason)))}" if finding.verdict == "inconclusive" else ""
    return f"- {capitalised(claim.where)}: {_ended(claim.says)}{told}{because}{why}"


def _decided(part: Part) -> str:
    return f"{part.label}: {effect(part)}, tested {condition(part)}"


def _ended(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _effect_cell(finding: Finding | None) -> str:
    if finding is None:
        return NO_TEST
    if finding.decisive is None:
        return f"not run: {finding.reason}" if finding.verdict == "not run" else finding.reason
    named = f" ({finding.decisive.label}, {condition(finding.decisive)})" if len(finding.parts) > 1 else ""
    return effect(finding.decisive) + named


def _seeds(finding: Finding | None) -> str:
    return NO_TEST if finding is None else seeds_text(finding)


def _items(finding: Finding | None) -> str:
    if finding is None:
        return NO_TEST
    if finding.decisive is None:
        return finding.verdict
    items = finding.decisive.values.items
    return "one number a run" if items is None else str(items.n)


def _scale_cell(finding: Finding | None) -> str:
    if finding is None:
        return NO_TEST
    if finding.verdict == "not run":
        return f"not run; needs {finding.needs}"
    return f"{finding.verdict}: {_effect_cell(finding)}"


_CSV_PARTS = ("verdict", "reason", "part", "condition", "effect", "low", "high", "seeds", "n", "p", "p_holm", "power",
              "evidence", "needs", "command")  # fmt: skip


def _csv(ledger: Ledger) -> str:
    header = ["id", "family", "where", "claim", "paper_effect"]
    header += [f"{where}_{part}" for where in SCALE_TITLES for part in _CSV_PARTS]
    body: list[list[object]] = []
    for c in ledger.claims:
        paper = "not given" if c.paper is None else f"{c.paper:g}"
        body.append([c.id, c.family, c.where, c.says, paper, *_csv_cells(c.small), *_csv_cells(c.scale)])
    return csv_table(header, body)


def _csv_cells(finding: Finding | None) -> list[str]:
    if finding is None:
        return [NO_TEST] * len(_CSV_PARTS)
    part = finding.decisive
    low, high = (part.interval if part is not None else None) or (None, None)
    items = None if part is None else part.values.items
    return [
        finding.verdict, finding.reason, "none" if part is None else part.label,
        "none" if part is None else part.condition, *(_digits(x) for x in (part.mean if part else None, low, high)),
        str(finding.seeds), "none" if items is None else str(items.n),
        *(_digits(x) for x in (finding.p, finding.p_holm, finding.power)), finding.evidence, finding.needs,
        finding.command,
    ]  # fmt: skip


def _digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
