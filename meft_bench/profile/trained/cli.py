"""`meft-bench selection`: its options. torch is imported when work begins, since every command reads the options."""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from meft_bench import fields, inputs
from meft_bench.fields import Text, Whole, flag
from meft_bench.harness.spec import DATA_SETS, REAL_TASKS
from meft_bench.profile.trained.log import FILE, title_of

_FOLDER = Path("results/profile")
_MODEL, _STEPS = "smollm2-135m", 40


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser; command(commands, name, function, about) makes one."""
    about = "train MEFT on a real model and log how many neurons its micro-batches need, for the profile"
    add = command(commands, "selection", _selection, about).add_argument
    add("--model", type=flag(Text()), default=_MODEL, help=f"a name, folder or hub id (default: {_MODEL})")
    add("--task", type=flag(Text()), help="what is learned (default: nq where there are real rows, else people)")
    add("--data", type=flag(Text()), help='folder of real rows, or "hub" (default: $MEFT_DATA)')
    add("--neurons", help="R, a list (default: 384,1536,3072,6144)")
    add("--steps", type=flag(Whole(1, 10**6)), default=_STEPS, help=f"training steps at each R (default: {_STEPS})")
    add("--output", type=fields.path, default=_FOLDER, help=f"folder of {FILE} (default: {_FOLDER})")


def _selection(args: argparse.Namespace) -> int:
    from meft_bench.harness.numerics import changed
    from meft_bench.harness.smollm2 import TASKS
    from meft_bench.profile.limits import check_folder
    from meft_bench.profile.trained import measure

    places: dict[str, Any] = {}
    task = _task(args, tuple(TASKS))
    data = inputs.data(args.data, places, DATA_SETS[task]) if task in REAL_TASKS else "synthetic"
    sizes = measure.SIZES if args.neurons is None else _sizes(args.neurons)
    check_folder(args.output)
    model = inputs.model(args.model, places)
    settings = measure.settings_of(model, task, data, args.steps)
    source = measure.Source(model=places.get("model_dir", model), data=places.get("data_dir"))
    path = args.output / FILE
    log = measure.log_trained(settings, source, sizes, path)
    print(f"U/R of {title_of(model)}, mean over the layers (measured):")
    for entry in log["entries"]:
        print(_line(entry))
    print(f"logged: {path}; make profile takes its U from there")
    if why := changed(log["provenance"]):
        print(f"{why}: it does not count until it is made from a commit")
    return 0


def _task(args: argparse.Namespace, known: tuple[str, ...]) -> str:
    """Raises ValueError for a task that the suite on real models does not have."""
    import os

    given = args.data is not None or bool(os.environ.get("MEFT_DATA"))
    task = args.task or ("nq" if given and args.data != "synthetic" else "people")
    if task not in known:
        raise ValueError(f"--task {fields.shown(task)} is none of {', '.join(known)}")
    if task not in REAL_TASKS and args.data not in (None, "synthetic"):
        raise ValueError(f"{task} makes its own rows: leave out --data")
    return str(task)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--neurons {fields.shown(text)} must be whole numbers with commas between") from None
    for neurons in found:
        Whole(1).check("--neurons", neurons)
    return found


def _line(entry: dict[str, Any]) -> str:
    """R, and U/R before and after training at every number of tokens."""
    told = {name: {p["tokens"]: fmean(p["share_by_layer"]) for p in entry[name]["unions"]} for name in _WHEN}
    points = (
        f"{tokens} tokens {told['before'][tokens]:.2f} -> {share:.2f}" if tokens in told["before"]
        else f"{tokens} tokens {share:.2f}" for tokens, share in told["after"].items()
    )  # fmt: skip
    return f"R = {entry['neurons']}, K = {entry['kept']}, {entry['steps']} steps: {', '.join(points)}"


_WHEN = ("before", "after")
