"""The host's part of one layer: which neurons a micro-batch keeps, their way to the device, their gradients' way home.

prepare() starts it as soon as the FFN's input is known, so that it may run beside the FFN; take() gives the layer
(layer.py) the MicroBatch that came of it. Whether that work runs in the background, is done from an earlier layer's
hidden states, or is done on the device instead is decided here (EngineConfig), and the layer's mathematics is the same
either way. Under torch.compile the adapter is left as it is, between compiled parts of the base: what the host does is
no graph of tensors.
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft import routing
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import split
from meft_bench.meft.engine.config import EngineConfig
from meft_bench.meft.engine.device_router import DeviceRouter
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.index import KeyIndex
from meft_bench.meft.engine.micro_batch import MicroBatch
from meft_bench.meft.engine.residency import KeptRows, PassingRows, rows_on_device
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.engine.workers import Task
from meft_bench.meft.link import GPUS, Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore

if TYPE_CHECKING:
    from meft_bench.meft.adam import StoreUpdates


class HostPart(nn.Module):
    """What a layer's adapter does beside its mathematics. usage lists (real tokens T, U) of every micro-batch that
    training has gone through, backward included. layers: adapters that share device_budget."""

    def __init__(
        self, config: MeftOptions, store: NeuronStore, link: Link | Resident, batch: BatchInfo, layers: int = 1
    ) -> None:
        super().__init__()
        self.config, self.store, self.link, self.batch, self.layers = config, store, link, batch, layers
        self.usage: list[tuple[int, int]] = []
        self.residency: PassingRows | KeptRows | WholeRows | None = None
        self.router: DeviceRouter | None = None
        self.index: KeyIndex | None = None
        self.on_select: Callable[[Tensor, routing.Selection], routing.Selection] | None = None
        """Is given the hidden states [T, D] and what select() chose from them; what it returns is used instead."""
        self.ahead: HostPart | None = None
        """The adapter whose neurons are selected from this layer's hidden states (config.lookahead layers on)."""
        self.selects_itself = True
        """False where an earlier layer's hidden states select for this one."""
        self._waiting: Task | None = None

    # ---- one micro-batch ----

    def prepare_early(self, h: Tensor) -> None:
        """prepare(h) before the FFN runs, where that lets the host work beside it or an earlier layer selects."""
        if self.config.lookahead or in_background(self.config, h.device):
            self.prepare(h)

    @engine
    def prepare(self, h: Tensor) -> None:
        """Start the host's part for hidden states h [..., D], which forward() is called with next. It runs in the
        background where config.overlap says so, and gives the same either way."""
        training = self.training and torch.is_grad_enabled()
        with torch.no_grad():
            self._set_up(h)
            if training:
                self.store.prepare_gradients()
            valid_T = self.batch.valid_tokens(h)
            if self.config.retrieval == "device":
                self._waiting = self.store.queue.submit(self._select_from_device, h.detach(), valid_T, training)
                return
            takers = [a for a in (self if self.selects_itself else None, self.ahead) if a is not None]
            if not takers:
                return
            arriving = self.link.send_to_host(h.detach().reshape(-1, h.shape[-1]), "hidden")
            for taker in takers:
                taker._set_up(h)
                taker._waiting = taker.store.queue.submit(taker._select_from_host, arriving, valid_T, training)

    @property
    def is_prepared(self) -> bool:
        """Whether take() has something to give."""
        return self._waiting is not None

    def take(self) -> MicroBatch:
        """What prepare() made."""
        if self._waiting is None:
            raise RuntimeError(
                "lookahead selects this layer's neurons from an earlier layer's input, which has not been seen: run "
                "the whole model, without gradient checkpointing (it runs layers again, last one first)"
            )
        future, self._waiting = self._waiting, None
        return self.store.queue.result(future)

    def _set_up(self, h: Tensor) -> None:
        """At the first call: the device and dtype of what will lie there are h's."""
        config, store = self.config, self.store
        dtype = torch.bfloat16 if config.wire == "bf16" else h.dtype
        store.queue.turn(in_background(config, h.device), h.device)
        store.source = weakref.ref(self)
        residency = self.residency
        if residency is not None and (residency.device, residency.dtype) == (h.device, dtype):
            return
        store.come_home()
        self.collect()
        bought = split(config, self.layers, h.shape[-1], h.dtype)
        self.router = DeviceRouter(store, self.link, h.device, dtype) if config.router_on_device else None
        self.residency = rows_on_device(store, self.link, config, bought, self.router, h.device, dtype)
        if config.retrieval == "device":
            self.index = KeyIndex(store, "int8", h.device, self.link)

    # ---- selecting ----

    def select(self, host_h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        """The neurons of one micro-batch, from host hidden states [T, D] fp32; with retrieval="device" from the
        device's own, and local_TK is there too."""
        chosen = self._selected(host_h_TD, valid_T)
        return chosen if self.on_select is None else self.on_select(host_h_TD, chosen)

    def _selected(self, host_h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        store, index, config = self.store, self._scoring_keys(), self.config
        if config.retrieval == "device":
            return self._search_device(host_h_TD, valid_T)
        router_ND = store.router_ND if config.key_experts else None
        if valid_T is not None:
            valid_T = valid_T.to(host_h_TD.device)

        def refresh(probed_N: Tensor | None) -> None:
            # Only what is about to be scored is brought up to date.
            rows_U = None
            if probed_N is not None:
                within = torch.arange(config.expert_size, device=probed_N.device)
                rows_U = (probed_N.nonzero() * config.expert_size + within).flatten()
            store.refresh_keys(rows_U)
            if index is not None:
                index.refresh(rows_U)

        if index is None:
            return routing.select(host_h_TD, store.rows_R2D[:, 0], router_ND, config, valid_T, refresh=refresh)
        keys_RD, scales_R = index.keys_RD, index.scales_R
        return routing.select(host_h_TD, keys_RD, router_ND, config, valid_T, scales_R=scales_R, refresh=refresh)

    def _scoring_keys(self) -> KeyIndex | None:
        if self.config.scoring != "fp32" and self.index is None:
            self.index = KeyIndex(self.store, self.config.scoring, self.store.rows_R2D.device, None)
        return self.index

    def _search_device(self, h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        index = self.index
        assert index is not None and index.scales_R is not None
        self.store.refresh_keys()
        index.refresh()
        there = None if valid_T is None else valid_T.to(h_TD.device)
        union_U, local_TK = routing.search_device(h_TD, index.keys_RD, index.scales_R, self.config, there)
        union_U = self.link.to_host(union_U, "index", torch.int32).long()
        return routing.Selection(union_U, local_TK, None, None)

    def _select_from_host(self, arriving: Transfer, valid_T: Tensor | None, training: bool) -> MicroBatch:
        link, config, residency = self.link, self.config, self.residency
        assert residency is not None
        host_h_TD = arriving.here().float()
        with observe.part("retrieval", self):
            chosen = self.select(host_h_TD, valid_T)
        tokens = host_h_TD.shape[0] if valid_T is None else int(valid_T.sum())
        made = MicroBatch(self, chosen, host_h_TD, residency.lend(chosen.union_U, training), tokens)
        if self.router is not None:
            self.router.refresh()
        gates = None if self.router is not None else _host_gates(chosen, config)
        if gates is not None:
            made.gates = link.send_to_device(gates, residency.device, "score", residency.dtype)
        if config.reading == "per_token":
            # int32 on the wire, int64 for torch's gathers.
            made.local_TK = link.send_to_device(chosen.local_TK, residency.device, "index", torch.int32)
            if self.router is not None:
                assert chosen.expert_TK is not None
                made.experts = link.send_to_device(chosen.expert_TK, residency.device, "index", torch.int32)
        elif chosen.gates_TN is not None:
            experts_U = chosen.union_U // config.expert_size
            made.experts = link.send_to_device(experts_U, residency.device, "index", torch.int32)
        return made

    def _select_from_device(self, h: Tensor, valid_T: Tensor | None, training: bool) -> MicroBatch:
        residency, h_TD = self.residency, h.reshape(-1, h.shape[-1])
        assert residency is not None
        with observe.part("retrieval", self):
            chosen = self.select(h_TD, valid_T)
        tokens = h_TD.shape[0] if valid_T is None else int(valid_T.sum())
        local_TK = Transfer(chosen.local_TK) if self.config.reading == "per_token" else None
        return MicroBatch(self, chosen, None, residency.lend(chosen.union_U, training), tokens, local_TK=local_TK)

    # ---- what stays on the device ----

    @engine
    def collect(self) -> None:
        """Send home the gradients that wait on the device. Nothing waits there without device_budget or lookahead."""
        if self.residency is not None:
            self.residency.collect()
        if self.router is not None:
            self.router.collect()

    def take_optimizer(self, updates: "StoreUpdates") -> None:
        """Gradients were cleared: the optimizer of rows that device_budget pays for goes to the device."""
        if isinstance(self.residency, WholeRows) and self.residency.adam is not None:
            self.store.queue.submit(self.residency.adam.take, updates)

    @property
    def device_bytes(self) -> int:
        """Bytes that stay on the device between micro-batches: kept rows, their gradients, router, key index."""
        kept = [part.nbytes for part in (self.residency, self.router) if part is not None]
        on_device = self.index is not None and self.config.retrieval == "device"
        return sum(kept) + (self.index.nbytes if on_device and self.index is not None else 0)


def in_background(config: EngineConfig, device: torch.device) -> bool:
    """Whether the host's work runs beside that of this device."""
    return config.overlap if config.overlap is not None else device.type in GPUS


def _host_gates(chosen: routing.Selection, config: MeftOptions) -> Tensor | None:
    """What the device needs of the router: a factor per kept neuron [T, K], or per expert [T, N] for the union."""
    if chosen.gates_TN is None:
        return None
    if config.reading == "union":
        return chosen.gates_TN
    assert chosen.expert_TK is not None
    return chosen.gates_TN.gather(1, chosen.expert_TK)
