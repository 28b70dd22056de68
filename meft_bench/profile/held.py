"""What MEFT keeps on the device from step to step, by what it is: rows that a device budget buys, the router, keys."""

from collections.abc import Iterable

from torch import Tensor

from meft_bench.meft.engine.host_part import HostPart
from meft_bench.meft.engine.residency import KeptRows
from meft_bench.meft.engine.whole import WholeRows
from meft_bench.meft.store import NeuronStore


def held_by(stores: Iterable[NeuronStore]) -> dict[str, list[Tensor]]:
    """Category -> tensors; without a budget the router alone lies there, or nothing."""
    held: dict[str, list[Tensor]] = {"adapter parameters": [], "gradients": [], "moments": []}
    weights, gradients, moments = held.values()
    for store in stores:
        part = store.source() if store.source is not None else None
        if not isinstance(part, HostPart):
            continue
        rows = part.residency
        if isinstance(rows, KeptRows):
            weights.append(rows.rows_CHD)
            gradients.append(rows.grads_CHD)
        elif isinstance(rows, WholeRows):
            weights.append(rows.rows_R2D)
            gradients.append(rows.grads_RHD)
        if isinstance(rows, KeptRows | WholeRows) and rows.adam is not None:
            for one in rows.adam.parts:
                weights.append(one.weights)
                moments += [one.first, one.second]
        if part.index is not None:
            weights.append(part.index.keys_RD)
        if part.router is not None:
            weights.append(part.router.router_ND)
            gradients.append(part.router.grad_ND)
    return held
