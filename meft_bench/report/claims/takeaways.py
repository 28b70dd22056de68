"""What a reader should take away: findings as sentences, the real model's first where it was run.

A claim's sentence follows the ledger's verdict; what carries no verdict (LoRA beside MEFT, what was forgotten) is told
as numbers with their intervals.
"""

import statistics
from collections.abc import Sequence

from meft_bench.report.claims import sentences
from meft_bench.report.claims.card import on_a_card
from meft_bench.report.claims.entries import Claim, Finding, Ledger, Shown
from meft_bench.report.claims.sentences import TASKS, difference_words, told
from meft_bench.report.claims.words import SHORT, effect
from meft_bench.report.figures.marks import title
from meft_bench.report.records import quantities as q
from meft_bench.report.records import real as on_real
from meft_bench.report.records.profiles import Profile
from meft_bench.report.records.results import STALE_MARK, Line, Results, borrowed_rates
from meft_bench.report.records.stats import mean_interval
from meft_bench.report.text import paragraphs

_STALE = f"**Stale {STALE_MARK}: made by an earlier version of the code.** The marked numbers hold for that version."
_DECIDED = ("supported", "contradicted")
_LISTED = 3
"""Disagreements that are told one by one; the verdicts' table has all."""
_ASKED_AGAIN: tuple[Line, ...] = (("meft", "10%"), ("adapter_h", "10%"), ("lora_ffn", "10%"),
                                  ("parallel_adapter", "10%"), ("full", "100%"))  # fmt: skip
"""Whose forgetting is told in a sentence: adapters of one size, and full fine-tuning."""


def takeaways(ledger: Ledger, profiles: Sequence[Profile], real: Results | None = None) -> str:
    """The findings as Markdown, after a line on old runs where a number is marked. real: of the suite on SmolLM2-135M,
    which leads as soon as its main comparison has all seeds."""
    claims = {c.id: c for c in ledger.claims}
    if real is not None and on_real.leads(real):
        said = _both_models(ledger, claims, real, profiles)
        shown = [s for s in sentences.EMBEDDED if not _was_run(claims[s.claim])]
    else:
        said = [_numbered([*(told(s, claims) for s in sentences.EMBEDDED), on_a_card(profiles)])]
        shown = list(sentences.EMBEDDED)
    lines = [line for s in shown for line in claims[s.claim].lines]
    stale = _STALE if any(STALE_MARK in text for text in said) else ""
    return paragraphs(stale, *said, borrowed_rates(lines))


def _both_models(ledger: Ledger, claims: dict[str, Claim], real: Results, profiles: Sequence[Profile]) -> list[str]:
    """Where the models disagree, the real model's findings, then what only the embedded one and the simulation tell."""
    run = [s for s in sentences.REAL if _was_run(claims[s.claim])]
    own = [told(s, claims, "pretrained") for s in run] + [beside_lora(real), forgot(real)]
    rest = [told(s, claims, brief=True) for s in sentences.EMBEDDED if not _was_run(claims[s.claim])]
    own = [text for text in own if text]
    return [
        disagreement(ledger),
        f"On **{on_real.NAME}**:",
        _numbered(own),
        "On the embedded model, and on a simulated card:",
        _numbered([*rest, on_a_card(profiles)], len(own) + 1),
    ]


def _numbered(found: Sequence[str], first: int = 1) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(found, first))


def _was_run(claim: Claim) -> bool:
    return claim.pretrained is not None and claim.pretrained.decisive is not None


def disagreement(ledger: Ledger) -> str:
    """Which claims the two models decide against each other, with both numbers; else that there is none."""
    decided = [c for c in ledger.claims if {_decided(c.small), _decided(c.pretrained)} <= set(_DECIDED)]
    against = [c for c in decided if _decided(c.small) != _decided(c.pretrained)]
    if not against:
        if not decided:
            return f"No claim is decided on both {on_real.NAME} and the embedded model yet."
        many = f"all {len(decided)} claims" if len(decided) > 1 else "the one claim"
        return f"{on_real.NAME} and the embedded model agree on {many} that both decide."
    listed = [f"*{SHORT.get(c.id, c.where)}*: {_verdict(c.pretrained)}, {_verdict(c.small)}" for c in against[:_LISTED]]
    listed += [f"and {len(against) - _LISTED} more"] * (len(against) > _LISTED)
    head = f"**{on_real.NAME} disagrees with the embedded model** on {len(against)} of the {len(decided)} claims"
    return f"{head} that both decide (its verdict first). {'; '.join(listed)}."


def _decided(finding: Finding | None) -> str:
    return finding.verdict if finding is not None else ""


def _verdict(finding: Finding | None) -> str:
    """The verdict with its number, and how many parts of the claim hold where one that fails decides."""
    assert finding is not None
    holding = sum(part.verdict == "holds" for part in finding.parts) if finding.verdict == "contradicted" else 0
    some = f"; parts that hold: {holding} of {len(finding.parts)}" if holding else ""
    return finding.verdict + (f" ({effect(finding.decisive)}{some})" if finding.decisive is not None else "")


# ---- without a verdict ----


def beside_lora(real: Results) -> str:
    """LoRA on the same layers minus MEFT of the same size, on the first task where both have all seeds; "" if none.

    It is of what was learnt: people in another wording, other tasks as taught, as their new questions ask what the base
    knows."""
    first, second = ("lora_ffn", "10%"), ("meft", "10%")
    task = next((t for t in on_real.TASKS if all(on_real.whole(real, x, t) for x in (first, second))), None)
    if task is None:
        return ""
    split = "test" if task == on_real.TASKS[0] else "recall"
    places = f"lora_ffn 10% {task}", f"meft 10% {task}"
    label = " minus ".join(places) + f" ({split})" * (split != "test")
    shown = Shown(label=label, words=label, values=q.difference(real, *places, split))
    if shown.mean is None:
        return ""
    low, high = shown.interval or (-1.0, 1.0)
    head = "LoRA on the FFN learns more than MEFT of the same size" if low > 0 else (
        "LoRA on the FFN learns less than MEFT of the same size" if high < 0 else
        "LoRA on the FFN and MEFT of the same size: the seeds do not tell them apart"
    )  # fmt: skip
    return f"**{head}.** {difference_words(shown, f'{len(shown.values.by_seed)} seeds')}"


def forgot(real: Results) -> str:
    """The share of the plain facts that the base states which each method still states, after the last task where that
    was asked (methods that recall all that they were taught are compared best); "" where it was not."""
    for task in reversed(on_real.TASKS):
        said, stale, forgets, runs = [], False, False, set[int]()
        for line in _ASKED_AGAIN:
            found = on_real.known_records(real, line, task) if on_real.whole(real, line, task) else []
            if items := on_real.kept(found):
                by_run = on_real.kept_by_run(found)
                runs.add(len(by_run))
                low, mean, high = (100 * x for x in (min(by_run), statistics.fmean(by_run), max(by_run)))
                said.append(f"{title(line[0])} {mean:.0f} % ({low:.0f} to {high:.0f})")
                forgets |= mean_interval(items)[1] < 1
                stale |= any(map(real.stale, found))
        if said:
            mark = f" {STALE_MARK}" * stale
            head = "Teaching makes the model forget" if forgets else "What the model knew has stayed"
            size = f"adapters at {_ASKED_AGAIN[0][1]}"
            seeds = " to ".join(map(str, sorted({min(runs), max(runs)})))
            return (
                f"**{head}.** Of the plain facts that the base states correctly, the model still states, after "
                f"training on {TASKS.get(task, task)}: {', '.join(said)} ({size}; lowest and highest of {seeds} seeds; "
                f"measured).{mark}"
            )
    return ""
