"""The paper's own numbers (results/paper/reported.yaml), checked on reading. Their evidence is always "reported"."""

from pathlib import Path
from typing import Any

import yaml

from meft_bench.harness.rows import ROWS
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import HEADLINE_METRIC

_SERIES = (
    ("table2", "size", ("squad", "toolbench")),
    ("table3", "rank", ("accuracy",)),
    ("figure6", "kept", ("accuracy",)),
    ("figure7", "experts", ("accuracy",)),
)
"""Block, its axis, its scores."""


def load_reported(path: Path) -> dict[str, Any]:
    """The checked file. Raises ValueError naming what is wrong."""
    try:
        reported = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the paper's numbers {path.name} ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    try:
        _check_table1(reported["table1"])
        _check_figure1(reported["figure1"])
        for name, axis, scores in _SERIES:
            block = reported[name]
            for curve in block.values() if name in ("figure6", "figure7") else [block]:
                _check_lengths(name, len(curve[axis]), *(len(curve[s]) for s in scores))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.name} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return reported


def _check_table1(block: dict[str, Any]) -> None:
    for theirs, ours in block["columns"].items():
        if theirs not in HEADLINE_METRIC or ours not in HEADLINE_METRIC:
            raise ValueError(f"table1.columns has an unknown task: {theirs}: {ours}")
    for row in block["rows"]:
        if row["row"] not in ROWS:
            raise ValueError(f"table1 has an unknown row {row['row']!r}; known: {', '.join(ROWS)}")
        for task in block["columns"]:
            if task in row and not 0 <= row[task] <= 1:
                raise ValueError(f"table1 {row['row']} {row['share']}: {task}={row[task]} is no score from 0 to 1")
    block["model"]  # noqa: B018  a KeyError if it is not there


def _check_figure1(block: dict[str, Any]) -> None:
    block["base_parameters"]  # noqa: B018
    for method, points in block.items():
        if method == "base_parameters":
            continue
        _check_lengths(f"figure1 {method}", len(points["size"]), len(points["accuracy"]))


def _check_lengths(name: str, points: int, *scores: int) -> None:
    if any(n != points for n in scores):
        raise ValueError(f"{name}: {points} points on the axis, {', '.join(map(str, scores))} scores")


def figure1_points(reported: dict[str, Any], method: str) -> list[tuple[float, float]]:
    """(trainable parameters in % of the base, accuracy) of a method in the paper's Figure 1, small to large.

    MEFT is not drawn there: its one point is Table 1's, at the size of the released configuration (router counted).
    """
    block = reported["figure1"]
    base = block["base_parameters"]
    if method == "meft":
        neurons, experts, _, _ = SIZES["llama-7b"]["meft"]["34%"]
        # A neuron is a key and a value (2DL parameters, as in the Parallel Adapter), an expert one router row (DL).
        trainable = (neurons + experts / 2) * block["parallel_adapter"]["parameters_per_unit"]
        accuracy = table1_value(reported, "meft", "10%", "nq")
        return [] if accuracy is None else [(100 * trainable / base, accuracy)]
    points = block[method]
    percents = [100 * size * points["parameters_per_unit"] / base for size in points["size"]]
    return sorted(zip(percents, points["accuracy"], strict=True))


def table1_value(reported: dict[str, Any], row: str, share: str, task: str) -> float | None:
    """A number of the paper's Table 1; None if it prints none."""
    found = (r.get(task) for r in reported["table1"]["rows"] if (r["row"], r["share"]) == (row, share))
    return next(found, None)
