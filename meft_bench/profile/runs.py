"""The simulated runs that a row is made of, and what they say of memory."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from meft_bench.profile import deepspeed
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated import Run, largest, simulate
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import KNOWN, size_options
from meft_bench.simulate.cards import Card
from meft_bench.train.counts import Counted
from meft_bench.train.methods import find_method


def made_from(spec: ProfileSpec) -> ProfileSpec:
    """The spec whose simulation the row is made from: the ground of DeepSpeed's, or its own. Rows of one are best made
    one after the other."""
    engine = KNOWN[spec.variant].engine
    return dataclasses.replace(spec, variant=deepspeed.GROUND) if engine else spec


def size_of(spec: ProfileSpec, counted: Counted) -> dict[str, Any]:
    """The method's options. Raises ValueError where the method does not attach to the base."""
    return size_options(KNOWN[spec.variant], spec.neurons, counted, spec.rank)


def size_if_any(spec: ProfileSpec, counted: Counted) -> dict[str, Any]:
    """size_of(), or nothing where the method does not attach."""
    try:
        return size_of(spec, counted)
    except ValueError:
        return {}


def trained_by(spec: ProfileSpec, counted: Counted, size: dict[str, Any]) -> int:
    """Trained parameters of the whole model."""
    method = KNOWN[spec.variant].method
    return counted.trainable(method, find_method(method).Options(**size))


Pair = tuple[Run, Run]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What a row is made of."""

    small: Pair
    """Of few layers, for the time of a step of one micro-batch."""
    threes: Pair | None
    """Of few layers and three micro-batches, for the time of more; None where nothing accumulates."""
    whole: Run
    """The whole model's: bytes of one micro-batch and its update, peaks of as many micro-batches as the spec has,
    which from the second on are all alike."""
    accumulated: Run | None
    """The whole model's of three micro-batches, for the peaks of more than one; None where the spec itself has more,
    and where nothing accumulates."""


def runs_of(spec: ProfileSpec, setting: Setting, size: dict[str, Any], trained: int) -> Runs:
    """What the row is made of: few layers of one micro-batch, and of three where a setting accumulates."""
    ground = made_from(spec)
    counts = (trained, setting.shape.parameters)

    def simulated(micro_batches: int) -> tuple[Run, Pair]:
        wanted = dataclasses.replace(ground, accumulation=micro_batches)
        return setting.latest.get((wanted, counts), lambda: simulate(wanted, setting.config, size, counts))

    whole, small = simulated(1)
    threes = accumulated = None
    if max(spec.accumulation, *setting.accumulations) > 1:
        accumulated, threes = simulated(3)
        whole = _once_a_step(whole, accumulated)
        if spec.accumulation > 1:
            whole, accumulated = dataclasses.replace(whole, peaks=accumulated.peaks), None

    if KNOWN[spec.variant].engine:
        few, more = small
        small = (_under_engine(few, spec, setting), _under_engine(more, spec, setting))
        threes = threes and (_under_engine(few, spec, setting, 3), _under_engine(more, spec, setting, 3))
        whole = _under_engine(whole, spec, setting)
        accumulated = accumulated and _under_engine(accumulated, spec, setting, 0)
    return Runs(small=small, threes=threes, whole=whole, accumulated=accumulated)


def _under_engine(run: Run, spec: ProfileSpec, setting: Setting, micro_batches: int = 1) -> Run:
    """The ground's run with what the variant's engine adds, if it has one; its program of so many micro-batches."""
    engine = KNOWN[spec.variant].engine
    if not engine:
        return run
    return deepspeed.zero(run, engine, spec.neurons * setting.shape.hidden, run.layer_parameters, micro_batches)


def _once_a_step(one: Run, three: Run) -> Run:
    """The run of one micro-batch, with what crosses in its passes once a step counted with the update: the router of an
    optimizer on the host, and all that an optimizer within the backward pass moves."""
    crossed = {phase: Counter(counts) for phase, counts in one.crossed.items()}
    update = crossed.setdefault("update", Counter())
    for phase in crossed.keys() & {"forward", "backward"}:
        for way in ("h2d", "d2h"):
            # Rows of a device budget are drawn anew, and a later micro-batch may move a few more than the first.
            every = min(crossed[phase][way], (three.crossed[phase][way] - one.crossed[phase][way]) // 2)
            update[way] += crossed[phase][way] - every
            crossed[phase][way] = every
    return dataclasses.replace(one, crossed=crossed)


def memory_of(spec: ProfileSpec, setting: Setting) -> dict[str, Any]:
    """What the row says of the device's and the host's peak, at a fraction of the work: nothing is replayed."""
    size = size_of(spec, setting.counted)
    ground = dataclasses.replace(made_from(spec), accumulation=3 if spec.accumulation > 1 else 1)
    run, _ = simulate(ground, setting.config, size, (trained_by(spec, setting.counted, size), setting.shape.parameters))
    return memory(_under_engine(run, spec, setting, 0), setting.card)


def memory(run: Run, card: Card) -> dict[str, Any]:
    """A row's "memory": peaks in bytes, by what they hold and by phase, and whether the card has room."""
    device, host = largest(run, "device"), largest(run, "host")
    by_phase: dict[str, int] = {}
    for (phase, _), peak in run.peaks["device"].items():
        by_phase[phase] = max(by_phase.get(phase, 0), peak.bytes)
    return {
        "device_peak_bytes": device.bytes,
        "device_total_bytes": device.bytes + int(card.context_bytes.value),
        "by_category": dict(sorted(device.by_category.items())),
        "by_phase": by_phase,
        "host_peak_bytes": host.bytes,
        "host_by_category": dict(sorted(host.by_category.items())),
        "fits": device.bytes + int(card.context_bytes.value) <= int(card.usable_bytes.value),
    }
