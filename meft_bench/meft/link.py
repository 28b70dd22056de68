"""Link: the only door between host and device memory. It makes every copy and counts its bytes.

Without a GPU the "device" is a second arena in the same RAM: the copies are real and the counts are the same.
"""

from collections import Counter

import torch
from torch import Tensor


class Link:
    """Copies tensors between host and device; bytes[(direction, purpose)] holds the running totals.

    Directions are "h2d" and "d2h". Purposes: "hidden" (T x D, to find the neurons), "rows" (keys and values of S),
    "grads" (their gradients); and the overhead the paper's formula leaves out: "index" (which rows a token uses),
    "score" (router scores and their gradients), "router_hidden" (the router's share of the hidden gradient).
    """

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()

    def to_device(self, source: Tensor, device: torch.device, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy on device of a host tensor, cast to dtype before it crosses."""
        return self._copy(source, device, ("h2d", purpose), dtype)

    def to_host(self, source: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy in host memory of a device tensor, cast to dtype before it crosses."""
        return self._copy(source, torch.device("cpu"), ("d2h", purpose), dtype)

    def _copy(self, source: Tensor, target: torch.device, key: tuple[str, str], dtype: torch.dtype | None) -> Tensor:
        wire = source.detach().to(dtype or source.dtype)
        self.bytes[key] += wire.nbytes
        copied = wire.to(target)
        if copied.data_ptr() == source.data_ptr() and source.numel():
            copied = copied.clone()  # same arena and dtype: still a copy, never an alias
        return copied

    def reset(self) -> None:
        """Set all counts to zero."""
        self.bytes.clear()


class Resident:
    """The link of placement="device": rows and hidden states already share a memory, so nothing is copied."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()

    def to_device(self, source: Tensor, device: torch.device, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        return source.detach().to(dtype or source.dtype)

    def to_host(self, source: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        return source.detach().to(dtype or source.dtype)

    def reset(self) -> None:
        pass
