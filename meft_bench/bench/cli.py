"""`meft-bench bench`: every part in turn. torch is imported when work begins, since every command reads the options."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meft_bench import fields
from meft_bench.fields import Whole, flag
from meft_bench.harness.numerics import changed
from meft_bench.harness.spec import PACKAGE
from meft_bench.provenance import git_commit
from meft_bench.train.methods import require_choice, require_positive

PARTS = ("changes", "kernels", "layer", "retrieval", "residency", "threads", "step", "ranks", "pretrained")


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser; command(commands, name, function, about) makes one."""
    about = (
        "time changes, kernels, one MEFT layer, its retrieval and a whole step against their rivals, and count bytes"
    )
    p = command(commands, "bench", _bench, about)
    p.add_argument("--pairs", type=flag(Whole(1, 10**6)), default=7, help="repeats of each timing (default: 7)")
    p.add_argument("--only", action="append", metavar="NAME", help=f"a part, repeatable: {', '.join(PARTS)}")
    p.add_argument("--output", type=fields.path, default=Path("results/bench"), help="folder (default: results/bench)")


def _bench(args: argparse.Namespace) -> int:
    print(all_benchmarks(args.pairs, args.output, args.only or ()))
    return 0


def all_benchmarks(pairs: int, output: Path, only: Sequence[str] = ()) -> str:
    """Run the parts (those in only, if given) with this many repeats each; write their files, return their Markdown,
    and a last line where they do not count, being made from changed files.

    Raises ValueError, before anything runs, for pairs below 1, an unknown part, or an output that is no folder.
    """
    require_positive(pairs=pairs)
    for name in only:
        require_choice("only", name, PARTS)
    from tqdm import tqdm

    from meft_bench.bench.common import open_folder

    open_folder(output)
    texts = []
    with tqdm([p for p in PARTS if not only or p in only], desc="benchmarks", unit="benchmark") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            texts.append(_part(name)(output, pairs))
    if why := changed(git_commit(PACKAGE)):
        texts.append(f"{why}: pages say so until make bench runs from a commit\n")
    return "\n".join(texts)


def _part(name: str) -> Callable[[Path, int], str]:
    # Here, as they take seconds to import, and they import this package's common.py.
    from meft_bench.bench import kernels, layer, pretrained, ranks, residency, retrieval, step, threads
    from meft_bench.bench.changes import frame

    benchmarks: dict[str, Callable[..., str]] = {
        "changes": frame.changes_benchmark,
        "kernels": kernels.kernels_benchmark,
        "layer": layer.layer_benchmark,
        "retrieval": retrieval.retrieval_benchmark,
        "residency": residency.residency_benchmark,
        "threads": threads.threads_benchmark,
        "step": step.step_benchmark,
        "ranks": ranks.ranks_benchmark,
        "pretrained": pretrained.pretrained_benchmark,
    }
    return benchmarks[name]
