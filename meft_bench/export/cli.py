"""The command export. No torch at import: help must be light."""

import argparse
from collections.abc import Callable
from typing import Any

from meft_bench import fields
from meft_bench.fields import Key, Text, flag
from meft_bench.harness.cli import RECORDS, add_runs

FORMATS = ("peft",)
_EXPORT = """\
examples:
  meft-bench export 0025b40e276c --output results/export     a run as a result of peft's method_comparison
  meft-bench export --task --output KnowledgeInjection        the task of learning new facts in its layout"""


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "export", _export, "write runs, or a task, in the form of another comparison")
    p.formatter_class, p.epilog = argparse.RawDescriptionHelpFormatter, _EXPORT
    p.add_argument("keys", nargs="*", type=flag(Key()), metavar="RUN", help="run keys or their beginnings")
    p.add_argument("--format", choices=FORMATS, default="peft", help="peft: its method_comparison (default)")
    p.add_argument("--task", action="store_true", help="write the task of learning new facts, too")
    p.add_argument("--model", type=flag(Text()), help="the folder of a base that is one, for runs of LoRA on it")
    p.add_argument("--output", type=fields.path, required=True, metavar="DIR", help="folder (made if missing)")
    add_runs(p)


def _export(args: argparse.Namespace) -> int:
    if not args.keys and not args.task:
        raise ValueError("nothing to export: name runs (meft-bench list), or give --task")
    from meft_bench.export.peft_result import exported, file_name
    from meft_bench.harness.record import find_record, read_record
    from meft_bench.write import result_bytes, write_new

    records = [read_record(find_record(key, (args.runs, RECORDS))) for key in args.keys]
    results = [exported(record, args.model) for record in records]
    files = {args.output / "results" / file_name(result): result_bytes(result) for result in results}
    if args.task:
        from meft_bench.export.peft_task import task_files

        files |= {args.output / name: content for name, content in task_files().items()}
    write_new(files)
    for path in files:
        print(path)
    return 0
