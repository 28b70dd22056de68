"""The options of `meft-bench profile`; without torch, since every command reads them."""

import argparse
from pathlib import Path

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
    add("--constants", type=Path, metavar="FILE", help="use the constants that --calibrate measured")
    add("--calibrate", action="store_true", help="measure this machine's constants and stop")
    add("--no-search", action="store_true", help="leave out the search for the largest R")
    add("--output", type=Path, default=FOLDER, help=f"folder of results (default: {FOLDER})")
    add("--workers", type=int, help="simulations at a time (default: one per core, at most 8)")
