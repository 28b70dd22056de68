"""Selecting a micro-batch's neurons on the device, from its hidden states and a copy of all keys.

The device's own stream does it, in order with what comes before and after, and nobody waits: where all rows are kept
there, the host is not asked for anything. Else marks of the union (R bytes) go to the host, whose worker waits for them
and sends what the device lacks.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meft_bench import observe
from meft_bench.meft import routing
from meft_bench.meft.engine.distinctive import experts_of
from meft_bench.meft.engine.loans import Loan
from meft_bench.meft.engine.micro_batch import MicroBatch
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.engine.workers import RETRIEVAL, Task
from meft_bench.meft.link import Transfer

if TYPE_CHECKING:
    from meft_bench.meft.engine.host_part import HostPart


def start(part: "HostPart", h_TD: Tensor, valid_T: Tensor | None, training: bool, own: bool) -> Task | MicroBatch:
    """Select from hidden states [T, D] on the device and have the rows lent. own: they are this layer's."""
    config, residency = part.config, part.residency
    assert residency is not None
    with observe.part("retrieval", part):
        kept = part.keep(h_TD, valid_T)
    if not own:  # the adapter will see other hidden states
        kept = kept._replace(dots_TK=None, gates_TN=None)
    tokens = h_TD.shape[0] if valid_T is None else int(valid_T.sum())
    used_R, local_TK = routing.mark(kept.neuron_TK, config.neurons, kept.used_R)
    counted_R = part.distinctive.marks(kept.neuron_TK) if training and part.distinctive else None
    if isinstance(residency, WholeRows) and config.reading == "per_token":
        union = part.link.send_to_host(used_R.sum(), "index", torch.int32) if training else 0
        loan = residency.lend_all(kept.neuron_TK, counted_R)
        return _made(part, kept, kept.neuron_TK, loan, tokens, union, counted_R)
    # 0: not in S, 1: in S, 2: in S and updated.
    arriving = part.link.send_to_host(used_R if counted_R is None else used_R.to(torch.uint8) + counted_R, "index")
    given = part, kept, used_R, counted_R, local_TK, arriving, tokens, training
    return part.store.queue.submit(_lend, *given, priority=RETRIEVAL)


def _lend(
    part: "HostPart",
    kept: routing.Kept,
    used_R: Tensor,
    counted_R: Tensor | None,
    local_TK: Tensor,
    arriving: Transfer,
    tokens: int,
    training: bool,
) -> MicroBatch:
    """The host's part: the rows that the device lacks."""
    assert part.residency is not None
    marks_R = arriving.here()
    union_U = marks_R.nonzero()[:, 0]
    counted = None if counted_R is None else (marks_R[union_U] == 2).nonzero()[:, 0]
    loan = part.residency.lend(union_U, training, counted)
    made = _made(part, kept, local_TK, loan, tokens, union_U.shape[0], counted_R)
    made.used_R = used_R
    return made


def _made(
    part: "HostPart",
    kept: routing.Kept,
    local_TK: Tensor,
    loan: Loan,
    tokens: int,
    union: int | Transfer,
    counted_R: Tensor | None,
) -> MicroBatch:
    config, index = part.config, part.index
    made = MicroBatch(part, loan, tokens, union, gates_TN=kept.gates_TN, dots_TK=kept.dots_TK)
    if counted_R is not None and config.trains_router:
        made.counted_N = Transfer(experts_of(counted_R, config))
    if config.reading == "per_token":
        made.local_TK = Transfer(local_TK)
        experts_TK = routing.expert_of(kept.neuron_TK, config)
        made.experts = None if experts_TK is None else Transfer(experts_TK)
    if index is not None and index.scales_R is None:
        made.keys_RD = index.keys_RD
        index.readers.add(made)
    return made


def search(part: "HostPart", h_TD: Tensor, valid_T: Tensor | None) -> routing.Kept:
    """HostPart.keep(): what routing.keep finds in the keys on the device, or on_select made of it."""
    config, index, residency = part.config, part.index, part.residency
    assert part.copies is not None
    part.copies.renew()
    routed = None
    if part.router is not None:
        routed = routing.route(h_TD, part.router.router_ND.to(h_TD.dtype), config)
    if isinstance(residency, WholeRows):
        residency.ready()  # what is lent is used as it is, also where a copy of the keys is searched
    if index is not None:
        keys_RD, scales_R = index.keys_RD, index.scales_R
    else:
        assert isinstance(residency, WholeRows)
        keys_RD, scales_R = residency.rows_R2D[:, 0], None
    there_T = None if valid_T is None else part.batch.valid_there(valid_T, h_TD.device)
    kept = routing.keep(h_TD, keys_RD, routed, config, there_T, scales_R=scales_R)
    if part.on_select is None:
        return kept
    chosen = part.on_select(h_TD, routing.united(kept, config))
    numbers = torch.cat([chosen.union_U, chosen.union_U.new_tensor([-1])])  # place -1 reads the last entry: -1 again
    used_R = torch.zeros(config.neurons, dtype=torch.bool, device=h_TD.device).index_fill_(0, chosen.union_U, True)
    return routing.Kept(numbers[chosen.local_TK], None, kept.gates_TN, used_R)
