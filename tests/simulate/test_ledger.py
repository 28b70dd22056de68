"""The ledger against the allocator itself: every block that a real CPU training step takes and gives back."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from meft_bench.meft.link import Link
from meft_bench.meft.sites import ADAPTER_NAME, decoder_layers
from meft_bench.simulate.device import simulated_gpu
from meft_bench.simulate.host_kernels import host_kernels
from meft_bench.simulate.ledger import Ledger, Segment
from meft_bench.simulate.machine import Machine
from meft_bench.simulate.sizes import Sizes
from tests.profile.small import real_parts, real_step, small_spec

# One of each way to hold state: everything trained, peft, an adapter, an adapter on the host, MEFT in both readings.
VARIANTS = ("full", "lora_all", "parallel_adapter", "parallel_adapter_streamed", "meft", "meft_union")


def allocator_peak(spec, dtype) -> int:
    """Bytes that lived at once during a steady step, from the allocator's own events."""
    parts = model, attached, optimizer = real_parts(spec, dtype)
    for _ in range(2):
        real_step(parts, spec)
    gc.collect()
    standing = [*model.parameters(), *model.buffers()]
    with torch._C.DisableTorchFunctionSubclass():  # MEFT's gradients cost more after a look at them
        standing += [p.grad for p in attached.parameters() if p.grad is not None]
    standing += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    for layer in decoder_layers(model):
        if store := getattr(getattr(layer, ADAPTER_NAME, None), "store", None):
            kept = [*vars(store).values(), *vars(store.grads).values()]
            standing += [*store.parameters(), *(v for v in kept if torch.is_tensor(v))]
            if updates := store.updates:
                standing += [t for t in tree_leaves(list(vars(updates).values())) if torch.is_tensor(t)]
    before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in standing}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        real_step(parts, spec)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    now = peak = 0
    for _, _, size in changes:
        now += size
        peak = max(peak, now)
    return before + peak


def ledger_peak(spec, dtype) -> int:
    """The same step through the ledger, on real tensors; all of it is host memory."""
    with Machine(device="none") as machine:
        parts = real_parts(spec, dtype)
        for _ in range(2):
            real_step(parts, spec, machine)
        machine.start()
        real_step(parts, spec, machine)
    return max(peak.bytes for peak in machine.ledger.peaks["host"].values())


@pytest.fixture(autouse=True)
def no_memory_used_again(monkeypatch):
    """The profiler does not report that a block from before it began is freed, so none may lie in reserve."""
    for name in ("staging", "scratch"):
        monkeypatch.setattr(Link, name, lambda self, shape, dtype, device: torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ledger_is_the_allocator(variant, checkpointing):
    spec = small_spec(variant, checkpointing=checkpointing)
    assert ledger_peak(spec, torch.float32) == pytest.approx(allocator_peak(spec, torch.float32), rel=1e-3)


@pytest.mark.parametrize("variant", ["full", "meft"])
def test_ledger_is_the_allocator_in_half_precision(variant):
    spec = small_spec(variant)
    assert ledger_peak(spec, torch.bfloat16) == pytest.approx(allocator_peak(spec, torch.bfloat16), rel=1e-3)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_both_kinds_of_adamw(fused):
    """foreach holds temporaries as large as all parameters, fused none: the ledger must see the difference."""
    parameters = [torch.nn.Parameter(torch.randn(1000, 100)) for _ in range(3)]
    settings = {"fused": True} if fused else {"foreach": True}
    with Machine(device="none") as machine:
        optimizer = torch.optim.AdamW(parameters, **settings)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            machine.start()
            standing = machine.ledger.live["host"]
            optimizer.step()
    extra = max(p.bytes for p in machine.ledger.peaks["host"].values()) - standing
    size = sum(p.nbytes for p in parameters)
    assert (extra < size / 10) if fused else (size <= extra <= 3 * size)


def test_fake_and_real_streams_are_one():
    """The same operations in the same order with and without data."""

    def names(fake: bool) -> list[str]:
        spec = small_spec("meft_no_ke")
        # All of R fire somewhere: the sizes are those of the real step.
        with simulated_gpu() if fake else nullcontext(), host_kernels():
            with Machine(Sizes({256: 256}) if fake else None, device="none") as machine:
                parts = real_parts(spec, torch.float32)
                parts[2].assume_steady()
                machine.start()
                real_step(parts, spec, machine)
        return [o.name for o in machine.operations if not o.name.startswith("_local_scalar")]

    real, fake = names(fake=False), names(fake=True)
    assert len(real) > 200
    assert real == fake


def test_sizes_are_rounded_on_the_device_alone():
    ledger = Ledger("cpu")
    tensor = torch.empty(3)
    ledger.charge(tensor, "x")
    assert ledger.live["device"] == 512
    other = Ledger("none")
    other.charge(tensor, "x")
    assert other.live["host"] == 12


def test_views_count_once_and_freed_memory_not():
    ledger = Ledger("none")
    tensor = torch.empty(100)
    ledger.charge(tensor, "a")
    ledger.charge(tensor.view(10, 10), "b")
    assert ledger.live["host"] == 400
    assert dict(ledger.by_category["host"]) == {"a": 400}
    del tensor
    assert ledger.live["host"] == 0


def test_peaks_are_kept_by_segment():
    ledger = Ledger("none")
    for layer, count in ((0, 10), (1, 30), (0, 20)):
        ledger.segment = Segment("forward", layer)
        tensor = torch.empty(count)
        ledger.charge(tensor, "x")
        ledger.note_peak()
        del tensor
    peaks = {s.layer: p.bytes for s, p in ledger.peaks["host"].items()}
    assert peaks == {0: 80, 1: 120}


def test_renaming_moves_bytes_between_categories():
    ledger = Ledger("none")
    tensor = torch.empty(10)
    ledger.charge(tensor, "before")
    ledger.name([tensor], "after")
    assert {c: n for c, n in ledger.by_category["host"].items() if n} == {"after": 40}
