"""A plan's bytes are its formula's, what is asked is kept, and what cannot fit is refused with the nearest."""

import re
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from meft_bench.finetune.plan import Job, Plan, check_options, make_plan, square_sizes, usual_rate
from meft_bench.harness.estimate import KNOWN_SHAPES
from meft_bench.harness.rates import learning_rates
from meft_bench.meft.config import MeftOptions
from meft_bench.ranks import Ranks
from meft_bench.train.contract import describe, method_names
from meft_bench.train.counts import Counted
from meft_bench.train.methods import find_method, parse_options
from meft_bench.train.models import shape_of

from .conftest import job

SEVEN_B = KNOWN_SHAPES["llama-7b"]


def plan_for(tmp_path="x", free=10**12, device="cuda", longest=128, **fields) -> Plan:
    """A plan for 100,000 rows on the 7B shape."""
    settings = job(tmp_path, **{"steps": None, "batch_size": 16, **fields})
    made = Job(settings=settings, shape=SEVEN_B, vocabulary=32000, rows=100_000, longest=longest, dtype="bfloat16",
               device=device, free_host=free)  # fmt: skip
    return make_plan(made)


def total(plan: Plan) -> int:
    return sum(plan.device_bytes.values())


def test_the_papers_setting_is_what_a_24_gb_card_gets():
    plan = plan_for(gpu_memory="24GB")
    sizes = {n: plan.options[n] for n in ("neurons", "experts", "probed", "kept")}
    assert sizes == {"neurons": 8464, "experts": 368, "probed": 8, "kept": 64}
    assert total(plan) <= 24e9
    one_more = plan_for(accumulation=max(1, plan.accumulation // 2), neurons=8464)
    assert plan.accumulation == 1 or total(one_more) > 24e9, "no larger micro-batch would fit"


def test_the_device_bytes_are_the_formula():
    plan = plan_for(neurons=64, kept=8, accumulation=16)
    tokens, d, layers = 128, SEVEN_B.hidden, SEVEN_B.layers
    assert plan.device_bytes == {
        "base weights": 2 * SEVEN_B.parameters,
        "activations": tokens * layers * d * 34,
        "logits": tokens * 32000 * 14,
        "CUDA context": 600_000_000,
        "adapter rows": 2 * 64 * d * (layers + 1) * 2,
    }
    count = sum(MeftOptions(neurons=64, kept=8).parameter_groups(d, layers).values())
    assert sum(plan.host_bytes.values()) == 16 * count and plan.trainable["keys"] == 64 * d * layers
    assert plan_for(neurons=64, kept=8, accumulation=16, device="cpu").device_bytes.get("CUDA context") is None


def test_kept_rows_and_narrow_moments_are_counted():
    plain = plan_for(neurons=64, kept=8, accumulation=16)
    d, layers, experts = SEVEN_B.hidden, SEVEN_B.layers, MeftOptions(neurons=64, kept=8).experts
    kept = plan_for(neurons=64, kept=8, accumulation=16, options={"device_budget": 10**11, "moments": "bf16"})
    # Rows and gradients (12 bytes of two numbers), the router's, and both their masters and narrow moments (8).
    whole = 64 * d * layers * (12 + 2 * 8) + experts * d * layers * (6 + 8)
    assert kept.device_bytes["kept on the device"] == whole
    assert kept.device_bytes["adapter rows"] < plain.device_bytes["adapter rows"], "no row waits on the device twice"
    assert kept.host_bytes["Adam moments"] == plain.host_bytes["Adam moments"] // 2
    some = plan_for(neurons=64, kept=8, accumulation=16, options={"device_budget": 40_000_000, "retrieval": "host"})
    assert 30_000_000 < some.device_bytes["kept on the device"] <= 40_000_000


def test_dense_methods_hold_their_state_on_the_device():
    plan = plan_for(method="parallel_adapter", neurons=100, accumulation=16)
    count = 2 * 100 * SEVEN_B.hidden * SEVEN_B.layers
    held = [plan.device_bytes[n] for n in ("adapter", "gradients", "Adam moments")]
    assert held == [4 * count, 4 * count, 8 * count] and not plan.host_bytes
    resident = plan_for(neurons=64, kept=8, accumulation=16, options={"placement": "device"})
    assert resident.device_bytes["adapter"] == 4 * sum(resident.trainable.values()) and not resident.host_bytes
    offloaded = plan_for(method="parallel_adapter_offload", neurons=100, accumulation=16)
    assert sum(offloaded.host_bytes.values()) == 16 * count


def test_a_smaller_micro_batch_that_makes_room_for_a_budget_is_not_called_the_largest():
    spent, plain = (plan_for(gpu_memory="48GB", neurons=6400, options=o) for o in ({}, {"device_budget": 0}))
    assert (spent.accumulation, plain.accumulation) == (2, 1) and spent.options["device_budget"] > 10**10
    said = [p.reasons[2] for p in (spent, plain)]
    assert "in 2 micro-batches of 8" in said[0]
    assert said[0].endswith("(the fastest with the budget below; 16 would fit)")
    assert said[1].endswith("(it fits whole)")
    tight = plan_for(gpu_memory="24GB", neurons=3136)
    assert "(the largest that fits)" in tight.reasons[2] and tight.options["device_budget"] > 0


def test_only_a_size_that_was_asked_for_is_said_to_be():
    for method, options, wanted in (
        ("lora", {"targets": "all"}, "lora: rank 8 (the method's own default): 19,988,480 trainable, 0.297 %"),
        ("lora", {"rank": 4}, "lora: rank 4 (as asked): 2,097,152 trainable, 0.0311 %"),
        ("lomo", {"clipping": "value"}, "lomo (the method's only size): 6,738,415,616 trainable, 100 %"),
        ("parallel_adapter", {"neurons": 64}, "parallel_adapter: neurons 64 (as asked): "),
    ):
        plan = plan_for(gpu_memory="80GB", method=method, options=options)
        assert plan.reasons[1].startswith(f"size   {wanted}")


def test_a_budget_of_nothing_buys_nothing():
    said = plan_for(gpu_memory="24GB", neurons=6400).reasons[-1]
    assert said.startswith("budget device_budget 0 (none that fits is faster), 2 micro-batches of 8: predicted ")
    assert "buys" not in said and "a budget of 0 reaches" not in said
    some = plan_for(gpu_memory="24GB", neurons=3136).reasons[-1]
    assert "(2.79 GB) buys router, keys, " in some and some.count("times what a budget of 0 reaches") == 1


def test_ranks_of_a_machine_are_predicted_with_their_share_of_it():
    """Four that search, gather and add up at once have a quarter of the host each."""
    settings = job("x", steps=None, batch_size=16, gpu_memory="24GB", neurons=3136)
    made = Job(settings=settings, shape=SEVEN_B, vocabulary=32000, rows=1000, longest=256, dtype="bfloat16",
               device="cuda", free_host=10**12)  # fmt: skip
    speeds = {}
    for here in (1, 4):
        plan = make_plan(replace(made, ranks=Ranks(count=4, local_count=here)))
        said = r"predicted ([\d,]+) tokens/s a rank on .*DDR4-3200(, which 4 ranks share)?, the (GPU|host) bus"
        told = re.search(said, plan.reasons[-1])
        assert told and bool(told[2]) == (here == 4) and plan.accumulation == 4
        speeds[here] = int(told[1].replace(",", ""))
    assert speeds[4] < 0.9 * speeds[1], "on four machines each has a host, and makes all steps of its own rows"


def test_without_memory_named_a_tenth_of_the_base():
    plan = plan_for()
    share = (plan.trainable["keys"] + plan.trainable["values"]) / SEVEN_B.parameters
    larger = 2 * (4 * (round(plan.options["neurons"] ** 0.5) // 4 + 1)) ** 2 * SEVEN_B.hidden * SEVEN_B.layers
    assert share <= 0.1 < larger / SEVEN_B.parameters
    assert plan.steps == 18_750 and plan.learning_rate == pytest.approx(1e-2 * 128 / 4096, rel=0.02)


def test_every_method_starts_from_its_own_best_rate_where_it_was_swept():
    """The middle of the grid that a sweep began with was 6 times below the best of three of them."""
    known = learning_rates()
    for method in (name for name in method_names() if not describe(name).untrained):
        best = known.get(f"{method} 10%", known.get(f"{method} 100%"))
        grid = find_method(method).LEARNING_RATES
        assert usual_rate(method)[0] == (grid[len(grid) // 2] if best is None else best), method
    assert usual_rate("galore") == (known["galore 100%"], "the best of galore at 100% in the sweep")
    assert usual_rate("galore")[0] > max(find_method("galore").LEARNING_RATES)
    assert "(the best of meft at 10% in the sweep at width 128, times 0.0312)" in plan_for().text()


def test_less_memory_means_fewer_neurons_or_smaller_micro_batches():
    small, large = plan_for(gpu_memory="15GB"), plan_for(gpu_memory="24GB")
    assert total(small) <= 15e9 and small.options["neurons"] < large.options["neurons"]
    host = plan_for(gpu_memory="24GB", host_memory="8GB")
    assert sum(host.host_bytes.values()) <= 8e9 and host.options["neurons"] < 8464
    asked = plan_for(gpu_memory="18GB", neurons=2304)
    assert asked.options["neurons"] == 2304 and asked.accumulation > 1 and total(asked) <= 18e9


def test_what_is_asked_and_cannot_fit_names_bytes_and_the_nearest_that_does():
    with pytest.raises(ValueError) as error:
        plan_for(gpu_memory="24GB", host_memory="20GB", neurons=30976)
    said = str(error.value)
    assert "of host memory, 20.00 GB are given" in said and "\n" not in said
    nearest = int(re.search(r"the nearest size that fits is --neurons (\d+)", said).group(1))
    fitting = plan_for(gpu_memory="24GB", host_memory="20GB", neurons=nearest)
    assert sum(fitting.host_bytes.values()) <= 20e9
    following = square_sizes(4 * nearest)[square_sizes(4 * nearest).index(nearest) + 1]
    with pytest.raises(ValueError):
        plan_for(gpu_memory="24GB", host_memory="20GB", neurons=following)


def test_the_nearest_size_goes_with_what_else_is_given():
    memory = {"gpu_memory": "24GB", "host_memory": "20GB"}
    for given in ({"experts": 100}, {"experts": 100, "probed": 90}, {"kept": 900, "probed": 200}):
        with pytest.raises(ValueError) as error:
            plan_for(**memory, neurons=38_000, options=given)
        nearest = int(re.search(r"fits is --neurons (\d+);", str(error.value)).group(1))
        assert given.items() <= plan_for(**memory, neurons=nearest, options=given).options.items()
    with pytest.raises(ValueError, match=r"the nearest size that fits is --neurons \d+ without experts;"):
        plan_for(**memory, neurons=38_000, options={"experts": 19})
    assert plan_for(gpu_memory="24GB", options={"experts": 100, "probed": 90}).options["experts"] == 100


def test_a_base_that_cannot_fit_names_its_bytes():
    with pytest.raises(ValueError, match=r"on the device, --gpu-memory allows 8.00 GB: no size .* take 13.48 GB"):
        plan_for(gpu_memory="8GB")
    with pytest.raises(ValueError, match="full fine-tuning does not fit; take a smaller base"):
        plan_for(gpu_memory="24GB", method="full")
    with pytest.raises(ValueError, match=r"the nearest size that fits is --option rank=\d+"):
        plan_for(gpu_memory="24GB", method="lora", options={"rank": 4000})


def test_the_way_out_is_none_that_was_taken_already():
    """No --dtype bfloat16 for a base in bfloat16, no --method meft to MEFT or where host memory is short, and fewer
    rows a micro-batch where they would fit."""
    for fields, wanted in (
        ({}, "at 1 row a micro-batch .*: no size of .*; take a smaller base .* or a smaller --max-length$"),
        ({"free": 10**6, "gpu_memory": "24GB"}, "of host memory, .* or a smaller --max-length$"),
        ({"method": "lora"}, "a smaller --max-length, or --method meft, whose neurons lie in host memory$"),
        (
            {"accumulation": 1, "longest": 512, "gpu_memory": "24GB"},
            "at 16 rows .* fits; take --accumulation 8, a smal",
        ),
        ({"accumulation": 2, "longest": 512, "gpu_memory": "24GB", "neurons": 8464}, "take --accumulation 8, a smal"),
    ):
        with pytest.raises(ValueError, match=wanted):
            plan_for(**{"gpu_memory": "8GB", **fields})
    assert plan_for(accumulation=8, longest=512, gpu_memory="24GB", neurons=8464).accumulation == 8
    settings = job("x", steps=None, batch_size=16, gpu_memory="24GB")
    wide = Job(settings=settings, shape=SEVEN_B, vocabulary=32000, rows=1000, longest=128, dtype="float32",
               device="cuda", free_host=10**12)  # fmt: skip
    with pytest.raises(ValueError, match="a smaller --max-length or --dtype bfloat16$"):
        make_plan(wide)


def test_a_gpu_that_is_smaller_than_named_decides():
    settings = job("x", steps=None, batch_size=16, gpu_memory="80GB")
    made = Job(settings=settings, shape=SEVEN_B, vocabulary=32000, rows=1000, longest=128, dtype="bfloat16",
               device="cuda", free_host=10**12, free_device=16 * 10**9)  # fmt: skip
    assert total(make_plan(made)) <= 16e9 < total(plan_for(gpu_memory="80GB"))
    with pytest.raises(ValueError, match="on the device, 8.00 GB of the GPU are free"):
        make_plan(replace(made, free_device=8 * 10**9))


def test_on_the_cpu_both_sides_share_the_memory():
    with pytest.raises(ValueError, match="of host memory, 14.00 GB are free"):
        plan_for(device="cpu", free=14 * 10**9)


def test_every_square_size_is_legal():
    for neurons in square_sizes(10_000):
        options = plan_for(neurons=neurons).options
        config = MeftOptions(**options)
        assert config.experts == 4 * round(neurons**0.5) and config.kept <= config.candidates
    assert 8464 in square_sizes(8464)


def test_counts_are_the_methods_own():
    for name, options in (("lora", {"rank": 4}), ("adapter_h", {"size": 4}), ("full", {})):
        plan = plan_for(method=name, options=options)
        assert plan.trainable == find_method(name).count(parse_options(name, options), SEVEN_B)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, "method 'magic' cannot be trained; choose one of adalomo, adapter_h, full"),
        ({"method": "base"}, "method 'base' cannot be trained"),
        ({"options": {"colour": 1}}, "meft has no option colour; it has: activation"),
        (
            {"neurons": 100, "options": {"experts": 16}},
            "experts N=16 does not divide neurons R=100: the nearest legal R",
        ),
        ({"method": "lora", "options": {"rank": 0}}, "rank=0 must be a whole number"),
        ({"method": "lora", "neurons": 8}, "lora has no option neurons"),
    ],
)
def test_bad_options_are_named(fields, message):
    with pytest.raises(ValueError) as error:
        check_options(job("x", **fields))
    assert message in str(error.value)


def test_the_text_says_that_nothing_is_measured():
    text = plan_for(gpu_memory="24GB").text()
    assert text.startswith("plan (bytes predicted by formula, none measured):") and "8464" in text
    assert Plan.from_dict(plan_for().to_dict()) == plan_for()
    assert replace(plan_for(), reasons=[]).text() != text


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 4, "targets": "all"}), ("adapter_h", {"size": 3}),
                                                 ("full", {})])  # fmt: skip
def test_a_plan_counts_what_attaches_to_the_base(tmp_path, method, options):
    """GPT-2 fuses query, key and value, has no gate and ties its head: LLaMA's formulas do not hold."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(model)
    settings = job(tmp_path, steps=1, batch_size=16, method=method, options=options)
    plan = make_plan(Job(settings=settings, shape=shape, vocabulary=96, rows=100, longest=32, dtype="bfloat16",
                         device="cuda", free_host=10**12, counted=Counted(config)))  # fmt: skip
    attached = find_method(method).attach(model, parse_options(method, options), 0).parameter_groups()
    assert plan.trainable == attached
    assert attached != find_method(method).count(parse_options(method, options), shape) or method == "full"
