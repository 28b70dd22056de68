"""Parallel Adapter with everything on the host and whole-matrix transfers: the paper's "brutal offload".

Every micro-batch fetches all keys and values of a layer for the forward pass and returns all their gradients: M numbers
each way, M the trainable parameters. The mathematics is that of parallel_adapter.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.dense import activate, activation_slope
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.link import Link
from meft_bench.meft.sites import add_parallel, free_ffns, hidden_size
from meft_bench.meft.store import NeuronStore
from meft_bench.train.methods import Attached, ModelShape, freeze, require_choice, require_positive

TITLE = "Parallel Adapter, offloaded whole"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "neurons"
CHOICES = {"activation": ("relu", "silu")}
PLACE = "host"


@dataclass(frozen=True, kw_only=True)
class Options:
    neurons: int = 64
    """R: key-value pairs per layer."""
    activation: str = "relu"

    def __post_init__(self) -> None:
        require_positive(neurons=self.neurons)
        require_choice("activation", self.activation, CHOICES["activation"])


class OffloadedAdapter(nn.Module):
    """The Parallel Adapter of one layer over a store in host memory; usage lists (T, R) per training call."""

    def __init__(self, store: NeuronStore, link: Link, activation: str) -> None:
        super().__init__()
        self.store, self.link, self.activation = store, link, activation
        self.usage: list[tuple[int, int]] = []

    def forward(self, h: Tensor) -> Tensor:
        return _WholeTransfer.apply(h, self.store.handle("values"), self)


class _WholeTransfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, values: Tensor, adapter: OffloadedAdapter) -> Tensor:
        store, link = adapter.store, adapter.link
        store.refresh()
        rows_R2D = link.to_device(store.rows_R2D, h.device, "rows", h.dtype)
        keys_RD, values_RD = rows_R2D[:, 0], rows_R2D[:, 1]
        h_TD = h.detach().reshape(-1, h.shape[-1])
        dots_TR = h_TD @ keys_RD.T
        ctx.save_for_backward(h_TD, keys_RD, values_RD, dots_TR)
        ctx.adapter = adapter
        return (activate(dots_TR, adapter.activation) @ values_RD).reshape(h.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        h_TD, keys_RD, values_RD, dots_TR = ctx.saved_tensors
        adapter, grad_TD = ctx.adapter, grad.reshape(h_TD.shape)
        if adapter.training:
            adapter.usage.append((h_TD.shape[0], keys_RD.shape[0]))
        grad_dots_TR = (grad_TD @ values_RD.T) * activation_slope(dots_TR, adapter.activation)
        grad_values_RD = activate(dots_TR, adapter.activation).T @ grad_TD
        grads_R2D = torch.stack([grad_dots_TR.T @ h_TD, grad_values_RD], dim=1)
        adapter.store.add_gradients(torch.arange(grads_R2D.shape[0]), adapter.link.to_host(grads_R2D, "grads"))
        grad_h = (grad_dots_TR @ keys_RD).reshape(grad.shape) if ctx.needs_input_grad[0] else None
        return grad_h, None, None


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    rows = options.neurons * shape.hidden * shape.layers
    return {"keys": rows, "values": rows}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    sites = free_ffns(model)
    freeze(model)
    link, generator = Link(), torch.Generator().manual_seed(seed)
    rows = MeftOptions(neurons=options.neurons, kept=options.neurons, key_experts=False)
    adapters = []
    for site in sites:
        store = NeuronStore(rows, hidden_size(model), generator, torch.device("cpu"))
        adapters.append(OffloadedAdapter(store, link, options.activation))
        add_parallel(site, adapters[-1])
    stores = [a.store for a in adapters]
    groups = {"keys": [s.keys for s in stores], "values": [s.values for s in stores]}

    def clip(most: float) -> Tensor:
        if stores[0].team is not None:  # of several ranks the engine alone knows the sum of the gradients
            return clip_grad_norm(stores, most)
        return nn.utils.clip_grad_norm_([p for group in groups.values() for p in group], most)

    return Attached(
        model=model,
        groups=groups,
        optimizer_factory=lambda **settings: DenseRowAdamW(stores, **settings),
        link=link,
        usage=[a.usage for a in adapters],
        clip=clip,
        adds_gradients=True,
    )
