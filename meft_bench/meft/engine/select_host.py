"""Selecting a micro-batch's neurons on the host, from hidden states that crossed."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meft_bench import observe
from meft_bench.meft import routing
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.distinctive import experts_of
from meft_bench.meft.engine.index import NARROW, KeyIndex
from meft_bench.meft.engine.micro_batch import MicroBatch
from meft_bench.meft.engine.workers import RETRIEVAL, Task
from meft_bench.meft.link import Transfer

if TYPE_CHECKING:
    from meft_bench.meft.engine.host_part import HostPart


def start(
    part: "HostPart", h_TD: Tensor, arriving: Transfer, valid_T: Tensor | None, training: bool, own: bool
) -> Task:
    """Queue the host's part for hidden states [T, D] that are arriving there. own: they are this layer's. A router on
    the device finds the experts, which cross beside them."""
    link, config = part.link, part.config
    experts = gates = gates_TN = None
    if part.router is not None:
        assert part.copies is not None
        part.copies.renew()
        routed = routing.route(h_TD, part.router.router_ND.to(h_TD.dtype), config)
        experts = link.send_to_host(routed.experts_TP, "index", torch.int32)
        if routed.gates_TP is not None:
            gates = link.send_to_host(routed.gates_TP, "score")
        gates_TN = routed.gates_TN if own else None
    given = part, arriving, experts, gates, gates_TN, valid_T, training
    return part.store.queue.submit(_lend, *given, priority=RETRIEVAL)


def _lend(
    part: "HostPart",
    arriving: Transfer,
    experts: Transfer | None,
    gates: Transfer | None,
    gates_TN: Tensor | None,
    valid_T: Tensor | None,
    training: bool,
) -> MicroBatch:
    """The host's part: search, and what the device needs of the result. gates_TN: on the device."""
    link, config, residency = part.link, part.config, part.residency
    assert residency is not None
    routed = None
    if experts is not None:
        gates_TP = None if gates is None else gates.here().float()
        routed = routing.Routed(experts.here().long(), gates_TP, None)
    host_h_TD = arriving.here().float()
    with observe.part("retrieval", part):
        chosen = part.select(host_h_TD, valid_T) if routed is None else part.select(host_h_TD, valid_T, routed)
    tokens = host_h_TD.shape[0] if valid_T is None else int(valid_T.sum())
    counted = part.distinctive.places(chosen.union_U, chosen.local_TK) if training and part.distinctive else None
    loan, union = residency.lend(chosen.union_U, training, counted), chosen.union_U.shape[0]
    made = MicroBatch(part, loan, tokens, union, chosen=chosen, host_h_TD=host_h_TD, gates_TN=gates_TN)
    if counted is not None and config.trains_router:
        made.counted_N = _counted_experts(part, chosen.union_U[counted])
    host_gates = None if part.router is not None else _host_gates(chosen, config)
    if host_gates is not None:
        made.gates = link.send_to_device(host_gates, residency.device, "score", residency.dtype)
    if config.reading == "per_token":
        # int32 on the wire, int64 for torch's gathers.
        made.local_TK = link.send_to_device(chosen.local_TK, residency.device, "index", torch.int32)
        if part.router is not None and chosen.expert_TK is not None:
            made.experts = link.send_to_device(chosen.expert_TK, residency.device, "index", torch.int32)
    elif config.trains_router:
        experts_U = chosen.union_U // config.expert_size
        made.experts = link.send_to_device(experts_U, residency.device, "index", torch.int32)
    return made


def search(part: "HostPart", h_TD: Tensor, valid_T: Tensor | None, routed: routing.Routed | None) -> routing.Selection:
    """What routing.select finds in the store's keys, or in the narrow copy that config.scoring asks for."""
    store, index, config = part.store, _scoring_keys(part), part.config
    router_ND = store.router_ND if config.key_experts and routed is None else None
    if valid_T is not None:
        valid_T = valid_T.to(h_TD.device)

    def refresh(probed_N: Tensor | None) -> None:
        # Only what is about to be scored is brought up to date.
        rows_U = None
        if probed_N is not None:
            within = torch.arange(config.expert_size, device=probed_N.device)
            rows_U = (probed_N.nonzero() * config.expert_size + within).flatten()
        store.refresh_keys(rows_U)
        if index is not None:
            index.refresh(rows_U)

    keys_RD = store.rows_R2D[:, 0] if index is None else index.keys_RD
    scales_R = None if index is None else index.scales_R
    return routing.select(h_TD, keys_RD, router_ND, config, valid_T, scales_R=scales_R, routed=routed, refresh=refresh)


def _scoring_keys(part: "HostPart") -> KeyIndex | None:
    if part.config.scoring != "fp32" and part.index is None:
        part.index = KeyIndex(part.store, NARROW[part.config.scoring], part.store.rows_R2D.device, None)
    return part.index


def _counted_experts(part: "HostPart", rows_U: Tensor) -> Transfer:
    """MicroBatch.counted_N of the neurons that are updated."""
    marks_R = torch.zeros(part.config.neurons, dtype=torch.bool, device=rows_U.device)
    marks_N = experts_of(marks_R.index_fill_(0, rows_U, True), part.config)
    if part.router is None:
        return Transfer(marks_N)
    return part.link.send_to_device(marks_N, part.router.router_ND.device, "index")


def _host_gates(chosen: routing.Selection, config: MeftOptions) -> Tensor | None:
    """What the device needs of the router: a factor per kept neuron [T, K], or per expert [T, N] for the union."""
    if chosen.gates_TN is None:
        return None
    if config.reading == "union":
        return chosen.gates_TN
    assert chosen.expert_TK is not None
    return chosen.gates_TN.gather(1, chosen.expert_TK)
