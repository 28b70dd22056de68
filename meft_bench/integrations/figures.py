"""MEFT's own figures for the training log: rows moved, bytes, seconds on the host, how evenly experts are used."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from meft_bench import observe
from meft_bench.integrations.peft_layer import HostAdapter

_SECONDS = {"retrieval": "host_select_s", "gather": "host_gather_s", "gradients": "host_gradients_s"}
"""Figure of each part of the engine's work."""


class Window:
    """Sums over the training steps since the last reading; what evaluation does in between is not counted.

    with window.micro_batch(): one forward and backward. window.read() gives the figures and starts anew.
    """

    def __init__(self, adapters: list[HostAdapter]) -> None:
        self.adapters, self.link = adapters, adapters[0].link
        self._owners = {id(owner) for adapter in adapters for owner in (adapter, adapter.store)}
        self._lock = threading.Lock()
        self._optimizer_start = 0.0
        self._timed: torch.optim.Optimizer | None = None
        self._clear()

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count the bytes and seconds of what runs inside."""
        with observe.listening(self):
            yield
        for adapter in self.adapters:
            self.passes += len(adapter.usage)
            self._add("rows_touched", sum(rows for _, rows in adapter.usage))
            self.tokens += sum(tokens for tokens, _ in adapter.usage) / len(self.adapters)
            adapter.usage.clear()

    def during(self, work: observe.Work) -> AbstractContextManager[None]:
        """As a listener: copies of these adapters' link, and parts of their work on the host."""
        if work.kind == "copy" and work.about is self.link:
            self._add(f"{work.direction}_bytes", work.nbytes)
        if work.kind == "part" and work.name in _SECONDS and id(work.about) in self._owners:
            return self._seconds(_SECONDS[work.name])
        return nullcontext()

    @contextmanager
    def _seconds(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - start)

    def time_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps of optimizer and their seconds; a trainer that trains twice names the same one again, by
        then inside accelerate's wrapper."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if optimizer is self._timed:
            return
        self._timed = optimizer

        def start(*_: Any) -> None:
            self._optimizer_start = time.perf_counter()

        def stop(*_: Any) -> None:
            self.steps += 1
            self._add("host_optimizer_s", time.perf_counter() - self._optimizer_start)

        optimizer.register_step_pre_hook(start)
        optimizer.register_step_post_hook(stop)

    def read(self) -> dict[str, float]:
        """Means per optimizer step over the window, each under "meft/"; empty when nothing was trained in it.

        rows_touched: rows moved, summed over layers and micro-batches. union_share: U/R, mean over layers and
        micro-batches; kept_share: K/R. h2d_bytes, d2h_bytes: copies by the link; bytes_per_token: both, per real token.
        host_*_s: seconds. expert_entropy: of the kept neurons' experts, from 0 (one expert) to 1 (all alike), mean over
        layers.
        """
        if not self.passes or not self.steps:
            return {}
        config = self.adapters[0].config
        figures = {name: value / self.steps for name, value in self.sums.items()}
        figures["union_share"] = self.sums["rows_touched"] / self.passes / config.neurons
        figures["kept_share"] = config.kept / config.neurons
        figures["bytes_per_token"] = (self.sums["h2d_bytes"] + self.sums["d2h_bytes"]) / max(1.0, self.tokens)
        counts = [a.expert_use for a in self.adapters if a.expert_use is not None and len(a.expert_use) > 1]
        if counts:
            figures["expert_entropy"] = sum(map(evenness, counts)) / len(counts)
        self._clear()
        return {f"meft/{name}": value for name, value in figures.items()}

    def _add(self, name: str, value: float) -> None:
        with self._lock:  # the host's work may run in threads of its own
            self.sums[name] += value

    def _clear(self) -> None:
        self.sums = {name: 0.0 for name in ("h2d_bytes", "d2h_bytes", "rows_touched", "host_optimizer_s")}
        self.sums |= dict.fromkeys(_SECONDS.values(), 0.0)
        self.passes, self.steps, self.tokens = 0, 0, 0.0
        for adapter in self.adapters:
            adapter.usage.clear()
            if adapter.expert_use is not None:
                adapter.expert_use.zero_()


def evenness(counts_N: Tensor) -> float:
    """Entropy of counts_N (N > 1) over log N; 0 when nothing was counted."""
    total = int(counts_N.sum())
    if total == 0:
        return 0.0
    share = counts_N[counts_N > 0].double() / total
    return float(-(share * share.log()).sum() / math.log(len(counts_N)))
