"""What .grad of a store's parameters shows, and where gradients start anew; share.py says it for several ranks."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from meft_bench.meft.engine.workers import UPDATE

if TYPE_CHECKING:
    from meft_bench.meft.store import NeuronStore


def prepare(store: "NeuronStore") -> None:
    """NeuronStore.prepare_gradients()."""
    parts: list[tuple[nn.Parameter, Tensor]] = []
    if store.handle("values").requires_grad:
        parts.append((store.handle("values"), store.gradients()[:, -1]))
    if store.trains_keys:
        parts.append((store.handle("keys"), store.gradients()[:, 0]))
    if store.trains_router:
        parts.append((store.handle("router"), store.router_gradient()))
    absent = [own for parameter, own in parts if parameter.grad is None]
    if parts and len(absent) == len(parts):
        store.queue.submit(clear, store, False, priority=UPDATE)
    else:
        for own in absent:
            store.queue.submit(_clear_part, store, own, priority=UPDATE)
    for parameter, own in parts:
        given = parameter.grad
        if given is None:
            parameter.grad = own
        elif given.data_ptr() != own.data_ptr():  # a gradient that somebody else put there
            store.queue.wait()
            store.grads.write_out()
            own.copy_(given)
            parameter.grad = own


def _clear_part(store: "NeuronStore", own: Tensor) -> None:
    if store.trains_router and own.data_ptr() == store.router_gradient().data_ptr():
        own.zero_()
    else:
        store.grads.zero_half(own)


def clear(store: "NeuronStore", shown: bool) -> None:
    """Forget all gradients. shown: somebody may still hold what .grad gave him."""
    if store.share is not None:
        store.share.clear()
        return
    store.grads.clear(shown)
    store.clear_router_gradient()
