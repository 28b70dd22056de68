"""Which tokens of a micro-batch are real: padding selects no neurons."""

import threading
from typing import Any

import torch
from torch import Tensor


class BatchInfo:
    """What the layers know of the running micro-batch beyond their input; one object per model."""

    def __init__(self, attention_mask: Tensor | None = None) -> None:
        self._masks: dict[int, Tensor] = {}
        """attention_mask by thread: a server may run the model in several at once."""
        self.repeated_mask: Tensor | None = None
        """That of the pass of which backward runs a part again (activation checkpointing): the newest unless known."""
        self._seen: tuple[Tensor, int, Tensor | None] | None = None
        self._there: tuple[Tensor, Tensor] | None = None
        """What valid_tokens() gave, on the host and on the device."""
        self.attention_mask = attention_mask

    def begin(self, mask: Tensor | None) -> None:
        """A forward pass begins, with this attention mask."""
        self.attention_mask = self.repeated_mask = mask
        self._seen = None  # the mask may be the same tensor with other numbers

    @property
    def attention_mask(self) -> Tensor | None:
        """[B, length] of the forward pass that runs in this thread, as begin() was told."""
        return self._masks.get(threading.get_ident())

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:
        if mask is None:
            self._masks.pop(threading.get_ident(), None)
        else:
            self._masks[threading.get_ident()] = mask

    def valid_tokens(self, h: Tensor) -> Tensor | None:
        """Bool [T] on the host, False for padding; None when every token of h [..., D] is real or unknown.

        With a cache the mask covers past tokens too; the last ones are those of h.
        """
        mask, tokens = self.attention_mask, h.shape[:-1].numel()
        if mask is None and torch._C._current_graph_task_id() != -1:  # within backward
            mask = self.repeated_mask
        if mask is None or mask.dim() != 2 or tokens % mask.shape[0] or tokens // mask.shape[0] > mask.shape[1]:
            return None
        seen = self._seen
        if seen is None or seen[0] is not mask or seen[1] != tokens:
            # Counted in tokens, not by h's shape: OPT hands its FFN all sequences as one. Once per pass, not per layer:
            # fetching the mask waits for all that the device has been given before.
            length = tokens // mask.shape[0]
            valid_T = mask[:, mask.shape[1] - length :].reshape(-1).to("cpu", torch.bool)
            self._seen = seen = mask, tokens, None if bool(valid_T.all()) else valid_T
        return seen[2]

    def valid_there(self, valid_T: Tensor, device: torch.device) -> Tensor:
        """What valid_tokens() gave, bool [T], on this device. Sent once per pass, not per layer: a GPU's copy of memory
        that is not page-locked waits for all that it has been given before."""
        there = self._there
        if there is None or there[0] is not valid_T or there[1].device != device:
            self._there = there = valid_T, valid_T.to(device)
        return there[1]


def token_mask(mask: Any) -> Tensor | None:
    """The mask [B, length] of which tokens are real, from whatever a model is given as its attention_mask.

    generate with a static cache hands over [B, 1, length, cache], or a dictionary of those by kind of attention: a real
    token sees itself at least, padding sees nothing.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask == 0
        return seen.any(-1)[:, 0]
    return mask
