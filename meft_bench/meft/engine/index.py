"""A narrow copy of one layer's keys, made for scoring: bf16 or int8, on the host or on the device.

The rows that move and compute stay exact; the copy only decides which ones. A row is copied again when a step changed
it, so a copy costs what its changes cost.
"""

import torch
from torch import Tensor

from meft_bench.meft.link import Link, Resident
from meft_bench.meft.store import NeuronStore


def quantise(keys_UD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [U, D], fp32 scales [U]): symmetric per row, so that int8 * scale is within half a scale of the key."""
    scales_U = keys_UD.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (keys_UD / scales_U[:, None]).round().to(torch.int8), scales_U


class KeyIndex:
    """keys_RD (bf16, or int8 with scales_R fp32) of a store; the scales are None for bf16. With a link it lies on the
    device, and what changed crosses that link; without, beside the store."""

    def __init__(self, store: NeuronStore, kind: str, device: torch.device, link: Link | Resident | None) -> None:
        self.store, self.link, self.device = store, link, device
        neurons, width = store.handle("keys").shape
        self.keys_RD = torch.zeros(
            neurons, width, dtype=torch.int8 if kind == "int8" else torch.bfloat16, device=device
        )
        self.scales_R = torch.zeros(neurons, device=device) if kind == "int8" else None
        self._copied_R = torch.full((neurons,), -1, dtype=torch.int32, device=store.changed_R.device)

    @torch.no_grad()
    def refresh(self, index_U: Tensor | None = None) -> None:
        """Copy those of these rows (of all: None) that changed since they were last copied. The store's keys must be up
        to date for them."""
        store = self.store
        late_R = self._copied_R < store.changed_R
        late_U = late_R.nonzero()[:, 0] if index_U is None else index_U[late_R[index_U]]
        if late_U.numel() == 0:
            return
        keys_UD = store.rows_R2D[:, 0][late_U]
        self._copied_R[late_U] = store.changed_R[late_U]
        narrow_UD, scales_U = quantise(keys_UD) if self.scales_R is not None else (keys_UD.bfloat16(), None)
        if self.link is not None:
            places_U = self.link.to_device(late_U, self.device, "key_index", torch.int32).long()
            narrow_UD = self.link.to_device(narrow_UD, self.device, "key_index")
            scales_U = None if scales_U is None else self.link.to_device(scales_U, self.device, "key_index")
        else:
            places_U = late_U
        self.keys_RD[places_U] = narrow_UD
        if self.scales_R is not None:
            assert scales_U is not None
            self.scales_R[places_U] = scales_U

    @property
    def nbytes(self) -> int:
        return self.keys_RD.nbytes + (self.scales_R.nbytes if self.scales_R is not None else 0)
