"""What came out of a test, as the table shows it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from meft_bench.harness.record import EVIDENCE


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence with its evidence."""

    says: str
    evidence: str
    """How it came to be: one of record.EVIDENCE, the weakest of what it is made from."""
    n: int
    of: str
    """What n counts: "rounds", "shapes and cards"."""
    interval: tuple[float, float] | None = None
    """None where there is one value."""
    covers: str = ""
    """What the interval is of, with its unit: "times, lowest to highest"."""
    digits: int = 2
    """Behind the point, of the interval."""

    def __post_init__(self) -> None:
        assert self.evidence in EVIDENCE, f"evidence {self.evidence!r} is none of {', '.join(EVIDENCE)}"
        assert (self.interval is None) == (self.covers == ""), "an interval says what it covers"

    @property
    def shown_n(self) -> str:
        return f"{self.n:,} {self.of}"

    @property
    def shown_interval(self) -> str:
        """ "0.10 to 0.25 (share, lowest to highest)"; "one value" without an interval."""
        if self.interval is None:
            return "one value"
        low, high = self.interval
        return f"{low:,.{self.digits}f} to {high:,.{self.digits}f} ({self.covers})"


def extent(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest."""
    return min(values), max(values)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # takes two seconds, so only where it is needed

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half
