"""The router of one layer on the device, where gates and its gradient are made."""

import torch
from torch import Tensor

from meft_bench.meft.engine.workers import GRADIENTS
from meft_bench.meft.link import Link, Resident, Transfer
from meft_bench.meft.store import NeuronStore


class DeviceRouter:
    """A copy of the router [N, D] on the device, sent once per optimizer step, and its gradient there (fp32)."""

    def __init__(self, store: NeuronStore, link: Link | Resident, device: torch.device, dtype: torch.dtype) -> None:
        self.store, self.link, self.dtype = store, link, dtype
        router = store.handle("router")
        self.router_ND = torch.zeros(router.shape, dtype=dtype, device=device)
        self.grad_ND = torch.zeros(router.shape, device=device)
        self._version, self._filled, self._held = -1, False, False

    @property
    def nbytes(self) -> int:
        return self.router_ND.nbytes + self.grad_ND.nbytes

    def refresh(self) -> None:
        """Send the router if a step changed it (the host's part)."""
        if self._version != self.store.version and not self._held:
            self.router_ND.copy_(self.link.to_device(self.store.router_ND, self.router_ND.device, "router", self.dtype))
            self._version = self.store.version

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
        """Whether the router's optimizer is on the device, which writes router_ND and reads grad_ND."""
        if held:
            self.refresh()
        self._held = held

    def drop(self) -> None:
        """Forget the gradient."""
        self.grad_ND.zero_()
        self._filled = False


def _add_router(store: NeuronStore, home: Transfer) -> None:
    store.add_router_gradient(home.here().float())
