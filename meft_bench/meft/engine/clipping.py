"""The global norm of all gradients, and the factor that clips them."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from meft_bench.meft.engine.device_adam import squares_elsewhere
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.kernels import in_pairs
from meft_bench.meft.engine.schedule import check_number
from meft_bench.meft.store import NeuronStore


@torch.no_grad()
@engine
def clip_grad_norm(stores: Iterable[NeuronStore], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ over all gradients of the stores, at next to no cost: the squares were taken while
    gradients were added up, and the factor is multiplied in when AdamW, or somebody who looks, reads them.

    Returns the norm before clipping (scalar fp32), the same to the bit for every number of threads. Waits for gradients
    on their way. As torch's, an infinite max_norm only measures, and a norm of NaN makes every gradient NaN. Raises
    ValueError for a max_norm that is NaN or negative. Where several ranks train the stores, all of them call it, and
    the gradients are sums over them.
    """
    if max_norm != math.inf:
        check_number("max_norm", max_norm)
    stores, total = list(stores), 0.0
    for team in dict.fromkeys(store.team for store in stores):
        if team is not None:
            team.sum_to_measure()
    for store in stores:
        store.prepare_gradients()
        store.queue.wait()
        for squares in store.squares():
            total += float(in_pairs(squares))
    away = [store.away for store in stores if store.away is not None]
    if away:
        total += float(squares_elsewhere(away))
    norm = torch.tensor(math.sqrt(total) if total >= 0 else math.nan, dtype=torch.float32)
    factor = max_norm / (float(norm) + 1e-6)
    if not factor >= 1:
        for rows in away:
            rows.scale(factor)
    for store in stores:
        if math.isnan(factor):
            store.fill_gradients(math.nan)
        elif factor < 1:
            store.scale_gradients(factor)
    return norm
