"""The host's part of one layer: which neurons a micro-batch keeps, their way to the device, their gradients' way home.

prepare() starts it as soon as the FFN's input is known, so that it may run beside the FFN; take() gives the layer
(layer.py) the MicroBatch that came of it. Whether that work runs in the background, is done from an earlier layer's
hidden states, or is done on the device instead is decided here (EngineConfig), and the layer's mathematics is the same
either way. Under torch.compile the adapter is left as it is, between compiled parts of the base: what the host does is
no graph of tensors.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft import routing
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.config import EngineConfig
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.index import KeyIndex
from meft_bench.meft.engine.residency import DeviceRouter, KeptRows, Loan, PassingRows, rows_on_device
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore


class OnDevice(NamedTuple):
    """What lies on the device for one micro-batch from forward to backward."""

    sent: Tensor
    """Rows that crossed for this micro-batch alone (Loan.arrived)."""
    sent_rows: Tensor
    """Which ones, int64 on the host."""
    experts: Tensor | None
    """int64, the expert of each kept neuron [T, K], or of each row of the union [U]; where gates need it."""
    gates_TN: Tensor | None
    """Gates of all experts, where the device has a copy of the router."""


@dataclass
class MicroBatch:
    """What the host made for one micro-batch of one layer."""

    part: "HostPart"
    chosen: routing.Selection
    host_h_TD: Tensor | None
    """fp32 hidden states the neurons were selected from; None when the device selected."""
    loan: Loan
    tokens: int
    """Real tokens T."""
    gates: Transfer | None = None
    """Per token [T, K], or [T, N] for the union; None without gates or when the device makes them."""
    local_TK: Transfer | None = None
    """int32; None for the union reading."""
    experts: Transfer | None = None
    """int32, see OnDevice.experts."""
    writes: int = 0
    """The store's count of writes when the rows were used."""

    # ---- forward ----

    def arrive(self, h_TD: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, OnDevice]:
        """(rows of S [U, 2, D] in h's dtype, each kept neuron's place among them [T, K] or None for the union, gates
        [T, K] or [T, U] or None, all that lies on the device). Once; waits for what is on its way."""
        config, router, dtype = self.part.config, self.part.router, h_TD.dtype
        sent = self.loan.arrived()
        rows_U2D = self.loan.rows(sent).to(dtype)
        experts = None if self.experts is None else self.experts.here().long()
        gates = None if self.gates is None else self.gates.here().to(dtype)
        gates_TN = None
        if router is not None:
            gates_TN = routing.gate_values(h_TD @ router.router_ND.to(dtype).T, config.gate)
        local_TK = None if self.local_TK is None else self.local_TK.here().long()
        if config.reading == "per_token":
            if gates_TN is not None:
                assert experts is not None
                gates = gates_TN.gather(1, experts)
        else:
            gates = gates_TN if gates_TN is not None else gates
            if gates is not None:
                gates = gates[:, experts]
        self.writes = self.part.store.writes
        return rows_U2D, local_TK, gates, OnDevice(sent, self.loan.sent_rows, experts, gates_TN)

    def let_go(self, there: OnDevice, backward: bool) -> None:
        """The output is made; the rows are not needed any more unless a backward pass will follow."""
        self.gates = self.local_TK = self.experts = None
        if not backward:
            self.loan.release(there.sent)

    # ---- backward ----

    def arrive_again(self, there: OnDevice, dtype: torch.dtype) -> tuple[Tensor, OnDevice]:
        """(the rows of S once more, what lies on the device). Raises RuntimeError when they are gone."""
        part, chosen = self.part, self.chosen
        if part.training:
            # Here and not in forward, which activation checkpointing runs twice.
            part.usage.append((self.tokens, chosen.union_U.shape[0]))
        again = self.loan.released  # a second backward pass over the same graph
        if again or not torch.equal(there.sent_rows, self.loan.sent_rows):  # a checkpoint's second forward kept others
            if part.store.writes != self.writes:
                raise RuntimeError("the rows of this forward pass are gone: the optimizer has made a step since")
            assert part.residency is not None
            self.loan.release(there.sent)
            self.loan = part.residency.lend(chosen.union_U, True)
            there = there._replace(sent=self.loan.arrived(), sent_rows=self.loan.sent_rows)
        return self.loan.rows(there.sent).to(dtype), there

    def room_for_gradients(self, rows_U2D: Tensor) -> Tensor:
        """Memory [U, 2, D] for the rows' gradients; [U, 1, D], values alone, when keys are frozen. Without a GPU,
        memory that take_gradients may read without another copy."""
        union, _, width = rows_U2D.shape
        halves = 1 if self.part.config.frozen_keys else 2
        return self.part.link.scratch((union, halves, width), rows_U2D.dtype, rows_U2D.device)

    def take_gradients(self, grads_UHD: Tensor, there: OnDevice) -> None:
        """The rows' gradients go home, and the rows are not needed any more."""
        self.loan.add_gradients(grads_UHD)
        self.loan.release(there.sent)
        queue = self.part.store.queue
        if queue.background:
            # backward() returns with all gradients in place, as anywhere else: clipping may come next.
            torch.autograd.Variable._execution_engine.queue_callback(queue.wait)

    def to_router(self, grad_gates: Tensor) -> Tensor:
        """The gradient of the gates, [T, K] per token or [T, N] for the union, where the router is."""
        part = self.part
        return grad_gates if part.router is not None else part.link.to_host(grad_gates, "score").float()

    def score_gradient(self, grad_gates: Tensor, there: OnDevice) -> Tensor:
        """Gradient of the router's scores [T, N] from that of the gates, both where the router is."""
        part, chosen = self.part, self.chosen
        on_host = part.router is None
        gates_TN, expert_TK = (chosen.gates_TN, chosen.expert_TK) if on_host else (there.gates_TN, there.experts)
        assert gates_TN is not None
        if part.config.reading == "per_token":
            assert expert_TK is not None
            grad_gates = torch.zeros_like(gates_TN).scatter_add_(1, expert_TK, grad_gates)
        return routing.gate_gradient(grad_gates, gates_TN, part.config.gate)

    def take_router_gradient(self, grad_scores_TN: Tensor, h_TD: Tensor) -> None:
        """The router's gradient: on the device at once, on the host after what is queued there."""
        part = self.part
        if part.router is not None:
            part.router.add_gradient((grad_scores_TN.T @ h_TD).float())
        else:
            assert self.host_h_TD is not None
            part.store.queue.submit(_add_router_gradient, part.store, grad_scores_TN, self.host_h_TD)

    def through_router(self, grad_scores_TN: Tensor, h_TD: Tensor) -> Tensor:
        """The router's share of the gradient of h [T, D], on the device."""
        part = self.part
        if part.router is not None:
            return grad_scores_TN @ part.router.router_ND.to(h_TD.dtype)
        return part.link.to_device(grad_scores_TN @ part.store.router_ND, h_TD.device, "router_hidden", h_TD.dtype)


def _add_router_gradient(store: NeuronStore, grad_scores_TN: Tensor, host_h_TD: Tensor) -> None:
    store.add_router_gradient(grad_scores_TN.T @ host_h_TD)


class HostPart(nn.Module):
    """What a layer's adapter does beside its mathematics. usage lists (real tokens T, U) of every micro-batch that
    training has gone through, backward included. layers: adapters that share device_budget."""

    def __init__(
        self, config: MeftOptions, store: NeuronStore, link: Link | Resident, batch: BatchInfo, layers: int = 1
    ) -> None:
        super().__init__()
        self.config, self.store, self.link, self.batch, self.layers = config, store, link, batch, layers
        self.usage: list[tuple[int, int]] = []
        self.residency: PassingRows | KeptRows | None = None
        self.router: DeviceRouter | None = None
        self.index: KeyIndex | None = None
        self.on_select: Callable[[Tensor, routing.Selection], routing.Selection] | None = None
        """Is given the hidden states [T, D] and what select() chose from them; what it returns is used instead."""
        self.ahead: HostPart | None = None
        """The adapter whose neurons are selected from this layer's hidden states (config.lookahead layers on)."""
        self.selects_itself = True
        """False where an earlier layer's hidden states select for this one."""
        self._waiting: Future | None = None

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
        store.queue.turn(in_background(config, h.device))
        store.source = weakref.ref(self)
        residency = self.residency
        if residency is not None and (residency.device, residency.dtype) == (h.device, dtype):
            return
        self.collect()
        with_router = config.router_on_device
        self.residency = rows_on_device(store, self.link, config, self.layers, h.device, dtype, with_router)
        self.router = DeviceRouter(store, self.link, h.device, dtype) if with_router else None
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

    @property
    def device_bytes(self) -> int:
        """Bytes that stay on the device between micro-batches: kept rows, their gradients, router, key index."""
        kept = [part.nbytes for part in (self.residency, self.router) if part is not None]
        on_device = self.index is not None and self.config.retrieval == "device"
        return sum(kept) + (self.index.nbytes if on_device and self.index is not None else 0)


def in_background(config: EngineConfig, device: torch.device) -> bool:
    """Whether the host's work runs beside that of this device."""
    return config.overlap if config.overlap is not None else device.type == "cuda"


def _host_gates(chosen: routing.Selection, config: MeftOptions) -> Tensor | None:
    """What the device needs of the router: a factor per kept neuron [T, K], or per expert [T, N] for the union."""
    if chosen.gates_TN is None:
        return None
    if config.reading == "union":
        return chosen.gates_TN
    assert chosen.expert_TK is not None
    return chosen.gates_TN.gather(1, chosen.expert_TK)
