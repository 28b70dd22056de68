"""The tables of scores: ours (table1, real), and the paper's numbers beside ours (table1_paper)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meft_bench.harness.rates import learning_rates, swept_rate
from meft_bench.harness.rows import ROWS, rate_source
from meft_bench.harness.spec import HEADLINE_METRIC, RunSpec
from meft_bench.named import named_in
from meft_bench.report.records.results import (
    TASK_TITLES,
    Column,
    Line,
    Record,
    Results,
    Score,
    borrowed_rates,
    headline,
    line_order,
    seeds_words,
    stale_note,
    uneven,
)
from meft_bench.report.records.stats import same_for_every_seed
from meft_bench.report.text import Table, paragraphs, plain, table

COMMANDS = {
    "smoke": "make replicate SUITE=smoke",
    "default": "make replicate",
    "full": "make replicate SUITE=full",
    "real": "make replicate SUITE=real MODEL=DIR DATA=DIR",
    "smollm2": "make replicate SUITE=smollm2 DATA=DIR",
    "frontier": "make replicate SUITE=frontier",
    "paper": "make replicate SUITE=paper MODEL=DIR DATA=DIR",
}
"""What fills the places of a suite that have no record."""
_CSV_PARTS = ("", "_low", "_high", "_seed_sd", "_seeds", "_n", "_evidence", "_state")
_SIZES = ("Method", "Size", "Trainable parameters", "% of base", "Peak learning rate")


def table1(results: Results, suite: str) -> Table:
    """Every line of the suite's comparison on all its tasks; the first task in more than its headline metric."""
    return score_table("table1", results, "table1", suite, comparison_columns(results))


def comparison_columns(results: Results) -> list[Column]:
    """Test scores on the headline metric; the first task also by exact match and on the rows it was trained on."""
    tasks = results.tasks()
    columns = [headline(t) for t in tasks]
    if tasks and tasks[0] in ("facts", "nq"):
        columns[1:1] = [Column(tasks[0], "test", "exact_match"), headline(tasks[0], "recall")]
    return columns


def real(results: Results) -> Table:
    """Real text and a small pretrained model: per task the test score and the recall of trained rows."""
    columns = [headline(task, split) for task in results.tasks() for split in ("test", "recall")]
    made = score_table("real", results, "real", "real", columns)
    return replace(made, markdown=paragraphs(made.markdown, _dropped(results)))


def real_not_run() -> Table:
    """What stands in place of the real suite when nobody gave its model and data."""
    why = "the real suite needs a small pretrained model and real rows"
    markdown = f"Not run: {why}. `{COMMANDS['real']}` fills this table."
    columns = [("", name) for name in ("state", "reason", "command")]
    return table("real", columns, [("not run", why, COMMANDS["real"])], before=[markdown])


def score_table(
    name: str, results: Results, artefact: str, suite: str, columns: Sequence[Column],
    names: Mapping[Column, str] | None = None,
) -> Table:  # fmt: skip
    """One line per (row, share) of the artefact, one column per score, each with its 95 % interval. names: of columns,
    where their titles are not plain enough. Where numbers of seeds differ, each column says its own, or each place."""
    lines = results.lines(artefact)
    scores = {(line, c): results.score(line, c) for line in lines for c in columns}
    n_of = {c: sorted({n for line in lines if (n := scores[line, c].n) is not None}) for c in columns}
    evidence = {s.evidence for s in scores.values() if s.value is not None}
    sizes = [("", "row"), ("Method", "method"), ("Size", ""), ("", "share"), ("Trainable parameters", ""),
             ("", "trainable_parameters"), ("% of base", "percent_of_base"),
             ("Peak learning rate", "learning_rate")]  # fmt: skip
    plainly = [(names or {}).get(c, c.title) for c in columns]
    of = {c: [scores[line, c] for line in lines] for c in columns}
    differ = uneven(scores.values())
    titles = [_title(name, of[c], n_of[c], differ) for c, name in zip(columns, plainly, strict=True)]
    body = []
    for line in lines:
        title, size, trainable, *rest = size_cells(results, line)
        body.append([line[0], title, size, line[1], trainable, trainable.replace(",", ""), *rest])
        for c in columns:
            found = scores[line, c]
            body[-1] += [found.text(len(n_of[c]) > 1, len(evidence) > 1, uneven(of[c])), *_csv_cells(found)]
    return table(
        name, [*sizes, *(name for c, t in zip(columns, titles, strict=True) for name in _score_columns(t, c))], body,
        left=2,
        before=[
            stale_note(results, _of(results, lines, columns)),
            caption(results, suite, list(scores.values()), columns),
            _about_sizes(results, lines),
            borrowed_rates(lines),
        ],
        after=[failures({(line, c.task): s for (line, c), s in scores.items()})],
    )  # fmt: skip


def _title(name: str, scores: Sequence[Score], n_of: Sequence[int], differ: bool) -> str:
    """A column's name with what all its scores have in common; differ: some column has another number of seeds."""
    told = [f"n = {n}" for n in n_of if len(n_of) == 1]
    told += sorted({seeds_words(s.planned) for s in scores if s.value is not None and differ and not uneven(scores)})
    return name + (f" ({', '.join(told)})" if told else "")


def _score_columns(title: str, column: Column, prefix: str = "") -> list[tuple[str, str]]:
    """A score's one column in Markdown and its eight in CSV."""
    return [(title, ""), *(("", f"{prefix}{column.key}{part}") for part in _CSV_PARTS)]


def size_cells(results: Results, line: Line) -> list[str]:
    """Title, size, trainable parameters, exact percent of the base, learning rate."""
    row, _ = line
    counts = results.parameters(line)
    size = (
        ["not run"] * 2
        if counts is None
        else [f"{counts['trainable']:,}", f"{counts['trainable_percent_of_base']:.3f}"]
    )
    return [ROWS[row].title, results.size(line), *size, learning_rate(results, line)]


def learning_rate(results: Results, line: Line) -> str:
    """Peak rates of a line, and whether the sweep of this row, size and task chose them."""
    by_rate: dict[str, list[str]] = {}
    for cell in results.cells_of(line):
        if cell.spec.steps:
            by_rate.setdefault(_rate(line, cell.spec), []).append(cell.spec.task)
    if not by_rate:
        return "not trained"
    if len(by_rate) == 1:
        return next(iter(by_rate))
    return "; ".join(f"{', '.join(tasks)} {rate}" for rate, tasks in by_rate.items())


def _rate(line: Line, spec: RunSpec) -> str:
    task, rate, sizes = spec.task, spec.learning_rate, named_in(spec.model) or "embedded"
    first = "facts" if sizes == "embedded" else "people"
    if rate == learning_rates(sizes).get(" ".join(line if task == first else (*line, task))):
        return f"{rate:g}"
    swept = swept_rate(*line, task, sizes)
    source = rate_source(line[0])
    if source is not None and rate == swept:
        return f"{rate:g} (that of {ROWS[source].title})"
    return f"{rate:g} (as on {first})" if task != first and rate == swept else f"{rate:g} (not swept)"


def caption(results: Results, suite: str, scores: Sequence[Score], columns: Sequence[Column]) -> str:
    """What is shown, how it came to be, and what the words in the cells mean; says only what occurs."""
    evidence = sorted({s.evidence for s in scores if s.value is not None})
    intervals = _intervals(columns, any(s.seed_sd is not None for s in scores))
    parts = [f"Suite `{suite}`: {_subject(results)}. Mean score with 95 % interval: {intervals}."]
    if any(s.seed_sd is not None for s in scores):
        parts.append(
            "± is the standard deviation over seeds, n the items per seed; the interval is over the questions of all "
            "seeds, one that every seed asks counted once."
        )
    if uneven(scores):
        parts.append(
            "How many seeds a mean is over stands at the head of a column, or behind a score where that differs."
        )
    if any(s.lost for s in scores):
        parts.append("A place that lacks some of its seeds says so.")
    if len(evidence) == 1:
        parts.append(f"Evidence of every score: **{evidence[0]}**.")
    elif evidence:
        parts.append("The evidence of a score stands behind it.")
    if suite == "smoke":
        parts.append("Far too short to mean anything.")
    if suite == "real":
        parts.append("Learning rates are those of the embedded model, not tuned on this one.")
    reasons = {s.reason for s in scores if s.state == "not run"}
    if "no record" in reasons:
        parts.append(f"No record: `{COMMANDS.get(suite, 'make replicate')}` fills these places.")
    if "not in suite" in reasons:
        parts.append("Not in suite: no such run is planned.")
    return " ".join(parts)


def _of(results: Results, lines: Iterable[Line], columns: Sequence[Column]) -> list[Record]:
    """The records that a table's places are made from."""
    places = dict.fromkeys((line, c.task) for line in lines for c in columns)
    return [r for line, task in places for r in results.records_of(line, task).values()]


def _about_sizes(results: Results, lines: Sequence[Line]) -> str:
    """What a size in brackets means, where there is one."""
    differs = any(results.size(line) != line[1] for line in lines)
    return "Sizes are nominal; the real share of the base's parameters stands in brackets." if differs else ""


def failures(scores: dict[tuple[Line, str], Score]) -> str:
    """A list of the runs that ended without a score, each with its reason."""
    found = {(line, task): s for (line, task), s in scores.items() if s.state not in ("ok", "not run")}
    return "\n".join(
        f"- {ROWS[line[0]].title} {line[1]} on {task}: {s.state}: {plain(s.reason)}"
        for (line, task), s in found.items()
    )


def paper_table(results: Results, reported: dict[str, Any]) -> Table:
    """The paper's Table 1, and beside it, in columns of their own, our rows of the same name and share."""
    block = reported["table1"]
    theirs, model = block["columns"], block["model"]
    rows = {(r["row"], r["share"]): r for r in sorted(block["rows"], key=lambda r: line_order((r["row"], r["share"])))}
    scores = {(line, task): results.score(line, headline(task)) for line in rows for task in theirs.values()}
    evidence = {s.evidence for s in scores.values() if s.value is not None}
    label = f" ({min(evidence)})" if len(evidence) == 1 else ""
    columns: list[str | tuple[str, str]] = [("", "row"), ("Method", "method"),
                                            ("Size, as the paper has it", "share_in_paper")]  # fmt: skip
    columns += [(f"paper, {model}, {TASK_TITLES[t]} (reported)", f"paper_{model}_{t}_reported") for t in theirs]
    for task in theirs.values():
        columns += _score_columns(f"ours, {_model(results)}, {task}{label}", headline(task), "ours_")
    body = []
    for line, row in rows.items():
        body.append([line[0], ROWS[line[0]].title, line[1], *(_printed(row, t) for t in theirs)])
        for task in theirs.values():
            found = scores[line, task]
            differ = uneven(scores[other, task] for other in rows)
            body[-1] += [found.text(True, len(evidence) > 1, differ), *_csv_cells(found)]
    titles = ", ".join(TASK_TITLES[t] for t in theirs)
    about = (
        f"Columns headed *paper* are the paper's, {model} on {titles}, evidence **reported**: one run each, no "
        "spread, about 501 items (a standard error near 0.022 at 0.4). Columns headed *ours* are other tasks on "
        "another model: compare the order of the methods within a column, never two columns."
    )
    stale = stale_note(results, _of(results, rows, [headline(task) for task in theirs.values()]))
    other = [f"{ROWS[line[0]].title} {size}" for line in rows if (size := results.size(line)) != line[1]]
    sizes = f"Ours train, where that is another share of the base: {'; '.join(other)}." if other else ""
    notes = [f"- {ROWS[r].title} {s}, paper: {row['note']}." for (r, s), row in rows.items() if row.get("note")]
    return table(
        "table1_paper", columns, body, left=2, before=[stale, about, sizes], after=[failures(scores), "\n".join(notes)]
    )


def _printed(row: dict[str, Any], task: str) -> str:
    return f"{row[task]:.3f}" if task in row else "not reported"


def _model(results: Results) -> str:
    models = {c.spec.model.split("@")[0] for seeds in results.places.values() for c in seeds.values()}
    return plain(", ".join(sorted(models)))


def _subject(results: Results) -> str:
    """Model, its size, seeds, device: what all cells of the suite share."""
    specs = [c.spec for seeds in results.places.values() for c in seeds.values()]
    sizes = sorted({r["parameters"]["base"] for r in results.records() if r["parameters"] is not None})
    counts, devices = sorted({len(seeds) for seeds in results.places.values()}), sorted({s.device for s in specs})
    model = f"model {_model(results)}" + "".join(f" ({size:,} parameters)" for size in sizes)
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{model}, {seeds} seed{'s' * (counts[-1:] != [1])}, {', '.join(devices)}"


def _intervals(columns: Sequence[Column], several: bool) -> str:
    """several: some place has more than one seed, so that what each of them is asked has means over seeds."""
    by_means = ["IoU"] * any(c.metric == "iou" for c in columns)
    if several and any(same_for_every_seed(c.task, c.split) for c in columns):
        by_means.append("questions that every seed is asked")
    return "Wilson for scores of 0 and 1" + (
        f", bootstrap over items for {' and for '.join(by_means)}" if by_means else ""
    )


def _dropped(results: Results) -> str:
    """How many training rows the length limit took away, per task."""
    by_task: dict[str, set[int]] = {}
    for record in results.records():
        rows = (record["timing"] or {}).get("rows_dropped", 0)
        if rows:
            by_task.setdefault(record["spec"]["task"], set()).add(rows)
    told = [f"{TASK_TITLES.get(t, t)} {max(by_task[t])}" for t in HEADLINE_METRIC if t in by_task]
    return f"Training rows left out because they exceed the length limit: {', '.join(told)}." if told else ""


def _csv_cells(score: Score) -> list[str]:
    state = f"{score.state}: {score.reason}" if score.reason else score.state
    state += " (stale)" * score.stale
    if score.value is None:
        return [score.state] * 6 + [score.evidence, state]
    assert score.low is not None and score.high is not None
    sd = "one seed" if score.seed_sd is None else f"{score.seed_sd:.4f}"
    state += f" ({len(score.lost)} seeds lost: {', '.join(score.lost)})" * bool(score.lost)
    numbers = [f"{score.value:.4f}", f"{score.low:.4f}", f"{score.high:.4f}", sd, str(score.seeds), str(score.n)]
    return [*numbers, score.evidence, state]
