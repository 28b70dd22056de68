"""The tables of the suite frontier: each method and size at the rate where it forgets least for what it knows, and the
sentence that the records give."""

import statistics

from meft_bench.harness import frontier as suite
from meft_bench.report.records.frontier import made, on_frontier, sentence
from meft_bench.report.records.quantities import Values, measure
from meft_bench.report.records.results import Results, stale_note, title
from meft_bench.report.tables.scores import COMMANDS
from meft_bench.report.text import Table, table

NAME = "frontier"


def frontier_table(results: Results, name: str = NAME, task: str = suite.TASK) -> Table:
    """A line for each method, size and rate; the bold ones are on the frontier of all: no run knows as much and forgot
    less."""
    columns = [("Method", "method"), ("Size", "share"), ("Rate", "rate"), ("Test score", "score"),
               ("Forgotten, nats a token", "forgotten"), ("Trainable", "trainable"), ("Device bytes", "device_bytes"),
               ("On the frontier", "frontier"), ("Seeds", "seeds")]  # fmt: skip
    points = made(results, task)
    best = on_frontier(points)
    body = []
    for p in points:
        reference = f"{p.line[0]} {p.line[1]} {task} / {p.rate}"
        counts = next((r["parameters"] for r in results.records_of(p.line, task, p.rate).values()), None)
        held = measure(results, "device_bytes", reference).by_seed
        body.append([
            title(p.line[0]), p.line[1], p.rate, _spread(p.score), _spread(p.forgotten),
            f"{counts['trainable']:,}" if counts else "unknown",
            f"{statistics.fmean(held.values()):,.0f}" if held else "unknown",
            "yes" if p in best else "no", str(len(p.score.by_seed)),
        ])  # fmt: skip
    what = "base model's own text" if task == suite.TASK else "text that the base writes by itself"
    about = (
        "Each method at each learning rate that was tried. Test score: facts asked in wordings that were not trained. "
        f"Forgotten: loss on the {what} above the base's own. Means over seeds (± is their standard deviation). "
        "Device bytes: what a method holds there beside the base's weights, which all hold. "
        "On the frontier: no other line knows as much and forgot less."
    )
    command = COMMANDS[NAME] if name == NAME else f"{COMMANDS[NAME]} MODEL=smollm2-135m"
    missing = f"Not run yet. `{command}` fills this table." if not body else ""
    said = [missing] if missing else [f"**{sentence(results, task)}**", about]
    return table(name, columns, body, left=3, before=[stale_note(results, results.records()), *said], instead=missing)


def _spread(values: Values) -> str:
    numbers = list(values.by_seed.values())
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.3f}{spread}"
