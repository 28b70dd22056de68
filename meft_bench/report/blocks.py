"""What the README's blocks say: what was run, the findings, one small table, one picture, what they cannot show.

All of it leads with the real model as soon as its main comparison has all seeds, and with the embedded one before.
"""

from collections.abc import Mapping, Sequence

from meft_bench.report.claims.entries import Ledger
from meft_bench.report.claims.sentences import TASKS
from meft_bench.report.claims.takeaways import takeaways
from meft_bench.report.claims.words import capitalised, counts_sentence
from meft_bench.report.figures.marks import title
from meft_bench.report.records import real as on_real
from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.profiles import Profile
from meft_bench.report.records.results import (
    STALE_MARK,
    TASK_TITLES,
    Column,
    Line,
    Results,
    Score,
    borrowed_rates,
    headline,
    seeds_words,
    stale_note,
    uneven,
)
from meft_bench.report.records.stats import mean_interval
from meft_bench.report.tables.scores import COMMANDS
from meft_bench.report.text import markdown_table, paragraphs

TABLE = (("base", "0%"), ("lora", "10%"), ("lora_ffn", "10%"), ("adapter_h", "10%"), ("parallel_adapter", "10%"),
         ("meft", "10%"), ("full", "100%"))  # fmt: skip
"""(row, share) of the embedded model's short table."""
_COLUMNS = {
    headline("people"): "People, other wording",
    headline("nq", "recall"): "NQ, as taught",
}
"""Scores of the real model's short table, with their names."""


def blocks(
    ledger: Ledger, results: Results, profiles: Sequence[Profile], suite: str, left_out: str = "",
    real: Results | None = None,
) -> dict[str, str]:  # fmt: skip
    """Block -> its Markdown. left_out: which files are no records, told first; real: of the suite smollm2."""
    leading = real if real is not None and on_real.leads(real) else None
    return {
        "about": about(leading),
        "findings": paragraphs(left_out, takeaways(ledger, profiles, real), counts_sentence(ledger)),
        "table": short_table(results, suite, real) if leading is None else real_table(leading),
        "picture": picture(leading),
        "limits": limits(leading),
    }


def about(real: Results | None) -> str:
    """What the runs are of. real: the leading real model's results, or None."""
    if real is None:
        return (
            "The runs use a tiny language model that comes with the project (a million parameters) and made-up facts "
            "that no model can know beforehand."
        )
    taught = "invented people and real questions (NQ)" if _has_nq(real) else "invented people"
    return (
        f"**{on_real.NAME}** is a real language model of 135 million parameters; it was taught {taught}. The *embedded "
        "model* of one million comes with the project, and `make replicate` uses it; it was taught made-up facts."
    )


def limits(real: Results | None) -> str:
    """What models of these sizes cannot show."""
    small = "A tiny model shows" if real is None else "Models of one and of 135 million parameters show"
    shows = "It does not show" if real is None else "They do not show"
    return (
        f"- {small} whether the mechanism behaves as the paper says. {shows} what LLaMA-7B would score. The paper's "
        f"own tables need 7B weights and a GPU (`{COMMANDS['paper']}`)."
    )


def picture(real: Results | None) -> str:
    """One figure with what it shows."""
    if real is None:
        return (
            "![Score against the size of the adapter, here and in the paper](results/figures/figure1.png)\n\nLeft: "
            "this project, on the tiny model. Right: what the paper reports for LLaMA-7B. The scales differ."
        )
    return (
        "![What each method learnt against what it made the model forget](results/figures/gained_lost.png)\n\n"
        f"{on_real.NAME}: higher is more learnt, further left is less forgotten."
    )


# ---- the small table ----


def short_table(results: Results, suite: str, real: Results | None = None) -> str:
    """One size of every method on every task of a suite: the mean score with its interval over items, or its state.
    real: runs on the real model that do not lead yet, which are counted."""
    columns = [headline(task) for task in results.tasks()]
    lines = [line for line in TABLE if any((*line, c.task, "") in results.places for c in columns)]
    scores = {line: [results.score(line, c) for c in columns] for line in lines}
    by_task = {c.task: [scores[line][i] for line in lines] for i, c in enumerate(columns)}
    differ = [uneven(found) for found in by_task.values()]
    body = [[title(line[0]), results.size(line), *map(_cell, scores[line], differ)] for line in lines]
    behind = [r for line in lines for c in columns for r in results.records_of(line, c.task).values()]
    begun = f"On {on_real.NAME} {on_real.progress(real)}; no comparison has all its seeds yet." if real else ""
    return paragraphs(
        stale_note(results, behind),
        _caption(suite, by_task),
        borrowed_rates(lines),
        markdown_table(["Method", "Trained", *(capitalised(TASKS.get(c.task, c.task)) for c in columns)], body),
        "The four tasks stand for the paper's Natural Questions, SQuAD, ToolBench and GSM8K.",
        begun,
    )


def real_table(real: Results) -> str:
    """The real model at one size of every method: scores of places with all their seeds, and what was forgotten."""
    columns = [c for c in _COLUMNS if any(on_real.whole(real, line, c.task) for line in on_real.HEADLINE)]
    lines = [x for x in on_real.HEADLINE if any(on_real.whole(real, x, c.task) for c in columns)]
    scores = {(x, c): real.score(x, c) for x in lines for c in columns if on_real.whole(real, x, c.task)}
    body = [
        [title(x[0]), real.size(x), *(_whole_cell(real, x, c, scores) for c in columns), _kept(real, x)] for x in lines
    ]
    behind = [r for line in lines for c in columns for r in real.records_of(line, c.task).values()]
    return paragraphs(
        stale_note(real, behind),
        _real_caption(real, {c.task: _in_column(scores, c) for c in columns}),
        borrowed_rates(lines),
        markdown_table(["Method", "Trained", *(_COLUMNS[c] for c in columns), "Known facts kept"], body),
        _missing(real),
    )


def _whole_cell(real: Results, line: Line, column: Column, scores: Mapping[tuple[Line, Column], Score]) -> str:
    found = scores.get((line, column))
    if found is not None:
        return _cell(found, uneven(_in_column(scores, column)))
    made, planned = (len(x) for x in (real.records_of(line, column.task), _planned(real, line, column.task)))
    return f"{made} of {planned} seeds so far" if planned else "not planned"


def _in_column(scores: Mapping[tuple[Line, Column], Score], column: Column) -> list[Score]:
    return [s for (_, c), s in scores.items() if c == column]


def _planned(real: Results, line: Line, task: str) -> Mapping[int, object]:
    return real.places.get((*line, task, ""), {})


def _kept(real: Results, line: Line) -> str:
    """Plain facts that the base states and the trained model still does, after the first task."""
    task = on_real.TASKS[0]
    if not on_real.whole(real, line, task):
        return "not yet"
    records = on_real.known_records(real, line, task)
    items = on_real.kept(records)
    if not items:
        return "not asked"
    low, high = mean_interval(items)
    return f"{sum(items) / len(items):.3f} [{low:.3f}, {high:.3f}]" + f" {STALE_MARK}" * any(map(real.stale, records))


def _real_caption(real: Results, by_task: Mapping[str, Sequence[Score]]) -> str:
    over = _over(by_task)
    if not over:
        return f"{on_real.NAME}: no run has a score."
    asked = "*People* are invented" + ("; *NQ* is Natural Questions. " if _has_nq(real) else ". ")
    return (
        f"{on_real.NAME}: {over} {asked}*Known facts kept*: the share of the plain facts the base states that the "
        "model still states after training on people."
    )


def _missing(real: Results) -> str:
    """The whole suite beside what is there, and where the embedded model's table is."""
    there, _, _ = on_real.progress(real).partition(":")
    more = f"Of the whole suite {there}. " if there else ""
    return (
        f"{more}All sizes: [scores](results/tables/smollm2.md), [forgetting](results/tables/smollm2_forgetting.md). "
        "[The embedded model's scores](results/tables/table1.md)."
    )


def _has_nq(real: Results) -> bool:
    return any(on_real.whole(real, line, "nq") for line in on_real.HEADLINE)


def _cell(score: Score, differ: bool) -> str:
    """differ: other places of the column are planned with another number of seeds."""
    if score.value is None:
        return score.state + f" {STALE_MARK}" * score.stale
    some = f" ({score.seeds} of {seeds_words(score.planned)})" if score.lost else ""
    some = some or f" ({seeds_words(score.seeds)})" * differ
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]{some}" + f" {STALE_MARK}" * score.stale


def _caption(suite: str, by_task: Mapping[str, Sequence[Score]]) -> str:
    over = _over(by_task)
    if not over:
        return f"Suite `{suite}`: not run yet. `{COMMANDS[suite]}` fills this table."
    return f"Suite `{suite}`, embedded model: {over}"


def _over(by_task: Mapping[str, Sequence[Score]]) -> str:
    """What the scores are means over, task by task where their seeds differ, and their evidence; "" without a score."""
    made = {task: [s for s in scores if s.value is not None] for task, scores in by_task.items()}
    found = [s for scores in made.values() for s in scores]
    if not found:
        return ""
    counts, seeds = sorted({s.n for s in found if s.n is not None}), sorted({s.seeds for s in found})
    asked, each = f"{_span(counts)} questions", ""
    if uneven(found):
        told = [f"{TASK_TITLES.get(t, t)} {_span(sorted({s.seeds for s in x}))}" for t, x in made.items() if x]
        asked, each = f"{asked} a seed", f" Seeds: {', '.join(told)}."
    else:
        asked = f"{_span(seeds)} seeds of {asked}"
    return (
        f"mean score (1: every answer right) of {asked}, with the 95 % interval over questions.{each} "
        f"Evidence: **{weakest(s.evidence for s in found)}**."
    )


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
