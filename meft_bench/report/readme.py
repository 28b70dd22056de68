"""Generated blocks in README.md: what stands between <!-- results:NAME --> and <!-- /results:NAME -->."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from meft_bench.report.claims.entries import Ledger
from meft_bench.report.claims.takeaways import TASKS, takeaways
from meft_bench.report.claims.words import capitalised, counts_sentence
from meft_bench.report.figures.marks import title
from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.profiles import Profile
from meft_bench.report.records.results import STALE_MARK, Results, Score, borrowed_rates, headline, stale_note
from meft_bench.report.tables.scores import COMMANDS
from meft_bench.report.text import markdown_table, paragraphs
from meft_bench.write import write_if_changed

TABLE = (("base", "0%"), ("lora", "10%"), ("lora_ffn", "10%"), ("adapter_h", "10%"), ("parallel_adapter", "10%"),
         ("meft", "10%"), ("full", "100%"))  # fmt: skip
"""(row, share) of the README's table."""
_MARKER = re.compile(r"<!-- (/?)results:([a-z0-9_]+) -->")


def blocks(
    ledger: Ledger, results: Results, profiles: Sequence[Profile], suite: str, left_out: str = ""
) -> dict[str, str]:
    """Block -> its Markdown. left_out: which files are no records, told first."""
    return {
        "findings": paragraphs(left_out, takeaways(ledger, profiles), counts_sentence(ledger)),
        "table": short_table(results, suite),
    }


def short_table(results: Results, suite: str) -> str:
    """One size of every method on every task of a suite: the mean score with its interval over items, or its state."""
    columns = [headline(task) for task in results.tasks()]
    lines = [line for line in TABLE if any((*line, c.task, "") in results.places for c in columns)]
    scores = {line: [results.score(line, c) for c in columns] for line in lines}
    body = [[title(line[0]), results.size(line), *map(_cell, scores[line])] for line in lines]
    found = [s for row in scores.values() for s in row if s.value is not None]
    behind = [r for line in lines for c in columns for r in results.records_of(line, c.task).values()]
    return paragraphs(
        stale_note(results, behind),
        _caption(suite, found),
        borrowed_rates(lines),
        markdown_table(["Method", "Trained", *(capitalised(TASKS.get(c.task, c.task)) for c in columns)], body),
    )


def _cell(score: Score) -> str:
    if score.value is None:
        return score.state + f" {STALE_MARK}" * score.stale
    some = f" ({score.seeds} of {score.seeds + len(score.lost)} seeds)" if score.lost else ""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]{some}" + f" {STALE_MARK}" * score.stale


def _caption(suite: str, found: Sequence[Score]) -> str:
    if not found:
        return f"Suite `{suite}`: not run yet. `{COMMANDS[suite]}` fills this table."
    seeds, counts = sorted({s.seeds for s in found}), sorted({s.n for s in found if s.n is not None})
    return (
        f"Suite `{suite}`, embedded model: mean score (1: every answer right) of {_span(seeds)} seeds of "
        f"{_span(counts)} questions, with the 95 % interval over questions. "
        f"Evidence: **{weakest(s.evidence for s in found)}**."
    )


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def update_readme(path: Path, blocks: Mapping[str, str]) -> bool:
    """Put every block between its markers; True if the file changed. Raises ValueError for markers that do not fit."""
    return write_if_changed(path, render(_read(path), blocks).encode())


def check_readme(path: Path, blocks: Mapping[str, str]) -> list[str]:
    """Names of the blocks that are not what the records give. Raises ValueError for markers that do not fit."""
    text = _read(path)
    spans = _spans(text, blocks)
    return [name for name, (start, end) in sorted(spans.items()) if text[start:end] != _inside(blocks[name])]


def render(text: str, blocks: Mapping[str, str]) -> str:
    """text with every block between its markers; all else is left as it is."""
    # From the last to the first, so that the positions found stay true.
    for name, (start, end) in sorted(_spans(text, blocks).items(), key=lambda item: -item[1][0]):
        text = text[:start] + _inside(blocks[name]) + text[end:]
    return text


def _inside(block: str) -> str:
    # GitHub needs the blank lines to read a table or list after a comment.
    return "\n\n" + block.strip("\n") + "\n\n"


def _spans(text: str, blocks: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Where each block's inside begins and ends. Raises ValueError, one for all faults."""
    faults, spans = [], {}
    found = [(m.group(1), m.group(2), m) for m in _MARKER.finditer(text)]
    for name in sorted({n for _, n, _ in found} - set(blocks)):
        faults.append(f"{name} is no block of the report (there are: {', '.join(sorted(blocks))})")
    for name in sorted(blocks):
        here = [(slash, m) for slash, n, m in found if n == name]
        if [slash for slash, _ in here] != ["", "/"]:
            faults.append(f"needs <!-- results:{name} --> and <!-- /results:{name} --> once each, in this order")
        else:
            spans[name] = (here[0][1].end(), here[1][1].start())
    ordered = sorted(spans.items(), key=lambda item: item[1])
    for (a, (_, end)), (b, (start, _)) in zip(ordered, ordered[1:], strict=False):
        if start <= end:  # even side by side, a closing marker stands between them
            faults.append(f"the blocks {a} and {b} overlap")
    if faults:
        raise ValueError(f"the README's result markers do not fit: {'; '.join(faults)}")
    return spans


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # bytes: line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path.name}: {error.__class__.__name__}") from None
