"""What lies on the device to select with, the router and the keys of one layer, as the last optimizer step left it."""

from typing import Any

from meft_bench.meft.engine.device_router import DeviceRouter
from meft_bench.meft.engine.index import Changed, KeyIndex
from meft_bench.meft.engine.workers import LATER, RETRIEVAL, Task
from meft_bench.meft.link import Transfer
from meft_bench.meft.store import NeuronStore


class DeviceCopies:
    """Either part may be absent. What a step changed is sent as part of the host's work after the step; a training loop
    that finds nothing changed does not ask the host."""

    def __init__(self, store: NeuronStore, router: DeviceRouter | None, keys: KeyIndex | None) -> None:
        self.store, self.router, self.keys = store, router, keys
        self._coming: list[Task] = []

    def send(self, priority: int = LATER) -> None:
        """Queue the sending of what has changed by then. After an optimizer step, which may itself be queued."""
        self._coming.append(self.store.queue.submit(self._send, priority=priority))

    def renew(self) -> None:
        """Bring the copies up to date on the current stream, before the device selects. Waits for the host where it
        still works on what changed."""
        self.take()
        while self._behind():
            self.send(RETRIEVAL)
            self.take()

    def _behind(self) -> bool:
        return any(part is not None and not self.store.is_at(part.version) for part in (self.router, self.keys))

    def _send(self) -> tuple[Transfer | None, Changed | None]:
        router = None if self.router is None else self.router.send()
        try:
            return router, None if self.keys is None else self.keys.send()
        except BaseException:
            if self.router is not None:
                self.router.version = -1  # what was sent will not be taken
            raise

    def take(self) -> None:
        """Write what is on its way, on the current stream."""
        try:
            # All of them before the first is written: then no row comes under the device's optimizer in between.
            arrived = [self.store.queue.result(task) for task in self._coming]
        except BaseException:  # an interrupt, say: what goes on arriving is taken later, what has failed is sent anew
            self._coming = [task for task in self._coming if not task.done() or task.exception() is None]
            raise
        self._coming = []
        for router, keys in arrived:
            if router is not None and self.router is not None:
                self.router.take(router)
            if keys is not None and self.keys is not None:
                self.keys.take(keys)

    def __getstate__(self) -> dict[str, Any]:
        self.take()
        return self.__dict__.copy()
