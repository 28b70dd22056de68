"""The host's part of one layer: which neurons a micro-batch keeps, their way to the device, their gradients' way home.

prepare() starts it as soon as the FFN's input is known, so that it may run beside the FFN; take() gives the layer
(layer.py) the MicroBatch that came of it. Whether that work runs in the background, is done from an earlier layer's
hidden states, or is done on the device instead is decided here (EngineConfig), and the layer's mathematics is the same
either way. Under torch.compile the adapter is left as it is, between compiled parts of the base: what the host does is
no graph of tensors.
"""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meft_bench.meft import routing
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import select_device, select_host
from meft_bench.meft.engine.budget import keys_are_int8, split
from meft_bench.meft.engine.config import EngineConfig
from meft_bench.meft.engine.device_copies import DeviceCopies
from meft_bench.meft.engine.device_router import DeviceRouter
from meft_bench.meft.engine.distinctive import Distinctive
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.index import KeyIndex
from meft_bench.meft.engine.micro_batch import MicroBatch
from meft_bench.meft.engine.residency import KeptRows, PassingRows, may_be_in_place, rows_on_device
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.engine.workers import LATER, Task
from meft_bench.meft.link import GPUS, Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore

if TYPE_CHECKING:
    from meft_bench.meft.engine.updates import StoreUpdates


class HostPart(nn.Module):
    """What a layer's adapter does beside its mathematics. usage lists (real tokens T, U) of every micro-batch that
    training has gone through, backward included. layers: adapters that share device_budget."""

    def __init__(
        self, config: MeftOptions, store: NeuronStore, link: Link | Resident, batch: BatchInfo, layers: int = 1
    ) -> None:
        super().__init__()
        self.config, self.store, self.link, self.batch, self.layers = config, store, link, batch, layers
        self.usage: list[tuple[int, int]] = []
        self._uncounted: list[tuple[int, int | Transfer]] = []
        """For usage, where a U is on its way from the device; they are read when gradients are collected."""
        self.residency: PassingRows | KeptRows | WholeRows | None = None
        self._former: list[KeptRows | WholeRows] = []
        """Those before it, of another device or dtype, that graphs still read and bring gradients to."""
        self._trained = False, False
        """Whether keys and router got gradients when it was made."""
        self.router: DeviceRouter | None = None
        self.index: KeyIndex | None = None
        """A copy of the keys to score with, beside the store or on the device."""
        self.copies: DeviceCopies | None = None
        self.distinctive = Distinctive(config) if config.is_distinctive else None
        """Which of S are updated; None updates all of it."""
        self.on_select: Callable[[Tensor, routing.Selection], routing.Selection] | None = None
        """Is given the hidden states [T, D] and what select() chose from them; what it returns is used instead."""
        self.ahead: HostPart | None = None
        """The adapter whose neurons are selected from this layer's hidden states (config.lookahead layers on)."""
        self.selects_itself = True
        """False where an earlier layer's hidden states select for this one."""
        self.looked_at_each_step = False
        """Whether the training loop is known to look at gradients in every step: then no optimizer could stay on the
        device, and none is bought there."""
        self.selects_on_device = False
        """Whether neurons are found where the hidden states are; known from the first micro-batch on."""
        self._waiting: dict[int, Task | MicroBatch] = {}
        """What prepare() made, by the thread that called it: a server may run the model in several at once."""

    # ---- one micro-batch ----

    def prepare_early(self, h: Tensor) -> None:
        """prepare(h) before the FFN runs, where that lets the host work beside it or an earlier layer selects."""
        if self.config.lookahead or in_background(self.config, h.device):
            self.prepare(h)

    @engine
    def prepare(self, h: Tensor) -> None:
        """Start the host's part for hidden states h [..., D], which forward() is called with next. It runs in the
        background where config.overlap says so, and gives the same either way. A pass that may have a backward pass is
        one of training, in eval mode too."""
        graph, thread = torch.is_grad_enabled(), threading.get_ident()
        with torch.no_grad():
            self._set_up(h)
            valid_T = self.batch.valid_tokens(h)
            takers = [a for a in (self if self.selects_itself else None, self.ahead) if a is not None]
            for taker in takers:
                if taker.distinctive is not None and graph and taker.store.trains_rows:
                    taker.distinctive.require()  # here, where the caller hears it
            if not takers:
                return
            h_TD = h.detach().reshape(-1, h.shape[-1])
            arriving = None if self.selects_on_device else self.link.send_to_host(h_TD, "hidden")
            for taker in takers:
                taker._set_up(h)
                own, training = taker is self, graph and taker.store.trains_rows
                if arriving is None:
                    taker._waiting[thread] = select_device.start(taker, h_TD, valid_T, training, own)
                else:
                    taker._waiting[thread] = select_host.start(taker, h_TD, arriving, valid_T, training, own)

    @property
    def is_prepared(self) -> bool:
        """Whether take() has something to give."""
        return threading.get_ident() in self._waiting

    def take(self) -> MicroBatch:
        """What prepare() made."""
        made = self._waiting.pop(threading.get_ident(), None)
        if made is None:
            raise RuntimeError(
                "lookahead selects this layer's neurons from an earlier layer's input, which has not been seen: run "
                "the whole model, without gradient checkpointing (it runs layers again, last one first)"
            )
        return made if isinstance(made, MicroBatch) else self.store.queue.result(made)

    def _set_up(self, h: Tensor) -> None:
        """At the first call: the device and dtype of what will lie there are h's, and what is trained has room for its
        gradients. Anew where these change."""
        config, store = self.config, self.store
        dtype = torch.bfloat16 if config.wire == "bf16" else h.dtype
        store.queue.turn(in_background(config, h.device), h.device)
        store.queue.follow()
        store.source = weakref.ref(self)
        residency, trained = self.residency, (store.trains_keys, store.trains_router)
        has_room = trained == self._trained or not store.trains
        if residency is not None and (residency.device, residency.dtype) == (h.device, dtype) and has_room:
            if isinstance(residency, KeptRows):  # the model's dtype may be another one, and the wire's the same
                residency.may_be_in_place = may_be_in_place(config, residency, h.dtype)
            return
        if residency is not None and not has_room:  # as in host memory (RowGradients.buffer), gradients start anew
            store.queue.wait()
            self._drop(residency)
        self._trained = trained
        store.come_home()
        self.collect()
        if isinstance(residency, KeptRows | WholeRows) and residency.loans:
            residency.adam = None
            self._former.append(residency)
        no_cpu = h.device.type != "cpu"
        on_host = store.share is not None or self.looked_at_each_step
        bought = split(config, self.layers, h.shape[-1], h.dtype, router_there=no_cpu, host_optimizer=on_host)
        self.selects_on_device, int8 = bought.keys, keys_are_int8(config)
        # A GPU finds the experts of a host that searches, too.
        has_router = config.key_experts and config.placement == "host" and (bought.router or no_cpu)
        self.router = DeviceRouter(store, self.link, h.device, dtype) if has_router else None
        self.residency = rows_on_device(store, self.link, config, bought, self.router, h.device, dtype)
        if isinstance(self.residency, KeptRows):
            self.residency.may_be_in_place = may_be_in_place(config, self.residency, h.dtype)
        self.index = None
        if bought.keys and (int8 or not isinstance(self.residency, WholeRows)):
            self.index = KeyIndex(store, torch.int8 if int8 else dtype, h.device, self.link)
        if isinstance(self.residency, KeptRows) and self.residency.adam is not None and bought.keys and not int8:
            self.residency.adam.index = self.index
        self.copies = DeviceCopies(store, self.router, self.index if bought.keys else None)

    # ---- selecting ----

    def select(self, h_TD: Tensor, valid_T: Tensor | None, routed: routing.Routed | None = None) -> routing.Selection:
        """The neurons of one micro-batch, from hidden states [T, D] where they are searched: fp32 on the host, or the
        device's own. routed: what a router on the device has said of them."""
        if self.selects_on_device:
            return routing.united(self.keep(h_TD, valid_T), self.config)
        chosen = select_host.search(self, h_TD, valid_T, routed)
        return chosen if self.on_select is None else self.on_select(h_TD, chosen)

    def keep(self, h_TD: Tensor, valid_T: Tensor | None) -> routing.Kept:
        """The neurons that each token keeps, found on the device from its hidden states [T, D]; on the current stream,
        and without the host where no step changed router or keys since."""
        return select_device.search(self, h_TD, valid_T)

    def stepped(self) -> None:
        """An optimizer has queued a step: the host's work goes on with what it changes on the device."""
        if self.selects_on_device and isinstance(self.residency, WholeRows):
            self.store.queue.submit(self.residency.renew, priority=LATER)
        if self.copies is not None:
            self.copies.send()

    # ---- what stays on the device ----

    @engine
    def collect(self) -> None:
        """Send home the gradients that wait on the device. Nothing waits there without device_budget or lookahead."""
        self.store.queue.follow()
        for rows in (self.residency, *self._former):
            if rows is not None:
                rows.collect()
        self._former = [rows for rows in self._former if rows.loans]
        if self.router is not None:
            self.router.collect()
        uncounted, self._uncounted = self._uncounted, []
        for tokens, union in uncounted:
            self.usage.append((tokens, int(union.here()) if isinstance(union, Transfer) else union))

    def _drop(self, residency: PassingRows | KeptRows | WholeRows) -> None:
        """Forget all gradients that wait on the device."""
        for part in (residency, self.router):
            if part is not None and not isinstance(part, PassingRows):
                part.drop()

    def count(self, tokens: int, union: int | Transfer) -> None:
        """Note T and U of a micro-batch whose backward pass begins."""
        if isinstance(union, int) and not self._uncounted:
            self.usage.append((tokens, union))
        else:
            self._uncounted.append((tokens, union))

    def take_optimizer(self, updates: "StoreUpdates") -> None:
        """Gradients were cleared: the optimizer of rows that device_budget pays for goes to the device."""
        if self.store.share is not None:
            return  # the node's ranks make its steps, where its rows are
        if isinstance(self.residency, KeptRows | WholeRows) and self.residency.adam is not None:
            self.store.queue.submit(self.residency.adam.take, updates, priority=LATER)

    def __getstate__(self) -> dict[str, Any]:
        if self.copies is not None:
            self.copies.take()  # before router and keys are copied, which count it as there
        return self.__dict__.copy()

    @property
    def device_bytes(self) -> int:
        """Bytes that stay on the device between micro-batches: kept rows, their gradients, router, key index."""
        kept = [part.nbytes for part in (self.residency, self.router) if part is not None]
        return sum(kept) + (self.index.nbytes if self.index is not None and self.selects_on_device else 0)


def in_background(config: EngineConfig, device: torch.device) -> bool:
    """Whether the host's work runs beside that of this device."""
    return config.overlap if config.overlap is not None else device.type in GPUS
