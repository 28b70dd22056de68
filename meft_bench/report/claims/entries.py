"""What the ledger holds: quantities, parts with bounds, findings, claims, discrepancies. Nothing is judged here."""

from dataclasses import dataclass
from typing import Any

from meft_bench.report.records import quantities as q
from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.results import Line
from meft_bench.report.records.stats import seed_interval

VERDICTS = ("supported", "contradicted", "inconclusive", "not run")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A quantity without a test: its label and values per seed, with their t-interval."""

    label: str
    """As claims.yaml refers to it."""
    words: str
    """As a reader sees it."""
    values: q.Values

    @property
    def mean(self) -> float | None:
        values = self.values.by_seed
        return sum(values.values()) / len(values) if values else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return seed_interval(list(self.values.by_seed.values()))


@dataclass(frozen=True, kw_only=True)
class Part(Shown):
    """A quantity and its bound; verdict is holds, fails, open or not run (before Holm)."""

    bound: str
    limits: tuple[float, ...]
    verdict: str
    p_holds: float | None = None
    p_fails: float | None = None
    exact: bool = False

    @property
    def condition(self) -> str:
        """The bound in words."""
        if self.bound == "within":
            return f"within [{self.limits[0]:g}, {self.limits[1]:g}]"
        return f"{self.bound} {self.limits[0]:g}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the records say of a claim on one scale."""

    verdict: str
    reason: str
    parts: tuple[Part, ...]
    decisive: Part | None = None
    """The part that the verdict hangs on: the weakest of a supported claim, the clearest failure of another."""
    p: float | None = None
    """Two-sided; p_holm after the correction over its family."""
    p_holm: float | None = None
    power: float | None = None
    """Chance that a test over as many seeds with this spread tells the paper's own effect from the bound, where the
    decisive part is a difference of scores."""
    command: str = ""
    needs: str = ""
    reachable: str = ""

    @property
    def seeds(self) -> int:
        """Of the deciding part; without one, of the part that has fewest."""
        if self.decisive is not None:
            return len(self.decisive.values.by_seed)
        return min((len(p.values.by_seed) for p in self.parts), default=0)

    @property
    def stale(self) -> bool:
        return any(p.values.stale for p in self.parts)

    @property
    def evidence(self) -> str:
        """The weakest of its parts."""
        return weakest(p.values.evidence for p in self.parts)

    @property
    def run_keys(self) -> list[str]:
        return sorted({key for p in self.parts for key in p.values.run_keys})


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One entry of the ledger with its findings; a scale that cannot decide it has none."""

    id: str
    where: str
    family: str
    says: str
    paper: float | None
    note: str
    because: str
    """Shown with a contradiction: the reason that the records can show."""
    small: Finding | None
    pretrained: Finding | None
    scale: Finding | None
    shows: tuple[Shown, ...]
    lines: tuple[Line, ...] = ()
    """Every (row, share) that it reads on the embedded model."""


@dataclass(frozen=True, kw_only=True)
class Discrepancy:
    """A difference between the paper and its released code, our default, and what it does on the embedded model."""

    what: str
    paper: str
    code: str
    default: str
    unshown: str
    """Why no run compares the two, where none does."""
    shows: tuple[Shown, ...]


@dataclass(frozen=True)
class Ledger:
    """Every claim and discrepancy, judged."""

    rules: dict[str, Any]
    families: dict[str, str]
    claims: tuple[Claim, ...]
    discrepancies: tuple[Discrepancy, ...]
