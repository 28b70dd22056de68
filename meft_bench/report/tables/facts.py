"""The tables the paper should have had (sizes with their bytes, ablations, neurons in use), and its Tables 2 and 3."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from meft_bench.harness.rates import learning_rates_swept
from meft_bench.harness.rows import ROWS, rate_source
from meft_bench.harness.suites import full
from meft_bench.report.records import quantities as q
from meft_bench.report.records.results import (
    STALE_MARK,
    Line,
    Results,
    Score,
    borrowed_rates,
    headline,
    line_order,
    stale_note,
    uneven,
)
from meft_bench.report.records.stats import seed_interval
from meft_bench.report.text import Table, csv_table, markdown_table, paragraphs, table

TASK = "facts"
_ABOUT_SEEDS = (
    "Mean over seeds. Brackets behind a score (facts test) are the 95 % interval over the questions of all seeds, and "
    "± is the standard deviation over seeds; all other brackets are the 95 % t-interval over seeds, where there are "
    "two or more."
)


def sizes(results: Results) -> Table:
    """Every row and size on facts: score, parameters, device bytes, bits recalled per parameter, forgetting."""
    header = ("Method", "Size", "Trainable parameters", "Device bytes, KiB", "facts test, contains",
              "bits recalled per parameter", "forgetting, nats per token")  # fmt: skip
    body, scores = [], _scores(results, results.lines("table1", "figure1"))
    for line in results.lines("table1", "figure1"):
        if (*line, TASK, "") not in results.places:
            continue
        counts, place = results.parameters(line), f"{line[0]} {line[1]} {TASK}"
        body.append([
            ROWS[line[0]].title, results.size(line), "not run" if counts is None else f"{counts['trainable']:,}",
            _mean(q.measure(results, "device_bytes", place), lambda x: f"{x / 1024:,.0f}"),
            scores[line],
            "none trained" if line[0] == "base" else _mean(q.measure(results, "bits_per_parameter", place), _three),
            _with_interval(q.forgotten(results, place)),
        ])  # fmt: skip
    about = (
        "Sizes compared at equal trainable parameters (column 3) and at equal device bytes (column 4): parameters, "
        "gradients and moments of a method that lives on the device; of a linked one the rows that wait for backward, "
        "their indices and the gradients of one layer. The base's weights, which all hold, are left out, also where "
        "they are what is trained. Bits: recall of the training questions x facts x 10 bits. "
        "Forgetting: loss on fresh draws of the base's own text, minus the base model's. " + _ABOUT_SEEDS
    )
    return _table("sizes", results, about, header, body, results.lines("table1", "figure1"))


def ablations(results: Results) -> Table:
    """Each choice of MEFT changed alone, against the default at the same size."""
    header = ("Variant", "Size", "facts test, contains", "difference to MEFT", "read the other way",
              "U/R in training", "dead neurons", "forgetting, nats per token")  # fmt: skip
    body = []
    lines = [("meft", "10%"), ("meft_no_ke", "10%"), *results.lines("ablations", "figure7", "figure6")]
    scores = _scores(results, lines)
    for line in lines:
        place = f"{line[0]} {line[1]} {TASK}"
        if (*line, TASK, "") not in results.places:
            continue
        same = f"{q.changed_row(line[0])} {line[1]} {TASK}"
        own = line[0] in ("meft", "meft_no_ke") or q.parse_reference(same) not in results.places
        body.append([
            ROWS[line[0]].title, results.size(line), scores[line],
            "reference" if own else _with_interval(q.difference(results, place, same)),
            _with_interval(q.measure(results, "reading_gap", place)),
            _mean(q.measure(results, "union_share", place), _three),
            _mean(q.measure(results, "dead_share", place), _three),
            _with_interval(q.forgotten(results, place)),
        ])  # fmt: skip
    about = (
        "One choice changed at a time; the difference is to MEFT (or to MEFT without Key-Experts) at the same size, "
        "paired over the seeds that both have. Read the other way: what the score gains when a model trained per token "
        "is read by union, and one trained by union per token. Dead: kept by no token of 256 training rows. "
        + _ABOUT_SEEDS
    )
    return _table("ablations", results, about, header, body, lines)


def neurons(results: Results) -> Table:
    """Experts and neurons in use, and pre-retrieval, by layer."""
    header = ("Variant", "Size", "expert entropy, by layer", "neuron entropy, by layer", "dead neurons, by layer",
              "found one layer ahead, by layer from the second", "chance of that, K/R")  # fmt: skip
    body = []
    lines = results.lines("table1", "figure1", "ablations", "figure6", "figure7")
    for line in lines:
        if ROWS[line[0]].method != "meft" or (*line, TASK, "") not in results.places:
            continue
        records = [r for r in results.records_of(line, TASK).values() if r["probes"] and "neurons" in r["probes"]]
        if not records:
            body.append([ROWS[line[0]].title, results.size(line), *["not run"] * 5])
            continue
        used = [r["probes"]["neurons"] for r in records]
        body.append([
            ROWS[line[0]].title, results.size(line),
            _by_layer([u["expert_entropy"] for u in used]) if "expert_entropy" in used[0] else "no experts",
            _by_layer([u["neuron_entropy"] for u in used]), _by_layer([u["dead_share"] for u in used]),
            _by_layer([r["probes"]["lookahead"]["recall_per_token"] for r in records]),
            f"{q.kept_share(records[0]):.3f}",
        ])  # fmt: skip
    about = (
        "Measured after training on 256 training rows of facts, mean over seeds. Entropy is over its maximum: 1 means "
        "that all are used alike. Found ahead: share of a token's kept neurons that the FFN input of the layer before "
        "would have selected."
    )
    return _table("neurons", results, about, header, body, lines)


def union(results: Results) -> Table:
    """U/R against micro-batch and length."""
    lines: list[Line] = [("meft", "10%"), ("meft", "40%"), ("meft", "150%")]
    records = {line: [r for r in results.records_of(line, TASK).values() if r["state"] == "ok"] for line in lines}
    points = sorted(
        {(p["length"], p["batch"]) for rs in records.values() for r in rs for p in r["probes"]["union_grid"]}
    )
    header = ("Tokens a sequence", "Sequences", "Tokens", *(f"R = {_neurons(results, line)}" for line in lines))
    body = [
        [str(length), str(batch), str(length * batch), *(_grid(records[line], batch, length) for line in lines)]
        for length, batch in points
    ]
    about = (
        "Share of a layer's neurons that a micro-batch needs (U/R) after training on facts, mean over layers and "
        "seeds; rows are joined end to end, so there is no padding. What crosses the link is U rows each way."
    )
    return _table("union", results, about, header, body or [["not run"] * len(header)], lines, left=1)


def paper_tables(results: Results, reported: dict[str, Any]) -> Table:
    """The paper's Tables 2 and 3 and its Mistral half of Table 1, ours beside where there is something beside."""
    table2, table3, mistral = reported["table2"], reported["table3"], reported["table1_mistral"]
    theirs2 = [
        [str(r), f"{p:g}", f"{s:.3f}", f"{t:.3f}"]
        for r, p, s, t in zip(*(table2[k] for k in ("size", "percent_printed", "squad", "toolbench")), strict=True)
    ]
    theirs3 = [[str(r), f"{a:.3f}"] for r, a in zip(table3["rank"], table3["accuracy"], strict=True)]
    theirs1 = [
        [ROWS[row["row"]].title, row["share"], *(f"{row[t]:.3f}" if t in row else "not reported" for t in _THEIRS)]
        for row in mistral["rows"]
    ]
    shares = ("0.5%", "2%", "10%", "40%")
    dense, low_rank = ([(row, s) for s in shares] for row in ("parallel_adapter", "lora_ffn"))
    by_task = {t: _scores(results, dense, t) for t in ("cloze", "tools")}
    ours2 = [[results.size(line), *(by_task[t][line] for t in by_task)] for line in dense]
    of_rank = _scores(results, low_rank)
    ours3 = [[results.size(line), of_rank[line]] for line in low_rank]
    ours = [*((("parallel_adapter", s), t) for s in shares for t in ("cloze", "tools")),
            *((("lora_ffn", s), TASK) for s in shares)]  # fmt: skip
    markdown = paragraphs(
        stale_note(results, [r for line, task in ours for r in results.records_of(line, task).values()]),
        "**Table 2, ours** (measured): Parallel Adapter by size, embedded model.",
        markdown_table(("Size", "cloze test, contains", "tools test, IoU"), ours2),
        "**Table 2, the paper's** (reported, LLaMA-7B; the printed percentages are 0.8 times the true ones).",
        markdown_table(("R", "% as printed", "SQuAD", "ToolBench"), theirs2),
        "**Table 3, ours** (measured): LoRA on the FFN by size, embedded model.",
        markdown_table(("Size", "facts test, contains"), ours3),
        "**Table 3, the paper's** (reported, LLaMA-7B, NQ).",
        markdown_table(("Rank", "NQ"), theirs3),
        "**Table 1 on Mistral-7B, the paper's** (reported; ours at that scale: not run).",
        markdown_table(("Method", "Size, as the paper has it", *(t.upper() for t in _THEIRS)), theirs1, left=2),
    )
    rows: list[list[object]] = [["ours_table2", f"{line[1]} {t}", by_task[t][line]] for line in dense for t in by_task]
    rows += [["ours_table3", line[1], of_rank[line]] for line in low_rank]
    rows += [["paper_table2_squad", line[0], line[2]] for line in theirs2]
    rows += [["paper_table2_toolbench", line[0], line[3]] for line in theirs2]
    rows += [["paper_table3_nq", *line] for line in theirs3]
    rows += [[f"paper_table1_mistral_{t}", f"{line[0]} {line[1]}", x] for line in theirs1
             for t, x in zip(_THEIRS, line[2:], strict=True)]  # fmt: skip
    return Table("paper_tables", markdown, csv_table(("table", "place", "score"), rows))


def sweep() -> Table:
    """Every learning rate that was tried, with its development score, and the one chosen."""
    about = (
        "Scored on the development split (prompts neither trained on nor tested), seed 0. The best score wins, ties "
        "go to the lower training loss; a best rate at the edge of its grid is followed outwards. A sweep is made once "
        "and kept: rates are not chosen anew when the code changes."
    )
    return _swept("sweep", "embedded", TASK, about, _not_swept())


def real_sweep(model: str) -> Table:
    """The same on a real model, whose rows and sizes all get as many rates, on people."""
    about = (
        "Scored on the development split of people, seed 0, at as many rates for every method and size. The best score "
        "wins, ties go to the lower training loss; a best rate at the edge of its grid is followed outwards. The other "
        "tasks take these rates."
    )
    return _swept("smollm2_sweep", model, "people", about, "")


def _swept(name: str, sizes: str, first: str, about: str, after: str) -> Table:
    """first: the task that names of the sweep leave out."""
    tried, chosen = learning_rates_swept(sizes)
    names = sorted(tried, key=lambda n: (*line_order((n.split()[0], n.split()[1])), n.split()[2:]))
    body = [
        [ROWS[n.split()[0]].title, n.split()[1], (n.split()[2:] or [first])[0],
         f"{chosen[n]:g}" if n in chosen else "not yet",
         "; ".join(f"{rate:g}: {_tried(e)}" for rate, e in sorted(tried[n].items()))]
        for n in names
    ]  # fmt: skip
    header = ("Method", "Size", "Task", "Chosen", "Rate: development score")
    return table(name, header, body, left=5, before=[about], after=[after])


def _not_swept() -> str:
    """Every row and size of the full suite that takes another row's rate, with that rate."""
    lines = {(c.row, c.share): c.spec.learning_rate for c in full() if rate_source(c.row) is not None}
    told = [
        f"- {ROWS[row].title} {share}: {rate:g}, as swept for {ROWS[rate_source(row) or row].title}"
        for (row, share), rate in sorted(lines.items(), key=lambda item: line_order(item[0]))
    ]
    about = (
        f"**Not swept: {len(told)} rows take another row's rate.** Offloaded whole is the same mathematics as "
        "resident; the engine's options are judged against the row that they change; the curves over K and N have "
        "one rate each, as in the paper: a point that would want another rate is scored too low. Runs with other "
        "numbers of facts or micro-batches take the rate of their row."
    )
    return paragraphs(about, "\n".join(told))


_THEIRS = ("nq", "squad", "toolbench", "gsm8k")


def _table(
    name: str, results: Results, about: str, header: tuple[str, ...], body: list[list[str]], lines: Sequence[Line],
    left: int = 2,
) -> Table:  # fmt: skip
    """A table on facts of these lines: first whether the numbers are of today's code, then what they are."""
    planned = [line for line in lines if (*line, TASK, "") in results.places]
    stale = stale_note(results, [r for line in planned for r in results.records_of(line, TASK).values()])
    return table(name, header, body, left=left, before=[stale, about, borrowed_rates(planned)])


def _scores(results: Results, lines: Iterable[Line], task: str = TASK) -> dict[Line, str]:
    """The score of each line that is planned, and its number of seeds where that is not the same for all."""
    found: dict[Line, Score] = {line: results.score(line, headline(task)) for line in lines}
    differ = uneven(found.values())
    return {line: score.text(show_seeds=differ) for line, score in found.items()}


def _mean(values: q.Values, form: Callable[[float], str]) -> str:
    if not values.by_seed:
        return "not run"
    return form(statistics.fmean(values.by_seed.values())) + f" {STALE_MARK}" * values.stale


def _with_interval(values: q.Values) -> str:
    seeds = list(values.by_seed.values())
    interval = seed_interval(seeds)
    text = _mean(values, lambda x: f"{x:+.3f}")
    return text if interval is None else f"{text} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _by_layer(layers_of_seeds: list[list[float]]) -> str:
    return " / ".join(f"{statistics.fmean(layer):.2f}" for layer in zip(*layers_of_seeds, strict=True))


def _neurons(results: Results, line: Line) -> int:
    seeds = results.places.get((*line, TASK, ""), {})
    return next(iter(seeds.values())).spec.options["neurons"] if seeds else 0


def _grid(records: list[dict[str, Any]], batch: int, length: int) -> str:
    try:
        return f"{statistics.fmean(q.grid_share(r, batch, length) for r in records):.3f}"
    except (ValueError, statistics.StatisticsError):
        return "not run"


def _tried(entry: dict[str, Any]) -> str:
    return f"{entry['score']:.3f}" if "score" in entry else entry["state"]
