"""The paper's contrasts on closed-book facts, each as one sentence with its interval and nothing beyond it."""

from typing import Any

from meft_bench.harness.suites import ROWS
from meft_bench.report.cells import Line, Results, headline
from meft_bench.report.paper import figure1_points, table1_value
from meft_bench.report.stats import compare

TASK, PAPER_TASK = "facts", "nq"
CONTRASTS: tuple[tuple[Line, Line], ...] = (
    (("meft", "10%"), ("lora", "2%")),
    (("meft", "10%"), ("adapter_h", "2%")),
    (("meft", "10%"), ("parallel_adapter", "2%")),
    (("meft", "10%"), ("parallel_adapter", "10%")),
    (("meft", "10%"), ("full", "100%")),
)
TRENDS = ("parallel_adapter", "lora")
"""The paper finds the first to rise with size and the second flat (its Figure 1)."""


def verdict_lines(results: Results, reported: dict[str, Any]) -> list[str]:
    """One sentence per contrast, one per size trend, and what they cannot decide."""
    lines = [_contrast(results, a, b, _reported_difference(reported, a, b)) for a, b in CONTRASTS]
    lines += [_trend(results, row, reported) for row in TRENDS]
    return [*lines, _limits(results)]


def summary(results: Results, reported: dict[str, Any]) -> str:
    """The sentences as a Markdown list."""
    return "".join(f"- {line}\n" for line in verdict_lines(results, reported))


def _contrast(results: Results, first: Line, second: Line, paper: str) -> str:
    subject, against = _name(first), _name(second)
    missing = [_name(line) + why for line in (first, second) if (why := _missing(results, line))]
    if missing:
        return f"{subject} against {against}: not run ({'; '.join(missing)}). {paper}"
    column = headline(TASK)
    left, right = results.record(first, TASK), results.record(second, TASK)
    assert left is not None and right is not None
    try:
        d = compare(left, right, column.split, column.metric)
    except ValueError as error:
        return f"{subject} against {against}: not comparable ({error}). {paper}"
    word = {
        "higher": f"{subject} is higher than {against}",
        "lower": f"{subject} is lower than {against}",
        "inconclusive": f"{subject} against {against} is inconclusive",
    }[d.verdict]
    stale = "; stale records" if results.stale(left) or results.stale(right) else ""
    seeds = len({left["spec"]["seed"], right["spec"]["seed"]})
    evidence = ", ".join(sorted({left["quality"]["evidence"], right["quality"]["evidence"]}))
    return (
        f"{word}: difference {d.mean:+.3f}, 95 % interval [{d.low:+.3f}, {d.high:+.3f}], n = {d.n}, seeds = {seeds} "
        f"({evidence}{stale}). {paper}"
    )


def _trend(results: Results, row: str, reported: dict[str, Any]) -> str:
    """Largest size that was run against the smallest."""
    column = headline(TASK)
    lines = [line for line in results.lines("figure1", "table1") if line[0] == row]
    run = [line for line in lines if results.score(line, column).value is not None]
    points = figure1_points(reported, row)
    paper = f"Paper, Figure 1, largest against smallest size: {points[-1][1] - points[0][1]:+.3f} (reported)."
    if len(run) < 2:
        return f"Size of {_title(row)}: not run (a trend needs two sizes with a score). {paper}"
    return f"Size: {_contrast(results, run[-1], run[0], paper)}"


def _limits(results: Results) -> str:
    sizes = {r["parameters"]["base"] for r in results.records() if r["parameters"] is not None}
    model = f"a {max(sizes) / 1e6:.0f} M-parameter model" if sizes else "a small model"
    seeds = len({c.spec.seed for c in results.places.values()})
    count = {1: "One seed", 2: "Two seeds"}.get(seeds, f"{seeds} seeds")
    return (
        f"{count} on {model} decide{'s' * (seeds == 1)} nothing about LLaMA-7B: the intervals (paired bootstrap over "
        "test items, each contrast on its own, not adjusted for their number) hold for these trained models and cover "
        "neither seeds nor scale, and inconclusive does not mean equal."
    )


def _reported_difference(reported: dict[str, Any], first: Line, second: Line) -> str:
    theirs = [table1_value(reported, *line, PAPER_TASK) for line in (first, second)]
    if theirs[0] is None or theirs[1] is None:
        return "Paper: no such pair."
    return f"Paper, {reported['table1']['model']} on NQ: {theirs[0] - theirs[1]:+.3f} (reported)."


def _missing(results: Results, line: Line) -> str:
    score = results.score(line, headline(TASK))
    if score.value is not None:
        return ""
    return f": {score.reason}" if score.state == "not run" else f": {score.state}"


def _name(line: Line) -> str:
    return _title(line[0]) if line[0] == "full" else f"{_title(line[0])} {line[1]}"


def _title(row: str) -> str:
    return ROWS[row].title.split(" (")[0].split(",")[0]
