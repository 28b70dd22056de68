"""What a profile refuses by arithmetic, before anything is simulated or logged."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meft_bench import host_memory
from meft_bench.profile import shapes
from meft_bench.train.step_bytes import STATE_BYTES

LARGEST_TENSOR = 2**40
"""Bytes of one tensor that no card and no host of cards.py comes near."""
_GIB = 2**30
_WORKER_BYTES = 600_000_000
"""A simulating process with torch and transformers loaded."""
_MOST_CONSTANTS = 2**20


def check_sizes(config: Any, batch: int, seq: int, sizes: Iterable[int], ranks: Iterable[int] = ()) -> None:
    """Raises ValueError for a sequence beyond the model's positions, and for a micro-batch, an R or a rank whose
    tensors exceed LARGEST_TENSOR."""
    text, tokens = config.get_text_config(), batch * seq
    hidden, vocabulary = (_whole(text, name) for name in ("hidden_size", "vocab_size"))
    positions = shapes.longest(config)
    if positions is not None and seq > positions:
        raise ValueError(f"--seq {seq} is longer than the model's {positions} positions: give at most {positions}")
    _check("--model", "embedding in fp32", 4 * vocabulary * hidden)
    _check(f"--batch {batch} x --seq {seq}", "logits", 4 * tokens * vocabulary)
    for neurons in sizes:
        _check(f"--neurons {neurons}", "keys and values of a layer in fp32", 8 * neurons * hidden)
        _check(f"--neurons {neurons} at {tokens} tokens", "activations of a layer", 4 * neurons * tokens)
    for rank in ranks:
        _check(f"--rank {rank}", "matrices of a layer in fp32", 8 * rank * hidden)


def _whole(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"the config's {name} is {value!r}, not a whole number of at least 1")
    return value


def _check(option: str, what: str, size: int) -> None:
    if size > LARGEST_TENSOR:
        raise ValueError(f"{option}: the {what} alone would take {size / _GIB:,.0f} GiB: give less")


def check_selection(config: Any, tokens: int, sizes: Iterable[int]) -> None:
    """Raises ValueError where logging a selection of tokens needs more host memory than is free."""
    text = config.get_text_config()
    wide = max(text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    # Two layers' hidden states and scores in fp32, the embedding and two layers of weights, and one adapter's keys,
    # values, gradients and moments.
    need = 4 * tokens * (6 * wide + max(sizes)) + 4 * text.vocab_size * text.hidden_size + 16 * wide * text.hidden_size
    need += 2 * STATE_BYTES * max(sizes) * text.hidden_size
    free = host_memory.available_bytes()
    if need > free:
        raise ValueError(
            f"logging which neurons {tokens} tokens choose takes about {need / _GIB:,.0f} GiB of host memory, "
            f"{free / _GIB:,.1f} are free: give fewer --neurons, --batch or --seq"
        )


def check_workers(workers: int | None) -> None:
    """Raises ValueError for fewer than one process, and for more than free memory holds."""
    if workers is None:
        return
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    most = max(1, host_memory.available_bytes() // _WORKER_BYTES)
    if workers > most:
        raise ValueError(f"--workers {workers} do not fit into the free memory: give at most {most}")


def check_share(option: str, value: float | None, most: float = math.inf) -> None:
    """Raises ValueError unless a number that was given is finite, above 0 and at most most."""
    if value is None or (math.isfinite(value) and 0 < value <= most):
        return
    limit = "" if math.isinf(most) else f" and at most {most:g}"
    raise ValueError(f"{option} {value:g} must be above 0{limit}")


def check_folder(folder: Path) -> None:
    """Raises ValueError for an --output that no file can be written into. Makes nothing."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write into {folder}: name another folder with --output")


def read_small(path: Path) -> bytes:
    """The content of a regular file of at most 1 MiB. Raises OSError, and ValueError for anything else."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    if path.stat().st_size > _MOST_CONSTANTS:
        raise ValueError(f"{path.stat().st_size:,} bytes are more than such a file has")
    return path.read_bytes()
