"""The claims on the page: their short table, and each of them with everything that the ledger holds of it."""

from collections.abc import Sequence
from html import escape

from meft_bench.report.claims.ledger import VERDICTS, Claim, Finding, Ledger, Part, Shown
from meft_bench.report.claims.words import (
    NO_TEST,
    SCALE_TITLES,
    capitalised,
    condition,
    counts,
    effect,
    is_exact,
    numbers,
    p_text,
    paper_effect,
    seeds_text,
    verdict_of,
)
from meft_bench.report.page.markdown import html_table, scroll_box
from meft_bench.report.page.parts import badge
from meft_bench.report.records.results import STALE_MARK, borrowed_rates

_HEADER = ("Quantity", "Condition", "Mean [95 % over seeds]", "By seed", "Over items, paired [95 %]", "n", "Evidence")
_RIGHT = (False, False, True, False, True, True, False)


def claim_anchor(claim: Claim) -> str:
    """The id of a claim's place on the page."""
    return f"claim-{claim.id}"


def counts_table(ledger: Ledger) -> str:
    """Verdicts by scale."""
    found = {where: counts(ledger, where) for where in SCALE_TITLES}
    body = [[badge(v), *(str(found[where][v]) for where in SCALE_TITLES)] for v in (*VERDICTS, NO_TEST)]
    header = ("Verdict", *(escape(capitalised(title)) for title in SCALE_TITLES.values()))
    return html_table(header, body, (False, *(True for _ in SCALE_TITLES)), "Counts of verdicts")


def overview_table(ledger: Ledger) -> str:
    """Every claim on one line, by family, linked to its own place."""
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Where", "Claim", "Embedded model", "Paper's scale"))
    rows = ""
    for family, title in ledger.families.items():
        members = [c for c in ledger.claims if c.family == family]
        if members:
            rows += f'<tr class="family"><th colspan="4" scope="colgroup">{escape(capitalised(title))}</th></tr>\n'
            rows += "".join(_overview_row(c) for c in members)
    table = f'<table class="overview">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'
    return scroll_box(table, "All claims")


def claim_article(claim: Claim, note: str = "") -> str:
    """One claim with its parts, numbers, verdicts, and what would decide it; note stands beside, without a verdict."""
    small, scale = claim.small, claim.scale
    parts = [
        f'<article class="claim" id="{claim_anchor(claim)}">\n'
        f"<h3>{escape(capitalised(claim.where))}</h3>\n"
        f'<p class="says">{escape(claim.says)}</p>\n'
        f'<p class="soft">The paper\'s own effect: {escape(paper_effect(claim))}. Id: <code>{escape(claim.id)}</code>.'
        f"{f' Note: {escape(claim.note)}.' if claim.note else ''}</p>\n",
        f"<h4>On the embedded model {badge(verdict_of(small))}</h4>\n",
    ]
    if small is None:
        parts.append("<p>No test on the embedded model: it cannot decide this claim.</p>\n")
        parts.append(shown_table(claim.shows) if claim.shows else "")
    else:
        parts.append(_told(small))
        if claim.because and small.verdict == "contradicted":
            parts.append(f'<p class="because">Because {escape(claim.because)}.</p>\n')
        parts.append(_parts_table(small.parts, claim.shows))
        parts.append(_repeat(small))
    rates = borrowed_rates(claim.lines)
    parts.append(f'<p class="soft">{escape(rates)}</p>\n' if rates else "")
    parts.append(_scale(scale))
    parts.append(f"<p>{escape(note)}</p>\n" if note else "")
    parts.append(_run_keys(claim))
    return "".join(parts) + "</article>\n"


def shown_table(shows: Sequence[Shown]) -> str:
    """Quantities without a test."""
    body = [[*_values(s), f"{evidence(s)}"] for s in shows]
    header = ("Quantity", "Mean [95 % over seeds]", "By seed", "Over items, paired [95 %]", "n", "Evidence")
    return html_table(header, body, (False, True, False, True, True, False), "Measured effects")


def evidence(shown: Shown) -> str:
    """How a quantity came to be, or what is missing of it."""
    missing = shown.values.missing
    label = "not run" if shown.values.evidence == "not-run" else shown.values.evidence
    if not missing:
        return escape(label)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return escape(f"{label} ({missing[0]}{more})")


def _overview_row(claim: Claim) -> str:
    where = f'<a href="#{claim_anchor(claim)}">{escape(capitalised(claim.where))}</a>'
    return (
        f"<tr><td>{where}</td><td>{escape(claim.says)}</td>"
        f'<td data-is="Embedded model">{badge(verdict_of(claim.small))}{_number(claim.small)}</td>'
        f'<td data-is="Paper\'s scale">{badge(verdict_of(claim.scale))}{_number(claim.scale)}</td></tr>\n'
    )


def _number(finding: Finding | None) -> str:
    if finding is None or finding.decisive is None:
        return ""
    return (
        f'<span class="small">{escape(effect(finding.decisive))}, tested {escape(condition(finding.decisive))}</span>'
    )


def _told(finding: Finding) -> str:
    """Why this verdict: the part that decides, the p-values, the seeds, the power."""
    part, decided = finding.decisive, finding.verdict in ("supported", "contradicted")
    said = [] if decided else [f"{finding.verdict.capitalize()}: {finding.reason}."]
    if part is not None and part.mean is not None:
        lead = "Decided by" if decided else "Nearest to a verdict"
        said.append(f"{lead}: {part.label}: {effect(part)}, tested {condition(part)}.")
    if finding.p is not None and finding.p_holm is not None:
        exact = " (counts that have no spread)" if is_exact(finding) else ""
        said.append(f"p {_equals(finding.p)}, after Holm over its family {_equals(finding.p_holm)}{exact}.")
    if finding.verdict != "not run":
        said.append(f"{seeds_text(finding).capitalize()}. Evidence: {finding.evidence}.")
    if finding.power is not None:
        said.append(f"Power of these seeds to tell the paper's own effect from the bound: {finding.power:.2f}.")
    if finding.stale:
        said.append(f"{STALE_MARK} stale: made by an earlier version of the code.")
    return f"<p>{escape(' '.join(said))}</p>\n"


def _equals(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _parts_table(parts: Sequence[Part], shows: Sequence[Shown]) -> str:
    body = [[_values(p)[0], _condition_cell(p), *_values(p)[1:], evidence(p)] for p in parts]
    body += [[_values(s)[0], "no test, shown beside", *_values(s)[1:], evidence(s)] for s in shows]
    return html_table(_HEADER, body, _RIGHT, "Parts of the claim")


def _condition_cell(part: Part) -> str:
    """The bound, whether it holds, and the one-sided p where there is one."""
    text = f"{_nowrap(condition(part))}<br>{badge(part.verdict)}"
    if part.exact or part.p_holds is None or part.p_fails is None:
        return text
    return f'{text}<br><span class="soft nowrap">p {escape(_equals(min(part.p_holds, part.p_fails)))}</span>'


def _values(shown: Shown) -> list[str]:
    """Label, mean with interval, value of each seed, difference over items with interval, n."""
    form, unit = numbers(shown)
    items = shown.values.items
    seeds = ", ".join(_nowrap(f"{s}: {form(x)}") for s, x in shown.values.by_seed.items())
    return [
        escape(shown.label),
        _nowrap(effect(shown)),
        f'<span class="seeds">{seeds}{unit}</span>' if seeds else "no value",
        "none" if items is None else _nowrap(f"{form(items.mean)} [{form(items.low)}, {form(items.high)}]"),
        "none" if items is None else f"{items.n:,}",
    ]


def _nowrap(text: str) -> str:
    return f'<span class="nowrap">{escape(text)}</span>'


def _scale(finding: Finding | None) -> str:
    """What would decide the claim on the paper's own models, or what it found there."""
    head = f"<h4>At the paper's scale {badge(verdict_of(finding))}</h4>\n"
    if finding is None:
        return head + "<p>No test planned: the paper's suite has no runs for it.</p>\n"
    command = f"<code>{escape(finding.command)}</code>"
    if finding.verdict == "not run":
        conditions = "".join(f"<li>{escape(f'{p.label}: {condition(p)}')}</li>\n" for p in finding.parts)
        needs = f"<p>Needs {escape(finding.needs)}; then {command} decides it by:</p>\n<ul>\n{conditions}</ul>\n"
        return f"{head}{needs}{_reachable(finding)}"
    return f"{head}{_told(finding)}{_parts_table(finding.parts, ())}{_repeat(finding)}"


def _repeat(finding: Finding) -> str:
    return f"<p>Repeat: <code>{escape(finding.command)}</code></p>\n{_reachable(finding)}"


def _reachable(finding: Finding) -> str:
    return f'<p class="soft">Evidence that can be had: {escape(finding.reachable)}.</p>\n'


def _run_keys(claim: Claim) -> str:
    of_findings = {k for f in (claim.small, claim.scale) if f is not None for k in f.run_keys}
    found = sorted(of_findings | {k for s in claim.shows for k in s.values.run_keys})
    if not found:
        return ""
    listed = " ".join(f"<code>{escape(k)}</code>" for k in found)
    return f"<details><summary>Run keys ({len(found)})</summary>\n<p>{listed}</p>\n</details>\n"
