"""The passes of a measurement, end to end on the CPU and with a made-up GPU."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meft_bench import observe
from meft_bench.harness.record import _check_nulls
from meft_bench.profile import session, shapes
from meft_bench.profile.best import memory_at
from meft_bench.profile.counters import DIRECTIONS, Memcpy, Trace
from meft_bench.profile.measured import NO_GPU, OutOfMemory, counted_by_run, measure
from meft_bench.profile.measured_row import _by_accumulation, _host_peak, measured_row, skipped_row
from meft_bench.profile.passes import PARTS, Measured, Passes, _cap, components
from meft_bench.profile.session import Session, check_host_memory
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import KNOWN
from meft_bench.train.methods import ModelShape
from meft_bench.train.models import shape_of
from tests.profile.tiny import LAYERS, SMALL

BATCH, SEQ, NEURONS = 2, 16, 64
TOKENS = BATCH * SEQ


def spec(variant: str, **changes: Any) -> ProfileSpec:
    fields: dict[str, Any] = {"model": "small", "variant": variant, "neurons": NEURONS, "batch": BATCH, "seq": SEQ}
    if KNOWN[variant].needs_union:
        fields["union"] = counted_by_run(NEURONS)
    return ProfileSpec(**{**fields, **changes})


def on_cpu(variant: str, **changes: Any) -> Measured:
    return measure(spec(variant, **changes), SMALL, device="cpu", steps=2, warmup=1, accumulations=(2,))


@pytest.mark.parametrize("variant", ["base", "parallel_adapter", "parallel_adapter_host_optimizer_gradients",
                                     "parallel_adapter_streamed", "full_lomo", "meft", "meft_no_sparse"])  # fmt: skip
def test_every_kind_of_variant_runs_to_a_whole_row(variant: str) -> None:
    m = on_cpu(variant, checkpointing=variant == "meft")
    row = measured_row(m)
    json.dumps(row, allow_nan=False)
    _check_nulls(row, "")
    micro_batches = ["1"] if variant == "base" else ["1", "2"]
    assert list(row["time"]["step_s_by_accumulation"]) == micro_batches
    assert row["time"]["steps"] == dict.fromkeys(micro_batches, 2)
    step = row["time"]["step_s_by_accumulation"]["1"]
    assert row["time"]["tokens_per_s_by_accumulation"]["1"] == pytest.approx(TOKENS / step, rel=1e-3)
    assert row["memory"]["device_peak_bytes"] is None and row["memory"]["device_peak_bytes_reason"] == "no CUDA GPU"
    assert row["parameters"]["base"] == shape().parameters
    parts = row["time"]["components_s"]
    named = sum(parts[p] for p in (*PARTS, "gpu"))
    assert named == pytest.approx(parts["serialised_step"], abs=1e-5)


def shape() -> ModelShape:
    return shape_of(shapes.build(SMALL, "meta", torch.bfloat16, random=False))


def test_the_links_count_and_u_are_those_of_the_step() -> None:
    m = on_cpu("meft_no_sparse")
    assert m.link_by_purpose is not None and isinstance(m.moved, dict)
    rows = 2 * NEURONS * SMALL.hidden_size * LAYERS * 2  # keys and values in bfloat16
    assert m.link_by_purpose["h2d rows"] == m.link_by_purpose["d2h grads"] == rows
    assert m.moved["update"] == {"h2d": 0, "d2h": 0}
    assert m.moved["micro_batch"]["d2h"] == sum(n for p, n in m.link_by_purpose.items() if p.startswith("d2h"))
    assert m.union_by_layer == [NEURONS] * LAYERS
    row = measured_row(m)
    # Units of M are 16-bit elements over trainable parameters, whatever crosses.
    trained, crossed = row["parameters"]["trainable"], sum(m.link_by_purpose.values())
    assert row["traffic"]["by_accumulation"]["1"]["in_m"] == pytest.approx(crossed / 2 / trained, abs=1e-4)
    assert row["traffic"]["by_accumulation"]["2"]["in_m"] == pytest.approx(2 * crossed / 2 / trained, abs=1e-4)
    assert row["union"]["union_share"] == 1 and row["union"]["evidence"] == "measured"


@pytest.mark.parametrize(
    ("variant", "down", "up"),
    [
        ("meft_keys_on_device", ("h2d key_index", "h2d router"), ("d2h router",)),
        ("meft_budget_50", ("h2d key_index",), ("d2h norm",)),
        ("meft_no_sparse", (), ()),
        ("full_lsp_offload", ("h2d updates",), ("d2h grads",)),
    ],
)
def test_what_crosses_once_a_step_is_the_updates_however_many_micro_batches(variant, down, up) -> None:
    """Copies of keys, the router with its gradient, and the norm; all of an optimizer that updates within backward."""
    m = on_cpu(variant)
    link = m.link_by_purpose
    assert link is not None and isinstance(m.moved, dict)
    once = {"h2d": sum(link[name] for name in down), "d2h": sum(link[name] for name in up)}
    assert m.moved["update"] == once
    traffic = measured_row(m)["traffic"]
    for way in DIRECTIONS:
        one = sum(n for name, n in link.items() if name.startswith(way))
        assert traffic[f"{way}_bytes_per_micro_batch"] == one - once[way]
        assert traffic["by_accumulation"]["2"][f"{way}_bytes_per_step"] == 2 * one - once[way]


def test_u_is_counted_not_taken_from_the_spec() -> None:
    m = on_cpu("meft", neurons=256, union=counted_by_run(256))
    assert all(0 < u < 256 for u in m.union_by_layer) and len(m.union_by_layer) == LAYERS
    assert m.link_by_purpose is not None
    assert measured_row(m)["union"]["union"] < 256


def test_time_is_found_where_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    m = on_cpu("meft")
    for part in ("retrieval", "gather", "h2d", "d2h", "gradients", "adam"):
        assert m.components_s[part] > 0, part
    resident = on_cpu("parallel_adapter").components_s
    assert all(resident[part] == 0 for part in PARTS)  # its Adam is the device's
    host = on_cpu("parallel_adapter_host_optimizer").components_s
    assert host["adam"] > 0 and host["retrieval"] == 0


def test_kineto_splits_what_no_part_covers() -> None:
    serialised = {**dict.fromkeys(PARTS, 0.0), "adam": 2.0, "rest": 10.0}
    trace = Trace([Memcpy("h2d", "pinned", 1, 1.5), Memcpy("d2h", "pinned", 1, 0.5)], 6.0)
    found = components(serialised, trace, has_link=False)
    assert found == {"retrieval": 0, "gather": 0, "gradients": 0, "adam": 2, "h2d": 1.5, "d2h": 0.5, "gpu": 6,
                     "other_host": 2, "serialised_step": 12}  # fmt: skip
    linked = components({**serialised, "h2d": 3.0}, trace, has_link=True)
    assert (linked["h2d"], linked["other_host"], linked["serialised_step"]) == (3, 4, 15)


# ---- with a made-up GPU ----


class FakeGpu:
    """torch.cuda's figures, and traces whose copies are those of a host optimizer's step."""

    allocated, reserved, used, total = 700, 900, 1200, 2000

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passes: Any) -> None:
        fakes = {
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: self.allocated,
            "max_memory_reserved": lambda: self.reserved,
            "memory_reserved": lambda: self.reserved,
            "mem_get_info": lambda: (self.total - self.used, self.total),
            "host_memory_stats": lambda: {},
            "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        nvml: Any = SimpleNamespace(process_bytes=lambda: "not told", pcie=lambda: "no counters")
        passes.cuda, passes.nvml, passes.peaks.cuda, passes.peaks.nvml = True, nvml, True, nvml
        passes.pcie.nvml = nvml


def passes_of(variant: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    passes = Passes(Session(spec(variant), "cpu"), None)
    FakeGpu(monkeypatch, passes)
    passes.session.build(SMALL)
    return passes


def test_without_a_link_kineto_tells_micro_batch_from_update(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = passes_of("parallel_adapter_host_optimizer", monkeypatch)
    trained = passes.session.trainable
    ids = 8 * TOKENS
    sizes: list[int] = []

    def fake_traced(step: Any) -> Trace:
        sizes.append(1 + len(sizes))  # one micro-batch, then two
        step()
        copies = [Memcpy("h2d", "pageable", ids, 0.1)] * sizes[-1]
        return Trace(
            [*copies, Memcpy("d2h", "pinned", 2 * trained, 0.2), Memcpy("h2d", "pinned", 2 * trained, 0.3)], 1.0
        )

    monkeypatch.setattr("meft_bench.profile.passes.traced", fake_traced)
    m = passes.all(steps=1, warmup=1, accumulations=[1, 4])
    assert sizes == [1, 2]
    assert m.moved == {"micro_batch": {"h2d": ids, "d2h": 0}, "update": {"h2d": 2 * trained, "d2h": 2 * trained}}
    row = measured_row(m)
    _check_nulls(row, "")
    four = row["traffic"]["by_accumulation"]["4"]
    assert four["h2d_bytes_per_step"] == 4 * ids + 2 * trained
    assert four["in_m"] == pytest.approx((4 * ids + 4 * trained) / 2 / trained, abs=1e-4)
    assert four["bytes_per_token"] == pytest.approx((4 * ids + 4 * trained) / (4 * TOKENS), abs=0.1)
    assert row["traffic"]["counted_by"] == "kineto" and row["traffic"]["link_bytes"] is None
    memory = row["memory"]
    assert memory["device_peak_bytes"] == 700 and memory["by_phase"] == dict.fromkeys(
        ("forward", "backward", "update"), 700
    )
    # NVML is silent: what the allocator holds and what else is in use on the card.
    assert memory["context_bytes"] == 300 and memory["device_total_bytes"] == 900 + 300
    assert "not told" in memory["device_total_source"]
    assert sum(memory["by_category"].values()) == 700
    assert memory["device_peak_bytes_by_accumulation"] == {"1": 700, "4": 700}
    told = {k: memory["accumulated"][k] for k in ("device_peak_bytes", "device_total_bytes", "fits")}
    assert told == {"device_peak_bytes": 700, "device_total_bytes": 1200, "fits": True}


def test_the_peak_of_several_micro_batches_stands_beside_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in simulated rows: what fits and how much it takes are decided by it (best.memory_at)."""
    passes = passes_of("parallel_adapter", monkeypatch)
    real, gpu = Session.step, {"allocated": 700, "uss": 10 * 2**20}

    def step(self: Session, accumulation: int) -> None:
        gpu["allocated"], gpu["uss"] = 700 + 100 * (accumulation > 1), (10 + accumulation) * 2**20
        real(self, accumulation)

    monkeypatch.setattr(Session, "step", step)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu["allocated"])
    monkeypatch.setattr("meft_bench.profile.watch.host_bytes", lambda: {"rss": 0, "uss": gpu["uss"]})
    passes.host_before = 10 * 2**20
    passes.whole = False
    m = passes.all(steps=1, warmup=1, accumulations=[1, 4])
    memory = measured_row(m)["memory"]
    assert (memory["device_peak_bytes"], memory["host_peak_bytes"]) == (700, 2**20)
    assert _host_peak(m, {"forward": {"uss": passes.host_before - 1}}) == 0
    more = memory["accumulated"]
    assert (more["device_peak_bytes"], more["host_peak_bytes"], more["fits"]) == (800, 4 * 2**20, True)
    assert memory_at({"memory": memory}, 4) is more


def made_bytes(made: Session, direction: str) -> int:
    assert made.link is not None
    return sum(n for (way, _), n in made.link.bytes.items() if way == direction)


def test_link_and_kineto_meet_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = passes_of("meft", monkeypatch)
    made = passes.session

    def fake_traced(step: Any) -> Trace:
        step()
        sums = {d: made_bytes(made, d) for d in DIRECTIONS}
        extra = {"h2d": 8 * TOKENS, "d2h": 8 * TOKENS}
        return Trace([Memcpy(d, "pageable", n, 0.1) for s in (sums, extra) for d, n in s.items()], 1.0)

    monkeypatch.setattr("meft_bench.profile.passes.traced", fake_traced)
    row = measured_row(passes.all(steps=1, warmup=1, accumulations=[1]))
    assert row["traffic"]["counted_by"] == "kineto"
    extra_h2d = row["traffic"]["h2d_bytes_per_micro_batch"] - made_bytes(made, "h2d")
    assert extra_h2d == 8 * TOKENS and row["traffic"]["h2d_bytes_per_update"] == 0
    both = row["traffic"]["transfers"]["link_and_kineto"]
    assert both["h2d"]["agrees"] and both["d2h"]["agrees"], both
    assert row["traffic"]["transfers"]["nvml_reason"] == "no counters"


# ---- what does not run ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="^torch sees no CUDA GPU: without one, meft-bench profile simulates$"):
        measure(spec("base"), SMALL)
    assert NO_GPU.startswith("torch sees no CUDA GPU")


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB. GPU 0 has 1 GiB. Process 7 has"),
         "in backward: CUDA out of memory. Tried to allocate 86.00 MiB"),
        (MemoryError(), "in backward: unknown size"),
        (RuntimeError("CUDA error: out of memory\nmore"), "in backward: CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         "in backward: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)  # fmt: skip
def test_out_of_memory_is_a_result_that_says_where(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Session, accumulation: int) -> None:
        with observe.phase("backward"):
            raise error

    monkeypatch.setattr(Session, "step", step)
    with pytest.raises(OutOfMemory) as caught:
        measure(spec("base"), SMALL, device="cpu")
    assert str(caught.value) == where


def test_a_base_that_does_not_fit_is_out_of_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a config that makes no model: under a 24 GB card's memory the weights of a 13B model are too much."""

    def from_config(config: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 170.00 MiB. GPU 0 has")

    monkeypatch.setattr(shapes.AutoModelForCausalLM, "from_config", from_config)
    with pytest.raises(OutOfMemory, match="^in load: CUDA out of memory. Tried to allocate 170.00 MiB$"):
        measure(spec("meft"), SMALL, device="cpu")


@pytest.mark.parametrize("cuda", [True, False])
def test_what_fits_without_accumulating_is_kept_where_several_micro_batches_do_not(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that are kept for the next micro-batch may be too much for a card that holds a step of one."""
    real = Session.step

    def step(self: Session, accumulation: int) -> None:
        if accumulation > 2:
            with observe.phase("forward"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")
        real(self, accumulation)

    monkeypatch.setattr(Session, "step", step)
    passes = (
        passes_of("parallel_adapter", monkeypatch) if cuda else Passes(Session(spec("parallel_adapter"), "cpu"), None)
    )
    if not cuda:
        passes.session.build(SMALL)
    m = passes.all(steps=1, warmup=1, accumulations=[1, 2, 4, 8])
    assert m.lacking == {4: "in forward: CUDA out of memory. Tried to allocate 1 GiB"}
    row = measured_row(m)
    _check_nulls(row, "")
    assert list(row["time"]["step_s_by_accumulation"]) == ["1", "2"] and row["memory"]["fits"]
    more = row["memory"]["accumulated"]
    assert not more["fits"] and more["device_total_bytes"] is None
    assert more["host_peak_bytes_reason"] == (
        "4 micro-batches ran out of memory in forward: CUDA out of memory. Tried to allocate 1 GiB"
    )
    assert row["time"]["components_s_reason"] == "a step of 4 micro-batches ran out of memory before"
    assert (row["memory"]["device_peak_bytes"], row["exact"]) == (700 if cuda else None, True)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Session, accumulation: int) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Session, "step", step)
    with pytest.raises(RuntimeError, match="shapes"):
        measure(spec("base"), SMALL, device="cpu")


def test_a_cap_is_a_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    _cap(None, 100)
    _cap(25, 100)
    assert asked == [0.25]
    with pytest.raises(ValueError, match="does not fit a card of 1.00 GiB"):
        _cap(2**30 + 1, 2**30)


def test_an_engine_that_is_only_modelled_is_not_run() -> None:
    with pytest.raises(ValueError, match="ZeRO-2 offload: its engine is modelled by formula"):
        measure(spec("parallel_adapter_zero2"), SMALL, device="cpu")


def test_too_little_host_memory_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.host_memory, "available_bytes", lambda: 16 * 2**30)
    check_host_memory(KNOWN["meft"], 2**30)
    check_host_memory(KNOWN["parallel_adapter"], 2**40)
    with pytest.raises(ValueError, match="needs 18.0 GiB of host memory .* 16.0 GiB are free"):
        check_host_memory(KNOWN["parallel_adapter_host_optimizer"], 2**30)
    check_host_memory(KNOWN["meft_fast"], 2**30, free=12 * 2**30)
    with pytest.raises(ValueError, match="needs 12.0 GiB of host memory"):
        check_host_memory(KNOWN["meft_fast"], 2**30, free=12 * 2**30 - 1)
    with pytest.raises(ValueError, match="needs 16.0 GiB of host memory"):
        check_host_memory(KNOWN["meft_lazy"], 2**30, free=12 * 2**30)


def test_a_skipped_row_has_its_reason() -> None:
    row = skipped_row(spec("meft"), shape(), "oom", "in load: no memory", "capped")
    assert (row["state"], row["reason"], row["evidence"], row["neurons"]) == (
        "oom",
        "in load: no memory",
        "capped",
        NEURONS,
    )
    assert row["key"] == spec("meft").key


def test_bytes_of_many_micro_batches_are_made_of_ones() -> None:
    m = SimpleNamespace(spec=spec("meft"), step_s={1: [1.0], 4: [4.0]}, trainable=10)
    moved = {"micro_batch": {"h2d": 3, "d2h": 2}, "update": {"h2d": 1, "d2h": 0}}
    told = _by_accumulation(m, moved)  # type: ignore[arg-type]
    assert [told[a]["h2d_bytes_per_step"] for a in ("1", "4")] == [4, 13]


@pytest.mark.parametrize("variant", ["meft_budget_50", "meft_budget_100"])
def test_after_the_warm_up_the_rows_that_a_budget_buys_are_on_the_device(variant: str) -> None:
    row = measured_row(on_cpu(variant))
    crossed = row["traffic"]["link_bytes"]
    assert "d2h norm" in crossed and "h2d moments" not in crossed
    assert ("h2d rows" in crossed) == ("d2h grads" in crossed) == (variant == "meft_budget_50")


@pytest.mark.parametrize("variant", ["meft_budget_50", "meft_budget_100", "meft_keys_on_device"])
def test_what_a_budget_keeps_on_the_device_is_counted_there_by_what_it_is(variant: str) -> None:
    """And not taken for activations, which are what is left of the peak."""
    m = on_cpu(variant)
    held, budget = m.accounted["device"], m.size.get("device_budget")
    assert held["adapter parameters"] > 0
    if budget is not None:
        assert held["moments"] > 0 and held["gradients"] > 0
        assert sum(n for c, n in held.items() if c != "base weights") == pytest.approx(budget, rel=0.1)


def test_counting_bytes_brings_nothing_home() -> None:
    """On a GPU of 7B it would take as long as the steps, and memory that a full card lacks: the row would be lost."""
    passes = Passes(Session(spec("meft_budget_100"), "cpu"), None)
    passes.session.build(SMALL)
    assert passes.all(2, 1, [1]).accounted["host"]["gradients"] > 0
    assert all(store.away is not None for store in passes.session.stores)
