"""The commands replicate and report: the runs of a suite, and the report of what was run. No torch at import."""

import argparse
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meft_bench import inputs
from meft_bench.fields import Text, flag, memory_bytes
from meft_bench.flags import add_flags
from meft_bench.harness.cli import RESULTS, add_running, add_runs, execute, require_checkout, unfinished
from meft_bench.harness.cluster import Jobs, asked_jobs
from meft_bench.reading import RECORD_BYTES


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands to the program's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "replicate", _replicate, "train, evaluate and render a suite")
    p.add_argument(
        "--suite",
        type=flag(Text()),
        default="default",
        help="smoke, default, full, real, smollm2, frontier, paper, sweep or neighbours (default: default)",
    )
    p.add_argument(
        "--model",
        type=flag(Text()),
        help="folder, hub id or name of the base model (real, smollm2, paper, sweep, frontier)",
    )
    p.add_argument("--only", action="append", metavar="NAME", help="a neighbour, repeatable (neighbours)")
    add_running(p)
    add_flags(p, Jobs)

    p = command(commands, "status", _status, "which runs are done, at work, waiting or failed, and where")
    p.add_argument("--suite", type=flag(Text()), help="of this suite (default: all that have a folder)")
    p.add_argument("--model", type=flag(Text()), help="the suite's model")
    p.add_argument("--data", type=flag(Text()), help="the suite's rows")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--all", action="store_true", help="list runs that have a result, too")
    add_runs(p)

    p = command(commands, "report", _report, "render verdicts, tables, figures and the page again, from records alone")
    add_runs(p)
    p.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README's blocks are out of date")
    p.add_argument("--svg", action="store_true", help="write every figure as SVG, too, which git does not keep")


_TAKES = {"real": ("model", "data"), "smollm2": ("model", "data"), "paper": ("model", "data"), "frontier": ("model",),
          "sweep": ("model",)}  # fmt: skip
"""Inputs of the suites that have any."""


def _check_suite(args: argparse.Namespace) -> None:
    """Raises ValueError for a suite that is none, and for a model or rows that it would not use."""
    from meft_bench.harness import suites

    if args.suite not in suites.SUITES:
        raise ValueError(f"unknown suite {args.suite!r}; known: {', '.join(suites.SUITES)}")
    for name in ("model", "data"):
        if getattr(args, name) is not None and name not in _TAKES.get(args.suite, ()):
            taking = ", ".join(suite for suite, names in _TAKES.items() if name in names)
            raise ValueError(f"the suite {args.suite} takes no --{name} (these do: {taking}): leave it out")


def _replicate(args: argparse.Namespace) -> int:
    _check_suite(args)
    if args.only and args.suite != "neighbours":
        raise ValueError("--only names neighbours: give --suite neighbours")
    require_checkout()
    args.jobs = asked_jobs(args)
    if args.suite == "paper":
        return _paper(args)
    if args.suite == "neighbours":
        return _neighbours(args)
    places: dict[str, Any] = {}
    cells = _cells(args, places)
    if args.suite == "sweep":
        return _sweep(cells, args, places)
    if args.suite in ("smollm2", "frontier") and args.jobs is None:
        _say_plan(cells, args)
    failed = execute([c.spec for c in cells], args, places, by_worth=args.suite in ("smollm2", "frontier"))
    if not unfinished([c.spec for c in cells], args):
        _render(cells, args)
    return failed


def _neighbours(args: argparse.Namespace) -> int:
    """The neighbours that are due, and their table; the page takes it up with `report`. With jobs, their training runs
    are made as such, and the neighbours themselves here, once those are over."""
    from meft_bench.neighbours.suite import due_specs, run_suite
    from meft_bench.report.tables.neighbours import neighbours_table
    from meft_bench.write import write_if_changed

    folder = RESULTS / "neighbours"
    specs = due_specs(folder, args.runs, args.only or ()) if args.jobs is not None else []
    failed = execute(specs, args, {}) if specs else 0
    if failed or unfinished(specs, args):
        print("the neighbours themselves are run on this machine, when the same command finds these runs done")
        return failed
    failed = run_suite(folder, args.runs, args.only or (), workers=args.workers)
    made = neighbours_table(folder)
    for name, text in made.files().items():
        write_if_changed(RESULTS / "tables" / name, text.encode())
    print(f"\n{made.markdown}\nresults/tables/neighbours.md is current; make report brings the page up to date")
    return failed


def _status(args: argparse.Namespace) -> int:
    from meft_bench.harness import status

    if args.suite:
        _check_suite(args)
        if args.suite == "neighbours":
            raise ValueError("the neighbours are no runs of the grid: make replicate SUITE=neighbours says what is due")
        paper = args.suite == "paper"
        cells = _paper_plan(args, {}, (math.inf, math.inf))[0] if paper else _cells(args, {})
        specs, unknown = [c.spec for c in cells], list[str]()
    else:
        specs, unknown = status.specs_in(args.runs)
    found, missing = status.rows(specs, args.runs)
    print("\n".join(status.text(found, args.all)))
    if unknown:
        print(f"{len(unknown)} folders hold no spec that can be read: {', '.join(unknown[:3])}")
    if missing:
        print(missing)
    return 0


def _say_plan(cells: list[Any], args: argparse.Namespace) -> None:
    """How long the suite takes here, before it starts."""
    from meft_bench.harness import frontier, runner, smollm2

    planned = runner.plan((c.spec for c in cells), args.runs)
    due = [p.spec for p in planned if p.due]
    workers = len(runner.slots(due, args.workers))
    of_suite = smollm2 if args.suite == "smollm2" or args.model else frontier
    print(of_suite.plan_text(due, len(planned) - len(due), workers), flush=True)
    if args.suite == "smollm2" and (lacking := smollm2.unswept(cells)):
        print(lacking, flush=True)


def _sweep(cells: list[Any], args: argparse.Namespace, places: dict[str, Any]) -> int:
    """Learning rates of every method, and beyond the grid where the best one lies at its edge."""
    from meft_bench.harness.rates import rates_file
    from meft_bench.harness.sweep import EXTENSIONS, choose, edge_cells, untried
    from meft_bench.named import named_in

    book = rates_file(named_in(cells[0].spec.model) or "embedded")
    failed = execute([c.spec for c in untried(cells, book)], args, places)
    if unfinished([c.spec for c in untried(cells, book)], args):
        return failed  # which rates lie at an edge is known when all have a score
    for _ in range(EXTENSIONS):
        if extra := edge_cells(cells, args.runs, book):
            cells += extra
            failed |= execute([c.spec for c in extra], args, places)
            if unfinished([c.spec for c in extra], args):
                return failed
    print(choose(cells, args.runs, book))
    return failed


def _render(cells: list[Any], args: argparse.Namespace) -> None:
    """Bring the report up to date, unless it is, and print the suite's table."""
    smoke = args.suite == "smoke"
    out, readme = (RESULTS / "smoke", None) if smoke else (RESULTS, Path("README.md"))
    stamp = args.runs / f".rendered-{args.suite}"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != _rendered(args.runs, out):
        from meft_bench.harness.published import known_records, published_cells
        from meft_bench.harness.record import left_out
        from meft_bench.report.build import build_report

        suite_cells = {args.suite: cells} if smoke else published_cells()
        if args.suite in ("real", "smollm2"):
            suite_cells[args.suite] = cells
        if args.suite == "frontier" and args.model:
            suite_cells["frontier_smollm2"] = cells
        build_report(suite_cells, known_records(args.runs, published=not smoke), out, readme, left_out())
        stamp.write_text(_rendered(args.runs, out), encoding="utf-8")
    name = args.suite if args.suite in ("real", "smollm2", "frontier") else "table1"
    print((out / "tables" / f"{name}.md").read_text(encoding="utf-8"))
    print(f"{out}/report.html, the tables and figures beside it{' and README.md' if readme else ''} are current")


def _cells(args: argparse.Namespace, places: dict[str, Any]) -> list[Any]:
    """The suite's cells, on the device and the inputs that the arguments name."""
    from dataclasses import replace

    from meft_bench.harness import frontier, smollm2, suites
    from meft_bench.harness.rows import ROWS
    from meft_bench.harness.spec import DATA_SETS
    from meft_bench.named import named_in
    from meft_bench.train.contract import describe

    if args.suite == "real":
        model = inputs.model(
            args.model, places, required="the real suite needs --model FOLDER (a small LLaMA such as stories260K)"
        )
        data = inputs.data(args.data, places, sum(DATA_SETS.values(), ()))
        if data == "synthetic":
            raise ValueError("the real suite needs real rows: give --data DIR or set MEFT_DATA")
        cells = suites.real(model, data)
    elif args.suite == "smollm2":
        model = inputs.model(args.model or smollm2.NAME, places)
        if named_in(model) != smollm2.NAME:
            raise ValueError(f"the sizes of this suite are those of {smollm2.NAME}: leave out --model")
        cells = smollm2.cells(model, inputs.data(args.data, places, sum(DATA_SETS.values(), ())))
    elif args.suite in ("frontier", "sweep"):
        named_model = inputs.model(args.model, places) if args.model else None
        if named_model is not None and named_in(named_model) != smollm2.NAME:
            named = f"on {smollm2.NAME} (--model {smollm2.NAME})"
            raise ValueError(f"the {args.suite} is {named} or on the embedded model (leave out --model)")
        if args.suite == "frontier":
            cells = frontier.real_cells(named_model) if named_model else frontier.cells()
        else:
            grids = {name: describe(name).learning_rates for name in {row.method for row in ROWS.values()}}
            cells = smollm2.sweep(named_model, grids) if named_model else suites.sweep(grids)
    else:
        cells = {"default": suites.default, "smoke": suites.smoke, "full": suites.full}[args.suite]()
    device = inputs.device(args.device)
    return [replace(c, spec=replace(c.spec, device=device)) for c in cells] if device != "cpu" else cells


def _rendered(runs: Path, out: Path) -> str:
    """Digest of everything a report is made from and of what was made: equal means there is nothing to render."""
    package = Path(__file__).parents[1]
    made_from = (
        "report/**/*.py",
        "report/**/*.html",
        "report/**/*.css",
        "harness/*.py",
        "harness/*.json",
        "neighbours/*.py",
    )
    published = ("records/*.json", "paper/*.yaml", "bench/*.json", "profile/*.json", "neighbours/*.json")
    files = [file for pattern in made_from for file in package.glob(pattern)]
    files += [file for pattern in published for file in RESULTS.glob(pattern)]
    files += [file for pattern in ("tables/*", "figures/*", "*.html") for file in out.glob(pattern)]
    files += [*runs.glob("*/record.json"), Path("README.md")]
    digest = hashlib.sha256()
    for file in sorted(files):
        # What another process is writing, and what is no file or too large for a report, does not go into one.
        if file.name.startswith(".") or not file.is_file() or file.stat().st_size > RECORD_BYTES:
            continue
        digest.update(str(file).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _paper(args: argparse.Namespace) -> int:
    """Print what the paper's Table 1 needs; run the cells this machine, or the cluster, can hold."""
    places: dict[str, Any] = {}
    able, text = _paper_plan(args, places, _cluster_memory(args.jobs))
    print(text)
    return execute([c.spec for c in able], args, places) if able else 0


def _paper_plan(
    args: argparse.Namespace, places: dict[str, Any], limits: tuple[float, float] | None
) -> tuple[list[Any], str]:
    from meft_bench.harness.estimate import KNOWN_SHAPES, paper_plan
    from meft_bench.harness.spec import DATA_SETS

    model = args.model or "llama-7b"
    spec_model = model if model in KNOWN_SHAPES else inputs.model(model, places)
    data = inputs.data(args.data, places, sum(DATA_SETS.values(), ()))
    return paper_plan(model, spec_model, places.get("model_dir", model), data, limits)


def _cluster_memory(jobs: Any) -> tuple[float, float] | None:
    """(bytes of a GPU, of a host) of a cluster's nodes: no limit where it is not said; None: this machine's."""
    if jobs is None or jobs.cluster != "slurm":
        return None
    return memory_bytes(jobs.gpu_memory) or math.inf, math.inf


def _report(args: argparse.Namespace) -> int:
    from meft_bench.harness.published import known_records, published_cells
    from meft_bench.harness.record import left_out
    from meft_bench.report.build import build_report, check_report

    require_checkout()
    cells, records = published_cells(), known_records(args.runs)
    if args.check:
        drifted = check_report(cells, records, RESULTS, Path("README.md"), left_out())
        print(f"out of date: {', '.join(drifted)}: run make report" if drifted else "tables and README agree")
        return 1 if drifted else 0
    formats = ("png", "svg") if args.svg else ("png",)
    for path in build_report(cells, records, RESULTS, Path("README.md"), left_out(), formats):
        print(path)
    return 0
