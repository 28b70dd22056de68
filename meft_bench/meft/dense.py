"""What MEFT shares with adapters that are dense: activations and fresh keys. Baselines import these and sites.py alone,
so that the engine of MEFT may change without a word about them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_KEY_STD = 0.02
_PAPER_HIDDEN = 4096


def key_std(hidden_size: int, asked: float | None = None) -> float:
    """Standard deviation of fresh keys: as asked, else the paper's 0.02 scaled to spread key . hidden as at 7B."""
    return asked if asked is not None else PAPER_KEY_STD * math.sqrt(_PAPER_HIDDEN / hidden_size)


def fresh_keys(neurons: int, hidden_size: int, generator: torch.Generator, std: float | None = None) -> Tensor:
    """Keys [R, D] fp32 from N(0, std); shared with the Parallel Adapter so that equal seeds start equal."""
    return torch.randn(neurons, hidden_size, generator=generator) * key_std(hidden_size, std)


def activate(o: Tensor, activation: str) -> Tensor:
    """relu or silu."""
    return F.silu(o) if activation == "silu" else o.relu()


def activation_slope(o: Tensor, activation: str) -> Tensor:
    """Derivative of activate at o; as torch's, 1 for the relu of NaN."""
    if activation == "silu":
        sigmoid = o.sigmoid()
        return sigmoid * (1 + o * (1 - sigmoid))
    return (~(o <= 0)).to(o.dtype)
