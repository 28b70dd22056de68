"""One profiled step on the simulated GPU: peaks, bytes and operations at full size from runs of a few layers.

Decoder layers repeat, so what a run of L layers shows at a given place (before the layers, in the first, second, last
but one or last layer, after them) is affine in L. Runs of 2 and 4 layers give every layer count.
"""

import dataclasses
import functools
import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft.adam import DenseRowAdamW, RowAdamW
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import Split, split
from meft_bench.meft.link import Link
from meft_bench.meft.sites import decoder_layers
from meft_bench.profile import shapes
from meft_bench.profile.held import held_by
from meft_bench.profile.host_adamw import HostAdamW
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.step import inference_step, prepare, training_step
from meft_bench.profile.variants import KNOWN, Variant, attach, make_optimizer, size_options
from meft_bench.simulate.accumulate import TouchedRows
from meft_bench.simulate.device import NAME, simulated_gpu
from meft_bench.simulate.drawn import Draws, drawn_slots
from meft_bench.simulate.host_kernels import host_kernels
from meft_bench.simulate.ledger import BLOCK, Peak, device_bytes
from meft_bench.simulate.machine import Machine, Operation, Program
from meft_bench.simulate.sizes import Sizes
from meft_bench.train.counts import Counted
from meft_bench.train.methods import Attached
from meft_bench.train.own_optimizer import FusedOptimizer

LAYERS = (2, 4)
Place = tuple[str, str]
"""(phase, where): "none", or the layer's place, counted from the nearer end."""


@dataclass(frozen=True)
class Run:
    """What one simulated step of a few layers showed."""

    layers: int
    parameters: int
    base_parameters: int
    peaks: dict[str, dict[Place, Peak]]
    """By "host" or "device", then place."""
    crossed: dict[str, Counter[str]]
    """phase -> "h2d" and "d2h" bytes."""
    link: Counter[tuple[str, str]]
    """(direction, purpose) -> bytes, the link's own count; empty without a link."""
    program: Program
    """What the step did, in order (simulate/machine.py)."""
    layer_parameters: int = 0
    """Of the last layer, with what is attached to it."""
    after: dict[str, Peak] = field(default_factory=dict)
    """"host" and "device": what lives when the step is over."""
    kept: dict[str, int] = field(default_factory=dict)
    """Device bytes that other loops keep until their next step: "gradients", and "outputs" (last logits and loss)."""
    last_differs: bool = False
    """Whether the backward pass of a step's last micro-batch does what no other does: updates (own_optimizer.py), or
    sends other gradients (deepspeed.py)."""

    @property
    def operations(self) -> list[Operation]:
        """The program without its marks."""
        return [entry for entry in self.program if isinstance(entry, Operation)]


def simulate_layers(
    spec: ProfileSpec,
    config: Any,
    layers: int,
    size: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Run:
    """Simulate one steady optimizer step of spec on the first layers of config, a base in dtype.

    size: the method's options; None takes those that size_options gives for the whole of config.
    """
    variant = KNOWN[spec.variant]
    if size is None:
        size = size_options(variant, spec.neurons, Counted(config), spec.rank)
    if size.get("device_budget"):  # of all layers
        size = {**size, "device_budget": size["device_budget"] * layers // shapes.layers_of(config)}
    config = shapes.with_layers(config, layers)
    # Without sparse transfer the code still makes the union and then moves all R rows.
    draws = draws_of(spec)
    with (
        warnings.catch_warnings(),
        simulated_gpu(),
        host_kernels(),
        drawn_slots(draws, spec.accumulation, 1 + spec.checkpointing),
        Machine(Sizes({spec.neurons: draws.union}, draws.union)) as machine,
        observe.listening(machine),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names it will change
        model = shapes.build(config, NAME, dtype, random=False)
        vocabulary = config.get_text_config().vocab_size
        base = sum(p.numel() for p in model.parameters())
        machine.ledger.name([*model.parameters(), *model.buffers()], "base weights")
        if variant.untrained:
            prepare(model, spec, training=False)
            machine.follow_layers(decoder_layers(model))
            kept = _follow_outputs(model)
            inference_step(model, spec, vocabulary, NAME)
            return _run(machine, model, 0, base, None, kept)
        attached = attach(variant, size, model, simulated=True)
        machine.sizes.rows_kept.setdefault(*_probed_experts(variant, size))
        optimizer = make_optimizer(variant, attached, simulated=True)
        if isinstance(optimizer, RowAdamW):
            _assume_steady(machine.sizes, spec, optimizer)
        prepare(model, spec)
        machine.follow_layers(decoder_layers(model))
        _name_state(machine, variant, model, attached, optimizer)
        _make_moments(machine, attached, optimizer)
        if size.get("device_budget"):
            # A step says which rows to keep. They come where gradients were cleared and nobody looked since.
            training_step(attached, optimizer, dataclasses.replace(spec, accumulation=1), vocabulary, NAME)
            optimizer.zero_grad()
            assert isinstance(optimizer, RowAdamW)
            _name_kept(machine, optimizer)
        _name_state(machine, variant, model, attached, optimizer)
        if isinstance(optimizer, RowAdamW):
            for store in optimizer.stores:  # as a step like this one leaves them
                store.grads.measures_arrived = spec.accumulation == 1
        kept = _follow_outputs(attached.model)
        machine.start()
        if attached.link is not None:
            attached.link.reset()
        with observe.listening(_Gradients(attached, kept)):
            training_step(attached, optimizer, spec, vocabulary, NAME)
        trained = sum(attached.parameter_groups().values())
        run = _run(machine, model, trained, base, attached.link, kept)
        return dataclasses.replace(run, last_differs=isinstance(optimizer, FusedOptimizer))


def draws_of(spec: ProfileSpec) -> Draws:
    """The unions of its micro-batches."""
    return _draws(spec.neurons, spec.union)


@functools.lru_cache(maxsize=2)  # rows of one size come one after the other
def _draws(neurons: int, union: Union | None) -> Draws:
    if union is None:
        return Draws(neurons, neurons, lambda _: neurons)
    return Draws(neurons, union.rows, union.touched(neurons))


def touched_rows(spec: ProfileSpec, there: Split) -> TouchedRows:
    """Of the rows that the host updates: what steps of several micro-batches touch. there: what the budget buys."""
    draws, held = draws_of(spec), there.moments
    return TouchedRows(spec.neurons - held, lambda a: draws.on_host(held, a), draws.union, spec.neurons)


def _assume_steady(sizes: Sizes, spec: ProfileSpec, optimizer: RowAdamW) -> None:
    """Say what data would: how many rows a steady step uses, leaves behind and changes. Rows whose optimizer is on the
    device are nobody's business on the host."""
    stores, neurons = optimizer.stores, spec.neurons
    there = split(stores[0].config, len(stores), stores[0].hidden_size, torch.bfloat16, router_there=True)
    rows, dense = touched_rows(spec, there), isinstance(optimizer, DenseRowAdamW)
    sizes.rows_kept[neurons] = rows.union if rows.neurons else 0
    sizes.changed[neurons] = rows.neurons if dense else round(rows.once)
    if isinstance(optimizer, DenseRowAdamW):
        optimizer.assume_steady((rows.neurons - rows.once) / neurons)


def _probed_experts(variant: Variant, size: dict[str, Any]) -> tuple[int, int]:
    """(N, N): the tokens of a micro-batch probe every expert. (0, 0) for methods without."""
    if not variant.is_meft:
        return 0, 0
    experts = MeftOptions(**size).experts or 0
    return experts, experts


def _name_state(
    machine: Machine, variant: Variant, model: nn.Module, attached: Attached, optimizer: torch.optim.Optimizer
) -> None:
    ledger, trained = machine.ledger, attached.parameters()
    own = {id(p) for p in trained}
    ledger.name((t for t in [*model.parameters(), *model.buffers()] if id(t) not in own), "base weights")
    ledger.name(trained, "base weights" if variant.trains_base else "adapter parameters")
    ledger.name((p.grad for p in trained if p.grad is not None), "gradients")
    ledger.name((v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)), "moments")
    if isinstance(optimizer, HostAdamW):
        for category, tensors in optimizer.host_state().items():
            ledger.name(tensors, category)

    def note(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # one that is used within backward is gone
            ledger.name([parameter.grad], "gradients")

    for parameter in trained:
        if variant.optimizer in ("own", "adam8bit", "host"):
            parameter.register_post_accumulate_grad_hook(note)


def _name_kept(machine: Machine, optimizer: RowAdamW) -> None:
    """What a device budget keeps there, by what it is; without a budget the router alone lies there."""
    for category, tensors in held_by(optimizer.stores).items():
        machine.ledger.name(tensors, category)


def _make_moments(machine: Machine, attached: Attached, optimizer: torch.optim.Optimizer) -> None:
    """One update with zero gradients, so that the step that is followed is a steady one."""
    with machine.phase("update"):
        for parameter in attached.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if isinstance(optimizer, FusedOptimizer):
                with torch.no_grad():
                    optimizer.use(parameter)
        if isinstance(optimizer, FusedOptimizer):
            attached.clip_gradients(1.0)  # forgets the gradients' norms
        optimizer.step()
        optimizer.zero_grad()


def _follow_outputs(model: nn.Module) -> dict[str, int]:
    """{"outputs": bytes of the logits and of the loss}, filled in when the model has run."""
    kept = {"gradients": 0, "outputs": 0}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        kept["outputs"] = device_bytes(output.logits) + BLOCK  # a loss takes one block

    model.register_forward_hook(note)
    return kept


class _Gradients:
    """A listener that fills in kept["gradients"]: bytes on the device of the gradients that zero_grad drops."""

    def __init__(self, attached: Attached, kept: dict[str, int]) -> None:
        self.attached, self.kept = attached, kept

    def during(self, work: observe.Work) -> AbstractContextManager[None]:
        if (work.name, work.doing) == ("adam", "zero_grad"):
            gradients = [p.grad for p in self.attached.parameters() if p.grad is not None]
            self.kept["gradients"] = sum(device_bytes(g) for g in gradients if g.device.type == NAME)
        return nullcontext()


def _run(
    machine: Machine, model: nn.Module, parameters: int, base: int, link: Link | None, kept: dict[str, int]
) -> Run:
    layers = len(decoder_layers(model))
    ledger = machine.ledger
    after = {
        place: Peak(ledger.live[place], {c: n for c, n in ledger.by_category[place].items() if n})
        for place in ("host", "device")
    }
    peaks: dict[str, dict[Place, Peak]] = {"host": {}, "device": {}}
    for where, by_segment in machine.ledger.peaks.items():
        for segment, peak in by_segment.items():
            key = (segment.phase, _place(segment.layer, layers))
            if key not in peaks[where] or peak.bytes > peaks[where][key].bytes:
                peaks[where][key] = peak
    crossed: dict[str, Counter[str]] = {}
    for segment, counts in machine.bytes.items():
        crossed.setdefault(segment.phase, Counter()).update(counts)
    own_count = Counter(link.bytes) if link is not None else Counter()
    of_layer = sum(p.numel() for p in decoder_layers(model)[-1].parameters())
    return Run(layers, parameters, base, peaks, crossed, own_count, machine.program, of_layer, after, kept)


def _place(layer: int, layers: int) -> str:
    if layer < 0:
        return "none"
    return f"first+{layer}" if layer < layers / 2 else f"last-{layers - 1 - layer}"


def extrapolate(runs: tuple[Run, Run], layers: int) -> Run:
    """The run of this many layers; its program is that of the larger run."""
    one, two = runs
    steps = (layers - one.layers) / (two.layers - one.layers)

    def line(a: float, b: float) -> int:
        return round(a + (b - a) * steps)

    def counts(a: Counter, b: Counter) -> Counter:
        return Counter({key: line(a[key], b[key]) for key in {*a, *b}})

    def mixed(a: Peak, b: Peak) -> Peak:
        both = counts(Counter(a.by_category), Counter(b.by_category))
        return Peak(line(a.bytes, b.bytes), {c: n for c, n in both.items() if n > 0})

    peaks: dict[str, dict[Place, Peak]] = {}
    for where in one.peaks:
        peaks[where] = {}
        for place, b in two.peaks[where].items():
            a = one.peaks[where].get(place)
            if a is None:  # a layer in the middle lies on the line between its neighbours
                continue
            peaks[where][place] = mixed(a, b)
    return Run(
        layers,
        line(one.parameters, two.parameters),
        line(one.base_parameters, two.base_parameters),
        peaks,
        {phase: counts(one.crossed.get(phase, Counter()), c) for phase, c in two.crossed.items()},
        counts(one.link, two.link),
        two.program,
        two.layer_parameters,
        {where: mixed(one.after[where], b) for where, b in two.after.items()},
        {what: line(one.kept[what], n) for what, n in two.kept.items()},
        two.last_differs,
    )


def simulate(
    spec: ProfileSpec,
    config: Any,
    size: dict[str, Any] | None = None,
    counts: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Run, tuple[Run, Run]]:
    """(the run at the model's own layer count, the two runs that its time is made from), a base in dtype.

    counts: (trained, base) parameters of the whole model. Where 2 and 4 layers do not lead to them, layers differ (a
    mixture of experts that begins with dense ones), and all of them are simulated.
    """
    wanted = shapes.layers_of(config)
    if size is None:
        size = size_options(KNOWN[spec.variant], spec.neurons, Counted(config), spec.rank)
    if wanted > max(LAYERS):
        few, more = (simulate_layers(spec, config, layers, size, dtype) for layers in LAYERS)
        small = (few, more)
        run = extrapolate(small, wanted)
        if counts is None or counts == (run.parameters, run.base_parameters):
            return run, small
    run = simulate_layers(spec, config, wanted, size, dtype)
    return run, (run, run)


def largest(run: Run, where: str) -> Peak:
    """The step's peak on "host" or "device"."""
    return max(run.peaks[where].values(), key=lambda peak: peak.bytes)
