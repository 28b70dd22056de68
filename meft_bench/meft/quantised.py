"""Inference with a layer's neurons in int8 or int4, quantised by group of 32, in host memory (arXiv 2311.00502).

Keys and values are held in that form alone. What is searched is dequantised for the search: the keys of the experts
that some token probes, or without Key-Experts all keys of one layer at a time. What crosses to the device is
dequantised into its staging memory, in the format of the wire. So a token gets what it would get from an adapter in
fp32 whose rows are the dequantised ones, to the bit (tested). Nothing is trained this way.
"""

import dataclasses
import math
import threading
import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft import routing
from meft_bench.meft.engine import groups, memory
from meft_bench.meft.engine.groups import BITS
from meft_bench.meft.engine.partners import Source
from meft_bench.meft.engine.workers import HostQueue
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.store import NeuronStore

_TRAINS = "rows in int8 or int4 are for inference: load the adapter in fp32 to train or save it"


class QuantisedStore(nn.Module):
    """A NeuronStore's rows in int8 or int4 and its router in fp32; what inference asks of a store, and no more.

    blocks_RB: uint8, as engine/groups.py writes them. It stays where it is: .to() of the model passes it by.
    """

    trains = trains_rows = trains_router = trains_keys = False
    writes = version = written = 0
    share = None
    """No ranks: nothing is trained."""

    def __init__(self, store: NeuronStore, rows: str) -> None:
        super().__init__()
        store.settle()
        self.bits, self.hidden_size = BITS[rows], store.hidden_size
        self.blocks_RB = groups.quantise(store.rows_R2D, self.bits)
        self._router_ND = None if store.router is None else store.router_ND.clone()
        self.queue = HostQueue(store.queue.name)
        self.source: weakref.ref[Source] | None = None
        self._values = torch.empty(0)

    def _apply(self, fn, recurse=True):
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(_TRAINS)

    @property
    def nbytes(self) -> int:
        """Host bytes of rows and router."""
        return self.blocks_RB.nbytes + (0 if self._router_ND is None else self._router_ND.nbytes)

    @property
    def router_ND(self) -> Tensor:
        """The router in fp32; only with Key-Experts."""
        assert self._router_ND is not None
        return self._router_ND

    def handle(self, name: str) -> Tensor:
        """The router; for "values" a tensor without numbers."""
        return self.router_ND if name == "router" else self._values

    def shown_to_autograd(self) -> Tensor:
        """A tensor without numbers, which does not train."""
        return self._values

    def keys(self, index_U: Tensor | None = None) -> Tensor:
        """The keys of these rows (of all: None), fp32 [U, D], until the next call on this thread."""
        if index_U is None:
            index_U = torch.arange(self.blocks_RB.shape[0])
        keys_U1D = _scratch((index_U.shape[0], 1, self.hidden_size))
        return groups.gather(self.blocks_RB, index_U, keys_U1D, self.bits)[:, 0]

    @observe.announced("gather")
    def gather(self, union_U: Tensor, dtype: torch.dtype = torch.float32, out_UHD: Tensor | None = None) -> Tensor:
        """The union's neurons [U, 2, D] in dtype, keys then values, copied out (into out, if given)."""
        if out_UHD is None:
            out_UHD = torch.empty(union_U.shape[0], 2, self.hidden_size, dtype=dtype)
        return groups.gather(self.blocks_RB, union_U, out_UHD, self.bits)

    def watch(self) -> None:
        """Nobody writes here."""

    def come_home(self) -> None:
        """Nothing is away."""

    def is_at(self, version: int) -> bool:
        """Whether this is still the version of the rows."""
        return version == self.version


class QuantisedAdapter(MeftAdapter):
    """An adapter whose rows are in int8 or int4; it takes the place of one in fp32.

    Rows pass the link for each micro-batch as without a device_budget, and the host searches. Raises ValueError for an
    adapter whose rows lie on the device.
    """

    store: QuantisedStore  # type: ignore[assignment]

    def __init__(self, adapter: MeftAdapter, rows: str) -> None:
        if adapter.config.placement == "device":
            raise ValueError(f"rows={rows!r} is for rows in host memory; this adapter has placement='device'")
        config = dataclasses.replace(adapter.config, device_budget=0, retrieval="host", scoring="fp32")
        store = cast(NeuronStore, QuantisedStore(adapter.store, rows))
        super().__init__(config, store, adapter.link, adapter.batch, adapter.layers)
        self.train(adapter.training)

    def prepare(self, h: Tensor) -> None:
        """As HostPart.prepare. Raises ValueError in training."""
        if self.training and torch.is_grad_enabled():
            raise ValueError(_TRAINS)
        super().prepare(h)

    def select(self, h_TD: Tensor, valid_T: Tensor | None, routed: routing.Routed | None = None) -> routing.Selection:
        """As HostPart.select, in keys that are dequantised for it."""
        store, config = self.store, self.config
        valid_T = None if valid_T is None else valid_T.to(h_TD.device)
        if not config.key_experts:
            return routing.united(routing.keep(h_TD, store.keys(), None, config, valid_T), config)
        routed = routed or routing.route(h_TD, store.router_ND, config)
        probed_M = routed.experts_TP.unique()
        rows_U = (probed_M[:, None] * config.expert_size + torch.arange(config.expert_size)).flatten()
        place_N = torch.zeros(config.experts or 0, dtype=torch.int64)
        place_N[probed_M] = torch.arange(probed_M.shape[0])
        among = routed._replace(experts_TP=place_N[routed.experts_TP])
        kept = routing.keep(h_TD, store.keys(rows_U), among, config, valid_T)
        neuron_TK = rows_U[kept.neuron_TK.clamp(min=0)].masked_fill(kept.neuron_TK < 0, -1)
        return routing.united(kept._replace(neuron_TK=neuron_TK), config)

    def keep_frozen(self) -> None:
        """Nothing trains."""


_scratches = threading.local()


def _scratch(shape: tuple[int, ...]) -> Tensor:
    """Memory of this thread, the same again and again: new pages would take longer than what is written into them."""
    numbers, kept = math.prod(shape), getattr(_scratches, "kept", None)
    if kept is None or kept.numel() < numbers:
        kept = _scratches.kept = memory.empty((numbers,), torch.float32, torch.device("cpu"))
    return kept[:numbers].view(shape)


def row_bytes(width: int, rows: str) -> int:
    """Host bytes of one neuron of this width: 8 D in fp32; 2 ceil(D / 32) groups of 34 bytes in int8, of 18 in int4."""
    return 8 * width if rows == "fp32" else 2 * groups.half_bytes(width, BITS[rows])


def host_bytes(stores: Iterable[NeuronStore | QuantisedStore]) -> int:
    """What rows and routers take in host memory, in bytes."""
    return sum(
        store.nbytes
        if isinstance(store, QuantisedStore)
        else store.rows_R2D.nbytes + (0 if store.router is None else store.router_ND.nbytes)
        for store in stores
    )
