"""The frozen base on many GPUs: a copy on each, or sharded over as few as it takes, by formula.

FSDP (arXiv 2304.11277) gathers each layer's weights before it runs them, in forward and again in backward, and drops
them afterwards; the next layer's are on their way meanwhile. Embedding and head are one unit, which stays gathered
during the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from meft_bench.meft.sites import decoder_layers
from meft_bench.profile.scale.rank import Team
from meft_bench.simulate.nodes import Node
from meft_bench.train.policy import Workload
from meft_bench.train.step_bytes import CONTEXT_BYTES, WIDTH, activation_bytes

_FP32 = 4
_GATHERED_LAYERS = 2
"""The one at work and the next."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Over how many GPUs each copy of some weights is spread, and of how many nodes."""

    gpus: int
    nodes: int = 1

    @property
    def share(self) -> float:
        """Of the weights that a GPU lacks: (g - 1) / g."""
        return 1 - 1 / self.gpus


def shardings(team: Team) -> Iterator[Sharding]:
    """From a copy on every GPU to one over all: within a node as far as that goes, since its fabric is faster."""
    for gpus in _divisors(team.gpus):
        yield Sharding(gpus=gpus)
    for nodes in _divisors(team.nodes)[1:]:
        yield Sharding(gpus=team.gpus * nodes, nodes=nodes)


@dataclass(frozen=True, kw_only=True)
class Units:
    """Parameters of the base that are gathered at a time."""

    layer: int
    """Of the matrices of a decoder layer, the largest where layers differ."""
    outside: int
    """Of all else: embedding and head, and the vectors of all layers, which are few."""


def units_of(model: nn.Module) -> Units:
    """Those of a base, which may lie on the meta device. Raises ValueError for one without decoder layers."""
    layers = [{id(p): p.numel() for p in layer.parameters() if p.dim() > 1} for layer in decoder_layers(model)]
    inside = {key: count for layer in layers for key, count in layer.items()}
    every = sum(p.numel() for p in model.parameters())
    return Units(layer=max(sum(layer.values()) for layer in layers), outside=every - sum(inside.values()))


def step_memory(work: Workload, units: Units, rows: int, sharding: Sharding, added: int = 0) -> dict[str, int]:
    """Device bytes of a micro-batch on the base, by purpose. added: parameters that are gathered with each layer."""
    shape, width = work.shape, WIDTH[work.dtype]
    tokens = rows * work.length
    gathered = _GATHERED_LAYERS * (units.layer + added) + units.outside
    return {
        "base weights": round(shape.parameters * width / sharding.gpus),
        "gathered weights": round(gathered * width * sharding.share),
        "activations": activation_bytes(tokens, shape.hidden, shape.layers, work.dtype),
        "logits": tokens * work.vocabulary * (width + 3 * _FP32),
        "CUDA context": CONTEXT_BYTES,
    }


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """What a step's gathers move: bytes that each GPU receives within its node, and each node from the others."""

    fabric_bytes: float
    network_bytes: float

    def seconds(self, node: Node) -> dict[str, float]:
        """What they occupy and for how many seconds: {"fabric": s, "network": s}."""
        return {
            "fabric": self.fabric_bytes / node.wiring.fabric.value,
            "network": self.network_bytes / node.wiring.network.value,
        }


def gathering(nbytes: float, sharding: Sharding, times: float) -> Gathering:
    """So many gathers of weights of nbytes. Over several nodes a ring passes each once: a node receives what it lacks,
    and so does each GPU, over the fabric where its node has another."""
    across = 1 - 1 / sharding.nodes
    within = sharding.share if sharding.gpus > sharding.nodes else 0.0
    return Gathering(fabric_bytes=times * nbytes * within, network_bytes=times * nbytes * across)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
