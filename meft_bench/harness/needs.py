"""What the job of a run asks a cluster for: minutes and memory, from the plans (estimate.py, smollm2.py).

Both are asked for with room to spare, in steps, so that runs which need about the same stand in one job array. Too
little time loses nothing: a run goes on from its checkpoint in its next start.
"""

from dataclasses import dataclass

from meft_bench.harness import estimate, smollm2
from meft_bench.harness.spec import RunSpec
from meft_bench.named import named_in
from meft_bench.train.contract import describe
from meft_bench.train.counts import Counted
from meft_bench.train.methods import ModelShape
from meft_bench.train.step_bytes import WIDTH

_SHORTEST_MINUTES = 30
_CPU_FLOPS = 10e9
"""Of a thread in products of a model's sizes: half of what a core of 2020 does, since a node may be shared."""
_TIME_SLACK, _GPU_EVALUATION_H = 2, 2.0
"""A plan's hours on a GPU are training's: so many more for the answers."""
_MEMORY_SLACK, _LIBRARIES_BYTES, _CUDA_BYTES = 1.25, 2 * 2**30, 4 * 2**30
_ROW_BYTES = 10_000
"""Of a training row in memory: its text, and its tokens as Python's numbers."""


@dataclass(frozen=True, order=True)
class Needs:
    """Of one job."""

    minutes: int
    memory_gib: int


def needs(
    spec: RunSpec, shape: ModelShape, counted: Counted | None = None, vocabulary: int = 0, threads: int = 1
) -> Needs:
    """What a run's job asks for; the arguments are those of estimate.predict, and how many threads it has."""
    return Needs(_minutes(spec, shape, threads), _memory_gib(spec, shape, counted, vocabulary))


def _minutes(spec: RunSpec, shape: ModelShape, threads: int) -> int:
    if spec.device == "cuda":
        planned = _GPU_EVALUATION_H * 60 + estimate.hours(spec, shape) * 60
    else:
        known = named_in(spec.model) == smollm2.NAME and spec.task in smollm2.TASKS
        work = smollm2.work(spec) if known else _work(spec, shape)
        planned = work / (_CPU_FLOPS * threads) / 60
    asked = _SHORTEST_MINUTES
    while asked < _TIME_SLACK * planned:
        asked *= 2
    return asked


def _work(spec: RunSpec, shape: ModelShape) -> float:
    """Floating-point operations of training and answering, every row as long as the longest may be."""
    row = spec.max_length or 64
    trained = spec.steps * spec.batch_size * row * (6 if describe(spec.method).trains_base else 4)
    answered = len(spec.splits) * len(spec.modes) * spec.eval_rows * row * 2
    return (trained + answered) * shape.parameters


def _memory_gib(spec: RunSpec, shape: ModelShape, counted: Counted | None, vocabulary: int) -> int:
    need = estimate.predict(spec, shape, counted, vocabulary)
    if spec.device == "cuda":  # the weights pass through the host's memory
        planned = need["host_bytes"] + shape.parameters * WIDTH[spec.dtype] + _CUDA_BYTES
    else:
        planned = need["host_bytes"] + need["device_bytes"]
    planned += spec.train_rows * _ROW_BYTES
    return _stepped((_MEMORY_SLACK * planned + _LIBRARIES_BYTES) / 2**30)


def _stepped(gib: float) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, 48, ..."""
    step = 4
    while step < gib:
        if step * 3 // 2 >= gib:
            return step * 3 // 2
        step *= 2
    return step
