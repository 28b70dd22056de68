"""The gradients of one store's rows, in host memory, touched as little as a step allows.

What is added up is written once and read once, by AdamW: nothing is zeroed, as a row's first gradient overwrites what
an earlier step left; what clipping multiplies by is a number that AdamW takes with it; and the first batch of a step is
kept as it arrived until a second one comes. The squares for the global norm are taken while gradients are added up, or
as the only gradients of a step arrive, beside the backward pass.

.grad is a view of the buffer. Somebody who looks at it may keep it, so from then on it is right at every moment, at the
cost of the passes over memory that are saved otherwise, until he sets .grad to None.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_bench.meft.engine import kernels, memory

_LOOK_ROWS = 1024  # of gradients that are looked at at once
_SCALE_ROWS = 256  # rows copied at once when gradients are multiplied or measured


@dataclass(frozen=True)
class Arrived:
    """The only gradients of a step, as they came."""

    rows_U: Tensor
    """int64, no repeats."""
    grads_UHD: Tensor
    """fp32, bf16 or fp16."""
    release: Callable[[], None]
    """Gives their memory back."""
    measured: bool
    """Whether their squares were taken as they came."""


class RowGradients:
    """Gradients [R, H, D] of R rows: H = 2, keys and values, or 1, values alone. Used by one thread at a time."""

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.filled_R = torch.zeros(neurons, dtype=torch.bool, device=device)
        """Rows that have a gradient: which may differ from zero."""
        self.touched_R = torch.zeros_like(self.filled_R)
        """Rows that got a gradient since the optimizer's last step."""
        self._squares_R = torch.zeros(neurons, dtype=torch.float64, device=device)
        self._measured_R = torch.zeros_like(self.filled_R)
        """Filled rows whose entry in squares is that of their gradient before `factor`."""
        self._all_measured = True
        """Whether they are all of the filled rows, but for gradients that are kept as they arrived: nobody need look
        for others."""
        self._stale_R = torch.zeros_like(self.filled_R)
        """Rows without a gradient whose memory is not zero."""
        self._none_R = torch.zeros_like(self.filled_R)
        self.buffer_RHD: Tensor | None = None
        self._seen = 0
        self.arrived: Arrived | None = None
        self.factor = 1.0
        """What all gradients are to be multiplied by, in fp32."""
        self.empty = True
        """Whether no row is filled."""
        self.shown = False
        """Whether somebody may hold the buffer (.grad)."""
        self.lent = False
        """Whether somebody was given it since watch() last looked: not every write counts up a version (.grad.data)."""
        self.measures_arrived = False
        """Whether gradients that are kept as they arrive are measured at once. The last norm says so: where it was of
        several micro-batches, or nobody asks for it, the pass over them would be for nothing."""

    def buffer(self, halves: int, width: int, device: torch.device) -> Tensor:
        """What .grad shows, fp32 [R, H, D]; made anew, without gradients, when its shape or device changed."""
        buffer = self.buffer_RHD
        if buffer is None or buffer.shape[1] != halves or buffer.device != device:
            self._let_go()
            if buffer is not None:
                buffer.zero_()  # .grad may still be a view of it, and would be taken for somebody's gradient
            shape = (self.filled_R.shape[0], halves, width)
            buffer = self.buffer_RHD = memory.empty(shape, torch.float32, device)
            self._forget()
            self._stale_R.fill_(True)
            self.lent = False
            self.wrote()
        return buffer

    # ---- what others write ----

    def watch(self) -> None:
        """Notice gradients that others wrote into the buffer: their rows have one too."""
        buffer = self.buffer_RHD
        counted = buffer is not None and buffer._version != self._seen
        if buffer is None or not (counted or self.lent):
            return
        self.lent, found = False, counted
        for start in range(0, buffer.shape[0], _LOOK_ROWS):
            part = slice(start, start + _LOOK_ROWS)
            written_R = kernels.nonzero_rows(buffer[part].flatten(1))
            if not counted:  # perhaps nothing was written: rows that have a gradient say nothing
                written_R &= ~self.filled_R[part]
                found = found or bool(written_R.any())
            self.touched_R[part] |= written_R
            self.filled_R[part] |= written_R
        if found:
            self._measure_again()
            self.empty = False
        self.wrote()

    def wrote(self) -> None:
        """What has changed in the buffer since watch() was the engine's own doing."""
        if self.buffer_RHD is not None:
            self._seen = self.buffer_RHD._version

    def show(self) -> None:
        """Make the buffer what .grad has to be, now and, as somebody may keep it, from now on."""
        self.lent = False  # a second look is no reason to search for what was written since the first
        self.write_out()
        self.shown = self.lent = True

    def write_out(self) -> None:
        """Make the buffer what .grad has to be."""
        self.watch()
        buffer = self.buffer_RHD
        if buffer is None:
            return
        self._flush()
        self._multiply()
        stale_U = self._stale_R.nonzero()[:, 0]
        if stale_U.numel():
            kernels.zero(buffer.flatten(1), stale_U)
            self._stale_R.zero_()
        self.wrote()

    def filled_rows(self) -> Tensor:
        """The rows whose gradient may differ from zero, ascending, int64."""
        self.watch()
        return self.filled_R.nonzero()[:, 0]

    # ---- adding up ----

    def add(self, rows_U: Tensor, grads_UHD: Tensor, release: Callable[[], None] | None) -> None:
        """Add the gradients of these rows. With release they may be kept as they are; it is called when they are not
        needed any more, at once or later."""
        assert self.buffer_RHD is not None
        self.watch()
        # Where rows are in the device's own memory, keeping would cost memory that is dearer than a pass over it.
        if release is not None and self.empty and not self.shown and self.buffer_RHD.device.type == "cpu":
            self.arrived = Arrived(rows_U, grads_UHD, release, self.measures_arrived)
            if self.measures_arrived:
                self._measure_arrived(self.arrived)
        else:
            self._flush()
            self._multiply()
            self._accumulate(rows_U, grads_UHD, self.filled_R)
            if release is not None:
                release()
        self.filled_R[rows_U] = True
        self.touched_R[rows_U] = True
        self.empty = False

    def _accumulate(self, rows_U: Tensor, grads_UHD: Tensor, filled_R: Tensor) -> None:
        assert self.buffer_RHD is not None
        sums_RX = self.buffer_RHD.flatten(1)
        kernels.accumulate(sums_RX, rows_U, grads_UHD.flatten(1), filled_R, self._squares_R)
        self._measured_R[rows_U] = True
        self._stale_R[rows_U] = False
        self.wrote()

    def _flush(self) -> None:
        """Write the gradients that are kept as they arrived into the buffer."""
        arrived = self.arrived
        if arrived is not None:
            self._accumulate(arrived.rows_U, arrived.grads_UHD, self._none_R)
            self._let_go()

    def _let_go(self) -> None:
        if self.arrived is not None:
            self.arrived.release()
            self.arrived = None

    # ---- clipping ----

    def squares_R(self) -> Tensor:
        """The sum of squares of each row's gradient, fp64 [R]; 0 for rows without one."""
        self.watch()
        if self.shown:  # not every write counts up a version: GradScaler.unscale_ does not
            self._measure_again()
        if self.factor != 1.0:
            self._flush()
            self._multiply()
        self.measures_arrived = self.arrived is not None
        if self.arrived is not None:
            if not self.arrived.measured:
                self._measure_arrived(self.arrived)
        elif self.buffer_RHD is not None and not self._all_measured:
            for some_U in (self.filled_R & ~self._measured_R).nonzero()[:, 0].split(_SCALE_ROWS):
                self._squares_R[some_U] = kernels.squares(self.buffer_RHD[some_U].flatten(1))
                self._measured_R[some_U] = True
            self._all_measured = True
        return self._squares_R.masked_fill(~self.filled_R, 0.0)

    def _measure_arrived(self, arrived: Arrived) -> None:
        self._squares_R[arrived.rows_U] = kernels.squares(arrived.grads_UHD.flatten(1))

    def scale(self, factor: float) -> None:
        """Multiply every gradient by factor, rounded to fp32: when AdamW reads it, or when somebody looks."""
        self.watch()
        if self.empty:
            return  # and what comes later is not multiplied
        if self.factor != 1.0:
            self._flush()
            self._multiply()
        self.factor = factor
        if self.shown:
            self._multiply()

    def _multiply(self) -> None:
        if self.factor == 1.0 or self.buffer_RHD is None:
            return
        for some_U in self.filled_R.nonzero()[:, 0].split(_SCALE_ROWS):
            self.buffer_RHD[some_U] = self.buffer_RHD[some_U] * self.factor
        self._measure_again()
        self.factor = 1.0
        self.wrote()

    # ---- all of them ----

    def fill(self, value: float) -> None:
        """Set every gradient to value."""
        assert self.buffer_RHD is not None
        self._let_go()
        self.buffer_RHD.fill_(value)
        self._forget()
        self._stale_R.zero_()
        self.filled_R.fill_(True)
        self._measure_again()
        self.empty = False
        self.wrote()

    def zero_half(self, own_RD: Tensor) -> None:
        """Zero keys.grad or values.grad, given as a view of the buffer."""
        self.write_out()
        own_RD.zero_()
        self._measure_again()
        self.wrote()

    def clear(self, shown: bool) -> None:
        """No row has a gradient any more. shown: somebody may still hold .grad, which is zeroed then."""
        self.watch()
        if self.arrived is None:
            self._stale_R |= self.filled_R
        self._let_go()
        self._forget()
        self.touched_R.zero_()
        self.shown = shown and self.shown
        if self.shown:
            self.write_out()

    def _measure_again(self) -> None:
        self._measured_R.zero_()
        self._all_measured = False

    def _forget(self) -> None:
        self.filled_R.zero_()
        self._measured_R.zero_()
        self._all_measured = True
        self.factor, self.empty = 1.0, True
