"""What all rows of a profile share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from meft_bench.simulate.cards import Card, Host
from meft_bench.train.counts import Counted
from meft_bench.train.methods import ModelShape


class Latest:
    """The last few things that were made, for what is made from the same."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What make() gives, or gave for this key not long ago."""
        if key not in self.made:
            self.made[key] = make()
            while len(self.made) > self.most:
                del self.made[next(iter(self.made))]
        return self.made[key]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of a profile share."""

    config: Any
    """The transformers config of the base."""
    shape: ModelShape
    card: Card
    host: Host
    accumulations: tuple[int, ...] = (1, 4, 16, 32)
    counted: Counted = field(init=False, compare=False)
    latest: Latest = field(init=False, compare=False, repr=False)
    """Runs that several rows are made from (made_from)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "counted", Counted(self.config))
        object.__setattr__(self, "latest", Latest(3))
