"""What data would decide: the sizes and values that operations on absent data cannot know, answered from a table.

MEFT asks how many neurons the union of a micro-batch holds (nonzero over R marks). The answers come from the caller,
who says where U is from; anything not foreseen raises, so nothing is invented.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_aten = torch.ops.aten


class Sizes:
    """rows_kept[R] = U: among R marks of host memory, U are set. changed[R]: among R marks that say whether a row's
    copy is older than the row (what `<` makes of versions), so many are set. Booleans reduced to one value are true: no
    token is padding. counted: what a whole number is that the device counted and the host reads (U, where neurons are
    selected on the device). asked lists what was answered, as (operation, answer)."""

    def __init__(
        self, rows_kept: Mapping[int, int], counted: int | None = None, changed: Mapping[int, int] | None = None
    ) -> None:
        self.rows_kept, self.counted, self.changed = dict(rows_kept), counted, dict(changed or {})
        self.asked: list[tuple[str, int]] = []

    def answer(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a data-dependent operation on absent data; NotImplemented for every other operation.

        Raises ValueError for a size that no table entry gives.
        """
        if func is _aten.nonzero.default and isinstance(args[0], FakeTensor):
            count = self._count(args[0])
            return torch.empty(count, args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is _aten.lt.Tensor and isinstance(args[0], FakeTensor) and args[0].dtype == torch.int32:
            marks = func(*args, **kwargs)
            marks.compares_versions = True
            return marks
        if func is _aten.equal.default and isinstance(args[0], FakeTensor):
            # Whether a checkpoint's second forward chose the same rows: weights have not changed since the first.
            self.asked.append(("equal", 1))
            return True
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._scalar(args[0])
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            if any(_is_mask(i) for i in args[1]):
                indices = [place for i in args[1] for place in self._positions(i)]
                return func(args[0], indices, *args[2:], **kwargs)
        return NotImplemented

    def _scalar(self, value: Tensor) -> Any:
        if value.constant is not None:  # type: ignore[attr-defined]
            return NotImplemented
        if value.dtype == torch.bool:
            self.asked.append(("all", 1))
            return True
        if value.dtype.is_floating_point:
            return 1.0  # a loss or a norm on its way to the log
        if self.counted is not None:
            self.asked.append(("count", self.counted))
            return self.counted
        raise ValueError("the code asks for a number that only data could give: give the simulation its value")

    def _count(self, marks: Tensor) -> int:
        table = self.changed if getattr(marks, "compares_versions", False) else self.rows_kept
        if marks.dim() != 1 or marks.shape[0] not in table:
            known = ", ".join(map(str, table)) or "none"
            raise ValueError(f"nonzero over {tuple(marks.shape)} marks: how many are set is known for {known} alone")
        count = table[marks.shape[0]]
        self.asked.append(("nonzero", count))
        return count

    def _positions(self, index: Any) -> list[Any]:
        if not _is_mask(index):
            return [index]
        # Masks over tokens (which positions are supervised): all are, since no token is padding. CUDA, too, turns a
        # mask into one list of positions per axis.
        self.asked.append(("mask", index.numel()))
        return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]


def _is_mask(index: Any) -> bool:
    return isinstance(index, FakeTensor) and index.dtype == torch.bool
