"""The claims as a table: one line each, everything of the ledger in the CSV."""

from meft_bench.report.claims.entries import Finding, Ledger
from meft_bench.report.claims.words import (
    NO_TEST,
    SCALE_TITLES,
    borrowed_sentence,
    condition,
    counts_sentence,
    effect,
    findings_of,
    paper_effect,
    seeds_text,
    stale_sentence,
    verdict_of,
)
from meft_bench.report.text import Table, table


def claims_table(ledger: Ledger) -> Table:
    """Every claim: where, what, the paper's effect, the verdict on the embedded model with its number, and at scale."""
    shown = ("Where", "Claim", "Paper's effect", "Embedded model", "Effect [95 % over seeds]", "Seeds", "n",
             "SmolLM2-135M", "Paper's scale")  # fmt: skip
    data = ["id", "family", "where", "claim", "paper_effect"]
    data += [f"{where}_{part}" for where in SCALE_TITLES for part in _CSV_PARTS]
    body = [
        [c.where, c.says, paper_effect(c), verdict_of(c.small), _effect_cell(c.small), _seeds(c.small), _items(c.small),
         _scale_cell(c.pretrained), _scale_cell(c.scale),
         c.id, c.family, c.where, c.says, "not given" if c.paper is None else f"{c.paper:g}",
         *(cell for f in findings_of(c) for cell in _csv_cells(f))]
        for c in ledger.claims
    ]  # fmt: skip
    about = (
        f"{counts_sentence(ledger)} The effect is that of the part that decides (named where a claim has several), "
        "its mean over seeds with the 95 % t-interval over seeds; n is the number of paired items of all seeds. "
        "Verdicts on the embedded model and on SmolLM2-135M are about the mechanism; all are corrected by Holm within "
        "a family of claims."
    )
    told = (stale_sentence(ledger), about, borrowed_sentence(ledger))
    return table("claims", [*((h, "") for h in shown), *(("", n) for n in data)], body, left=len(shown), before=told)


def _effect_cell(finding: Finding | None) -> str:
    if finding is None:
        return NO_TEST
    if finding.decisive is None:
        return f"not run: {finding.reason}" if finding.verdict == "not run" else finding.reason
    named = f" ({finding.decisive.words}; {condition(finding.decisive)})" if len(finding.parts) > 1 else ""
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
    if finding.decisive is None:
        return f"{finding.verdict}: {finding.reason}"
    items = finding.decisive.values.items
    n = f", n = {items.n}" if items is not None else ""
    return f"{finding.verdict}: {_effect_cell(finding)}; {seeds_text(finding)}{n}"


_CSV_PARTS = ("verdict", "reason", "part", "condition", "effect", "low", "high", "seeds", "n", "p", "p_holm", "power",
              "evidence", "needs", "command")  # fmt: skip


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
