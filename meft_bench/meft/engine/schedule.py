"""The constants of AdamW's steps, remembered for rows whose steps are made later, and what its settings may be."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meft_bench.meft.engine import adamw

MARGIN = 16.0
"""How far above the largest rate so far still rows are tested, so that a growing rate seldom wakes them: one that
grows a hundredfold does so twice."""
LARGEST = torch.finfo(torch.float32).max
_TABLE_GROWTH = 1024


class Schedule:
    """The constants of every step since `first`, in a table that grows; betas and eps stay."""

    def __init__(self, first: int, betas: Sequence[float], eps: float) -> None:
        self.first, self.betas, self.eps, self.withstood = first, (betas[0], betas[1]), eps, 0.0
        self._table, self._used = torch.empty(0, 3), 0

    def goes_on(self, group: dict[str, Any]) -> bool:
        """Whether these are still the group's betas and eps."""
        return (tuple(group["betas"]), group["eps"]) == (self.betas, self.eps)

    def add(self, step: int, lr: float, weight_decay: float) -> None:
        """The next step."""
        entry = step_constants(step, lr, self.betas, weight_decay)
        if self._used == len(self._table):
            self._table = torch.cat([self._table, torch.empty(_TABLE_GROWTH, 3)])
        self._table[self._used] = torch.tensor(entry)
        self._used += 1
        if entry[0] > self.withstood:
            self.withstood = MARGIN * entry[0]

    def constants(self) -> adamw.Steps:
        beta1, beta2 = self.betas
        return adamw.Steps(self._table[: self._used], self.first, beta1, beta2, self.eps, self.withstood)


def step_constants(step: int, lr: float, betas: Sequence[float], weight_decay: float) -> tuple[float, float, float]:
    """(lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - lr * weight_decay) of step t, counted from 1."""
    beta1, beta2 = betas
    return lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), 1 - lr * weight_decay


def lazy_table(most: int, lr: float, betas: Sequence[float], weight_decay: float) -> Tensor:
    """Constants [most, 3] of a row's first, second, ... update, all at today's rate."""
    return torch.tensor([step_constants(t, lr, betas, weight_decay) for t in range(1, most + 1)]).view(-1, 3)


def check_settings(group: dict[str, Any]) -> None:
    """Raises ValueError naming the first of lr, betas, eps and weight_decay that is no number AdamW can take in fp32:
    none may be negative, NaN, infinite or above 3.4e38, and betas must lie below 1."""
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be two numbers from 0 to below 1")
    for number in betas:
        check_number("betas", number)
        if not float(number) < 1:
            raise ValueError(f"betas={betas!r} must lie below 1")
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if not max(lr / (1 - float(betas[0])), lr * weight_decay) <= LARGEST:  # of all steps, the first's rate is largest
        raise ValueError(f"lr={lr} overflows fp32 with betas={betas} and weight_decay={weight_decay}: lower it")


def check_number(name: str, number: Any) -> None:
    """Raises ValueError unless number is one from 0 to the largest of fp32."""
    try:
        value = math.nan if isinstance(number, bool | str) else float(number)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{name}={number!r} must be a number from 0 to 3.4e38")
