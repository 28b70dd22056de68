"""The sizes at which the changes are timed: one layer of a 7B model, and a few tokens of it in tests."""

import dataclasses
from dataclasses import dataclass

from meft_bench.bench import common, kernels
from meft_bench.train.methods import require_positive


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Raises ValueError for values that do not fit together."""

    neurons: int = 3072
    """R."""
    hidden: int = 4096
    """D."""
    tokens: int = common.TOKENS
    """T."""
    kept: int = 64
    """K."""
    probed: int = 8
    """P."""
    touched: int = 1600
    """U, at most R."""

    def __post_init__(self) -> None:
        require_positive(**dataclasses.asdict(self))
        if self.touched > self.neurons:
            raise ValueError(f"touched={self.touched} is more than neurons={self.neurons}")
        self._of_kernels()

    def layer(self) -> kernels.Layer:
        """The host memory of one layer, with rows, gradients, moments and a round's inputs."""
        return kernels.Layer(self.neurons, self._of_kernels())

    def _of_kernels(self) -> kernels.Sizes:
        return kernels.Sizes(**{**dataclasses.asdict(self), "neurons": (self.neurons,)})
