"""The suite of neighbours: which there are, which are due, and one file of results for each. No torch in this process.

Every neighbour runs in a process of its own, since some put a simulated GPU where torch looks for one.
"""

import concurrent.futures
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from meft_bench.fields import one_line
from meft_bench.harness import runner
from meft_bench.harness.numerics import changed, neighbour_facts, neighbour_names, neighbour_numerics, numerics
from meft_bench.harness.published import RECORDS
from meft_bench.harness.record import read_record
from meft_bench.harness.spec import PACKAGE, RunSpec
from meft_bench.provenance import git_commit
from meft_bench.reading import read_json
from meft_bench.stopping import end_with
from meft_bench.train.methods import require_choice
from meft_bench.write import write_json

MOST_MINUTES = 60
"""Of the whole suite, on 2 cores."""


def run_suite(
    output: Path, runs: Path, only: Sequence[str] = (), quick: bool = False, workers: int | None = None
) -> int:
    """Run the neighbours (those in only, if given) that are due and write output/NAME.json; 1 if one failed, else 0.

    runs: folder of the harness's runs. quick: at the sizes of a test; such a result does not count. workers: training
    runs at a time (default: one per core, at most 8). Raises ValueError for an unknown name, before anything runs.
    """
    due, fresh = _due_and_fresh(output, only, quick)
    print(plan_text(due, fresh), flush=True)
    failed = {}
    with tqdm(due, desc="neighbours", unit="neighbour", disable=not due) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            try:
                _run_one(output, runs, name, quick, workers)
            except Exception as error:
                failed[name] = one_line(error) or type(error).__name__
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    if due and (why := changed(git_commit(PACKAGE))):
        print(f"{why}: pages say so until make replicate SUITE=neighbours runs from a commit")
    return 1 if failed else 0


def due_specs(output: Path, runs: Path, only: Sequence[str] = ()) -> list[RunSpec]:
    """The training runs that neighbours which are due ask for, and that no record counts for: what may be made as jobs
    before run_suite(). Raises ValueError for an unknown name."""
    modules = [importlib.import_module(module_name(name)) for name in _due_and_fresh(output, only, False)[0]]
    asked = [spec for module in modules if hasattr(module, "specs") for spec in module.specs(False)]
    return [spec for spec in asked if _known(spec, runs) is None]


def _due_and_fresh(output: Path, only: Sequence[str], quick: bool) -> tuple[list[str], list[str]]:
    for name in only:
        require_choice("only", name, tuple(neighbour_names()))
    names = [n for n in neighbour_names() if not only or n in only]
    fresh = [n for n in names if is_fresh(output, n, quick)]
    return [n for n in names if n not in fresh], fresh


def plan_text(due: Sequence[str], fresh: Sequence[str]) -> str:
    """What will be run and how long it takes about, before it starts."""
    minutes = {name: neighbour_facts(name)["MINUTES"] for name in due}
    lines = [
        f"{len(due)} neighbours to run, {len(fresh)} are there; about {sum(minutes.values()):.0f} minutes on 2 cores"
    ]
    lines += [f"  {name:<12} {neighbour_facts(name)['TITLE']}: about {m:g} minutes" for name, m in minutes.items()]
    return "\n".join([*lines, *(f"  {name:<12} is there" for name in fresh)])


def is_fresh(output: Path, name: str, quick: bool = False) -> bool:
    """Whether the neighbour's file was made with today's numbers, at these sizes, and from a commit (or from changed
    files, if these are changed as well)."""
    try:
        content = read_json(output / f"{name}.json")
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict) or content.get("numerics") != neighbour_numerics(name):
        return False
    here = not changed(content.get("provenance")) or bool(changed(git_commit(PACKAGE)))
    return here and content.get("quick") is quick


def _run_one(output: Path, runs: Path, name: str, quick: bool, workers: int | None) -> None:
    records = _records(name, runs, quick, workers)
    write_json(output / f"{name}.json", apart(measured, name, quick, records))


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """What the function returns, called in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, _begin, (os.getpid(),)) as pool:
        return pool.submit(function, *given).result()


def _records(name: str, runs: Path, quick: bool, workers: int | None) -> list[dict[str, Any]] | None:
    """Of the training runs that the neighbour asks for: this machine's or the published ones, made where neither
    counts; None where it asks for none. Raises ValueError for one that did not end."""
    module = importlib.import_module(module_name(name))
    if not hasattr(module, "specs"):
        return None
    specs = module.specs(quick)
    if due := [s for s in specs if _known(s, runs) is None]:
        runner.execute(runner.plan(due, runs), runs, {}, workers=workers)
    records = [_known(s, runs) for s in specs]
    if missing := [s for s, r in zip(specs, records, strict=True) if r is None]:
        raise ValueError(f"{len(missing)} of its runs did not end: see {runner.run_dir(runs, missing[0])}/log.txt")
    return [r for r in records if r is not None]


def _known(spec: RunSpec, runs: Path) -> dict[str, Any] | None:
    """The run's record, if it has ended and counts."""
    for path in (runner.run_dir(runs, spec) / "record.json", RECORDS / f"{spec.run_key}.json"):
        if path.is_file():
            record = read_record(path)
            ended = record["state"] in ("ok", "oom", "diverged")
            if ended and record["numerics"] == numerics(spec.task, spec.method, spec.model):
                return record
    return None


def measured(name: str, quick: bool, records: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the neighbour's file holds: run()'s dict, the numbers that made it, and where."""
    import torch

    from meft_bench.provenance import provenance

    module = importlib.import_module(module_name(name))
    found = module.run(quick) if records is None else module.run(quick, records)
    about = {"quick": quick, "numerics": neighbour_numerics(name), "provenance": provenance(torch.get_num_threads())}
    return {**found, **about}


def module_name(name: str) -> str:
    """Where the neighbour is imported from."""
    return f"{__package__}.{name}"


def _begin(owner: int) -> None:
    end_with(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
