"""Old and new in turn, the median ratio with its interval, and the files."""

import dataclasses
import importlib
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from meft_bench.bench import changes as package
from meft_bench.bench import common
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.train.methods import require_positive

CONFIDENCE = 0.95
"""Of the interval, where there are rounds enough for it (6)."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the engine does now, and what it did before, on inputs of one size."""

    name: str
    old: Callable[[], Any]
    new: Callable[[], Any]
    sizes: Mapping[str, int]
    """What the times depend on."""
    counts: Mapping[str, tuple[int, int]]
    """What each does by count, (old, new): bytes, calls, passes."""
    before: Callable[[], None] = lambda: None
    """Fresh inputs for a round, untimed."""
    ready: Callable[[], None] = lambda: None
    """Untimed, before every call: takes back what the last one did, where it would leave the next nothing to do."""


def changes_benchmark(output: Path, repeats: int = 7, **sizes: Any) -> str:
    """Time every change; write changes.json and changes.md into output, return the Markdown.

    sizes are fields of Sizes. Raises ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats)
    settings = Sizes(**sizes)
    common.open_folder(output)
    with tqdm(desc="changes", unit="pair", leave=False) as bar:
        rows = []
        for file in files():
            for change in importlib.import_module(f"{package.__name__}.{file}").changes(settings):
                bar.set_postfix_str(change.name)
                rows.append({"file": file, **row(change, repeats)})
                bar.update()
    result = {**common.about(repeats, **dataclasses.asdict(settings)), "rows": rows}
    return common.write_result(output, "changes", result, _table(result))


def files() -> Iterator[str]:
    """The files that offer changes."""
    for found in pkgutil.iter_modules(package.__path__):
        if found.name not in ("frame", "sizes"):
            yield found.name


def row(change: Change, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    old_s, new_s = alternated(change, repeats)
    found = [round(old / new, 4) for old, new in zip(old_s, new_s, strict=True)]
    low, high, coverage = interval(found)
    return {
        "change": change.name,
        "sizes": dict(change.sizes),
        "counts": {name: {"old": old, "new": new} for name, (old, new) in change.counts.items()},
        "old_s": round(statistics.median(old_s), 6),
        "new_s": round(statistics.median(new_s), 6),
        "times_faster": round(statistics.median(found), 3),
        "interval": [round(low, 3), round(high, 3)],
        "coverage": round(coverage, 4),
        "n": repeats,
        "rounds_s": {"old": common.rounded(old_s), "new": common.rounded(new_s)},
    }


def alternated(change: Change, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of old and new, round by round; the one that came second comes first in the next round. Rounds before
    the first are dropped: they fault pages in."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-common.WARMUP, repeats):
        change.before()
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            change.ready()
            time.sleep(common.REST_S)
            taken = common.seconds((change.old, change.new)[which])
            if number >= 0:
                times[which].append(taken)
    return times


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """An interval for the median by order statistics, which supposes nothing of how values are spread: (low, high,
    coverage), the narrowest with coverage at least confidence, or all values where there are too few."""
    ordered, n = sorted(values), len(values)
    outside = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    cut = max((k for k, share in enumerate(outside) if 1 - share >= confidence), default=0)
    return ordered[cut], ordered[n - 1 - cut], max(0.0, 1 - outside[cut])


def _table(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"Changes of the engine against what they replace, {s['threads']} threads on {result['cpu']}; {s['kernels']}. "
        f"Old and new in turn, {s['repeats']} rounds, every call after a rest; times faster is the median of the "
        "rounds' own ratios, with its interval by order statistics (measured).",
        "",
        "| change | sizes | counts, old to new | old, ms | new, ms | times faster | interval | n |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        sizes = ", ".join(f"{name}={n}" for name, n in r["sizes"].items())
        counts = ", ".join(f"{name} {c['old']:,} to {c['new']:,}" for name, c in r["counts"].items())
        low, high = r["interval"]
        lines.append(
            f"| {r['change']} | {sizes} | {counts} | {1000 * r['old_s']:.2f} | {1000 * r['new_s']:.2f} | "
            f"{r['times_faster']:.2f} | {low:.2f} to {high:.2f} ({100 * r['coverage']:.0f} %) | {r['n']} |"
        )
    return "\n".join(lines) + "\n"
