"""What runs where: the state of every run of a folder, by its files, its lock and the cluster's queue. No torch."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meft_bench.fields import one_line
from meft_bench.harness import slurm
from meft_bench.harness.cluster import job_id
from meft_bench.harness.record import read_record
from meft_bench.harness.runner import (
    SPEC,
    Planned,
    has_failed,
    holder_of,
    label,
    last_log,
    plan,
    read_spec,
    run_dir,
    steps_kept,
)
from meft_bench.harness.spec import RunSpec
from meft_bench.text import cut, printable

_LONGEST_NOTE = 120
_ORDER = ("running", "starting", "queued", "partial", "failed", "killed", "stale", "missing", "diverged", "oom", "ok")


@dataclass(frozen=True)
class Row:
    """A run: its key, its state (a plan's, "queued" or "starting"), its label, and where it runs or why it does not."""

    key: str
    state: str
    label: str
    note: str


def specs_in(runs: Path) -> tuple[list[RunSpec], list[str]]:
    """(the specs of all runs in a folder, the names of what holds no readable one)."""
    found, unknown = [], []
    for folder in sorted({path.parent for name in (SPEC, "record.json", "lock") for path in runs.glob(f"*/{name}")}):
        try:
            found.append(_spec_of(folder))
        except ValueError:
            unknown.append(folder.name)
    return found, unknown


def _spec_of(folder: Path) -> RunSpec:
    """Raises ValueError where it is not kept, as in folders of an earlier version that hold no record yet."""
    if (folder / SPEC).is_file():
        return read_spec(folder)
    return RunSpec.from_dict(read_record(folder / "record.json")["spec"])


def rows(specs: Iterable[RunSpec], runs: Path) -> tuple[list[Row], str]:
    """(a row for each distinct spec, what could not be asked; "" if all could)."""
    planned = plan(specs, runs)
    named = {p.spec.run_key: job for p in planned if p.due and (job := job_id(run_dir(runs, p.spec))) is not None}
    queue: dict[str, slurm.Queued] = {}
    missing = ""
    if named:
        try:
            queue = slurm.queue()
        except ValueError as error:
            missing = f"jobs are not shown: {one_line(error)}"
    over = slurm.ended(job for job in named.values() if job not in queue) if not missing else {}
    return [_row(p, runs, named.get(p.spec.run_key), queue, over) for p in planned], missing


def _row(planned: Planned, runs: Path, job: str | None, queue: dict[str, slurm.Queued], over: dict[str, str]) -> Row:
    spec, folder = planned.spec, run_dir(runs, planned.spec)
    queued = queue.get(job) if job else None
    state = planned.state
    if queued and planned.due and state != "running":
        state = "starting" if queued.state == "RUNNING" else "queued"
    notes = []
    if state == "running":
        notes.append(holder_of(folder))
    if queued:
        notes.append(f"slurm {job} {queued.state} {queued.where} {queued.elapsed}")
    elif job and job in over and planned.due:
        notes.append(f"slurm {job} {over[job]}")
    if planned.due and (steps := steps_kept(folder)):
        notes.append(f"step {steps} of {spec.steps} kept")
    if state in ("failed", "killed") or (state == "partial" and has_failed(folder)):
        notes.append(_last_words(folder))
    return Row(spec.run_key, state, label(spec), ", ".join(note for note in notes if note))


def _last_words(folder: Path) -> str:
    """The last line that the run's last start wrote into its log, cut."""
    lines = last_log(folder).strip().splitlines()
    return cut(printable(lines[-1]), _LONGEST_NOTE) if lines else ""


def text(found: list[Row], everything: bool = False) -> Iterator[str]:
    """Lines for a reader: how many are in each state, then the runs; those with a result if everything is asked for."""
    counts = Counter(row.state for row in found)
    if not found:
        yield "no runs here yet: make replicate starts some; --runs names another folder"
        return
    yield f"{len(found)} runs: " + ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    for row in sorted(found, key=lambda row: _ORDER.index(row.state)):
        if everything or row.state not in ("ok", "oom", "diverged"):
            yield f"{row.key}  {row.state:<8} {row.label}{f'  [{row.note}]' if row.note else ''}"
