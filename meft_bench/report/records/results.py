"""What stands in a place of a table: a score with its interval, or the reason why there is none."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from meft_bench.harness.numerics import numerics
from meft_bench.harness.rows import ROWS, rate_source
from meft_bench.harness.spec import HEADLINE_METRIC
from meft_bench.harness.suites import Cell
from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.stats import mean_interval, over_repeats, same_for_every_seed, spread

Record = dict[str, Any]
Line = tuple[str, str]
"""(row, share): a line of a table."""
Place = tuple[str, str, str, str]
"""(row, share, task, variant): what the seeds of a cell have in common."""

TASK_TITLES = {"nq": "NQ", "squad": "SQuAD", "toolbench": "ToolBench", "gsm8k": "GSM8K"}
_METRIC_WORDS = {"exact_match": "exact match", "iou": "IoU"}
_SPLIT_WORDS = {"recall": "recall of trained"}
STALE_MARK = "†"
STALE_HEAD = f"**Stale {STALE_MARK}: made by an earlier version of the code.**"
_SAME_SIZE = 0.02
"""A run whose share of the base's parameters is off its nominal one by more than this part of it is said to be."""


@dataclass(frozen=True)
class Column:
    """What a column of scores shows."""

    task: str
    split: str
    metric: str

    @property
    def key(self) -> str:
        """Name in CSV files."""
        return f"{self.task}_{self.split}_{self.metric}"

    @property
    def title(self) -> str:
        """Name in Markdown."""
        split, metric = _SPLIT_WORDS.get(self.split, self.split), _METRIC_WORDS.get(self.metric, self.metric)
        return f"{TASK_TITLES.get(self.task, self.task)} {split}, {metric}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number with its interval, or, when value is None, a state and its reason."""

    state: str = "ok"
    """ok, not run, oom, diverged or failed."""
    reason: str = ""
    value: float | None = None
    """Mean over the items of all seeds that have a score."""
    low: float | None = None
    high: float | None = None
    """95 % interval over the questions of all seeds, one that every seed asks counted once."""
    seed_sd: float | None = None
    """Standard deviation of the seeds' means; None with one seed."""
    n: int | None = None
    """Items per seed."""
    seeds: int = 0
    lost: tuple[str, ...] = ()
    """States of planned seeds that give no score ("diverged", "no record")."""
    evidence: str = "not-run"
    stale: bool = False

    @property
    def planned(self) -> int:
        """Seeds that the place is planned with."""
        return self.seeds + len(self.lost)

    def text(self, show_n: bool = False, show_evidence: bool = False, show_seeds: bool = False) -> str:
        """A cell of a Markdown table; never empty. Of a place that lacks seeds it says how many there are."""
        mark = f" {STALE_MARK}" if self.stale else ""
        if self.value is None:
            # Why a run was not made is short; why it failed is told below the table.
            return (f"not run ({self.reason})" if self.state == "not run" else self.state) + mark
        extras = [f"n = {self.n}"] * show_n + [self.evidence] * show_evidence
        extras += [seeds_words(self.seeds)] * (show_seeds and not self.lost)
        extras += [f"{self.seeds} of {self.seeds + len(self.lost)} seeds: {', '.join(sorted(set(self.lost)))}"] * bool(
            self.lost
        )
        sd = "" if self.seed_sd is None else f" ±{self.seed_sd:.3f}"
        return f"{self.value:.3f}{sd} [{self.low:.3f}, {self.high:.3f}]{mark}" + (
            f" ({', '.join(extras)})" if extras else ""
        )


def seeds_words(count: int) -> str:
    """1 seed, 3 seeds."""
    return f"{count} seed{'s' * (count != 1)}"


def uneven(scores: Iterable[Score]) -> bool:
    """True when places that stand together are planned with different numbers of seeds, so that each must say its."""
    return len({s.planned for s in scores if s.value is not None}) > 1


class Results:
    """The cells of one suite and the records that fill them, seed by seed. Raises ValueError when two different runs
    claim one place and seed."""

    def __init__(
        self,
        cells: Iterable[Cell],
        records: Mapping[str, Record],
        today: Callable[..., Mapping[str, int | str]] = numerics,
    ) -> None:
        """records by run key; today(task, method, model) gives the numerics of today."""
        self.places: dict[Place, dict[int, Cell]] = {}
        for cell in cells:
            place = (cell.row, cell.share, cell.spec.task, cell.variant)
            seeds = self.places.setdefault(place, {})
            if cell.spec.seed in seeds and seeds[cell.spec.seed].spec != cell.spec:
                raise ValueError(f"two different runs claim {' '.join(place).strip()}, seed {cell.spec.seed}")
            seeds[cell.spec.seed] = cell
        # Found once: a run key is a hash, and every table asks for every record again.
        keys = {(place, s): c.spec.run_key for place, seeds in self.places.items() for s, c in seeds.items()}
        self._records = {key: records[run] for key, run in keys.items() if run in records}
        self._today = cache(today)
        self.score = cache(self._score)

    def lines(self, *artefacts: str) -> list[Line]:
        """(row, share) of the cells of these artefacts that have no variant, in the order of ROWS, small
        before large."""
        found = {
            (row, share)
            for (row, share, _, variant), seeds in self.places.items()
            if not variant and any(set(artefacts) & set(c.artefacts) for c in seeds.values())
        }
        return sorted(found, key=line_order)

    def tasks(self) -> list[str]:
        """Tasks of the suite, in the order of HEADLINE_METRIC."""
        found = {task for _, _, task, _ in self.places}
        return [t for t in HEADLINE_METRIC if t in found]

    def seeds(self) -> list[int]:
        """Every seed that some place is planned with."""
        return sorted({s for seeds in self.places.values() for s in seeds})

    def cells_of(self, line: Line) -> list[Cell]:
        """The cells of a line at their first seed, one per task, variants left out."""
        found = [self.places.get((*line, t, "")) for t in self.tasks()]
        return [seeds[min(seeds)] for seeds in found if seeds]

    def records_of(self, line: Line, task: str, variant: str = "") -> dict[int, Record]:
        """Seed -> record of a place, whatever their states, seeds ascending."""
        place = (*line, task, variant)
        return {s: r for s in sorted(self.places.get(place, ())) if (r := self._records.get((place, s))) is not None}

    def records(self) -> list[Record]:
        """Records that fill a place, in the order of the cells."""
        return list(self._records.values())

    def parameters(self, line: Line) -> dict[str, Any] | None:
        """The parameter counts of a line, from any of its records: they depend on neither task nor seed."""
        found = (r for c in self.cells_of(line) for r in self.records_of(line, c.spec.task).values())
        return next((r["parameters"] for r in found if r["parameters"] is not None), None)

    def size(self, line: Line) -> str:
        """The nominal share, and behind it the real one where they differ: "40% (24.5%)"."""
        real = self.real_size(line)
        return f"{line[1]} ({real})" if real else line[1]

    def real_size(self, line: Line) -> str:
        """The real share of a line whose nominal one is another; "" where they agree, or without a record."""
        counts, nominal = self.parameters(line), float(line[1].rstrip("%"))
        real = nominal if counts is None else counts["trainable_percent_of_base"]
        return "" if abs(real - nominal) <= _SAME_SIZE * nominal else f"{real:.3g}%"

    def stale(self, record: Record) -> bool:
        """True when the record was made with other numerics than today's."""
        spec = record["spec"]
        return record["numerics"] != self._today(spec["task"], spec["method"], spec["model"])

    def _score(self, line: Line, column: Column, variant: str = "") -> Score:
        """What stands at a line and column, its seeds together."""
        planned = self.places.get((*line, column.task, variant))
        if planned is None:
            return Score(state="not run", reason="not in suite")
        records = self.records_of(line, column.task, variant)
        if not records:
            return Score(state="not run", reason="no record")
        stale = any(self.stale(r) for r in records.values())
        finished = [r for r in records.values() if r["state"] == "ok"]
        lost = ["no record"] * (len(planned) - len(records)) + [
            r["state"] for r in records.values() if r["state"] != "ok"
        ]
        if not finished:
            first = next(iter(records.values()))
            return Score(state=first["state"], reason=first.get("state_reason", "no reason recorded"), stale=stale)
        blocks = [r["quality"].get(column.split) for r in finished]
        if any(b is None or column.metric not in b["metrics"] for b in blocks):
            return Score(state="not run", reason=f"no {column.metric} on {column.split}", stale=stale)
        metrics = [b["metrics"][column.metric] for b in blocks if b is not None]
        same = same_for_every_seed(column.task, column.split)
        asked = [
            {name if same else (r["run_key"], name): x for name, x in zip(b["ids"], m["items"], strict=True)}
            for r, b, m in zip(finished, blocks, metrics, strict=True)
        ]
        low, high = mean_interval(over_repeats(asked))
        means = [m["mean"] for m in metrics]
        return Score(
            value=sum(means) / len(means),
            low=low,
            high=high,
            seed_sd=spread(means),
            n=blocks[0]["n"] if blocks[0] is not None else None,
            seeds=len(finished),
            lost=tuple(lost),
            evidence=weakest(r["quality"]["evidence"] for r in finished),
            stale=stale,
        )


def line_order(line: Line) -> tuple[int, float]:
    """Sort key: the order of ROWS, then the share."""
    row, share = line
    return list(ROWS).index(row), float(share.rstrip("%"))


def title(row: str) -> str:
    """A row's short name: "LoRA, FFN" from "LoRA, FFN (alpha 16)"; plain LoRA and Parallel Adapter by themselves."""
    plain = {"lora": "LoRA", "parallel_adapter": "Parallel Adapter", "lora_alpha_rank": "LoRA, alpha = 2r"}
    return plain.get(row) or ROWS[row].title.replace(" (alpha 16)", "")


def borrowed_rates(lines: Iterable[Line]) -> str:
    """Which of these lines take a learning rate that was swept on another row, in a sentence; "" if none does."""
    # "MEFT, N = 4" and "MEFT, N = 8" are told as "MEFT, N = 4, 8".
    by_source: dict[str, dict[str, list[str]]] = {}
    for row in sorted({row for row, _ in lines}, key=list(ROWS).index):
        if (source := rate_source(row)) is not None:
            name, _, number = ROWS[row].title.partition(" = ")
            by_source.setdefault(source, {}).setdefault(name, []).append(number)
    told = []
    for source, found in by_source.items():
        names = [name + (f" = {', '.join(numbers)}" if numbers[0] else "") for name, numbers in found.items()]
        told.append(f"{'; '.join(names)} (that of {ROWS[source].title})")
    return f"Rows without a sweep of their own take another row's learning rate: {'. '.join(told)}." if told else ""


def stale_note(results: "Results", records: Iterable[Record]) -> str:
    """What a reader must know before a table where code older than today's made any of its numbers; "" if none."""
    found = {r["run_key"]: r for r in records}.values()
    return stale_words([results.stale(r) for r in found], "runs behind this table")


def stale_words(stale: Sequence[bool], what: str) -> str:
    """The one sentence on numbers of older code; "" where there are none. stale: of each of what is counted."""
    old = sum(stale)
    if not old:
        return ""
    which = f"All {old}" if old == len(stale) else f"{old} of {len(stale)}"
    return (
        f"{STALE_HEAD} {which} {what} were made before a part of the code that computes them changed. Their numbers "
        "are what that version measured; today's may differ until they are run again."
    )


def headline(task: str, split: str = "test") -> Column:
    """The column of a task's headline metric."""
    return Column(task, split, HEADLINE_METRIC[task])
