"""The tables of the suite on a pretrained model: what was learnt, what was forgotten, how many neurons were needed."""

import statistics
from dataclasses import replace
from typing import Any

from meft_bench.harness.rows import ROWS
from meft_bench.harness.suites import SEEDS
from meft_bench.report.records.real import kept, kept_by_run, progress
from meft_bench.report.records.results import TASK_TITLES, Column, Line, Record, Results, headline, stale_note
from meft_bench.report.records.stats import mean_interval
from meft_bench.report.tables.scores import COMMANDS, score_table
from meft_bench.report.text import Table, paragraphs, table

NAME = "smollm2"


def pretrained(results: Results) -> list[Table]:
    """smollm2, smollm2_forgetting and smollm2_union, from the suite's results."""
    return [_scores(results), forgetting(results), union(results)]


def not_run() -> Table:
    """What stands in place of the scores while there is no record."""
    why = "six to seven hours on two cores, or minutes on a GPU"
    markdown = f"Not run yet ({why}). `{COMMANDS[NAME]}` fills this table."
    columns = [("", name) for name in ("state", "reason", "command")]
    return table(NAME, columns, [("not run", why, COMMANDS[NAME])], before=[markdown])


def _scores(results: Results) -> Table:
    columns = [headline(task, split) for task in results.tasks() for split in ("test", "recall")]
    names = {c: f"{TASK_TITLES.get(c.task, c.task)}, {_asked(c)}" for c in columns}
    made = score_table(NAME, results, NAME, NAME, columns, names)
    about = (
        "SmolLM2-135M-Instruct, weights dequantised from 4 bits. *people*: invented people in natural sentences, asked "
        "about as they were taught, and in a wording that was never trained. NQ, SQuAD, ToolBench and GSM8K are asked "
        "again *as taught*, which is what was learnt, and with *new questions*, which need what the base knows."
    )
    there = progress(results)
    return replace(made, markdown=paragraphs(f"**Not complete: {there}.**" if there else "", about, made.markdown))


def _asked(column: Column) -> str:
    if column.split == "recall":
        return "as taught"
    return "other wording" if column.task == "people" else "new questions"


def forgetting(results: Results) -> Table:
    """Per line and task: what was learnt, loss and divergence from the base on two texts, and the share of plain facts
    still stated."""
    columns = [("Method", "method"), ("Size", "share"), ("Task", "task"), ("Learnt", "learnt"),
               ("Loss, held-out text", "held_out_nats"),
               ("KL to the base", "held_out_kl"), ("KL, the base's own text", "own_kl"),
               ("Facts kept, greedy", "kept_greedy"), ("by choice", "kept_choice"), ("Runs", "runs")]  # fmt: skip
    body, found = [], []
    for (row, share), task, records in _groups(results):
        blocks = [r["probes"]["forgetting"] for r in records]
        found += records
        body.append([
            ROWS[row].title, share, TASK_TITLES.get(task, task), _learnt(results, (row, share), task),
            _mean(blocks, "held_out", "nats_per_token"),
            _mean(blocks, "held_out", "kl_nats_per_token"), _mean(blocks, "own_text", "kl_nats_per_token"),
            _kept(records, "greedy"), _kept(records, "choice"), _runs(results, (row, share), task, len(records)),
        ])  # fmt: skip
    about = (
        "What the model lost, beside what it learnt (the score: people in another wording, other tasks as taught; its "
        "95 % interval is over the questions of all runs), measured. Loss and Kullback-Leibler divergence are nats a "
        "token, means over runs (± is the standard deviation over them); facts are plain sentences that the base "
        "completes rightly, with the 95 % interval over facts: every run is asked the same, so each counts "
        f"once, and the interval says nothing about other seeds. {_base_losses(found)}"
    )
    return table("smollm2_forgetting", columns, body, left=3, before=[stale_note(results, found), about])


def _base_losses(records: list[Record]) -> str:
    """The base's own loss in each number format: a run is compared with the base in its own."""
    found = {r["spec"]["dtype"]: r["probes"]["forgetting"]["held_out"]["base_nats_per_token"] for r in records}
    if len(found) < 2:
        return "".join(f"The base's own loss there is {loss:.3f} nats a token." for loss in found.values())
    told = " and ".join(f"{loss:.3f} in {dtype}" for dtype, loss in sorted(found.items()))
    return (
        f"The base's own loss there is {told}, in nats a token. Full fine-tuning trains in float32; each run is "
        "compared with the base in its own format, which states other facts rightly."
    )


def _groups(results: Results) -> list[tuple[tuple[str, str], str, list[Record]]]:
    groups = []
    for task in results.tasks():
        for line in results.lines(NAME):
            records = list(results.records_of(line, task).values())
            records = [r for r in records if r["state"] == "ok" and "forgetting" in (r["probes"] or {})]
            if records:
                groups.append((line, task, records))
    return groups


def _learnt(results: Results, line: Line, task: str) -> str:
    return results.score(line, headline(task, "test" if task == "people" else "recall")).text()


def _runs(results: Results, line: Line, task: str, made: int) -> str:
    planned = len(results.places[(*line, task, "")])
    return str(made) if made == planned else f"{made} of {planned}"


def _mean(blocks: list[dict[str, Any]], text: str, name: str) -> str:
    values = [b[text][name] for b in blocks]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _kept(records: list[Record], way: str) -> str:
    items, by_run = kept(records, way), kept_by_run(records, way)
    if not items:
        return "the base states none"
    low, high = mean_interval(items)
    sd = f" ±{statistics.stdev(by_run):.3f}" if len(by_run) > 1 else ""
    return f"{statistics.fmean(by_run):.3f}{sd} [{low:.3f}, {high:.3f}] of {len(items)}"


def union(results: Results) -> Table:
    """U / R after training, by layer, for micro-batches of 128, 512 and 2048 tokens."""
    columns = [("R", "neurons"), ("K", "kept"), ("Tokens", "tokens"), ("U/R, mean", "mean"), ("lowest layer", "lowest"),
               ("highest layer", "highest"), ("dead neurons", "dead"), ("Size", "share")]  # fmt: skip
    body, seen = [], []
    for share, record in _meft_records(results):
        seen.append(record)
        options, dead = record["spec"]["options"], statistics.fmean(record["probes"]["neurons"]["dead_share"])
        for point in record["probes"]["union_grid"]:
            by_layer = point["share_by_layer"]
            shares = (statistics.fmean(by_layer), min(by_layer), max(by_layer), dead)
            sizes = (options["neurons"], options["kept"], point["tokens"])
            body.append([*map(str, sizes), *(f"{x:.3f}" for x in shares), share])
    about = (
        "How many of a layer's neurons one micro-batch of training text needs after training (the union U of all "
        "tokens' neurons), measured on the first seed of people."
    )
    return table("smollm2_union", columns, body, left=0, before=[stale_note(results, seen), about])


def _meft_records(results: Results) -> list[tuple[str, Record]]:
    """(size, record of the first seed on people) of MEFT, small ones first."""
    found = []
    for line in [*results.lines("union"), *results.lines(NAME)]:
        record = results.records_of(line, "people").get(SEEDS[0]) if line[0] == "meft" else None
        if record is not None and record["state"] == "ok" and "union_grid" in (record["probes"] or {}):
            found.append((line[1], record))
    return sorted(found, key=lambda pair: pair[1]["spec"]["options"]["neurons"])
