"""Distinctive updates: only neurons that the new data use far more than background text does get a gradient.

Sparse memory fine-tuning (arXiv 2510.15103) scores slot i of a memory by TF-IDF, with c(i) how often a batch uses it
and B the background:

    score(i) = c(i) / sum over j of c(j)  *  log((|B| + 1) / (texts of B that use i, + 1))

Here a slot is a neuron, c(i) is the number of tokens of a micro-batch that keep it, and B are texts. The neurons of the
best scores are counted, which means here: their gradients go home, and they are updated. The others' gradients go
nowhere. U rows, R neurons, N experts as in config.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meft_bench.meft.config import MeftOptions


@dataclass(frozen=True)
class Background:
    """How often background text uses the neurons of one layer."""

    used_R: Tensor
    """int64, on the host: in how many texts some token keeps the neuron."""
    texts: int

    def weights(self) -> Tensor:
        """The inverse document frequency of each neuron, fp64 [R]: 0 for one that every text uses."""
        return ((self.texts + 1) / (self.used_R.double() + 1)).log()


def scores(uses: Tensor, weights: Tensor) -> Tensor:
    """TF-IDF, fp64: uses (any dtype) says how often the micro-batch uses each neuron of a list, weights (fp64) what
    Background says of it. The list must hold every neuron in use. 0 where there is none."""
    return uses.double() / uses.sum().clamp(min=1) * weights


def best(found: Tensor, config: MeftOptions) -> Tensor:
    """Marks (bool) of the neurons that are updated, from their scores: the config.distinctive best (of equal ones the
    first) or those above config.distinctive_above, and never one whose score is 0. Asks a GPU nothing."""
    if config.distinctive is None:
        assert config.distinctive_above is not None
        return found > config.distinctive_above
    first = found.argsort(descending=True, stable=True)[: config.distinctive]
    return torch.zeros_like(found, dtype=torch.bool).index_fill_(0, first, True) & (found > 0)


def uses_of(places_TK: Tensor, size: int) -> Tensor:
    """How often each of `size` places is named (int64 [size]); negative ones name none. Asks a GPU nothing."""
    taken = torch.where(places_TK < 0, size, places_TK).flatten()
    counts = torch.zeros(size + 1, dtype=torch.int64, device=places_TK.device)
    return counts.index_add_(0, taken, torch.ones_like(taken))[:size]


def experts_of(marks_R: Tensor, config: MeftOptions) -> Tensor:
    """Marks (bool [N]) of the experts that one of the marked neurons belongs to."""
    return marks_R.view(-1, config.expert_size).any(1)


class Distinctive:
    """Which neurons of one layer a micro-batch updates, once its background is known."""

    def __init__(self, config: MeftOptions) -> None:
        self.config = config
        self.background: Background | None = None
        self._weights_R: Tensor | None = None

    def take(self, background: Background) -> None:
        """From now on this is the background."""
        self.background, self._weights_R = background, None

    def require(self) -> Background:
        """The background. Raises ValueError without one."""
        if self.background is None:
            raise ValueError(
                "distinctive updates need to know what background text uses: call count_background before training, or "
                "torch.no_grad() where nothing is trained"
            )
        return self.background

    def weights(self, device: torch.device) -> Tensor:
        """Background.weights() on this device."""
        if self._weights_R is None or self._weights_R.device != device:
            self._weights_R = self.require().weights().to(device)
        return self._weights_R

    def places(self, union_U: Tensor, local_TK: Tensor) -> Tensor:
        """Places in the union (ascending, int64) of the neurons that are updated; local_TK as in routing.Selection."""
        weights_U = self.weights(union_U.device)[union_U]
        found_U = scores(uses_of(local_TK, union_U.shape[0]), weights_U)
        return best(found_U, self.config).nonzero()[:, 0]

    def marks(self, neuron_TK: Tensor) -> Tensor:
        """Marks (bool [R]) of the neurons that are updated; neuron_TK as in routing.Kept. Asks a GPU nothing."""
        uses_R = uses_of(neuron_TK, self.config.neurons)
        return best(scores(uses_R, self.weights(neuron_TK.device)), self.config)
