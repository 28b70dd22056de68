"""DeepSpeed by formula: its C++ and its hooks hide copies from the dispatcher, so its rows are made from another run.

The ground is the run of the Parallel Adapter whose optimizer and gradients are on the host (same half-precision
parameters, same activations, same host arithmetic). What DeepSpeed 0.19.8 adds with its default settings, read from its
sources (runtime/zero/stage_1_and_2.py, stage3 defaults in config.py):

ZeRO-2 with optimizer offload: a gradient bucket of 5e8 elements on the device and a buffer of the largest parameter;
gradients become fp32 on the device and cross so (4 bytes each). With accumulation, micro-batches before the last send
16-bit sums instead, and those after the first fetch them again and add to them on the device. That each waits for a
bucket to be full before it crosses is left out, which favours DeepSpeed.
ZeRO-3 with parameter offload: besides, every parameter (of the frozen base too) lives on the host, at most 1e9 of them
on the device at once, and is fetched for forward and again for backward.
"""

import dataclasses
from collections import Counter

from meft_bench.profile.simulated import Place, Run
from meft_bench.simulate.ledger import Peak
from meft_bench.simulate.machine import PREFETCH, WAIT_COPY, Mark, Operation, Program

GROUND = "parallel_adapter_host_optimizer_gradients"
_BUCKET = 500_000_000
_LIVE = 1_000_000_000
_BUFFERS = "DeepSpeed buffers"
MODELLED = {
    "zero2": "DeepSpeed 0.19.8 at default settings, by formula on top of the simulated host optimizer: its C++ hides "
             "its copies",
    "zero3": "DeepSpeed 0.19.8 at default settings, by formula on top of the simulated host optimizer: parameter "
             "fetches hide from the simulation; prefetch assumed perfect",
}  # fmt: skip


def zero(run: Run, engine: str, largest_parameter: int, layer_parameters: int, micro_batches: int = 1) -> Run:
    """The run of "zero2" or "zero3" from the ground's; the largest trained tensor and one layer with
    its adapter, in elements. micro_batches: of its program, which with 0 is empty, as it must be where the ground has
    several; all else is the ground's."""
    whole = run.parameters + run.base_parameters
    live = min(whole, _LIVE)
    peaks: dict[str, dict[Place, Peak]] = {"device": {}, "host": dict(run.peaks["host"])}
    for place, peak in run.peaks["device"].items():
        held = {**peak.by_category, _BUFFERS: 2 * (_BUCKET + largest_parameter)}
        if engine == "zero3":
            held["base weights"], held["adapter parameters"] = 2 * live, 0
        held = {c: n for c, n in held.items() if n}
        peaks["device"][place] = Peak(sum(held.values()), held)
    if engine == "zero3":
        for place, peak in run.peaks["host"].items():
            held = {**peak.by_category, "base weights": 2 * run.base_parameters}
            peaks["host"][place] = Peak(sum(held.values()), held)
    crossed = {phase: Counter(c) for phase, c in run.crossed.items()}
    crossed["backward"]["d2h"] += 2 * run.parameters
    if engine == "zero3":
        crossed["forward"]["h2d"] += 2 * whole
        crossed["backward"]["h2d"] += 2 * (whole - live)
    program = _program(run.program, engine, layer_parameters, micro_batches) if micro_batches else []
    return dataclasses.replace(run, peaks=peaks, crossed=crossed, program=program, last_differs=True)


def accumulated_bytes(run: Run, micro_batches: int) -> tuple[int, int]:
    """(h2d, d2h) bytes of a step of so many micro-batches under ZeRO: the step's own, and the 16-bit sums that come and
    go between micro-batches."""
    h2d = {phase: c["h2d"] for phase, c in run.crossed.items()}
    d2h = {phase: c["d2h"] for phase, c in run.crossed.items()}
    sums = 2 * run.parameters
    fetches = micro_batches * (h2d["forward"] + h2d["backward"]) + h2d["update"]
    inputs = micro_batches * (d2h["forward"] + d2h["backward"] - 2 * sums)
    extra = sums * (micro_batches - 1)
    last = 2 * sums
    return fetches + extra, inputs + extra + last + d2h["update"]


_APART = 1 << 32
"""Between the numbers of one micro-batch's copies and the next's."""


def _program(once: Program, engine: str, layer_parameters: int, micro_batches: int) -> Program:
    """What the ground does in its passes so many times, and its update once."""
    passes = [entry for entry in once if entry.segment.phase != "update"]
    program: Program = []
    for number in range(micro_batches):
        apart = _APART * (micro_batches - 1 - number)  # the update waits for copies of the last
        own = [_numbered(entry, apart) for entry in passes]
        program += _micro_batch(own, engine, layer_parameters, number == 0, number == micro_batches - 1)
    return program + [entry for entry in once if entry.segment.phase == "update"]


def _numbered(entry: Operation | Mark, apart: int) -> Operation | Mark:
    if isinstance(entry, Operation):
        return entry._replace(copy=entry.copy + apart) if entry.copy else entry
    assert entry.kind == WAIT_COPY, "with one micro-batch the ground hands nothing to a queue"
    return entry._replace(number=entry.number + apart)


def _micro_batch(passes: Program, engine: str, layer_parameters: int, first: bool, last: bool) -> Program:
    """The last's gradients are twice as wide; earlier sums are fetched and added to; with ZeRO-3, each layer's weights
    are fetched ahead of its work, both ways."""
    program: Program = []
    before = None
    for entry in passes:
        segment = entry.segment
        if engine == "zero3" and segment != before and segment.layer >= 0:
            program.append(Operation(segment, "weights", PREFETCH, "h2d", 0, 2 * layer_parameters, False, False))
        before = segment
        if isinstance(entry, Operation) and entry.place == "d2h" and entry.part == "gradients" and not entry.blocking:
            sums = entry.bytes
            if not first:
                add = "add_.Tensor"
                program.append(Operation(segment, "gradients", PREFETCH, "h2d", 0, sums, False, False))
                program.append(Operation(segment, "gradients", add, "device", sums // 2, 3 * sums, False, False))
            if last:
                entry = entry._replace(bytes=2 * sums)
        program.append(entry)
    return program
