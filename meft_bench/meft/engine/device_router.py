"""The router of one layer on the device, where experts, gates and its gradient are made."""

import torch
from torch import Tensor

from meft_bench.meft.engine.workers import GRADIENTS
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore


class DeviceRouter:
    """A copy of the router [N, D] on the device, sent once per optimizer step if it is trained, and its gradient there
    (fp32)."""

    def __init__(self, store: NeuronStore, link: Link | Resident, device: torch.device, dtype: torch.dtype) -> None:
        self.store, self.link, self.dtype = store, link, dtype
        router = store.handle("router")
        self.router_ND = torch.zeros(router.shape, dtype=dtype, device=device)
        self.grad_ND = torch.zeros(router.shape if store.trains_router else (0,), device=device)
        self.version, self._filled, self._held = -1, False, False

    @property
    def nbytes(self) -> int:
        return self.router_ND.nbytes + self.grad_ND.nbytes

    def send(self) -> Transfer | None:
        """The host's part of renewing the copy: send the router if a step, or somebody, changed it."""
        store = self.store
        store.watch()
        late = self.version < (store.version if store.trains_router else store.written)
        sent = None
        if late and not self._held:
            sent = self.link.send_to_device(store.router_ND, self.router_ND.device, "router", self.dtype)
        self.version = store.version  # only now: a copy that could not be made is made anew
        return sent

    def take(self, sent: Transfer) -> None:
        """The device's part, on the current stream."""
        if not self._held:  # what was sent before its optimizer came here is no news
            self.router_ND.copy_(sent.here())

    def add_gradient(self, grad_ND: Tensor) -> None:
        self.grad_ND.add_(grad_ND)
        self._filled = True

    def collect(self) -> None:
        """Send the gradient home, unless it is used here."""
        if self._filled and not self._held:
            home = self.link.send_to_host(self.grad_ND.clone(), "router", self.dtype)
            self.store.queue.submit(_add_router, self.store, home, priority=GRADIENTS)
            self.grad_ND.zero_()
            self._filled = False

    def hold(self, held: bool) -> None:
        """Whether the router's optimizer is on the device, which writes router_ND and reads grad_ND. The host's memory
        is what router_ND holds at this moment. Once it is there again it is sent again, after what may be on its way
        from before."""
        self._held, self.version = held, self.store.version if held else -1
        self._filled = self._filled or not held  # what waits here may go home again

    def drop(self) -> None:
        """Forget the gradient."""
        self.grad_ND.zero_()
        self._filled = False


def _add_router(store: NeuronStore, home: Transfer) -> None:
    store.add_router_gradient(home.here().float())
