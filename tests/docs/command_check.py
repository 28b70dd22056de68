"""Commands of the documentation against what they name: the CLI's parser, the Makefile, the extras, our scripts."""

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable

from torch.distributed.run import parse_args

from meft_bench import cli
from tests.docs.pages import ROOT


def check_command(words: list[str]) -> None:
    """Raises ValueError, naming the command, for one whose target, options or extras do not exist."""
    checks = {"meft-bench": _meft_bench, "make": _make, "pip": _pip, "python": _python, "torchrun": _torchrun,
              "git": _git}  # fmt: skip
    if words[0] not in checks:
        raise ValueError(f"{' '.join(words)}: no check for {words[0]}; write it so that there is one")
    try:
        checks[words[0]](words[1:])
    except ValueError as error:
        raise ValueError(f"{' '.join(words)}: {error}") from None


def _meft_bench(arguments: list[str]) -> None:
    _parsed(cli._parser().parse_args, arguments)


def _torchrun(arguments: list[str]) -> None:
    started = _parsed(parse_args, arguments)
    if not started.module or started.training_script != "meft_bench":
        raise ValueError("only torchrun -m meft_bench is written down")
    _meft_bench(started.training_script_args)


def _parsed(parse: Callable[[list[str]], argparse.Namespace], arguments: list[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(arguments)
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _git(arguments: list[str]) -> None:
    """An archive of the tree, whose paths must be there."""
    if arguments[:2] != ["archive", "--output"] or arguments[3:5] != ["HEAD", "--"]:
        raise ValueError("write it as git archive --output FILE HEAD -- PATHS")
    for path in arguments[5:]:
        if not (ROOT / path.removeprefix(":(exclude)")).exists():
            raise ValueError(f"{path} is not there")


def _make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(" ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)).split())
    variables = set(re.findall(r"\$\((\w+)\)", makefile)) | set(re.findall(r"^(\w+) [?:]?=", makefile, re.M))
    for word in arguments:
        name, given, _ = word.partition("=")
        if name not in (variables if given else targets):
            raise ValueError(f"the Makefile has no {'variable' if given else 'target'} {name}")
    # What make would run is checked as if it stood in the page itself; with PY nothing is set up.
    printed = subprocess.run(
        ["make", "-n", "PY=python", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for line in printed.stdout.splitlines():
        if found := re.search(r"python -m meft_bench (.*)", line):
            _meft_bench([word.strip('"') for word in found[1].split()])


def _pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if arguments[:1] != ["install"]:
        raise ValueError("only pip install is written down")
    for word in arguments[1:]:
        found = re.fullmatch(r"(?:-e|--editable|\.|meft-bench|meft_bench)(?:\[([\w,]+)\])?", word)
        if not found:
            raise ValueError(f"{word} is not this package")
        if unknown := sorted(set((found[1] or "").split(",")) - {"", *extras}):
            raise ValueError(f"pyproject.toml has no extra {', '.join(unknown)}")


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "meft_bench"]:
        return _meft_bench(arguments[2:])
    if arguments[:1] == ["-m"]:
        if arguments[1] not in ("pytest", "ruff", "mypy"):
            raise ValueError(f"no check for python -m {arguments[1]}")
        return
    script = ROOT / arguments[0]
    if not script.is_file():
        raise ValueError(f"no script {arguments[0]}")
    text = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    if unknown := [word for word in arguments[1:] if word.startswith("-") and word not in text]:
        raise ValueError(f"{arguments[0]} has no option {', '.join(unknown)}")
