"""What stands in a place of a table: a score with its interval, or the reason why there is none."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from meft_bench.harness.spec import code_digest
from meft_bench.harness.suites import ROWS, Cell
from meft_bench.report.stats import mean_interval

Record = dict[str, Any]
Line = tuple[str, str]
"""(row, share): a line of a table."""

HEADLINE_METRIC = {
    "facts": "contains",
    "cloze": "contains",
    "tools": "iou",
    "arithmetic": "accuracy",
    "nq": "contains",
    "squad": "contains",
    "toolbench": "iou",
    "gsm8k": "accuracy",
}
TASK_TITLES = {"nq": "NQ", "squad": "SQuAD", "toolbench": "ToolBench", "gsm8k": "GSM8K"}
_METRIC_WORDS = {"exact_match": "exact match", "iou": "IoU"}
_SPLIT_WORDS = {"recall": "recall of trained"}
STALE_MARK = "†"


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
    low: float | None = None
    high: float | None = None
    n: int | None = None
    evidence: str = "not-run"
    stale: bool = False

    def text(self, show_n: bool = False, show_evidence: bool = False) -> str:
        """A cell of a Markdown table; never empty."""
        mark = f" {STALE_MARK}" if self.stale else ""
        if self.value is None:
            # Why a run was not made is short; why it failed is told below the table.
            return (f"not run ({self.reason})" if self.state == "not run" else self.state) + mark
        extras = [f"n = {self.n}"] * show_n + [self.evidence] * show_evidence
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{mark}" + (
            f" ({', '.join(extras)})" if extras else ""
        )


class Results:
    """The cells of one suite and the records that fill them. Raises ValueError when two runs claim one place."""

    def __init__(
        self, cells: Iterable[Cell], records: Mapping[str, Record], digest: Callable[..., str] = code_digest
    ) -> None:
        """records by run key; digest(task, method, model) is the content hash of the code of today."""
        self.places: dict[tuple[str, str, str], Cell] = {}
        for cell in cells:
            place = (cell.row, cell.share, cell.spec.task)
            if place in self.places and self.places[place].spec != cell.spec:
                raise ValueError(f"two different runs claim {' '.join(place)}: average the seeds before tabling them")
            self.places[place] = cell
        # Found once: a run key is a hash, and every table asks for every record again.
        keys = {place: cell.spec.run_key for place, cell in self.places.items()}
        self._records = {place: records[key] for place, key in keys.items() if key in records}
        self._digest = cache(digest)
        self.score = cache(self._score)

    def lines(self, *artefacts: str) -> list[Line]:
        """(row, share) of the cells of these artefacts, in the order of suites.ROWS, small before large."""
        found = {(c.row, c.share) for c in self.places.values() if set(artefacts) & set(c.artefacts)}
        return sorted(found, key=line_order)

    def tasks(self) -> list[str]:
        """Tasks of the suite, in the order of HEADLINE_METRIC."""
        found = {task for _, _, task in self.places}
        return [t for t in HEADLINE_METRIC if t in found]

    def cells_of(self, line: Line) -> list[Cell]:
        """The cells of a line, one per task."""
        return [self.places[(*line, t)] for t in self.tasks() if (*line, t) in self.places]

    def record(self, line: Line, task: str) -> Record | None:
        """The record of a place, whatever its state; None when there is none."""
        return self._records.get((*line, task))

    def records(self) -> list[Record]:
        """Records that fill a place, in the order of the cells."""
        return list(self._records.values())

    def parameters(self, line: Line) -> dict[str, Any] | None:
        """The parameter counts of a line, from any of its records: they do not depend on the task."""
        found = (self.record(line, c.spec.task) for c in self.cells_of(line))
        return next((r["parameters"] for r in found if r is not None and r["parameters"] is not None), None)

    def stale(self, record: Record) -> bool:
        """True when other code than this made the record."""
        spec = record["spec"]
        return record["code_digest"] != self._digest(spec["task"], spec["method"], spec["model"])

    def _score(self, line: Line, column: Column) -> Score:
        """What stands at a line and column."""
        if (*line, column.task) not in self.places:
            return Score(state="not run", reason="not in suite")
        record = self.record(line, column.task)
        if record is None:
            return Score(state="not run", reason="no record")
        stale = self.stale(record)
        if record["state"] != "ok":
            return Score(state=record["state"], reason=record.get("state_reason", "no reason recorded"), stale=stale)
        block = record["quality"].get(column.split)
        if block is None or column.metric not in block["metrics"]:
            return Score(state="not run", reason=f"no {column.metric} on {column.split}", stale=stale)
        metric = block["metrics"][column.metric]
        low, high = mean_interval(metric["items"])
        return Score(
            value=metric["mean"], low=low, high=high, n=block["n"], evidence=record["quality"]["evidence"], stale=stale
        )


def line_order(line: Line) -> tuple[int, float]:
    """Sort key: the order of suites.ROWS, then the share."""
    row, share = line
    return list(ROWS).index(row), float(share.rstrip("%"))


def headline(task: str, split: str = "test") -> Column:
    """The column of a task's headline metric."""
    return Column(task, split, HEADLINE_METRIC[task])
