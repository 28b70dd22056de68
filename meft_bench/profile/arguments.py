"""The options of `meft-bench profile`; without torch, since every command reads them."""

import argparse
from pathlib import Path

from meft_bench import fields
from meft_bench.fields import Kind, Maybe, Real, Text, Whole

FOLDER = Path("results/profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `meft-bench profile`."""
    add = parser.add_argument
    add("--gpu", default="24GB", help="a memory size (12GB, 16GB, 24GB, 48GB, 80GB) or a card (rtx3090, a100, ...)")
    add("--model", default="llama-7b", help="llama-7b, mistral-7b, a folder or a hub id; only its config is read")
    add("--batch", type=int, default=2, help="sequences per micro-batch (default: 2)")
    add("--seq", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--accumulation", default="1,4,16,32", help="micro-batches per optimizer step, a list (default: 1,4,16,32)")
    add("--neurons", help="R to profile, a list (default: 256 to 32768)")
    add("--variants", help="which methods, a list such as meft,parallel_adapter (default: all)")
    add("--rank", help="LoRA's ranks, a list (default: the rank that trains as much as R neurons)")
    add("--host", default="desktop", help="desktop or server: the machine around a simulated card")
    add("--host-memory", type=float, metavar="GIB", help="its memory in GiB (default: 64 desktop, 256 server)")
    add(
        "--union",
        type=float,
        metavar="SHARE",
        help="assume this U/R for MEFT (default: what the paper's 0.56 M implies)",
    )
    add("--constants", type=fields.path, metavar="FILE", help="use the constants that --calibrate measured")
    add("--calibrate", action="store_true", help="measure this machine's constants and stop")
    add("--no-search", action="store_true", help="leave out the search for the largest R")
    add("--output", type=fields.path, default=FOLDER, help=f"folder of results (default: {FOLDER})")
    add("--workers", type=int, help="simulations at a time (default: one per core, at most 8)")


_MOST_TOKENS = 2**24
_NUMBERS: dict[str, Kind] = {
    "model": Text(),
    "batch": Whole(1, _MOST_TOKENS),
    "seq": Whole(2, _MOST_TOKENS),
    "host_memory": Maybe(Real(above=0, most=2**32)),
    "union": Maybe(Real(above=0, most=1)),
    "workers": Maybe(Whole(1, 1024)),
}
_LISTS: dict[str, Kind] = {"accumulation": Whole(1), "neurons": Whole(1)}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what makes no profile on any machine, before torch is imported."""
    from meft_bench.simulate import cards

    for name, kind in _NUMBERS.items():
        value = getattr(args, name)
        if wrong := kind.must(value):
            said = f"{value:g}" if isinstance(value, float) else fields.shown(value)
            raise ValueError(f"--{name.replace('_', '-')} {said} {wrong}")
    for name, kind in _LISTS.items():
        given = getattr(args, name)
        for part in given.split(",") if given is not None else ():
            kind.check(f"--{name}", _whole(name, part))
    cards.card(args.gpu)
    cards.host(args.host)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        said = fields.shown(text)
        raise ValueError(f"--{name} {said} must be whole numbers with commas between, such as 1,4,16") from None
