"""One micro-batch of one layer, from what was selected for it to its gradients' way home."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from meft_bench.meft import routing
from meft_bench.meft.engine.loans import Loan
from meft_bench.meft.engine.workers import GRADIENTS
from meft_bench.meft.link import Transfer
from meft_bench.meft.store import NeuronStore

if TYPE_CHECKING:
    from meft_bench.meft.engine.host_part import HostPart


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
            self.loan.release(there.sent)
            self.loan = self.loan.again()
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
            part.store.queue.submit(
                _add_router_gradient, part.store, grad_scores_TN, self.host_h_TD, priority=GRADIENTS
            )

    def through_router(self, grad_scores_TN: Tensor, h_TD: Tensor) -> Tensor:
        """The router's share of the gradient of h [T, D], on the device."""
        part = self.part
        if part.router is not None:
            return grad_scores_TN @ part.router.router_ND.to(h_TD.dtype)
        return part.link.to_device(grad_scores_TN @ part.store.router_ND, h_TD.device, "router_hidden", h_TD.dtype)


def _add_router_gradient(store: NeuronStore, grad_scores_TN: Tensor, host_h_TD: Tensor) -> None:
    store.add_router_gradient(grad_scores_TN.T @ host_h_TD)
