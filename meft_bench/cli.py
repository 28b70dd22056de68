"""The door: `meft-bench COMMAND`. Every command prints one clear line on bad input and exits with 2."""

import argparse
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from meft_bench import fields, inputs, quiet
from meft_bench.fields import Key, Text, Whole, flag, one_line
from meft_bench.profile.cli import add_arguments as profile_arguments
from meft_bench.profile.cli import check as check_profile
from meft_bench.reading import RECORD_BYTES
from meft_bench.stopping import ctrl_c_stops
from meft_bench.text import printable

RESULTS = Path("results")


_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.I)


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code: 0 fine, 1 some run failed, 2 bad input."""
    try:
        _print_anything()
        given = sys.argv[1:] if arguments is None else arguments
        _check_arguments(given)
        args = _parser().parse_args(given)
        with ctrl_c_stops(), quiet.commands():
            return args.command(args) or 0
    except BrokenPipeError:  # `meft-bench list | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError) as error:
        return _say(error)
    except OSError as error:
        what = f": {Path(os.fsdecode(error.filename)).name}" if isinstance(error.filename, str | bytes) else ""
        return _say(f"{error.strerror or error}{what}; check free space and permissions")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        asked = one_line(error).partition(". ")[0] if str(error) else "the host's allocator"
        return _say(f"out of memory ({asked}): choose a smaller size, batch or model; see meft-bench doctor")
    except KeyboardInterrupt:
        print(
            "\nmeft-bench: stopped; finished runs are kept, started ones resume with the same command", file=sys.stderr
        )
        return 130


def _say(error: object) -> int:
    print(f"meft-bench: {printable(one_line(error))}", file=sys.stderr)
    return 2


def _print_anything() -> None:
    """What the terminal's encoding cannot show is printed escaped; an answer in another script is no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_arguments(given: list[str]) -> None:
    """Raises ValueError for bytes that are no text in this locale; they could not be written down anywhere."""
    for argument in given:
        if fields.Text(empty=True, longest=10**6).must(argument):
            raise ValueError(
                f"the argument {fields.shown(argument)} is no text in the encoding {sys.getfilesystemencoding()}: "
                "rename what it names, or set LC_ALL=C.UTF-8"
            )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument (?:.*/)?(\S+): ", r"\1 ", message)
        raise ValueError(f"{said}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="meft-bench", description="MEFT (arXiv 2406.04984): replicate it, measure it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = _command(commands, "replicate", _replicate, "train, evaluate and render a suite")
    p.add_argument(
        "--suite",
        type=flag(Text()),
        default="default",
        help="smoke, default, full, real, paper or sweep (default: default)",
    )
    p.add_argument("--model", type=flag(Text()), help="folder or hub id of the base model (suites real and paper)")
    _running(p)

    p = _command(commands, "run", _run, "one run from a YAML spec or from options")
    p.add_argument("spec", nargs="?", type=fields.path, help="YAML file with the fields of a spec")
    p.add_argument("--task", type=flag(Text()))
    p.add_argument("--method", type=flag(Text()))
    p.add_argument("--model", type=flag(Text()), help="embedded, a folder or a hub id")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="fields", help="a field of the spec"
    )
    _running(p)

    p = _command(commands, "profile", _profile, "what fits on a card, how fast and at what traffic: every method")
    profile_arguments(p)

    p = _command(commands, "list", _list, "tasks, methods and suites, and where the runs of a suite stand")
    p.add_argument("--suite", type=flag(Text()), help="list this suite's runs and their states")
    p.add_argument("--runs", type=fields.path, default=RESULTS / "runs")

    p = _command(commands, "show", _show, "one record")
    p.add_argument("key", type=flag(Key()), help="run key or its beginning")
    p.add_argument("--runs", type=fields.path, default=RESULTS / "runs")

    p = _command(commands, "report", _report, "render verdicts, tables, figures and the page again, from records alone")
    p.add_argument("--runs", type=fields.path, default=RESULTS / "runs")
    p.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README's blocks are out of date")

    p = _command(commands, "publish", _publish, "keep this machine's records of the suites")
    p.add_argument("--runs", type=fields.path, default=RESULTS / "runs")

    p = _command(commands, "base", _base, "pretrain the embedded base model again from its recipe")
    p.add_argument("--output", type=fields.path, help="folder (default: where the package keeps it)")

    about = "time kernels, one MEFT layer, its retrieval and a whole step against their rivals, and count bytes"
    p = _command(commands, "bench", _bench, about)
    p.add_argument("--pairs", type=flag(Whole(1, 10**6)), default=7)
    p.add_argument("--only", action="append", metavar="NAME", help="a part, repeatable: kernels, layer, retrieval, "
                   "residency, threads or step")  # fmt: skip
    p.add_argument("--output", type=fields.path, default=RESULTS / "bench")

    from meft_bench.finetune.cli import add_commands

    add_commands(commands, _command)

    _command(commands, "doctor", _doctor, "what this machine has, and whether the installation is whole")
    return parser


def _command(commands: Any, name: str, function: Any, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(command=function)
    return parser


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=flag(Text()), help='folder of real rows, or "hub" (default: $MEFT_DATA)')
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--runs", type=fields.path, default=RESULTS / "runs", help="folder of runs (default: results/runs)"
    )
    parser.add_argument(
        "--workers", type=flag(Whole(1, 1024)), help="runs at a time (default: one per core, at most 8)"
    )


# ---- replicate and run ----


def _replicate(args: argparse.Namespace) -> int:
    from meft_bench.harness import suites

    if args.suite not in suites.SUITES:
        raise ValueError(f"unknown suite {args.suite!r}; known: {', '.join(suites.SUITES)}")
    _in_checkout()
    if args.suite == "paper":
        return _replicate_paper(args)
    places: dict[str, Any] = {}
    cells = _cells(args, places)
    if args.suite == "sweep":
        from meft_bench.harness.sweep import EXTENSIONS, choose, edge_cells, untried

        failed = _execute([c.spec for c in untried(cells)], args, places)
        for _ in range(EXTENSIONS):
            if extra := edge_cells(cells, args.runs):
                cells += extra
                failed |= _execute([c.spec for c in extra], args, places)
        print(choose(cells, args.runs))
        return failed
    failed = _execute([c.spec for c in cells], args, places)
    smoke = args.suite == "smoke"
    out = RESULTS / "smoke" if smoke else RESULTS
    readme = None if smoke else Path("README.md")
    stamp = args.runs / f".rendered-{args.suite}"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != _rendered(args.runs, out):
        from meft_bench.harness.record import left_out
        from meft_bench.report.build import build_report

        suite_cells = {args.suite: cells} if smoke else _published_cells()
        if args.suite == "real":
            suite_cells["real"] = cells
        build_report(suite_cells, _records(args.runs, published=not smoke), out, readme, left_out())
        stamp.write_text(_rendered(args.runs, out), encoding="utf-8")
    print((out / "tables" / ("real.md" if args.suite == "real" else "table1.md")).read_text(encoding="utf-8"))
    print(f"{out}/report.html, the tables and figures beside it{' and README.md' if readme else ''} are current")
    return failed


def _rendered(runs: Path, out: Path) -> str:
    """Digest of everything a report is made from and of what was made: equal means there is nothing to render."""
    package = Path(__file__).parent
    files = [f for kind in ("py", "html", "css") for f in package.glob(f"report/**/*.{kind}")]
    files += [*package.glob("harness/suites.py"), *package.glob("harness/*.json")]
    files += [*runs.glob("*/record.json"), *RESULTS.glob("records/*.json"), *RESULTS.glob("paper/*.yaml")]
    files += [
        *RESULTS.glob("bench/*.json"),
        *RESULTS.glob("profile/*.json"),
        *out.glob("tables/*"),
        *out.glob("figures/*"),
        *out.glob("*.html"),
    ]
    files.append(Path("README.md"))
    digest = hashlib.sha256()
    for file in sorted(files):
        # What another process is writing, and what is no file or too large for a report, does not go into one.
        if file.name.startswith(".") or not file.is_file() or file.stat().st_size > RECORD_BYTES:
            continue
        digest.update(str(file).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _replicate_paper(args: argparse.Namespace) -> int:
    """Print what the paper's Table 1 needs; run the cells this machine can hold."""
    from meft_bench.harness.estimate import KNOWN_SHAPES, paper_plan
    from meft_bench.harness.spec import DATA_SETS

    places: dict[str, Any] = {}
    model = args.model or "llama-7b"
    spec_model = model if model in KNOWN_SHAPES else inputs.model(model, places)
    data = inputs.data(args.data, places, sum(DATA_SETS.values(), ()))
    able, text = paper_plan(model, spec_model, places.get("model_dir", model), data)
    print(text)
    return _execute([c.spec for c in able], args, places) if able else 0


def _cells(args: argparse.Namespace, places: dict[str, Any]) -> list[Any]:
    """The suite's cells, on the device and the inputs that the arguments name."""
    from dataclasses import replace

    from meft_bench.harness import suites
    from meft_bench.harness.spec import DATA_SETS

    if args.suite == "real":
        model = inputs.model(
            args.model, places, required="the real suite needs --model FOLDER (a small LLaMA such as stories260K)"
        )
        data = inputs.data(args.data, places, sum(DATA_SETS.values(), ()))
        if data == "synthetic":
            raise ValueError("the real suite needs real rows: give --data DIR or set MEFT_DATA")
        cells = suites.real(model, data)
    elif args.suite == "sweep":
        from meft_bench.train.methods import find_method

        names = {row.method for row in suites.ROWS.values()}
        cells = suites.sweep({name: find_method(name).LEARNING_RATES for name in names})
    else:
        cells = {"default": suites.default, "smoke": suites.smoke, "full": suites.full}[args.suite]()
    device = inputs.device(args.device)
    return [replace(c, spec=replace(c.spec, device=device)) for c in cells] if device != "cpu" else cells


def _run(args: argparse.Namespace) -> int:
    from meft_bench.harness.asked import asked_run

    spec, places = asked_run(args)
    failed = _execute([spec], args, places)
    path = args.runs / spec.run_key / "record.json"
    if path.is_file():
        _print_record(path)
    return failed


def _execute(specs: list[Any], args: argparse.Namespace, places: dict[str, Any]) -> int:
    from meft_bench.harness import runner

    planned = runner.plan(specs, args.runs)
    due = [p for p in planned if p.due]
    states = {s: sum(p.state == s for p in planned) for s in sorted({p.state for p in planned})}
    print(f"{len(planned)} runs: {', '.join(f'{n} {s}' for s, n in states.items())}", flush=True)
    if not due:
        return 0
    workers = args.workers if args.workers is not None else min(8, os.cpu_count() or 1)
    done = runner.execute(planned, args.runs, places, workers=workers)
    bad = {key: why for key, why in done.items() if why[0] in ("failed", "killed")}
    return 1 if bad else 0


def _records(runs: Path, published: bool = True) -> list[dict[str, Any]]:
    """Published records, with this machine's own in their place where it has them."""
    from meft_bench.harness.record import read_records

    records = {r["run_key"]: r for r in read_records(RESULTS / "records")} if published else {}
    records.update({r["run_key"]: r for r in read_records(runs)})
    return sorted(records.values(), key=lambda r: r["run_key"])


def _published_cells(records: list[dict[str, Any]] | None = None) -> dict[str, list[Any]]:
    """The suites whose records are kept in the repository: the full one (the default one is its first seed), and the
    real and the paper's one on whatever models and data the records (by default the published ones) were made with."""
    from meft_bench.harness import suites
    from meft_bench.harness.record import read_records

    records = read_records(RESULTS / "records") if records is None else records
    sources = sorted({(r["spec"]["model"], r["spec"]["data"]) for r in records if r["spec"]["data"] != "synthetic"})
    known = {r["run_key"] for r in records}
    made = {
        "full": suites.full(),
        "real": [c for model, data in sources for c in suites.real(model, data) if c.spec.run_key in known],
        "paper": _at_scale(sources, known, "llama-7b"),
        "paper_mistral": _at_scale(sources, known, "mistral-7b"),
    }
    return {name: cells for name, cells in made.items() if cells}


def _at_scale(sources: list[tuple[str, str]], known: set[str], shape: str) -> list[Any]:
    """The paper's suite on the model and data that most records were made with, whole, so that what is missing shows;
    empty without any record."""
    from meft_bench.harness import suites

    counted = []
    for model, data in sources:
        cells = suites.paper(model, data, "cuda", shape)
        # Rows without a size (the base, full fine-tuning) are the same at every shape.
        own = sum(c.spec.run_key in known for c in cells if c.row not in ("base", "full"))
        counted.append((own, cells))
    best = max(counted, key=lambda pair: pair[0], default=(0, []))
    return best[1] if best[0] else []


def _profile(args: argparse.Namespace) -> int:
    check_profile(args)
    from meft_bench.profile.cli import profile

    return profile(args)


# ---- looking ----


def _list(args: argparse.Namespace) -> int:
    from meft_bench.harness import runner, suites
    from meft_bench.harness.spec import TASKS, package_dir

    if args.suite:
        builders = {"default": suites.default, "smoke": suites.smoke, "full": suites.full}
        if args.suite not in builders:
            raise ValueError(f"list shows the suites {', '.join(builders)}; {args.suite!r} depends on its inputs")
        for p in runner.plan((c.spec for c in builders[args.suite]()), args.runs):
            print(f"{p.spec.run_key}  {p.state:<8} {runner.label(p.spec)}")
        return 0
    methods = sorted(["meft", *(f.stem for f in package_dir("baselines").glob("*.py") if f.stem != "__init__")])
    print(f"tasks:   {', '.join(TASKS)}\nmethods: {', '.join(methods)}\nsuites:  {', '.join(suites.SUITES)}")
    return 0


def _show(args: argparse.Namespace) -> int:
    for folder in (args.runs, RESULTS / "records"):
        found = sorted([*folder.glob(f"{args.key}*/record.json"), *folder.glob(f"{args.key}*.json")])
        if len(found) > 1:
            raise ValueError(f"{args.key} begins {len(found)} run keys: give more digits")
        if found:
            _print_record(found[0])
            return 0
    raise ValueError(f"no record begins with {args.key!r} in {args.runs} or {RESULTS / 'records'}: see meft-bench list")


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


def _report(args: argparse.Namespace) -> int:
    from meft_bench.harness.record import left_out
    from meft_bench.report.build import build_report, check_report

    _in_checkout()
    cells, records = _published_cells(), _records(args.runs)
    if args.check:
        drifted = check_report(cells, records, RESULTS, Path("README.md"), left_out())
        print(f"out of date: {', '.join(drifted)}: run make report" if drifted else "tables, figures and README agree")
        return 1 if drifted else 0
    for path in build_report(cells, records, RESULTS, Path("README.md"), left_out()):
        print(path)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from meft_bench.harness.record import read_records

    _in_checkout()
    target = RESULTS / "records"
    target.mkdir(parents=True, exist_ok=True)
    finished = [r for r in read_records(args.runs) if r["state"] in ("ok", "oom", "diverged")]
    wanted = {c.spec.run_key for cells in _published_cells(finished).values() for c in cells}
    due = [r for r in finished if r["run_key"] in wanted]
    kept = [r["run_key"] for r in due if r["provenance"].get("dirty") is False]
    for key in kept:
        shutil.copyfile(args.runs / key / "record.json", target / f"{key}.json")
    print(f"{len(kept)} records in {target}")
    if refused := len(due) - len(kept):
        raise ValueError(
            f"{refused} records are left out: they were made from changed files or outside a checkout, so nobody could "
            "make them again; commit, delete their folders, and run them again"
        )
    return 0


# ---- making ----


def _base(args: argparse.Namespace) -> int:
    from meft_bench.embedded.pretrain import BaseRecipe, build_base
    from meft_bench.train.models import embedded_dir

    record = build_base(BaseRecipe(), args.output or embedded_dir())
    print(f"{record['parameters']:,} parameters, weights sha256 {record['weights_sha256'][:12]}, {record['train_s']} s")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from meft_bench.bench.cli import all_benchmarks

    print(all_benchmarks(args.pairs, args.output, args.only or ()))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from meft_bench.harness.doctor import report

    lines, whole = report()
    print("\n".join(lines))
    return 0 if whole else 1


def _in_checkout() -> None:
    if not (RESULTS / "paper" / "reported.yaml").is_file():
        raise ValueError("run this in the repository's folder: results/paper/reported.yaml is not here")


if __name__ == "__main__":
    sys.exit(main())
