"""Whether a run has room at all: a lower bound of its bytes by arithmetic, before torch is imported.

The plan and the worker know more and refuse more. What is refused here can be held by no cleverness.
"""

import math
from pathlib import Path
from typing import Any

from meft_bench import host_memory
from meft_bench.harness.spec import PACKAGE
from meft_bench.reading import read_json
from meft_bench.train.contract import describe
from meft_bench.train.step_bytes import LEAST_STATE_BYTES, activation_bytes

_TOKENS = 2  # the shortest row there is
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")
_CONFIG_BYTES = 2**20


def refuse_without_room(
    method: str,
    options: dict[str, Any],
    rows: int,
    device: str,
    model: str | Path = "embedded",
    limit: int | None = None,
) -> None:
    """Raises ValueError when the memory there is, or limit bytes of it, cannot hold the method's size on the model, or
    the activations of rows sequences at once.

    options: as given; without a size nothing is known of it. device "cuda": only what lies in host memory counts.
    """
    hidden, layers = _shape(model)
    about = describe(method)
    name = about.size
    free, there = host_memory.available_bytes(), "free here"
    if limit is not None and limit < free:
        free, there = limit, "given"
    size = options.get(name) if name is not None else None
    if isinstance(size, int) and (about.on_host(options) if about.place == "host" else device == "cpu"):
        each = 2 * hidden * layers * LEAST_STATE_BYTES
        instead = f"a smaller {name}, {free // each:,} at most" if free >= each else "a smaller model"
        _refuse(size * each, free, there, f"{method} with {name}={size:,}", instead)
    if device == "cpu" and not about.untrained:
        need = activation_bytes(rows * _TOKENS, hidden, layers)
        _refuse(need, free, there, f"a micro-batch of {rows:,} rows", "a smaller batch_size or a larger accumulation")


def _refuse(need: int, free: int, there: str, what: str, instead: str) -> None:
    if need > free:
        raise ValueError(
            f"{what} needs at least {need / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are {there}: take {instead}"
        )


def _shape(model: str | Path) -> tuple[int, int]:
    """(hidden size, layers) as a folder's config says; (1, 1) for what is not known."""
    folder = PACKAGE / "embedded" if model == "embedded" else Path(model)
    if not (folder / "config.json").is_file():
        return 1, 1
    try:
        config = read_json(folder / "config.json", _CONFIG_BYTES, "config")
    except ValueError:  # said by who reads it in earnest
        return 1, 1
    inner = config.get("text_config") if isinstance(config, dict) else None
    found = inner if isinstance(inner, dict) else config if isinstance(config, dict) else {}
    return _first(found, _WIDTHS), _first(found, _DEPTHS)


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    values = [config[n] for n in names if isinstance(config.get(n), int | float) and not isinstance(config[n], bool)]
    return max(1, int(values[0])) if values and math.isfinite(values[0]) else 1
