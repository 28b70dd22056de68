"""ProfileSpec: everything that can change a number of one profiled step."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meft_bench.harness.spec import canonical_json
from meft_bench.profile.variants import KNOWN
from meft_bench.train.methods import require_positive


@dataclass(frozen=True, kw_only=True)
class Union:
    """U, the rows that a micro-batch moves per layer, and where it is from. Never made up: logged, or assumed by the
    user and called so. Tokens that are there use a row, so a U that was rounded to none is one."""

    rows: int
    source: str
    evidence: str
    """"measured" (a logged selection) or "assumed"."""
    window: tuple[tuple[int, int], ...] = ()
    """(A, rows that at least one of A micro-batches touched), logged; empty where it was not."""
    model: str = ""
    """The trained model whose selection was logged; empty for the profiled shape with random weights, and where U is
    assumed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", max(1, self.rows))

    def touched(self, neurons: int) -> Callable[[int], float]:
        """Rows of R that A micro-batches touch: as logged, between two logged A along their logarithm; where nothing
        was logged, as A independent draws of U rows would."""
        known = dict(self.window)
        known.setdefault(1, self.rows)

        def after(micro_batches: int) -> float:
            if len(known) == 1:
                return neurons * (1 - (1 - self.rows / neurons) ** micro_batches)
            below = max(a for a in known if a <= micro_batches)
            above = min((a for a in known if a >= micro_batches), default=below)
            if above == below:
                return float(known[below])
            weight = math.log(micro_batches / below) / math.log(above / below)
            return known[below] * (1 - weight) + known[above] * weight

        return after

    def logged(self, micro_batches: int, neurons: int) -> int | None:
        """touched(), in whole rows; None where it was not logged."""
        return round(self.touched(neurons)(micro_batches)) if self.window else None


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """One variant at one size on one model. Raises ValueError, naming the field, for values that make no step."""

    model: str
    variant: str
    neurons: int
    """Nominal R; unused by variants without a size."""
    checkpointing: bool = False
    """Activation checkpointing of every decoder layer (non-reentrant)."""
    batch: int = 2
    """Sequences per micro-batch."""
    seq: int = 256
    """Tokens per sequence."""
    accumulation: int = 1
    """Micro-batches per optimizer step; memory is that of this many, traffic is listed for several."""
    union: Union | None = None
    rank: int | None = None
    """LoRA's rank where it is named; None takes the one that trains as much as a Parallel Adapter of R neurons."""

    def __post_init__(self) -> None:
        if self.variant not in KNOWN:
            raise ValueError(f"unknown variant {self.variant!r}; known: {', '.join(KNOWN)}")
        require_positive(neurons=self.neurons, batch=self.batch, seq=self.seq, accumulation=self.accumulation)
        if self.rank is not None:
            require_positive(rank=self.rank)
        if self.seq < 2:
            raise ValueError(f"seq={self.seq} must be at least 2: the loss is on the next token")
        if KNOWN[self.variant].needs_union and self.union is None:
            raise ValueError(f"{self.variant} at R={self.neurons} needs U: log a selection, or give --union SHARE")

    @property
    def tokens(self) -> int:
        """T of one micro-batch."""
        return self.batch * self.seq

    @property
    def key(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        values = dataclasses.asdict(self)
        if self.rank is None:
            del values["rank"]  # a spec without it is the one it was before there were ranks
        for later in ("window", "model"):
            if values["union"] is not None and not values["union"][later]:
                del values["union"][later]  # likewise
        return values
