"""The sparse Parallel Adapter of one FFN, and its autograd boundary.

Forward: hidden states go to the host, the host selects neurons, their rows come to the device, the device computes the
adapter's output. Backward: the device computes the gradients of the rows it holds and sends them back. The host's part
may start as soon as the FFN's input is known (prepare) and run beside the FFN. Under torch.compile the adapter is left
as it is, between compiled parts of the base: what the host does is no graph of tensors.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft import routing
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.dense import activate, activation_slope
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.index import KeyIndex
from meft_bench.meft.engine.products import adapter_backward, adapter_forward
from meft_bench.meft.engine.residency import DeviceRouter, KeptRows, Loan, PassingRows, rows_on_device
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore


@dataclass
class BatchInfo:
    """What the layers know of the running micro-batch beyond their input; one object per model."""

    attention_mask: Tensor | None = None
    _seen: tuple[Tensor, int, int, Tensor | None] | None = None

    def valid_tokens(self, h: Tensor) -> Tensor | None:
        """Bool [T] on the host, False for padding; None when every token of h [..., D] is real or unknown.

        With a cache the mask covers past tokens too; the last ones are those of h.
        """
        mask, tokens = self.attention_mask, h.shape[:-1].numel()
        if mask is None or mask.dim() != 2 or tokens % mask.shape[0] or tokens // mask.shape[0] > mask.shape[1]:
            return None
        seen = self._seen
        if seen is None or seen[0] is not mask or seen[1:3] != (mask._version, tokens):
            # Counted in tokens, not by h's shape: OPT hands its FFN all sequences as one. Once per pass, not per layer:
            # fetching the mask waits for all that the device has been given before.
            length = tokens // mask.shape[0]
            valid_T = mask[:, mask.shape[1] - length :].reshape(-1).to("cpu", torch.bool)
            self._seen = seen = mask, mask._version, tokens, None if bool(valid_T.all()) else valid_T
        return seen[3]


def token_mask(mask: Any) -> Tensor | None:
    """The mask [B, length] of which tokens are real, from whatever a model is given as its attention_mask.

    generate with a static cache hands over [B, 1, length, cache], or a dictionary of those by kind of attention: a real
    token sees itself at least, padding sees nothing.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask == 0
        return seen.any(-1)[:, 0]
    return mask


@dataclass
class Prepared:
    """What the host made for one micro-batch of one layer."""

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
    """int32, the expert of each kept neuron [T, K], or of each row of the union [U]; where gates need it."""


class MeftAdapter(nn.Module):
    """adapter(h) of one layer: sum over the kept neurons j of relu(gate_j * key_j . h) * value_j.

    Input and output [..., D] in the model's dtype; fp32 on the host. usage lists (real tokens T, U) of every
    micro-batch that training has gone through, backward included. layers: adapters that share device_budget.
    """

    def __init__(
        self, config: MeftConfig, store: NeuronStore, link: Link | Resident, batch: BatchInfo, layers: int = 1
    ) -> None:
        super().__init__()
        self.config, self.store, self.link, self.batch, self.layers = config, store, link, batch, layers
        self.usage: list[tuple[int, int]] = []
        self.rows: PassingRows | KeptRows | None = None
        self.router: DeviceRouter | None = None
        self.index: KeyIndex | None = None
        self.ahead: MeftAdapter | None = None
        """The adapter whose neurons are selected from this layer's hidden states (config.lookahead layers on)."""
        self.selects_itself = True
        """False where an earlier layer's hidden states select for this one."""
        self._waiting: Future | None = None
        self.on_select: Callable[[Tensor, routing.Selection], routing.Selection] | None = None
        """Is given the hidden states [T, D] and what select() chose from them; what it returns is used instead."""

    @engine
    def forward(self, h: Tensor) -> Tensor:
        # The values ride along as an input so that autograd reaches this layer although the base is frozen.
        # autocast would change dtypes half-way; h's own is kept.
        with torch.autocast(h.device.type, enabled=False):
            if self._waiting is None:
                self.prepare(h)
            return _SparseAdapter.apply(h, self.store.handle("values"), self)

    # ---- the host's part ----

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
                self._waiting = self.store.queue.submit(self._device_part, h.detach(), valid_T, training)
                return
            takers = [a for a in (self if self.selects_itself else None, self.ahead) if a is not None]
            if not takers:
                return
            arriving = self.link.send_to_host(h.detach().reshape(-1, h.shape[-1]), "hidden")
            for taker in takers:
                taker._set_up(h)
                taker._waiting = taker.store.queue.submit(taker._host_part, arriving, valid_T, training)

    def select(self, host_h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        """The neurons of one micro-batch, from host hidden states [T, D] fp32; with retrieval="device" from the
        device's own, and local_TK is there too."""
        chosen = self._selected(host_h_TD, valid_T)
        return chosen if self.on_select is None else self.on_select(host_h_TD, chosen)

    def _selected(self, host_h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        store, index, config = self.store, self._scoring_keys(), self.config
        if config.retrieval == "device":
            return self._select_on_device(host_h_TD, valid_T)
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

    def _set_up(self, h: Tensor) -> None:
        """At the first call: the device and dtype of what will lie there are h's."""
        config, store = self.config, self.store
        dtype = torch.bfloat16 if config.wire == "bf16" else h.dtype
        store.queue.turn(in_background(config, h.device))
        store.source = weakref.ref(self)
        rows = self.rows
        if rows is not None and (rows.device, rows.dtype) == (h.device, dtype):
            return
        self.collect()
        self.rows = rows_on_device(store, self.link, config, self.layers, h.device, dtype)
        self.router = DeviceRouter(store, self.link, h.device, dtype) if config.router_on_device else None
        if config.retrieval == "device":
            self.index = KeyIndex(store, "int8", h.device, self.link)

    def _host_part(self, arriving: Transfer, valid_T: Tensor | None, training: bool) -> Prepared:
        link, config, rows = self.link, self.config, self.rows
        assert rows is not None
        host_h_TD = arriving.here().float()
        with observe.part("retrieval", self):
            chosen = self.select(host_h_TD, valid_T)
        tokens = host_h_TD.shape[0] if valid_T is None else int(valid_T.sum())
        made = Prepared(chosen, host_h_TD, rows.lend(chosen.union_U, training), tokens)
        if self.router is not None:
            self.router.refresh()
        gates = None if self.router is not None else _host_gates(chosen, config)
        if gates is not None:
            made.gates = link.send_to_device(gates, rows.device, "score", rows.dtype)
        if config.reading == "per_token":
            # int32 on the wire, int64 for torch's gathers.
            made.local_TK = link.send_to_device(chosen.local_TK, rows.device, "index", torch.int32)
            if self.router is not None:
                assert chosen.expert_TK is not None
                made.experts = link.send_to_device(chosen.expert_TK, rows.device, "index", torch.int32)
        elif chosen.gates_TN is not None:
            experts_U = chosen.union_U // config.expert_size
            made.experts = link.send_to_device(experts_U, rows.device, "index", torch.int32)
        return made

    def _device_part(self, h: Tensor, valid_T: Tensor | None, training: bool) -> Prepared:
        rows, h_TD = self.rows, h.reshape(-1, h.shape[-1])
        assert rows is not None
        with observe.part("retrieval", self):
            chosen = self.select(h_TD, valid_T)
        tokens = h_TD.shape[0] if valid_T is None else int(valid_T.sum())
        local_TK = Transfer(chosen.local_TK)
        return Prepared(chosen, None, rows.lend(chosen.union_U, training), tokens, local_TK=local_TK)

    def _select_on_device(self, h_TD: Tensor, valid_T: Tensor | None) -> routing.Selection:
        index = self.index
        assert index is not None and index.scales_R is not None
        self.store.refresh_keys()
        index.refresh()
        there = None if valid_T is None else valid_T.to(h_TD.device)
        union_U, local_TK = routing.search_device(h_TD, index.keys_RD, index.scales_R, self.config, there)
        union_U = self.link.to_host(union_U, "index", torch.int32).long()
        return routing.Selection(union_U, local_TK, None, None)

    def take(self) -> Prepared:
        """What prepare() made."""
        if self._waiting is None:
            raise RuntimeError(
                "lookahead selects this layer's neurons from an earlier layer's input, which has not been seen: run "
                "the whole model, without gradient checkpointing (it runs layers again, last one first)"
            )
        future, self._waiting = self._waiting, None
        return self.store.queue.result(future)

    # ---- the device's waiting gradients ----

    @engine
    def collect(self) -> None:
        """Send home the gradients that wait on the device. Nothing waits there without device_budget or lookahead."""
        if self.rows is not None:
            self.rows.collect()
        if self.router is not None:
            self.router.collect()

    @property
    def device_bytes(self) -> int:
        """Bytes that stay on the device between micro-batches: kept rows, their gradients, router, key index."""
        kept = [part.nbytes for part in (self.rows, self.router) if part is not None]
        on_device = self.index is not None and self.config.retrieval == "device"
        return sum(kept) + (self.index.nbytes if on_device and self.index is not None else 0)


def in_background(config: MeftConfig, device: torch.device) -> bool:
    """Whether the host's work runs beside that of this device."""
    return config.overlap if config.overlap is not None else device.type == "cuda"


class _SparseAdapter(torch.autograd.Function):
    """Rows' gradients go to the store, not through autograd. Rows stay on the device from forward to backward."""

    @staticmethod
    def forward(ctx, h: Tensor, values: Tensor, adapter: MeftAdapter) -> Tensor:
        config = adapter.config
        h_TD = h.detach().reshape(-1, h.shape[-1])
        made = adapter.take()
        sent = made.loan.arrived()
        rows_U2D = made.loan.rows(sent).to(h.dtype)
        experts = None if made.experts is None else made.experts.here().long()
        gates = None if made.gates is None else made.gates.here().to(h.dtype)
        gates_TN = None
        if adapter.router is not None:
            gates_TN = routing.gate_values(h_TD @ adapter.router.router_ND.to(h.dtype).T, config.gate)
        if config.reading == "per_token":
            assert made.local_TK is not None
            local_TK = made.local_TK.here().long()
            if gates_TN is not None:
                assert experts is not None
                gates = gates_TN.gather(1, experts)
            out_TD, saved = _per_token_forward(h_TD, rows_U2D, gates, local_TK, config)
        else:
            gates = gates_TN if gates_TN is not None else gates
            if gates is not None:
                gates = gates[:, experts]
            out_TD, saved = _union_forward(h_TD, rows_U2D, gates, config)
        # All that lies on the device is saved this way, so that activation checkpointing can drop it and make it again.
        ctx.save_for_backward(h_TD, sent, made.loan.sent_rows, experts, gates_TN, *saved)
        made.gates = made.local_TK = made.experts = None
        ctx.adapter, ctx.made, ctx.writes = adapter, made, adapter.store.writes
        if not any(ctx.needs_input_grad):
            made.loan.release(sent)
        return out_TD.reshape(h.shape)

    @staticmethod
    @engine
    def backward(ctx, grad: Tensor):
        adapter, made = ctx.adapter, ctx.made
        config, store, link, router, chosen = adapter.config, adapter.store, adapter.link, adapter.router, made.chosen
        h_TD, sent, sent_rows, experts, gates_TN, *saved = ctx.saved_tensors
        if adapter.training:
            # Here and not in forward, which activation checkpointing runs twice.
            adapter.usage.append((made.tokens, chosen.union_U.shape[0]))
        grad_TD = grad.reshape(h_TD.shape).contiguous()
        again = made.loan.released  # a second backward pass over the same graph
        if again or not torch.equal(sent_rows, made.loan.sent_rows):  # a checkpoint's second forward kept other rows
            if store.writes != ctx.writes:
                raise RuntimeError("the rows of this forward pass are gone: the optimizer has made a step since")
            made.loan.release(sent)
            made.loan = adapter.rows.lend(chosen.union_U, True)
            sent = made.loan.arrived()
        rows_U2D = made.loan.rows(sent).to(h_TD.dtype)
        # Without a GPU, memory that add_gradients may read without another copy.
        shape = (rows_U2D.shape[0], 1 if config.frozen_keys else 2, rows_U2D.shape[2])
        grads_UKD = link.scratch(shape, h_TD.dtype, h_TD.device)
        reading = _per_token_backward if config.reading == "per_token" else _union_backward
        grad_h_TD, grad_gates = reading(grad_TD, h_TD, rows_U2D, saved, experts, config, grads_UKD)
        made.loan.add_gradients(grads_UKD)
        made.loan.release(sent)
        if store.queue.background:
            # backward() returns with all gradients in place, as anywhere else: clipping may come next.
            torch.autograd.Variable._execution_engine.queue_callback(store.queue.wait)
        if grad_gates is not None and router is not None:
            scores_TN = _score_gradient(grad_gates, gates_TN, experts, config)
            router.add_gradient((scores_TN.T @ h_TD).float())
            if ctx.needs_input_grad[0]:
                grad_h_TD = grad_h_TD + scores_TN @ router.router_ND.to(h_TD.dtype)
        elif grad_gates is not None:
            grad_gates = link.to_host(grad_gates, "score").float()
            scores_TN = _score_gradient(grad_gates, chosen.gates_TN, chosen.expert_TK, config)
            store.queue.submit(_add_router_gradient, store, scores_TN, made.host_h_TD)
            if ctx.needs_input_grad[0]:
                router_h_TD = link.to_device(scores_TN @ store.router_ND, grad.device, "router_hidden", grad.dtype)
                grad_h_TD = grad_h_TD + router_h_TD
        return grad_h_TD.reshape(grad.shape) if ctx.needs_input_grad[0] else None, None, None


def _add_router_gradient(store: NeuronStore, scores_TN: Tensor, host_h_TD: Tensor) -> None:
    store.add_router_gradient(scores_TN.T @ host_h_TD)


def _host_gates(chosen: routing.Selection, config: MeftConfig) -> Tensor | None:
    """What the device needs of the router: a factor per kept neuron [T, K], or per expert [T, N] for the union."""
    if chosen.gates_TN is None:
        return None
    if config.reading == "union":
        return chosen.gates_TN
    assert chosen.expert_TK is not None
    return chosen.gates_TN.gather(1, chosen.expert_TK)


def _score_gradient(grad_gates: Tensor, gates_TN: Tensor, expert_TK: Tensor | None, config: MeftConfig) -> Tensor:
    """Gradient for the router scores [T, N] from that of the gates: [T, K] per token, [T, N] for the union."""
    if config.reading == "per_token":
        assert expert_TK is not None
        grad_gates = torch.zeros_like(gates_TN).scatter_add_(1, expert_TK, grad_gates)
    return routing.gate_gradient(grad_gates, gates_TN, config.gate)


def _per_token_forward(h_TD, rows_U2D, gates_TK, local_TK, config):
    out_TD, dots_TK = adapter_forward(h_TD, rows_U2D, local_TK, gates_TK, config.activation)
    return out_TD, (local_TK, dots_TK) if gates_TK is None else (local_TK, dots_TK, gates_TK)


def _per_token_backward(grad_TD, h_TD, rows_U2D, saved, experts, config, grads_UKD):
    local_TK, dots_TK, *gates = saved
    grad_h_TD, grad_output_TK = adapter_backward(
        grad_TD, h_TD, rows_U2D, local_TK, dots_TK, gates[0] if gates else None, config.activation, grads_UKD
    )
    return grad_h_TD, grad_output_TK * dots_TK if gates else None


def _union_forward(h_TD, rows_U2D, gates_TU, config):
    keys_UD, values_UD = rows_U2D[:, 0], rows_U2D[:, 1]
    dots_TU = h_TD @ keys_UD.T
    output_TU = dots_TU if gates_TU is None else dots_TU * gates_TU
    saved = (dots_TU,) if gates_TU is None else (dots_TU, gates_TU)
    return activate(output_TU, config.activation) @ values_UD, saved


def _union_backward(grad_TD, h_TD, rows_U2D, saved, experts, config, grads_UKD):
    dots_TU, *gates = saved
    keys_UD, values_UD = rows_U2D[:, 0], rows_U2D[:, 1]
    output_TU = dots_TU * gates[0] if gates else dots_TU
    grad_output_TU = (grad_TD @ values_UD.T) * activation_slope(output_TU, config.activation)
    grad_dots_TU = grad_output_TU * gates[0] if gates else grad_output_TU
    grad_gates_TN = None
    if gates:
        grad_gates_TN = grad_TD.new_zeros(grad_TD.shape[0], config.experts)
        grad_gates_TN.index_add_(1, experts, grad_output_TU * dots_TU)
    if not config.frozen_keys:
        grads_UKD[:, 0] = grad_dots_TU.T @ h_TD
    grads_UKD[:, -1] = activate(output_TU, config.activation).T @ grad_TD
    return grad_dots_TU @ keys_UD, grad_gates_TN
