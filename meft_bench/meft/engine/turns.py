"""Gradients that the ranks of a node add up in one place, in one order: that of one process with accumulation.

Between two clearings (a window) micro-batch a of rank r is number a * W + r, as samplers deal them out, and each
addition waits for its turn. Nobody stands still for it: what is not due is kept, one micro-batch at most, and made when
this rank comes by again or closes its window. So the sums have the bits of one process, for any number of
micro-batches, and the buffer is one for the node.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meft_bench.meft.engine import kernels
from meft_bench.meft.engine.gradients import RowGradients
from meft_bench.meft.engine.handle import ABOUT
from meft_bench.meft.engine.shared import Board

_WINDOW, _DONE, _CLOSED, _BEGUN = range(4)


class Turns:
    """This rank's additions to one sum of its node. clear: forget what the window before left."""

    COUNTERS = 4

    def __init__(self, board: Board, first: int, clear: Callable[[], None], what: str) -> None:
        """first: the board's counter from which on four are this sum's."""
        self._board, self._first, self._clear, self._what = board, first, clear, what
        self.window = self.made = 0
        self.closed = False
        """Whether this rank has added all that it will in this window."""
        self._waiting: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()

    def add(self, make: Callable[[], None], drop: Callable[[], None]) -> None:
        """Make an addition at its turn; drop is called instead if the window is cleared before. Raises RuntimeError
        in a closed window."""
        if self.closed:
            raise RuntimeError(f"{self._what} after the ranks have summed them: call zero_grad() after each step")
        self._waiting.append((make, drop))
        while self._waiting and self._is_due():
            self._make()
        while len(self._waiting) > 1:
            self._make_waiting()

    def close(self) -> None:
        """Make what waits; this rank adds nothing more until clear()."""
        while self._waiting:
            self._make_waiting()
        if self._board.topology.place == 0 and not self.made:
            # Nobody may have a gradient for it: what the window before left goes all the same.
            self._board.until(self._is_due, self._what)
            self._begin()
        self.closed = True
        self._put(_CLOSED, 1)

    def clear(self) -> None:
        """A new window, unless this one is untouched."""
        untouched = not (self._waiting or self.made or self.closed)
        while self._waiting:
            self._waiting.popleft()[1]()
        if untouched:
            return
        self.window, self.made, self.closed = self.window + 1, 0, False
        self._put(_DONE, 0)
        self._put(_CLOSED, 0)
        self._put(_WINDOW, self.window)

    @property
    def windows(self) -> list[int]:
        """Of all ranks of the node."""
        return [self._get(_WINDOW, place) for place in range(self._board.topology.beside)]

    def _make_waiting(self) -> None:
        self._board.until(self._is_due, self._what)
        self._make()

    def _make(self) -> None:
        self._begin()
        self._waiting.popleft()[0]()
        self.made += 1
        self._put(_DONE, self.made)

    def _begin(self) -> None:
        if max(self._get(_BEGUN, place) for place in range(self._board.topology.beside)) < self.window:
            self._clear()
            self._put(_BEGUN, self.window)

    def _is_due(self) -> bool:
        topology = self._board.topology
        for place in range(topology.beside):
            window = self._get(_WINDOW, place)
            if place == topology.place or window > self.window:  # who is in a later one has thrown this one's away
                continue
            before = self.made + (place < topology.place)
            behind = self._get(_DONE, place) < before and not self._get(_CLOSED, place)
            if window < self.window or behind:
                return False
        return True

    def _put(self, counter: int, value: int) -> None:
        self._board.put(self._first + counter, value)

    def _get(self, counter: int, place: int) -> int:
        return self._board.get(self._first + counter, place)


class SharedGradients(RowGradients):
    """RowGradients of rows that the ranks of a node share: one buffer, added to in turn. The flags and squares of the
    rows are shared too; touched_R is each rank's own and filled when the ranks have summed."""

    def __init__(
        self, grads_RHD: Tensor, filled_R: Tensor, squares_R: Tensor, board: Board, first: int, mine_R: Tensor
    ) -> None:
        """mine_R: the rows that this rank owns."""
        super().__init__(filled_R.shape[0], grads_RHD.device)
        self.buffer_RHD, self.filled_R, self._squares_R = grads_RHD, filled_R, squares_R
        self.turns = Turns(board, first, self._start, "gradients of rows")
        self._mine_R = mine_R

    def _start(self) -> None:
        self.filled_R.zero_()

    def buffer(self, halves: int, width: int, device: torch.device) -> Tensor:
        assert self.buffer_RHD is not None
        if self.buffer_RHD.shape[1] != halves:
            raise ValueError("keys were frozen, or set free, after the optimizer was made: make it anew on every rank")
        return self.buffer_RHD

    def add(self, rows_U: Tensor, grads_UHD: Tensor, release: Callable[[], None] | None) -> None:
        if release is None:
            grads_UHD = grads_UHD.clone()  # the caller may write it again before its turn
        released = release or (lambda: None)

        def make() -> None:
            assert self.buffer_RHD is not None
            kernels.accumulate(self.buffer_RHD.flatten(1), rows_U, grads_UHD.flatten(1), self.filled_R, self._squares_R)
            self.filled_R[rows_U] = True
            released()

        self.turns.add(make, released)

    def summed(self) -> None:
        """All ranks have added, and nodes exchanged, what they have."""
        self.touched_R |= self.filled_R

    def squares_R(self) -> Tensor:
        return self._squares_R.masked_fill(~self.filled_R, 0.0)

    def scale(self, factor: float) -> None:
        self.factor = factor

    def multiply(self) -> None:
        """Multiply the gradients of this rank's rows by the factor."""
        if self.factor == 1.0:
            return
        assert self.buffer_RHD is not None
        for some_U in (self.filled_R & self._mine_R).nonzero()[:, 0].split(256):
            self.buffer_RHD[some_U] = self.buffer_RHD[some_U] * self.factor
            self._squares_R[some_U] = kernels.squares(self.buffer_RHD[some_U].flatten(1))
        self.factor = 1.0

    def fill(self, value: float) -> None:
        """Every rank writes the same."""
        assert self.buffer_RHD is not None
        self.buffer_RHD.fill_(value)
        self.filled_R.fill_(True)
        self.touched_R.fill_(True)
        self.factor = 1.0

    def clear(self, shown: bool) -> None:
        self.turns.clear()
        self.touched_R.zero_()
        self.factor = 1.0

    # Nobody but the engine has the buffer: .grad shows a RanksGradient.

    def watch(self) -> None: ...
    def wrote(self) -> None: ...
    def show(self) -> None: ...
    def write_out(self) -> None: ...

    def zero_half(self, own_RD: Tensor) -> None:
        raise ValueError("gradients of rows that ranks share are cleared together: use zero_grad()")

    def filled_rows(self) -> Tensor:
        return self.filled_R.nonzero()[:, 0]


class RanksGradient(Tensor):
    """What .grad shows of parameters that ranks share. That there is one can be seen; its numbers are sums of all ranks
    in memory of the node, which only the engine may read and write: one rank's in-place change would be everybody's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ValueError(
            "gradients of rows that several ranks share are not for torch functions: clip with "
            "meft_bench.clip_grad_norm_ and step with meft_bench.make_optimizer (or those of the attached model)"
        )

    @classmethod
    def like(cls, parameter: Tensor) -> "RanksGradient":
        """For a parameter, without memory for its numbers."""
        empty = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        return empty.expand(parameter.shape).as_subclass(cls)
