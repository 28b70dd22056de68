"""What a profile is asked for, and what all of its rows share."""

from dataclasses import dataclass
from pathlib import Path

import torch

from meft_bench.meft.sites import find_ffns
from meft_bench.profile import shapes
from meft_bench.profile.limits import check_share, check_sizes
from meft_bench.profile.setting import Setting
from meft_bench.profile.variants import SIZES, VARIANTS
from meft_bench.simulate.cards import CLASSES, Card, Host
from meft_bench.simulate.nodes import Link
from meft_bench.train.methods import require_positive
from meft_bench.train.models import shape_of

ASKED = 3072
"""R that is profiled first where none is asked for: the paper's 12 % at LLaMA-7B."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. Raises ValueError for values that make no profile."""

    model: str
    card: Card
    host: Host
    host_gib: float
    batch: int = 2
    seq: int = 256
    accumulations: tuple[int, ...] = (1, 4, 16, 32)
    union: float | None = None
    """U / R assumed by the user; None takes the share that the paper's traffic implies."""
    selection: Path | None = None
    """The selection log of random weights; None uses the assumed share alone."""
    trained: Path | None = None
    """A trained model's log, in place of that one."""
    neurons: tuple[int, ...] = (ASKED,)
    """The sizes asked for: they come first, and the answer is theirs."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    ranks: tuple[int, ...] = ()
    """LoRA's ranks; empty takes those that train as much as R neurons."""
    full: bool = False
    """Every row of every size, and the largest sizes by search; else what the answer needs."""
    sweep: tuple[int, ...] = ()
    """Further sizes of a full profile."""
    longer: tuple[tuple[int, int], ...] = ()
    """(sequences, their tokens) of larger micro-batches, at which a full profile has a row of every method of the sizes
    asked for."""
    search: bool = True
    """Whether a full profile searches for the largest sizes."""
    link: Link | None = None
    """Between card and host, in place of the card's own: the card is behind it already."""

    def __post_init__(self) -> None:
        require_positive(batch=self.batch, seq=self.seq, **{f"accumulation {a}": a for a in self.accumulations})
        require_positive(**{f"neurons {n}": n for n in self.neurons}, **{f"rank {r}": r for r in self.ranks})
        if self.seq < 2:
            raise ValueError(f"seq={self.seq} must be at least 2: the loss is on the next token")
        check_share("host memory", self.host_gib)
        check_share("union share", self.union, most=1.0)

    @property
    def others(self) -> tuple[Card, ...]:
        """The classes of other memory than the card's, behind the same link where one was named."""
        classes = (c for c in CLASSES if c.memory_bytes.value != self.card.memory_bytes.value)
        return tuple(c if self.link is None else self.link.on(c) for c in classes)

    @property
    def accumulation(self) -> int:
        """Micro-batches of the simulated step: the least asked for."""
        return min(self.accumulations)

    @property
    def beyond(self) -> dict[int, int]:
        """R asked for -> the next size of the sweep that is at least twice as large: what the answer to "how large at
        this speed" is drawn towards. Of a full profile only sizes that it has anyway."""
        pairs = ((r, min((n for n in SIZES if n >= 2 * r), default=2 * r)) for r in self.neurons)
        return {r: n for r, n in pairs if not self.full or n in self.sweep}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every R that may have a row, ascending."""
        return tuple(sorted({*self.neurons, *self.sweep, *self.beyond.values()}))


def setting_of(request: Request) -> Setting:
    """Raises ValueError for a model without known FFNs and for sizes that no machine holds."""
    config = shapes.model_config(request.model)
    check_sizes(config, request.batch, request.seq, request.sizes, request.ranks)
    model = shapes.build(config, "meta", torch.bfloat16, random=False)
    find_ffns(model)
    return Setting(
        config=config,
        shape=shape_of(model),
        card=request.card,
        host=request.host,
        accumulations=tuple(sorted(set(request.accumulations))),
    )
