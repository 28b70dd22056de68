"""Seconds of operations and their overlap, against sums made by hand."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from meft_bench import observe
from meft_bench.meft.sites import decoder_layers
from meft_bench.simulate.cards import Card, Constant, Host, card, host
from meft_bench.simulate.device import NAME, simulated_gpu
from meft_bench.simulate.host_kernels import host_kernels
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import PREFETCH, Machine, Operation
from meft_bench.simulate.sizes import Sizes
from meft_bench.simulate.timeline import (
    LANES,
    Timeline,
    chrome_trace,
    extrapolate,
    operation_seconds,
    replay,
    replay_accumulated,
)
from meft_bench.train.methods import find_method


def _set(owner, **values: float):
    return dataclasses.replace(owner, **{k: Constant(v, "", "") for k, v in values.items()})


@pytest.fixture
def slow_card() -> Card:
    """1 byte/s everywhere but pinned copies, which take a tenth; 10 FLOP/s in fp32, 100 in bf16; issuing takes 1 s."""
    return _set(
        card("24GB"),
        half_rate=200.0,
        half_share=0.5,
        full_rate=20.0,
        full_share=0.5,
        bandwidth=2.0,
        bandwidth_share=0.5,
        h2d_pinned=10.0,
        d2h_pinned=10.0,
        h2d_pageable=1.0,
        d2h_pageable=1.0,
        copy_latency=0.5,
        launch=1.0,
        kernel=0.25,
    )


@pytest.fixture
def slow_host() -> Host:
    return _set(
        host("desktop"),
        product_rate=10.0,
        dot_rate=5.0,
        element_rate=2.0,
        bandwidth=1.0,
        fresh_bandwidth=0.5,
        overhead=0.1,
    )


def _op(
    place: str,
    bytes: int = 0,
    flops: int = 0,
    name: str = "add.Tensor",
    *,
    half: bool = False,
    blocking: bool = False,
    part: str = "model",
    phase: str = "forward",
    layer: int = 0,
) -> Operation:
    return Operation(Segment(phase, layer), part, name, place, flops, bytes, half, blocking)


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (_op("device", bytes=3, flops=10), 3.0),  # bound by memory
        (_op("device", bytes=3, flops=50), 5.0),  # by arithmetic, in fp32
        (_op("device", flops=500, name="mm.default", half=True), 5.0),  # tensor cores
        (_op("device", flops=500, half=True), 50.0),  # which serve products alone
        (_op("device"), 0.25),
        (_op("host", bytes=3), 3.1),
        (_op("host", bytes=3, flops=1000), 3.1),  # element-wise arithmetic hides behind memory
        (_op("host", bytes=3, flops=50, name="mm.default"), 5.1),
        (_op("host", bytes=3, flops=50, name="_embedding_bag_per_sample_weights_backward.default"), 10.1),
        (_op("host", bytes=3, flops=50, name="topk.default"), 25.1),
        (_op("host", bytes=3, name="index_select.default"), 3.1),
        (_op("host", bytes=2**27, name="index_select.default"), 2**28 + 0.1),  # new pages
        (_op("host", bytes=3 * 2**24, name="_to_copy.default"), 3 * 2**24 + 0.1),  # 32 MiB written: just reused
        (_op("host", bytes=3 * 2**25, name="_to_copy.default"), 3 * 2**26 + 0.1),
        (_op("host", bytes=3 * 2**25, name="_to_copy.default", half=True), 3 * 2**25 + 0.1),
        (_op("h2d", bytes=3, blocking=True), 3.5),
        (_op("h2d", bytes=3), 0.8),
        (_op("d2h", bytes=3, blocking=True), 3.5),
    ],
)
def test_seconds_of_one_operation(operation: Operation, seconds: float, slow_card: Card, slow_host: Host) -> None:
    assert operation_seconds(operation, slow_card, slow_host) == pytest.approx(seconds)


def _spans(timeline: Timeline) -> list[tuple[str, str, float, float]]:
    return [(e["lane"], e["name"], e["start_s"], e["end_s"]) for e in timeline.events]


def test_host_work_overlaps_device_work_that_was_issued(slow_card: Card, slow_host: Host) -> None:
    timeline = replay([_op("device", bytes=8), _op("host", bytes=3, part="adam")], slow_card, slow_host)
    assert _spans(timeline) == [("host", "launch", 0, 1), ("host", "adam", 1, 4.1), ("gpu", "model", 1, 9)]
    assert timeline.step_s == pytest.approx(9)
    assert timeline.busy_s == pytest.approx({"host": 4.1, "gpu": 8, "h2d": 0, "d2h": 0})


def test_a_blocking_copy_waits_for_the_stream_and_holds_up_the_host(slow_card: Card, slow_host: Host) -> None:
    program = [_op("device", bytes=8), _op("d2h", bytes=2, blocking=True), _op("host", bytes=3, part="retrieval")]
    timeline = replay(program, slow_card, slow_host)
    assert _spans(timeline) == [
        ("host", "launch", 0, 2),
        ("gpu", "model", 1, 9),
        ("d2h", "model", 9, 11.5),
        ("host", "retrieval", 11.5, 14.6),
    ]
    assert timeline.step_s == pytest.approx(14.6)
    assert timeline.components_s == pytest.approx(
        {"gpu": 8, "retrieval": 3.1, "gather": 0, "h2d": 0, "d2h": 2.5, "gradients": 0, "adam": 0, "other_host": 2}
    )


def test_a_non_blocking_copy_keeps_stream_order_and_lets_the_host_go_on(slow_card: Card, slow_host: Host) -> None:
    program = [_op("device", bytes=4), _op("h2d", bytes=5), _op("device", bytes=1), _op("host", bytes=1)]
    timeline = replay(program, slow_card, slow_host)
    assert ("h2d", "model", 5, 6) in _spans(timeline)  # after the first kernel
    assert ("gpu", "model", 6, 7) in _spans(timeline)  # and before the second
    assert ("host", "model", 3, 4.1) in _spans(timeline)
    assert timeline.step_s == pytest.approx(7)


def test_a_prefetch_runs_beside_the_stream_and_what_follows_waits_for_it(slow_card: Card, slow_host: Host) -> None:
    program = [_op("device", bytes=4), _op("h2d", bytes=65, name=PREFETCH), _op("device", bytes=1)]
    timeline = replay(program, slow_card, slow_host)
    assert _spans(timeline) == [
        ("host", "launch", 0, 2),
        ("gpu", "model", 1, 5),
        ("h2d", "model", 1, 8),
        ("gpu", "model", 8, 9),
    ]
    assert timeline.components_s["h2d"] == pytest.approx(7)


def test_an_idle_device_waits_to_be_told(slow_card: Card, slow_host: Host) -> None:
    timeline = replay([_op("host", bytes=5), _op("device", bytes=1)], slow_card, slow_host)
    assert _spans(timeline)[-1] == ("gpu", "model", pytest.approx(6.1), pytest.approx(7.1))


def test_order_matters(slow_card: Card, slow_host: Host) -> None:
    kernel, work = _op("device", bytes=6), _op("host", bytes=5)
    assert replay([kernel, work], slow_card, slow_host).step_s == pytest.approx(7)
    assert replay([work, kernel], slow_card, slow_host).step_s == pytest.approx(12.1)


def test_device_work_of_any_part_counts_as_gpu(slow_card: Card, slow_host: Host) -> None:
    timeline = replay([_op("device", bytes=6, part="adam"), _op("host", bytes=1)], slow_card, slow_host)
    assert (timeline.components_s["gpu"], timeline.components_s["adam"]) == (6, 0)
    assert timeline.components_s["other_host"] == pytest.approx(2.1)


def test_nothing_takes_no_time(slow_card: Card, slow_host: Host) -> None:
    timeline = replay([], slow_card, slow_host)
    assert timeline.step_s == 0 and timeline.events == [] and set(timeline.busy_s) == set(LANES)


def _layer(number: int, phase: str) -> list[Operation]:
    return [
        _op("device", bytes=10**8, flops=10**11, name="mm.default", half=True, phase=phase, layer=number),
        _op("d2h", bytes=4 * 10**6, blocking=True, phase=phase, layer=number),
        _op("host", bytes=10**7, part="retrieval", phase=phase, layer=number),
        _op("h2d", bytes=10**7, phase=phase, layer=number),
        _op("device", bytes=10**8, phase=phase, layer=number),
    ]


def _step(layers: int) -> list[Operation]:
    forward = [o for i in range(layers) for o in _layer(i, "forward")]
    backward = [o for i in reversed(range(layers)) for o in _layer(i, "backward")]
    update = [_op("host", bytes=10**8, part="adam", phase="update", layer=-1) for _ in range(layers)]
    return [*forward, _op("d2h", bytes=4, blocking=True, layer=-1), *backward, *update]


@pytest.mark.parametrize("name", ["24GB", "h200"])
def test_lanes_add_up(name: str) -> None:
    timeline = replay(_step(3), card(name), host("desktop"))
    assert max(timeline.busy_s.values()) <= timeline.step_s < sum(timeline.components_s.values())
    assert sum(timeline.components_s.values()) == pytest.approx(sum(timeline.busy_s.values()))
    for lane in LANES:
        spans = [e for e in timeline.events if e["lane"] == lane]
        assert all(a["end_s"] <= b["start_s"] + 1e-9 for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("name", ["24GB", "h200"])
@pytest.mark.parametrize("target", [1, 8])
def test_two_and_four_layers_tell_any_number(name: str, target: int) -> None:
    two, four, direct = (replay(_step(n), card(name), host("desktop")) for n in (2, 4, target))
    told = extrapolate(two, four, target)
    assert told.step_s == pytest.approx(direct.step_s, rel=0.01)
    assert told.busy_s == pytest.approx(direct.busy_s, rel=1e-6)
    assert told.components_s == pytest.approx(direct.components_s, rel=1e-6, abs=1e-9)
    assert told.events == two.events


def _simulated_step(layers: int) -> list[Operation]:
    """A MEFT training step of a small Llama, R=512 and U=200 per layer, as the simulated GPU sees it."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=97,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    method = find_method("meft")
    with simulated_gpu(), host_kernels(), Machine(Sizes({512: 200, 64: 64})) as machine:
        with torch.device(NAME), no_init_weights():
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        attached = method.attach(model, method.Options(neurons=512, kept=64), 0)
        optimizer = attached.make_optimizer(lr=1e-3, weight_decay=0.0)
        optimizer.assume_steady()
        attached.model.train()
        machine.follow_layers(decoder_layers(model))
        with machine.phase("forward"):
            ids_BL = torch.randint(97, (2, 16)).to(NAME)
            loss = attached.model(input_ids=ids_BL, labels=ids_BL).loss
        with machine.phase("backward"):
            loss.backward()
        with observe.listening(machine), observe.phase("update"):
            optimizer.step()
    return machine.operations


def test_layers_of_a_simulated_step_extrapolate() -> None:
    two, four, eight = (replay(_simulated_step(n), card("24GB"), host("desktop")) for n in (2, 4, 8))
    told = extrapolate(two, four, 8)
    assert told.step_s == pytest.approx(eight.step_s, rel=0.01)
    assert told.components_s == pytest.approx(eight.components_s, rel=0.01)
    assert min(eight.components_s[k] for k in ("gpu", "h2d", "d2h", "adam", "other_host")) > 0


def test_extrapolation_needs_a_layer() -> None:
    one = replay(_step(1), card("24GB"), host("desktop"))
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        extrapolate(one, one, 0)


def test_accumulation_repeats_micro_batches_and_not_the_update() -> None:
    program = _step(2)
    micro = [o for o in program if o.segment.phase != "update"]
    told = replay_accumulated(program, card("24GB"), host("desktop"), (1, 2, 5))
    for count in (1, 2, 5):
        direct = replay([*micro * (count - 1), *program], card("24GB"), host("desktop"))
        assert told[count].step_s == pytest.approx(direct.step_s, rel=1e-6)
        assert told[count].components_s == pytest.approx(direct.components_s, rel=1e-6, abs=1e-9)
    assert told[5].components_s["adam"] == pytest.approx(told[1].components_s["adam"])
    with pytest.raises(ValueError, match="accumulation 0 must be at least 1"):
        replay_accumulated(program, card("24GB"), host("desktop"), (0,))


def test_events_join_within_a_part_of_a_layer_alone() -> None:
    kernels = [_op("device", bytes=10**8, layer=layer) for layer in (0, 0, 0, 1, 1)]
    timeline = replay(kernels, card("24GB"), host("desktop"))
    gpu = [e for e in timeline.events if e["lane"] == "gpu"]
    assert [e["layer"] for e in gpu] == [0, 1]
    assert sum(e["end_s"] - e["start_s"] for e in gpu) == pytest.approx(timeline.busy_s["gpu"], rel=1e-6)


def test_a_trace_opens_in_perfetto() -> None:
    """The Trace Event Format: metadata names the threads, complete events carry microseconds."""
    timeline = replay(_step(2), card("24GB"), host("desktop"))
    trace = json.loads(json.dumps(chrome_trace(timeline.events), allow_nan=False))
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert sorted(names.values()) == sorted(LANES) and len(spans) == len(timeline.events)
    for span, event in zip(spans, timeline.events, strict=True):
        assert set(span) == {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
        assert names[span["tid"]] == event["lane"] and span["cat"] == event["phase"]
        assert span["ts"] == pytest.approx(event["start_s"] * 1e6, abs=1e-2)
        assert span["dur"] == pytest.approx((event["end_s"] - event["start_s"]) * 1e6, abs=1e-2) and span["dur"] >= 0
