"""The commands run, list, show, publish and doctor. No torch at import: help must be light."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meft_bench import fields
from meft_bench.fields import Key, Text, Whole, flag

RESULTS = Path("results")
RECORDS, RUNS = RESULTS / "records", RESULTS / "runs"


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands to the program's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "run", _run, "one run from a YAML spec or from options")
    p.add_argument("spec", nargs="?", type=fields.path, help="YAML file with the fields of a spec")
    p.add_argument("--task", type=flag(Text()))
    p.add_argument("--method", type=flag(Text()))
    p.add_argument("--model", type=flag(Text()), help="embedded, a folder or a hub id")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="fields", help="a field of the spec"
    )
    add_running(p)

    p = command(commands, "list", _list, "tasks, methods and suites, and where the runs of a suite stand")
    p.add_argument("--suite", type=flag(Text()), help="list this suite's runs and their states")
    add_runs(p)

    p = command(commands, "show", _show, "one record")
    p.add_argument("key", type=flag(Key()), help="run key or its beginning")
    add_runs(p)

    p = command(commands, "publish", _publish, "keep this machine's records of the suites")
    add_runs(p)

    command(commands, "doctor", _doctor, "what this machine has, and whether the installation is whole")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The flag for where runs are."""
    parser.add_argument("--runs", type=fields.path, default=RUNS, help="folder of runs (default: results/runs)")


def add_running(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that train."""
    parser.add_argument("--data", type=flag(Text()), help='folder of real rows, or "hub" (default: $MEFT_DATA)')
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add_runs(parser)
    parser.add_argument(
        "--workers",
        type=flag(Whole(1, 1024)),
        help="runs at a time (default: one per core, at most 8; on GPUs one each, and more would share them)",
    )


def _run(args: argparse.Namespace) -> int:
    from meft_bench.harness.asked import asked_run

    spec, places = asked_run(args)
    failed = execute([spec], args, places)
    path = args.runs / spec.run_key / "record.json"
    if path.is_file():
        _print_record(path)
    return failed


def execute(specs: list[Any], args: argparse.Namespace, places: dict[str, Any], by_worth: bool = False) -> int:
    """Make the runs that are due; returns 1 if one failed, else 0. places: folders of the model and the data. by_worth:
    specs are in the order of their worth, and run in it."""
    from meft_bench.harness import runner

    planned = runner.plan(specs if by_worth else runner.in_turn(specs), args.runs)
    due = [p for p in planned if p.due]
    states = {s: sum(p.state == s for p in planned) for s in sorted({p.state for p in planned})}
    print(f"{len(planned)} runs: {', '.join(f'{n} {s}' for s, n in states.items())}", flush=True)
    if not due:
        return 0
    if getattr(args, "jobs", None) is not None:
        return _execute_as_jobs(planned, args, places)
    done = runner.execute(planned, args.runs, places, workers=args.workers)
    bad = {key: why for key, why in done.items() if why[0] in ("failed", "killed")}
    return 1 if bad else 0


def _execute_as_jobs(planned: list[Any], args: argparse.Namespace, places: dict[str, Any]) -> int:
    from meft_bench.harness import cluster, local_jobs

    if args.jobs.cluster == "local":
        return 0 if local_jobs.run(planned, args.runs, places, args.jobs, args.workers) else 1
    cluster.submit(planned, args.runs, places, args.jobs, args.workers)
    print(
        "meft-bench status shows where they stand; given again, this command submits what has failed and then reports"
    )
    return 0


def unfinished(specs: list[Any], args: argparse.Namespace) -> bool:
    """Whether jobs of a cluster are still to bring results, so that there is nothing new to report."""
    from meft_bench.harness import runner

    slurm = args.jobs is not None and args.jobs.cluster == "slurm"
    return slurm and any(p.due for p in runner.plan(specs, args.runs))


def _list(args: argparse.Namespace) -> int:
    from meft_bench.harness import runner, suites
    from meft_bench.harness.spec import TASKS
    from meft_bench.train.contract import method_names

    if args.suite:
        builders = {"default": suites.default, "smoke": suites.smoke, "full": suites.full}
        if args.suite not in suites.SUITES:
            raise ValueError(f"unknown suite {args.suite!r}; known: {', '.join(suites.SUITES)}")
        if args.suite not in builders:
            raise ValueError(f"list shows the suites {', '.join(builders)}; {args.suite!r} depends on its inputs")
        for p in runner.plan((c.spec for c in builders[args.suite]()), args.runs):
            print(f"{p.spec.run_key}  {p.state:<8} {runner.label(p.spec)}")
        return 0
    print(f"tasks:   {', '.join(TASKS)}\nmethods: {', '.join(method_names())}\nsuites:  {', '.join(suites.SUITES)}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from meft_bench.harness.record import find_record

    _print_record(find_record(args.key, (args.runs, RECORDS)))
    return 0


def _print_record(path: Path) -> None:
    import json

    from meft_bench.harness.record import read_record

    record = read_record(path)
    for split in (record["quality"] or {}).values():
        if isinstance(split, dict):
            split["ids"] = f"{len(split['ids'])} ids"
            for metric in split["metrics"].values():
                metric["items"] = f"{len(metric['items'])} scores"
    if record["timing"] and record["timing"].get("step_s"):
        record["timing"]["step_s"] = f"{len(record['timing']['step_s'])} step times"
    print(json.dumps(record, indent=1, sort_keys=True))


def _publish(args: argparse.Namespace) -> int:
    from meft_bench.harness.published import adopt, not_counting, publish, published_cells
    from meft_bench.harness.record import read_records

    require_checkout()
    if args.runs != RUNS and not args.runs.is_dir():  # without runs of its own a checkout may have benchmarks to keep
        raise ValueError(f"no folder of runs {args.runs}: make replicate makes one")
    finished = [r for r in read_records(args.runs) if r["state"] in ("ok", "oom", "diverged")]
    wanted = {c.spec.run_key for cells in published_cells(finished).values() for c in cells}
    kept, refused = publish([r for r in finished if r["run_key"] in wanted], RECORDS)
    print(f"{kept} records in {RECORDS}")
    if adopted := adopt(RESULTS):
        print(f"the commit of their code was found in this history: {', '.join(adopted)}")
    said = []
    if refused:
        few = "; ".join(refused[:3]) + ("; ..." if len(refused) > 3 else "")
        said.append(
            f"{len(refused)} records are left out, since nobody could make them again: {few}; commit, delete their "
            "folders, and run them again"
        )
    if old := not_counting(RESULTS):
        said.append(f"files that do not count: {'; '.join(old)}")
    if said:
        raise ValueError(". ".join(said))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from meft_bench.harness.doctor import report

    lines, whole = report()
    print("\n".join(lines))
    return 0 if whole else 1


def require_checkout() -> None:
    """Raises ValueError outside the repository's folder, where suites are published and reported."""
    if not (RESULTS / "paper" / "reported.yaml").is_file():
        raise ValueError("run this in the repository's folder: results/paper/reported.yaml is not here")
