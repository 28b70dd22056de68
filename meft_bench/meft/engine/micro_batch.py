"""One micro-batch of one layer, from what was selected for it to its gradients' way home."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from meft_bench.meft import routing
from meft_bench.meft.engine.budget import ALIGNED
from meft_bench.meft.engine.loans import InPlace, Loan
from meft_bench.meft.engine.products import Rows, always_dense
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


def padded(rows: int, device: torch.device) -> int:
    """How many rows the device computes with for this many of a union; those on top are zeros."""
    return rows if device.type == "cpu" else -(-rows // ALIGNED) * ALIGNED


def _with_room(rows_UX: Tensor, room: int) -> Tensor:
    """The rows, and below them zeros that make them as many as this."""
    if room == rows_UX.shape[0]:
        return rows_UX
    made = torch.empty(room, *rows_UX.shape[1:], dtype=rows_UX.dtype, device=rows_UX.device)
    made[: rows_UX.shape[0]] = rows_UX
    made[rows_UX.shape[0] :] = 0.0
    return made


@dataclass(eq=False)
class MicroBatch:
    """What was selected and lent for one micro-batch of one layer."""

    part: "HostPart"
    loan: Loan
    tokens: int
    """Real tokens T."""
    union: int | Transfer
    """U; a number (int32) on its way where the host has no union."""
    chosen: routing.Selection | None = None
    """What the host selected; None when the device did."""
    host_h_TD: Tensor | None = None
    """fp32 hidden states the host selected from."""
    gates: Transfer | None = None
    """Per token [T, K], or [T, N] for the union; None without gates or when the device makes them."""
    gates_TN: Tensor | None = None
    """Gates of all experts, where the device has made them of this layer's hidden states."""
    dots_TK: Tensor | None = None
    """key . h of the kept neurons, where the device's search has made them."""
    local_TK: Transfer | None = None
    """Each kept neuron's place among the rows that are lent; None for the union reading."""
    experts: Transfer | None = None
    """See OnDevice.experts; for the union reading None where used_R says it."""
    used_R: Tensor | None = None
    """Marks of S on the device, where neurons were selected there."""
    counted_N: Transfer | None = None
    """Marks of the experts whose router rows are updated, where the router is; None: all are."""
    keys_RD: Tensor | None = None
    """Keys of all neurons on the device, where only values are lent."""
    writes: int = 0
    """The store's count of writes when the rows were used."""
    lent: int = 0
    """Rows whose gradients the loan takes: U, R where all of them are lent, or what lies in its blocks."""

    # ---- forward ----

    def arrive(self, h_TD: Tensor) -> tuple[Rows, Tensor | None, Tensor | None, OnDevice]:
        """(rows of S in h's dtype, each kept neuron's place in S [T, K] or None for the union, gates [T, K] or [T, U]
        or None, all that lies on the device). Once; waits for what is on its way."""
        config, dtype = self.part.config, h_TD.dtype
        sent = self.loan.arrived()
        keys = self.dots_TK is None or config.reading == "union"
        rows = self._rows(sent, dtype, keys)
        experts, gates_TN = self._experts(rows.count), self._gates(h_TD)
        gates = None if self.gates is None else self.gates.here().to(dtype)
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
        return rows, local_TK, gates, OnDevice(sent, self.loan.sent_rows, experts, gates_TN)

    def _rows(self, sent: Tensor, dtype: torch.dtype, keys: bool) -> Rows:
        """The rows in dtype, and rows of zeros that round U up (padded()). keys: whether keys are read."""
        loan, device = self.loan, sent.device
        if loan.in_place is not None:
            return self._rows_in_place(loan.in_place, sent, keys)
        rows_UHD = loan.rows(sent)
        union, halves, _ = rows_UHD.shape
        self.lent = union
        room = padded(union, device)
        if halves == 2:
            return Rows.of(_with_room(rows_UHD.to(dtype), room))
        if always_dense(device, dtype):
            there = (self._keys(self._listed(room)).to(dtype),) if keys else ()
            return Rows(there, (_with_room(rows_UHD[:, 0].to(dtype), room),))
        keys_and_values = self._keys(self._listed(union)), rows_UHD[:, 0]
        return Rows.of(torch.stack([half.to(dtype) for half in keys_and_values], dim=1))

    def _rows_in_place(self, where: InPlace, sent: Tensor, keys: bool) -> Rows:
        """The rows where they lie: those in slots, and below them those that were sent. In the wire's dtype, which is
        the model's."""
        slots, room = where.slots_CHD, padded(sent.shape[0], sent.device)
        self.lent = slots.shape[0] + sent.shape[0]
        blocks = (slots, _with_room(sent, room)) if room else (slots,)
        values = tuple(block[:, -1] for block in blocks)
        if not keys:
            there: tuple[Tensor, ...] = ()
        elif slots.shape[1] == 2:
            there = tuple(block[:, 0] for block in blocks)
        else:
            assert where.numbers_P is not None
            numbers = [where.numbers_C, where.numbers_P.here().long(), where.numbers_C[: room - sent.shape[0]]]
            there = (self._keys(torch.cat(numbers)),)
        return Rows(there, values, where_U=where.where_U)

    def _keys(self, numbers_U: Tensor) -> Tensor:
        assert self.keys_RD is not None
        return self.keys_RD.index_select(0, numbers_U)

    def _listed(self, room: int) -> Tensor:
        """The numbers of S on the device, int64, and any others that make them as many as this."""
        assert self.used_R is not None
        numbers_U = routing.listed(self.used_R, self.lent)
        return numbers_U if room == self.lent else torch.nn.functional.pad(numbers_U, (0, room - self.lent))

    def _experts(self, room: int) -> Tensor | None:
        config = self.part.config
        if self.experts is not None:
            experts = self.experts.here().long()
        elif self.used_R is not None and config.trains_router:
            assert isinstance(self.union, int)
            experts = routing.listed(self.used_R, self.union) // config.expert_size
        else:
            return None
        if config.reading == "union":  # zero rows may have any expert's gate
            experts = torch.nn.functional.pad(experts, (0, room - experts.shape[0]))
        return experts

    def _gates(self, h_TD: Tensor) -> Tensor | None:
        """Gates of all experts where the router is on the device."""
        router, gate = self.part.router, self.part.config.gate
        if router is None or gate == "none" or self.gates_TN is not None:
            return self.gates_TN
        return routing.gate_values(h_TD @ router.router_ND.to(h_TD.dtype).T, gate)

    def let_go(self, there: OnDevice, backward: bool) -> None:
        """The output is made; the rows are not needed any more unless a backward pass will follow."""
        self.gates = self.gates_TN = self.dots_TK = self.local_TK = self.experts = None
        if not backward:
            self._release(there)

    def _release(self, there: OnDevice) -> None:
        self.loan.release(there.sent)
        index = self.part.index
        if index is not None:
            index.readers.discard(self)

    # ---- backward ----

    def arrive_again(self, there: OnDevice, dtype: torch.dtype) -> tuple[Rows, OnDevice]:
        """(the rows of S once more, what lies on the device). Raises RuntimeError when they are gone."""
        part = self.part
        if part.store.trains_rows:
            # Here and not in forward, which activation checkpointing runs twice.
            part.count(self.tokens, self.union)
        self.loan.settle()
        again = self.loan.released  # a second backward pass over the same graph
        if again or not torch.equal(there.sent_rows, self.loan.sent_rows):  # a checkpoint's second forward kept others
            part.store.queue.wait()  # a step that is still being made
            if part.store.writes != self.writes:
                raise RuntimeError("the rows of this forward pass are gone: the optimizer has made a step since")
            self.loan.release(there.sent)
            self.loan = self.loan.again()
            there = there._replace(sent=self.loan.arrived(), sent_rows=self.loan.sent_rows)
        return self._rows(there.sent, dtype, keys=True), there

    def room_for_gradients(self, rows: Rows, h_TD: Tensor) -> Tensor:
        """Memory [U, 2, D] for the gradients of rows (Rows.count of them); [U, 1, D], values alone, when keys are
        frozen. Without a GPU, memory that take_gradients may read without another copy."""
        halves = 2 if self.part.store.trains_keys else 1
        return self.part.link.scratch((rows.count, halves, h_TD.shape[1]), h_TD.dtype, h_TD.device)

    def take_gradients(self, grads_UHD: Tensor, there: OnDevice) -> None:
        """The rows' gradients go home, unless rows are frozen, and the rows are not needed any more."""
        store = self.part.store
        if store.trains:
            # On the training loop's side, and not before: .grad may be set to None between forward and backward.
            store.prepare_gradients()
        if store.trains_rows:
            if store.trains_keys and not store.handle("values").requires_grad:
                grads_UHD[:, 1] = 0.0  # they count in no norm
            self.loan.add_gradients(grads_UHD if self.lent == grads_UHD.shape[0] else grads_UHD[: self.lent])
        else:
            self.part.link.release(grads_UHD)
        self._release(there)
        queue = store.queue
        if queue.background or grads_UHD.device.type == "cuda":
            # backward() returns with all gradients in place, as anywhere else: clipping may come next, on the stream
            # that backward() was called on. autograd waits for none but those of parameters on a GPU.
            torch.autograd.Variable._execution_engine.queue_callback(queue.wait)

    def to_router(self, grad_gates: Tensor) -> Transfer:
        """The gradient of the gates, [T, K] per token or [T, N] for the union, on its way to where the router is."""
        part = self.part
        return Transfer(grad_gates) if part.router is not None else part.link.send_to_host(grad_gates, "score")

    def score_gradient(self, sent: Transfer, there: OnDevice) -> Tensor:
        """Gradient of the router's scores [T, N] from what to_router() sent, both where the router is."""
        part, chosen, grad_gates = self.part, self.chosen, sent.here()
        gates_TN, expert_TK = there.gates_TN, there.experts
        if part.router is None:
            assert chosen is not None
            gates_TN, expert_TK, grad_gates = chosen.gates_TN, chosen.expert_TK, grad_gates.float()
        assert gates_TN is not None
        if part.config.reading == "per_token":
            assert expert_TK is not None
            grad_gates = torch.zeros_like(gates_TN).scatter_add_(1, expert_TK, grad_gates)
        return routing.gate_gradient(grad_gates, gates_TN, part.config.gate)

    def take_router_gradient(self, grad_scores_TN: Tensor, h_TD: Tensor) -> None:
        """The router's gradient, unless it is frozen: on the device at once, on the host after what is queued there."""
        part = self.part
        if not part.store.trains_router:
            return
        if self.counted_N is not None:
            grad_scores_TN = grad_scores_TN.masked_fill(~self.counted_N.here(), 0.0)
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
