"""Seconds of operations and their overlap, against sums made by hand."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from meft_bench import observe
from meft_bench.meft.sites import decoder_layers
from meft_bench.simulate.accumulate import Recorded, TouchedRows, replay_accumulated
from meft_bench.simulate.blocks import blocks
from meft_bench.simulate.cards import Card, Constant, Host, card, host
from meft_bench.simulate.device import NAME, simulated_gpu
from meft_bench.simulate.host_kernels import host_kernels
from meft_bench.simulate.ledger import Segment
from meft_bench.simulate.machine import PIECE, PREFETCH, SUBMIT, WAIT_COPY, WAIT_TASK, Machine, Mark, Operation, Program
from meft_bench.simulate.seconds import operation_seconds
from meft_bench.simulate.sizes import Sizes
from meft_bench.simulate.stretch import stretched
from meft_bench.simulate.threads import Replay
from meft_bench.simulate.timeline import LANES, Timeline, chrome_trace, replay, steady_step
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
        search_rate=4.0,
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
    thread: int = 0,
    copy: int = 0,
) -> Operation:
    return Operation(Segment(phase, layer), part, name, place, flops, bytes, half, blocking, thread, copy)


def _mark(kind: str, number: int, thread: int = 0, queue: int = 0, priority: int = 0) -> Mark:
    return Mark(Segment("forward", 0), kind, thread, number, queue, priority)


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
        (_op("host", bytes=3, flops=50, name="search.default"), 12.6),
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
    assert timeline.busy_s == pytest.approx({"host": 4.1, "workers": 0, "gpu": 8, "h2d": 0, "d2h": 0})


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
@pytest.mark.parametrize("layers", [5, 8, 11])
def test_two_and_four_layers_tell_any_number(name: str, layers: int) -> None:
    made = {n: blocks(_step(n), card(name), host("desktop")) for n in (2, 4, layers)}
    told, direct = Replay(stretched(made[2], made[4], layers), 2), Replay(made[layers], 2)
    assert told.end == pytest.approx(direct.end, rel=1e-9)
    with pytest.raises(ValueError, match="layers=3 must be at least 4"):
        stretched(made[2], made[4], 3)


def _simulated_step(layers: int, micro_batches: int = 1) -> Program:
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
    with simulated_gpu(), host_kernels(), Machine(Sizes({512: 200, 64: 64})) as machine, observe.listening(machine):
        with torch.device(NAME), no_init_weights():
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        attached = method.attach(model, method.Options(neurons=512, kept=64), 0)
        optimizer = attached.make_optimizer(lr=1e-3, weight_decay=0.0)
        optimizer.assume_steady(0.5)
        attached.model.train()
        machine.follow_layers(decoder_layers(model))
        for _ in range(micro_batches):
            with machine.phase("forward"):
                ids_BL = torch.randint(97, (2, 16)).to(NAME)
                loss = attached.model(input_ids=ids_BL, labels=ids_BL).loss
            with machine.phase("backward"):
                loss.backward()
        with machine.phase("update"):
            optimizer.step()
    return machine.program


def test_layers_of_a_simulated_step_extrapolate() -> None:
    two, four, eight = (_simulated_step(n) for n in (2, 4, 8))
    fast, slow = card("24GB"), dataclasses.replace(host("desktop"), bandwidth=Constant(1e8, "", ""))
    for at in (host("desktop"), slow):  # bound by issuing, and by the host's memory
        told = replay_accumulated(Recorded((two, four), 8, False), fast, at, (1, 2))
        seen = replay_accumulated(Recorded((eight, eight), 8, True), fast, at, (1, 2))
        for count in (1, 2):
            assert told[count].step_s == pytest.approx(
                seen[count].step_s, rel=1e-2
            )  # layers are submitted in another order
            assert told[count].components_s == pytest.approx(seen[count].components_s, rel=1e-3, abs=1e-9)
    assert min(seen[1].components_s[k] for k in ("gpu", "h2d", "d2h", "adam", "other_host")) > 0


def test_accumulation_repeats_micro_batches_and_not_the_update() -> None:
    one, two, three, six = (_simulated_step(4, count) for count in (1, 2, 3, 6))
    recorded = Recorded((one, one), 4, True, (three, three))
    for name in ("desktop", "server"):
        told = replay_accumulated(recorded, card("24GB"), host(name), (1, 2, 3, 6))
        for count, program in ((1, one), (2, two), (3, three), (6, six)):
            made = blocks(program, card("24GB"), host(name))
            direct = steady_step(lambda i, made=made: [] if i < 0 else made, 1, steps=4)
            assert told[count].step_s == pytest.approx(direct.step_s, rel=1e-2)
            parts = [{**t.components_s, "gradients": 0.0} for t in (told[count], direct)]  # adds read the sums, too
            assert parts[0] == pytest.approx(parts[1], rel=1e-6, abs=1e-9)
    assert told[6].components_s["adam"] < 3 * told[1].components_s["adam"]
    with pytest.raises(ValueError, match="accumulation 0 must be at least 1"):
        replay_accumulated(recorded, card("24GB"), host("desktop"), (0,))


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


# ---- threads ----


def test_a_task_runs_beside_the_training_thread_until_somebody_waits_for_it(slow_card: Card, slow_host: Host) -> None:
    task = [_mark(SUBMIT, 1, queue=1), _op("host", bytes=5, part="adam", thread=1)]
    timeline = replay(
        [*task, _op("device", bytes=1), _mark(WAIT_TASK, 1), _op("device", bytes=1)], slow_card, slow_host
    )
    assert ("workers", "adam", 0, 5.1) in _spans(timeline)
    assert _spans(timeline)[-1] == ("gpu", "model", pytest.approx(6.1), pytest.approx(7.1))
    assert timeline.busy_s["workers"] == pytest.approx(5.1)


def test_more_urgent_work_takes_the_host_from_less_urgent(slow_card: Card, slow_host: Host) -> None:
    program = [
        _mark(SUBMIT, 1, queue=1, priority=2),
        _op("host", bytes=9, part="adam", thread=1),
        _op("device"),
        _mark(SUBMIT, 2, queue=2, priority=0),
        _op("host", bytes=3, part="retrieval", thread=2),
    ]
    spans = _spans(replay(program, slow_card, slow_host))
    assert ("workers", "retrieval", 1, pytest.approx(4.1)) in spans
    assert ("workers", "adam", pytest.approx(4.1), pytest.approx(12.2)) in spans


def test_one_queue_keeps_its_order_and_lends_its_urgency(slow_card: Card, slow_host: Host) -> None:
    """The search of layer 2 waits behind that layer's AdamW, which so goes before layer 1's."""
    program = [
        _mark(SUBMIT, 1, queue=1, priority=2),
        _op("host", bytes=9, part="adam", thread=1),
        _mark(SUBMIT, 2, queue=2, priority=2),
        _op("host", bytes=9, part="gradients", thread=2),
        _mark(SUBMIT, 3, queue=2, priority=0),
        _op("host", bytes=1, part="retrieval", thread=3),
    ]
    ends = {name: end for _, name, _, end in _spans(replay(program, slow_card, slow_host))}
    assert ends == pytest.approx({"gradients": 9.1, "retrieval": 10.2, "adam": 19.3})


def test_a_queue_that_the_training_thread_waits_for_goes_first(slow_card: Card, slow_host: Host) -> None:
    program = [
        _mark(SUBMIT, 1, queue=1, priority=2),
        _op("host", bytes=9, part="adam", thread=1),
        _mark(SUBMIT, 2, queue=2, priority=2),
        _op("host", bytes=4, part="gradients", thread=2),
    ]
    for waits, order in (([], {"adam": 9.1, "gradients": 13.2}), ([2], {"gradients": 4.1, "adam": 13.2})):
        made = replay([*program, *(_mark(WAIT_TASK, task, queue=2) for task in waits)], slow_card, slow_host)
        assert {name: end for _, name, _, end in _spans(made)} == pytest.approx(order)


def test_with_one_worker_a_task_gives_way_between_its_pieces_alone(slow_card: Card, slow_host: Host) -> None:
    def program(piece: bool) -> Program:
        return [
            _mark(SUBMIT, 1, queue=1, priority=2),
            _op("host", bytes=4, part="adam", thread=1),
            *([_mark(PIECE, 1, thread=1, queue=1)] if piece else []),
            _op("host", bytes=4, part="adam", thread=1),
            _op("device"),
            _mark(SUBMIT, 2, queue=2, priority=0),
            _op("host", bytes=1, part="retrieval", thread=2),
        ]

    for piece, end in ((True, 5.2), (False, 9.2 - 0.1 + 0.2)):
        spans = _spans(replay(program(piece), slow_card, slow_host, workers=1))
        assert [e for _, name, _, e in spans if name == "retrieval"] == [pytest.approx(end)]


def test_copies_of_both_ways_run_beside_kernels_and_each_other(slow_card: Card, slow_host: Host) -> None:
    program = [
        _op("device", bytes=9),
        _op("h2d", bytes=55, copy=1),
        _op("d2h", bytes=5, copy=2),
        _op("device", bytes=1),
        _mark(WAIT_COPY, 1),
        _op("device", bytes=2),
    ]
    spans = _spans(replay(program, slow_card, slow_host))
    assert ("h2d", "model", 2, 8) in spans  # at once
    assert ("d2h", "model", 10, 11) in spans  # after the kernel that made what it copies
    assert ("gpu", "model", 1, 13) in spans  # which waits for neither


def test_device_work_waits_for_its_copy_and_so_does_a_task(slow_card: Card, slow_host: Host) -> None:
    program = [
        _op("h2d", bytes=75, copy=1),
        _mark(WAIT_COPY, 1),
        _op("device", bytes=1),
        _op("d2h", bytes=5, copy=2),
        _mark(SUBMIT, 1, queue=1),
        _mark(WAIT_COPY, 2, thread=1),
        _op("host", bytes=1, part="gradients", thread=1),
    ]
    spans = _spans(replay(program, slow_card, slow_host))
    assert ("gpu", "model", 9, 10) in spans and ("d2h", "model", 10, 11) in spans
    assert ("workers", "gradients", 11, pytest.approx(12.1)) in spans


def test_what_never_happens_is_not_waited_for_in_silence(slow_card: Card, slow_host: Host) -> None:
    program = [_mark(SUBMIT, 1, queue=1), _mark(WAIT_TASK, 2, thread=1), _mark(SUBMIT, 2, queue=1)]
    with pytest.raises(ValueError, match="waits for ever"):
        replay(program, slow_card, slow_host)


def test_a_step_counts_what_it_hides_behind_the_next() -> None:
    """Layer by layer an update of .2 s that the next forward pass of .1 s does not wait for: a step takes .2 s."""
    on, at = _set(card("24GB"), launch=0.0), _set(host("desktop"), bandwidth=1e9, overhead=0.0)
    forward = [_op("device", bytes=round(0.1 * on.bandwidth.value * on.bandwidth_share.value))]
    sync = _op("d2h", blocking=True)
    mark = Mark(Segment("update", -1), SUBMIT, 0, 1, 1, 2)
    update = [mark, _op("host", bytes=2 * 10**8, thread=1, phase="update", layer=-1)]
    program: Program = [*forward, sync, *update]
    one = replay_accumulated(Recorded((program, program), 1, True), on, at, (1,))[1]
    assert one.step_s == pytest.approx(0.1, rel=1e-2)  # nobody waits: AdamW would fall behind for ever
    held: Program = [_mark(WAIT_TASK, 99, queue=1), *program]  # of the step before
    assert replay_accumulated(Recorded((held, held), 1, True), on, at, (1,))[1].step_s == pytest.approx(0.3, rel=1e-2)


def test_an_update_within_backward_is_the_last_micro_batchs_alone() -> None:
    """3 s a micro-batch, half a second to add to gradients that are there, 4 s to use them."""
    on, at = _set(card("24GB"), launch=0.0), _set(host("desktop"), overhead=0.0)
    second = on.bandwidth.value * on.bandwidth_share.value
    forward, sync = _op("device", bytes=round(second)), _op("d2h", blocking=True)

    def backward(seconds: float) -> list[Operation | Mark]:
        return [_op("device", bytes=round(seconds * second), phase="backward"), sync._replace(segment=_BACK)]

    one: Program = [forward, *backward(2 + 4)]
    three: Program = [forward, *backward(2), forward, *backward(2.5), forward, *backward(2.5 + 4)]
    recorded = Recorded((one, one), 1, True, (three, three), last_differs=True)
    told = replay_accumulated(recorded, on, at, (1, 2, 3, 6))
    for count in (1, 2, 3, 6):
        assert told[count].components_s["gpu"] == pytest.approx(3 * count + 0.5 * (count - 1) + 4)
        assert told[count].step_s == pytest.approx(told[count].components_s["gpu"], rel=1e-3)


_BACK = Segment("backward", 0)


def test_rows_touched_drift_and_update_by_their_count() -> None:
    """Of 100 rows a micro-batch touches 20, two touch 36: keys of 64 drift, once a step, and 36 rows are updated. Of
    the second's 20 gradients 4 are added to one that is there, which is read."""
    rows = TouchedRows(100, lambda a: {1: 20, 2: 36}[a], 20, 100)
    drift = _op("host", bytes=8000, name="drift.default", part="retrieval", phase="update", layer=-1)
    add = _op("host", bytes=600, flops=100, name="accumulate.default", part="gradients", phase="backward")
    update = _op("host", bytes=2000, name="advance.default", part="adam", phase="update", layer=-1)
    again = _op("device", bytes=1)
    one: Program = [again, add, update, drift]
    three: Program = [again, add, again, add, again, add, update, drift]
    at = _set(host("desktop"), bandwidth=1.0, overhead=0.0)
    recorded = Recorded((one, one), 1, True, (three, three), rows)
    told = replay_accumulated(recorded, card("24GB"), at, (1, 2))
    parts = {a: told[a].components_s for a in (1, 2)}
    assert (parts[1]["retrieval"], parts[1]["gradients"], parts[1]["adam"]) == pytest.approx((8000, 600, 2000))
    assert parts[2]["retrieval"] == pytest.approx(8000 * 64 / 80)
    assert parts[2]["gradients"] == pytest.approx(600 + 600 + 4 * 100 * 4 / 20)
    assert parts[2]["adam"] == pytest.approx(2000 * 36 / 20)
