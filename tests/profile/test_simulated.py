"""One simulated step: exact in the number of layers, in its counts, and in what crosses."""

import dataclasses

import pytest
import torch

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.budget import Split, split
from meft_bench.profile import deepspeed, jobs, shapes, simulated, variants
from meft_bench.profile.runs import memory_of
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated import Run, draws_of, extrapolate, largest, simulate_layers, touched_rows
from meft_bench.profile.simulated_row import add_practicality, crossed_bytes, simulated_row
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.variants import VARIANTS, size_options
from meft_bench.simulate import accumulate, cards
from meft_bench.simulate.ledger import BLOCK
from meft_bench.simulate.machine import WAIT_COPY, Mark, Operation
from meft_bench.train.counts import Counted
from meft_bench.train.methods import find_method
from tests.profile.small import real_parts, real_step, shape_of_config, small_config, small_spec

RUN = [name for name, v in VARIANTS.items() if not v.engine]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("variant", ["full", "lora_all", "parallel_adapter", "q4_parallel_adapter", "meft",
                                     "parallel_adapter_host_optimizer_gradients"])  # fmt: skip
def test_two_runs_give_every_layer_count(variant, checkpointing):
    """2 and 4 layers give 8, byte for byte: device peak by category, copies, parameters."""
    spec = small_spec(variant, checkpointing=checkpointing, neurons=1024)
    config = small_config(layers=8)
    told = extrapolate((simulate_layers(spec, config, 2), simulate_layers(spec, config, 4)), 8)
    seen = simulate_layers(spec, config, 8)
    assert largest(told, "device").bytes == largest(seen, "device").bytes
    assert largest(told, "device").by_category == largest(seen, "device").by_category
    # A small host tensor in a reference cycle may or may not have been collected yet.
    assert largest(told, "host").bytes == pytest.approx(largest(seen, "host").bytes, abs=4096)
    assert (told.crossed, told.link, told.parameters) == (seen.crossed, seen.link, seen.parameters)
    assert (told.base_parameters, told.layer_parameters) == (seen.base_parameters, seen.layer_parameters)
    assert (told.after["device"], told.kept) == (seen.after["device"], seen.kept)


@pytest.mark.parametrize("variant", RUN)
def test_every_variant_runs_and_trains_what_its_formula_says(variant):
    spec = small_spec(variant)
    run = simulate_layers(spec, small_config(), 2)
    shape = shape_of_config(small_config(layers=2))
    if variant == "base":
        assert run.parameters == 0
        return
    method = find_method(VARIANTS[variant].method)
    options = method.Options(**size_options(VARIANTS[variant], spec.neurons, Counted(small_config(layers=2))))
    assert run.parameters == sum(method.count(options, shape).values())
    assert largest(run, "device").bytes > 0


def meft_formula(spec: ProfileSpec, hidden: int, layers: int, gated: bool, options: MeftOptions) -> dict[str, int]:
    """Bytes of one step by purpose: Eq. 8 with gradients, and what it leaves out, at 16 bits. The router lies on the
    device: experts and their gates come from there, its gradient comes once a step; it goes there again after that."""
    tokens, rows, kept = spec.tokens, spec.union.rows, options.kept
    purposes = {
        "h2d rows": 2 * rows * hidden * 2,
        "d2h grads": 2 * rows * hidden * 2,
        "d2h hidden": tokens * hidden * 2,
        "h2d index": tokens * kept * 4,
    }
    if gated:
        router = options.experts * hidden * 2
        purposes |= {
            "h2d index": 2 * tokens * kept * 4,  # places, and whose expert each is
            "d2h index": tokens * options.probed * 4,
            "d2h score": tokens * options.probed * 2,
            "d2h router": router,
            "h2d router": 2 * router,  # the step that is followed begins without it
        }
    return {name: layers * size for name, size in purposes.items()}


@pytest.mark.parametrize("variant", ["meft", "meft_no_ke"])
def test_link_meter_and_formula_agree_to_the_byte(variant):
    spec = small_spec(variant, union=Union(rows=90, source="assumed: test", evidence="assumed"))
    run = simulate_layers(spec, small_config(), 2)
    options = find_method("meft").Options(**size_options(VARIANTS[variant], spec.neurons, None))
    expected = meft_formula(spec, 256, 2, variant == "meft", options)
    link = {f"{way} {purpose}": size for (way, purpose), size in run.link.items()}
    assert link == expected
    for way in ("h2d", "d2h"):
        counted = sum(size for name, size in expected.items() if name.startswith(way))
        metered = sum(c[way] for c in run.crossed.values())
        # The meter also sees what the link does not: token ids down, the padding mask up, and a few numbers that the
        # host reads (the loss, how many positions a mask holds).
        others = 8 * spec.tokens
        assert counted + others <= metered <= counted + others + (0 if way == "h2d" else 64)


def test_without_checkpointing_rows_wait_for_backward():
    """The union's rows of every layer live at the peak, and with checkpointing those of one layer at most."""
    kept, again = (simulate_layers(small_spec("meft", checkpointing=c), small_config(), 4) for c in (False, True))
    rows = 4 * 2 * 100 * 256 * 2
    held = largest(kept, "device").by_category["transferred rows"]
    assert held >= rows
    assert largest(again, "device").by_category.get("transferred rows", 0) < held


def test_more_rows_cost_what_they_weigh():
    few, many = (
        simulate_layers(small_spec("meft_no_ke", union=Union(rows=u, source="assumed: test", evidence="assumed")),
                        small_config(), 2)
        for u in (64, 192)
    )  # fmt: skip
    difference = 128 * 256 * 2 * 2 * 2
    assert sum(many.link.values()) - sum(few.link.values()) == 2 * difference
    assert largest(many, "device").bytes > largest(few, "device").bytes


def test_accumulated_gradients_stay_on_the_device_or_do_not():
    waiting = simulate_layers(small_spec("parallel_adapter_host_optimizer"), small_config(), 2)
    returned = simulate_layers(small_spec("parallel_adapter_host_optimizer_gradients"), small_config(), 2)
    size = waiting.parameters * 2
    assert waiting.crossed["update"]["d2h"] >= size > waiting.crossed["backward"]["d2h"]
    assert returned.crossed["backward"]["d2h"] >= size


def zero_ground(accumulations: int = 1) -> tuple[Run, ProfileSpec]:
    spec = small_spec(deepspeed.GROUND, neurons=512)
    return simulate_layers(spec, small_config(), 2), spec


def test_zero2_formula():
    """DeepSpeed's gradients cross in fp32; its bucket and buffer stand on the device."""
    run, _ = zero_ground()
    made = deepspeed.zero(run, "zero2", 512 * 256, 0)
    assert largest(made, "device").bytes - largest(run, "device").bytes == 2 * (500_000_000 + 512 * 256)
    assert made.crossed["backward"]["d2h"] - run.crossed["backward"]["d2h"] == 2 * run.parameters
    once, four = deepspeed.accumulated_bytes(made, 1), deepspeed.accumulated_bytes(made, 4)
    m = 2 * run.parameters
    small = 10_000
    assert once[1] == pytest.approx(2 * m, abs=small) and once[0] == pytest.approx(m, abs=small)
    # Four: three 16-bit sums sent and fetched back, and the last in fp32.
    assert four[0] == pytest.approx(m + 3 * m, abs=small) and four[1] == pytest.approx(3 * m + 2 * m, abs=small)


def test_zero2_sends_sums_and_fetches_them_and_the_host_adds_nothing():
    run, _ = zero_ground()
    one, three = (deepspeed.zero(run, "zero2", 512 * 256, 0, count) for count in (1, 3))
    for way, told in zip(("h2d", "d2h"), deepspeed.accumulated_bytes(one, 3), strict=True):
        assert sum(o.bytes for o in three.operations if o.place == way) == told
    first, second, last = (
        sum(o.bytes for o in part if isinstance(o, Operation) and (o.place, o.part) == ("d2h", "gradients"))
        for part in (accumulate._parts(three.program)[kind] for kind in ("first", "second", "later"))
    )
    assert 2 * first == 2 * second == last == 4 * run.parameters
    assert not any(o.name.startswith("add_gradient") for o in three.operations)
    # Every copy that the update waits for is made, in the last micro-batch.
    waited = {m.number for m in three.program if isinstance(m, Mark) and m.kind == WAIT_COPY}
    assert waited and waited <= {o.copy for o in three.operations}
    whole = sum(o.bytes for o in three.operations if o.name == "add_.Tensor")
    assert whole == 2 * 3 * 2 * run.parameters


def test_zero3_fetches_every_weight_both_ways():
    run, _ = zero_ground()
    live = deepspeed._LIVE
    made = deepspeed.zero(run, "zero3", 512 * 256, 1_000_000)
    whole = run.parameters + run.base_parameters
    assert made.crossed["forward"]["h2d"] - run.crossed["forward"]["h2d"] == 2 * whole
    assert made.crossed["backward"]["h2d"] - run.crossed["backward"]["h2d"] == 2 * (whole - min(whole, live))
    prefetched = [o for o in made.operations if o.name == "prefetch"]
    assert {o.segment for o in prefetched} == {o.segment for o in run.operations if o.segment.layer >= 0}
    assert largest(made, "host").bytes - largest(run, "host").bytes == 2 * run.base_parameters


def crossed_in(run: Run, phase: str, way: str, part: str) -> int:
    return sum(o.bytes for o in run.operations if (o.segment.phase, o.place, o.part) == (phase, way, part))


def bought(spec: ProfileSpec, config, layers: int) -> tuple[MeftOptions, Split]:
    options = MeftOptions(**size_options(VARIANTS[spec.variant], spec.neurons, Counted(config)))
    return options, split(options, layers, config.hidden_size, torch.bfloat16, router_there=True)


def test_with_everything_on_the_device_no_row_crosses_and_the_host_updates_none():
    run = simulate_layers(small_spec("meft_budget_100", accumulation=3), small_config(), 4)
    assert set(run.link) <= {("d2h", "index"), ("d2h", "norm")}
    updates = [o.name for o in run.operations if o.place == "host" and o.name.startswith(("advance.", "drift."))]
    assert not updates
    on_device = [o for o in run.operations if o.name.startswith("_fused_adamw") and o.place == "device"]
    assert len(on_device) == 4 * 3, "keys, values and router of each layer"


@pytest.mark.parametrize("variant", ["meft_budget_25", "meft_budget_50"])
def test_rows_whose_optimizer_is_on_the_device_stay_there(variant):
    """Of the others each micro-batch sends the values that it uses, and their gradients go home. After a step the keys
    of all others have changed."""
    config, layers = small_config(), 4
    one, three = (small_spec(variant, accumulation=a) for a in (1, 3))
    first, later = (simulate_layers(s, config, layers) for s in (one, three))
    options, there = bought(one, config, layers)
    assert 0 < there.moments == there.rows < options.neurons and there.keys
    value, others = config.hidden_size * 2, options.neurons - there.rows
    passing = first.link["h2d", "rows"] // (layers * value)
    assert passing == pytest.approx(draws_of(one).on_host(there.rows, 1), rel=0.2), "held are nearly the rows used most"
    assert first.link["d2h", "grads"] == layers * passing * 2 * value
    assert later.link["d2h", "grads"] == 2 * later.link["h2d", "rows"]
    assert later.link["h2d", "rows"] == pytest.approx(3 * first.link["h2d", "rows"], rel=0.15)
    assert first.link["h2d", "key_index"] == layers * others * (value + 4), "and their numbers"
    assert ("d2h", "hidden") not in first.link and ("h2d", "moments") not in first.link
    on_device = [o for o in first.operations if o.name.startswith("_fused_adamw") and o.place == "device"]
    assert len(on_device) == layers * 3, "keys, values and router of each layer"
    told = crossed_bytes(one, first, 3)
    assert told == {way: pytest.approx(sum(c[way] for c in later.crossed.values()), rel=0.1) for way in told}


def test_the_host_updates_the_rows_that_are_not_on_the_device():
    """Dense AdamW moves each of them in a step, with a gradient or without; what many micro-batches touch is theirs
    alone."""
    spec, config, layers = small_spec("meft_budget_50"), small_config(), 4
    run, (options, there) = simulate_layers(spec, config, layers), bought(spec, config, layers)
    rows = touched_rows(spec, there)
    moved = sum(o.flops for o in run.operations if o.place == "host" and o.name.startswith("advance."))
    plain = simulate_layers(dataclasses.replace(spec, variant="meft"), config, layers)
    all_moved = sum(o.flops for o in plain.operations if o.place == "host" and o.name.startswith("advance."))
    all_moved -= layers * 12 * options.experts * config.hidden_size  # the router, which a budget takes to the device
    assert moved / all_moved == pytest.approx(rows.once / spec.union.rows, rel=0.15)
    assert 0 < rows.once < rows.after(8) <= rows.neurons == options.neurons - there.moments
    assert rows.updated(1, 1) == 1 and rows.updated(8, 3) == rows.after(8) / spec.union.rows


@pytest.mark.parametrize("variant", ["meft_budget_25", "meft_budget_50", "meft_budget_100"])
def test_what_a_budget_keeps_on_the_device_is_called_what_it_is(variant):
    """All of what it buys, to the byte, and nothing of it among the activations."""
    spec, config, layers = small_spec(variant), small_config(), 4
    run, (options, there) = simulate_layers(spec, config, layers), bought(spec, config, layers)
    held = largest(run, "device").by_category
    kept = sum(held.get(name, 0) for name in ("adapter parameters", "gradients", "moments"))
    assert there.nbytes <= kept <= there.nbytes + layers * 8 * BLOCK, "each tensor takes whole blocks"
    plain = largest(simulate_layers(small_spec("meft"), config, layers), "device").by_category
    assert held["activations"] < plain["activations"] + plain["transferred rows"]
    assert ("moments" in held) == (there.moments > 0) and options.neurons >= there.rows


def test_a_checkpoints_second_forward_pass_sends_what_is_not_on_the_device_again():
    config = small_config()
    once, twice = (simulate_layers(small_spec("meft_budget_25", checkpointing=c), config, 4) for c in (False, True))
    assert twice.link["h2d", "rows"] == pytest.approx(2 * once.link["h2d", "rows"], rel=0.05)
    assert twice.link["d2h", "grads"] == twice.link["h2d", "rows"], "gradients of keys and values, once"


def test_gradients_that_were_measured_as_they_came_are_not_measured_again():
    """After several micro-batches, the norm needs no pass over rows' gradients."""
    spec = small_spec("meft", accumulation=3)
    run, (options, _) = simulate_layers(spec, small_config(), 4), bought(spec, small_config(), 4)
    squares = [o for o in run.operations if o.segment.phase == "update" and o.name.startswith("squares.")]
    assert 0 < sum(o.bytes for o in squares) <= 4 * options.experts * 256 * 4 + 4 * options.experts * 8 * 2


def test_a_union_that_is_rounded_to_none_is_of_one_row():
    union = Union(rows=round(0.3), source="assumed: for a test", evidence="assumed")
    run = simulate_layers(small_spec("meft", neurons=1, union=union), small_config(), 2)
    assert run.link["h2d", "rows"] == 2 * 2 * 256 * 2, "keys and values of two layers"


def test_mistral_and_others_build():
    for config in (
        shapes.model_config("mistral-7b"),
        small_config(num_key_value_heads=2),
    ):
        spec = dataclasses.replace(small_spec("parallel_adapter"), neurons=64)
        assert simulate_layers(spec, config, 1).base_parameters > 0


def row_of(spec: ProfileSpec, accumulations: tuple[int, ...], **changes) -> dict:
    config = small_config(layers=2, **changes)
    setting = Setting(config=config, shape=shape_of_config(config), card=cards.card("24GB"),
                      host=cards.host("desktop"), accumulations=accumulations)  # fmt: skip
    return simulated_row(spec, setting)[0]


def setting_of_two_layers(*accumulations: int) -> Setting:
    config = small_config(layers=2)
    return Setting(config=config, shape=shape_of_config(config), card=cards.card("24GB"), host=cards.host("desktop"),
                   accumulations=accumulations)  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("variant", ["meft", "meft_budget_50", "full_lomo", "lora_all", "parallel_adapter_zero3"])
def test_a_rows_memory_is_had_without_its_time(variant, accumulation):
    spec, setting = small_spec(variant, accumulation=accumulation), setting_of_two_layers(accumulation)
    row, alone = simulated_row(spec, setting)[0]["memory"], memory_of(spec, setting)
    assert alone["host_peak_bytes"] == pytest.approx(row["host_peak_bytes"], abs=4096)  # as above
    others = {"host_peak_bytes", "host_by_category"}
    assert {k: v for k, v in alone.items() if k not in others} == {k: row[k] for k in alone if k not in others}


@pytest.mark.parametrize(
    "variants", [("parallel_adapter_host_optimizer_gradients", "parallel_adapter_zero2", "parallel_adapter_zero3")]
)
def test_rows_that_are_made_from_one_simulation_simulate_once(variants, monkeypatch):
    ran = []
    real = simulated.simulate_layers
    monkeypatch.setattr(simulated, "simulate_layers", lambda spec, *rest: ran.append(spec) or real(spec, *rest))
    specs, setting = [small_spec(v) for v in variants], setting_of_two_layers(1, 4)
    assert jobs.grouped([*specs, small_spec("full")]) == [tuple(specs), (small_spec("full"),)]
    together = [simulated_row(spec, setting)[0] for spec in specs]
    assert [spec.accumulation for spec in ran] == [1, 3]
    alone = [simulated_row(spec, setting_of_two_layers(1, 4))[0] for spec in specs]
    assert [row["time"] for row in together] == [row["time"] for row in alone]
    assert [row["variant"] for row in together] == list(variants)


@pytest.mark.parametrize("variant", ["meft", "parallel_adapter_host_optimizer", "parallel_adapter_zero2"])
def test_a_step_of_four_is_a_step_of_four_however_it_is_asked_for(variant):
    """Time and bytes of 4 micro-batches do not depend on what else was asked; memory is that of more than one."""
    alone = row_of(small_spec(variant, accumulation=4), (4,))
    among = row_of(small_spec(variant), (1, 4))
    assert alone["time"]["step_s_by_accumulation"]["4"] == among["time"]["step_s_by_accumulation"]["4"]
    assert alone["traffic"]["by_accumulation"]["4"] == among["traffic"]["by_accumulation"]["4"]
    assert alone["traffic"]["link_bytes"] == among["traffic"]["link_bytes"]
    assert alone["memory"]["device_peak_bytes"] >= among["memory"]["device_peak_bytes"]
    many = row_of(small_spec(variant, accumulation=10**6), (10**6,))
    assert many["memory"] == alone["memory"], "from the second micro-batch on all are alike"


def test_memory_of_several_micro_batches_holds_their_gradients():
    one, four = (row_of(small_spec("parallel_adapter", accumulation=a), (4,)) for a in (1, 4))
    more = four["memory"]["by_phase"]["forward"] - one["memory"]["by_phase"]["forward"]
    assert more >= 0.9 * one["memory"]["after_step"]["kept_gradients_bytes"] > 0


HOST = ("parallel_adapter_host_optimizer_gradients", "parallel_adapter_zero2")


@pytest.mark.parametrize("variant", ["parallel_adapter", "parallel_adapter_adam8bit", "meft", *HOST])
def test_a_row_of_one_micro_batch_says_what_a_step_of_four_takes(variant):
    """Of a model that is extrapolated."""
    config, spec = small_config(layers=12), small_spec(variant)
    setting = Setting(config=config, shape=shape_of_config(config), card=cards.card("24GB"),
                      host=cards.host("desktop"), accumulations=(1, 4))  # fmt: skip
    memory = simulated_row(spec, setting)[0]["memory"]
    four = memory_of(dataclasses.replace(spec, accumulation=4), setting)
    told = memory["accumulated"]
    near = {**told, "host_peak_bytes": pytest.approx(told["host_peak_bytes"], abs=4096)}  # as above
    assert {name: four[name] for name in told} == near
    kept = memory["after_step"]["kept_gradients_bytes"] if memory["after_step"] else 0
    more, blocks = told["device_peak_bytes"] - memory["device_peak_bytes"], 100 * BLOCK
    assert (kept / 10 if kept else 0) <= more <= kept + blocks
    if variant in HOST:
        sums = 4 * 2 * spec.neurons * config.hidden_size * 12
        assert told["host_peak_bytes"] > memory["host_peak_bytes"] + sums / 2, "they are summed there"


def test_practicality_is_there_without_a_step_of_one():
    rows = [row_of(small_spec(v, accumulation=16), (16, 128)) for v in ("parallel_adapter", "meft")]
    add_practicality(rows[1:])
    assert rows[1]["time"]["practicality"] is None and rows[1]["time"]["practicality_reason"]
    add_practicality(rows)
    assert "practicality_reason" not in rows[1]["time"], "a profile saved half-way had no row to compare with"
    seconds = [r["time"]["step_s_by_accumulation"]["16"] for r in rows]
    assert rows[1]["time"]["practicality"] == pytest.approx(seconds[0] / seconds[1], abs=1e-4)


@pytest.mark.parametrize("variant", ["parallel_adapter", "lora_all", "full", "adapter_h"])
def test_memory_after_the_step_is_what_a_real_step_leaves(variant):
    """Weights, buffers and moments; gradients and logits are what other loops keep besides."""
    spec = small_spec(variant)
    config = small_config(layers=2)
    parts = real_parts(spec, torch.bfloat16, config)
    real_step(parts, spec)
    model, attached, optimizer = parts
    left = [*model.parameters(), *model.buffers()]
    left += [v for state in optimizer.state.values() for v in state.values()]
    after = row_of(spec, (1,))["memory"]["after_step"]
    blocks = {t.untyped_storage()._cdata: -(-t.untyped_storage().nbytes() // 512) * 512 for t in left}
    assert after["device_bytes"] == sum(blocks.values())
    grads = [-(-p.nbytes // 512) * 512 for p in attached.parameters()]
    assert after["kept_gradients_bytes"] == sum(grads)
    assert after["kept_outputs_bytes"] == spec.tokens * config.vocab_size * 2 + 512


def test_meft_keeps_its_neurons_on_the_host_after_the_step():
    row = row_of(small_spec("meft"), (1,))
    after = row["memory"]["after_step"]
    assert after["kept_gradients_bytes"] == 0
    base = sum(
        -(-p.nbytes // 512) * 512 for p in shapes.build(small_config(2), "meta", torch.bfloat16, False).parameters()
    )
    mask = small_spec("meft").tokens * 8
    # Weights and fp32 gradient of the router in both layers, and the copy of it that is on its way.
    router = 2 * MeftOptions(neurons=256, kept=32).experts * 256 * (2 + 4 + 2)
    assert base <= after["device_bytes"] <= base + mask + router + 4096, "the last mask and rotary frequencies"
    assert after["host_bytes"] >= 12 * row["parameters"]["trainable"]


@pytest.mark.parametrize("options", [{"reading": "union"}, {"reading": "union", "gate": "none"}, {"gate": "softmax"}])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_every_reading_and_gate_runs_where_the_device_searches(options, share, monkeypatch):
    """A GPU's search has made the dots of the kept neurons, which the union reading has no use for."""
    variant = dataclasses.replace(VARIANTS["meft"], budget=share, options=options)
    monkeypatch.setitem(variants.KNOWN, "meft", variant)
    run = simulate_layers(small_spec("meft"), small_config(), 2)
    assert any(o.part == "retrieval" and o.place == "device" and o.name.startswith("mm.") for o in run.operations)
