"""The program: `meft-bench COMMAND`. Every command prints one clear line on bad input and exits with 2.

The commands themselves are in the cli.py of the room that does the work.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from meft_bench import fields, quiet
from meft_bench.bench import cli as bench
from meft_bench.embedded import cli as embedded
from meft_bench.export import cli as export
from meft_bench.fields import one_line
from meft_bench.finetune import cli as finetune
from meft_bench.gpu import cli as gpu
from meft_bench.harness import cli as harness
from meft_bench.host_memory import asked_of, is_out_of_memory
from meft_bench.profile import cli as profile
from meft_bench.profile.trained import cli as selection
from meft_bench.report import cli as report
from meft_bench.stopping import ctrl_c_stops
from meft_bench.text import printable


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
        if not is_out_of_memory(error):
            raise
        return _say(f"out of memory ({asked_of(error)}): choose a smaller size, batch or model; see meft-bench doctor")
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
    for room in (finetune, report, harness, profile, selection, gpu, bench, export, embedded):
        room.add_commands(commands, _command)
    return parser


def _command(commands: Any, name: str, function: Any, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(command=function)
    return parser


if __name__ == "__main__":
    sys.exit(main())
