"""`meft-bench gpu`: its options. torch is imported when work begins, since every command reads the options."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meft_bench import fields
from meft_bench.fields import Real, Text, flag

SECONDS = 480.0
OUTPUT = Path("results/profile")
TRIED = Path("results/runs/gpu-tiny")
"""Where --tiny writes: its rows are nobody's records."""


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "gpu", _gpu, "one session on a machine with a GPU: CUDA tests, measured rows at the 7B shape")
    add = p.add_argument
    add("--seconds", type=flag(Real(above=0)), default=SECONDS, help="the session ends then (default: 480)")
    add("--output", type=fields.path, help=f"folder of the files (default: {OUTPUT}); with --predict the file")
    add("--tiny", action="store_true", help="the same rows on a tiny model on the CPU, to try the command")
    add("--no-tests", action="store_true", help="leave out the CUDA tests")
    add("--commit", type=flag(Text()), help="the commit of these files, where there is no git to ask")
    add(
        "--host-memory",
        type=flag(Real(above=0, most=2**32)),
        metavar="GIB",
        help="the host's memory, for a machine that starts with little and grows (default: what the system has free)",
    )
    add("--predict", action="store_true", help="simulate the rows for known cards and stop; needs no GPU")
    add("--cards", type=flag(Text()), help="cards to predict, a list (default: h100,h200,rtx3090,rtx4090)")


def _gpu(args: argparse.Namespace) -> int:
    if args.commit is not None and not re.fullmatch(r"[0-9a-f]{7,40}", args.commit):
        raise ValueError(f"--commit {fields.shown(args.commit)} must be 7 to 40 hex digits, as git rev-parse HEAD says")
    return _predict(args) if args.predict else _session(args)


def _predict(args: argparse.Namespace) -> int:
    from meft_bench.gpu import predictions
    from meft_bench.simulate import cards

    names = tuple(args.cards.split(",")) if args.cards is not None else tuple(predictions.CARDS)
    for name in names:
        cards.card(name)
    path = args.output or predictions.FILE
    content = predictions.write_predictions(path, names)
    print(f"{sum(map(len, content['cards'].values()))} rows predicted for {', '.join(names)}: {path}")
    return 0


def _session(args: argparse.Namespace) -> int:
    from meft_bench.gpu import box as boxes

    box = boxes.find(args.tiny)
    try:
        from meft_bench.gpu import predictions, rows
        from meft_bench.gpu.work import Session
        from meft_bench.profile.limits import check_folder
    except ImportError as error:
        raise ValueError(boxes.too_old(error)) from None

    output = args.output or (TRIED if args.tiny else OUTPUT)
    check_folder(output)
    if args.tiny:
        import torch

        torch.set_num_threads(1)  # tensors so small that more threads would only wait for each other
    wanted = rows.tiny() if args.tiny else rows.at_7b()
    host = None if args.host_memory is None else round(args.host_memory * 2**30)
    session = Session(wanted, box, output, seconds=args.seconds, commit=args.commit, host_bytes=host)
    print(f"{box.gpu}: {len(wanted.rows)} rows on {wanted.model}, {args.seconds:.0f} s; files in {output}", flush=True)
    predicted, source = session.predict(predictions.FILE)
    print(f"predictions: {source}", flush=True)
    print("CUDA tests: left out" if args.no_tests else session.tests(), flush=True)
    for path in session.rows(predicted, source):
        print(f"measured: {path}")
    return 0
