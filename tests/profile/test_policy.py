"""The cost model: what fits, the best of all choices, more memory never slower, and near what the simulator replays."""

import dataclasses

import pytest
import torch

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import budget
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.spec import Union
from meft_bench.simulate import cards
from meft_bench.train import policy
from meft_bench.train.methods import ModelShape
from tests.profile.small import shape_of_config, small_config, small_spec

SEVEN_B = ModelShape(hidden=4096, layers=32, ffn=11008, query=4096, value=4096, parameters=6_738_415_616)
WORK = policy.Workload(shape=SEVEN_B, vocabulary=32_000, length=256, batch=8, card=cards.card("rtx3090"),
                       host=cards.host("desktop"))  # fmt: skip
OPTIONS = MeftOptions(neurons=3072)
GIB = 2**30


def test_the_best_is_the_fastest_of_all_that_fit() -> None:
    room = int(23.6 * GIB)
    every = list(policy.policies(OPTIONS, WORK, room))
    best = policy.best(OPTIONS, WORK, room)
    assert best is not None and best.tokens_per_s == pytest.approx(max(p.tokens_per_s for p in every), abs=0.1)
    assert {p.rows for p in every} <= {1, 2, 4, 8} and len({p.device_budget for p in every}) > 3
    for p in every:
        assert p.device_bytes <= room and p.rows * p.accumulation == WORK.batch


def test_what_does_not_fit_is_not_chosen_and_nothing_is_chosen_where_nothing_fits() -> None:
    large, small = (policy.best(OPTIONS, WORK, int(gib * GIB)) for gib in (40, 18))
    assert large is not None and small is not None
    assert large.tokens_per_s > small.tokens_per_s and large.device_bytes > small.device_bytes
    assert policy.best(OPTIONS, WORK, 10 * GIB) is None
    assert policy.best(OPTIONS, WORK, 40 * GIB, host_room=GIB) is None


def test_every_part_that_can_be_bought_is_among_the_choices() -> None:
    one = dataclasses.replace(WORK, batch=1)
    bought = [p.bought for p in policy.policies(OPTIONS, one, 80 * GIB)]
    assert bought[0] == "router" and "router, keys" in bought
    assert bought[-1] == "router, keys, all rows with their optimizer"
    assert any(b.endswith("of 3072 rows with their optimizer") for b in bought)


def test_a_resident_adapters_budget_keeps_the_host_out_of_the_step() -> None:
    whole = budget.whole(OPTIONS, SEVEN_B.layers, SEVEN_B.hidden, torch.bfloat16)
    everything = policy.predict(dataclasses.replace(OPTIONS, device_budget=whole), WORK, 2)
    nothing = policy.predict(OPTIONS, WORK, 2)
    assert everything.wall == "the GPU" and everything.tokens_per_s > nothing.tokens_per_s
    assert everything.device_bytes > nothing.device_bytes and everything.host_bytes == nothing.host_bytes


def test_a_smaller_union_and_more_accumulation_are_never_slower() -> None:
    rates = [policy.predict(OPTIONS, dataclasses.replace(WORK, union_share=u), 2).tokens_per_s for u in (1, 0.5, 0.1)]
    assert rates == sorted(rates)
    steps = [policy.predict(OPTIONS, dataclasses.replace(WORK, batch=2 * a), 2).tokens_per_s for a in (1, 2, 8, 32)]
    assert steps == sorted(steps)


def test_few_tokens_use_a_neuron_at_least() -> None:
    """Of one neuron, or a small share of few, a rounded union would be none."""
    work = dataclasses.replace(WORK, union_share=0.01)
    for neurons in (1, 4):
        options = MeftOptions(neurons=neurons, kept=1, key_experts=False)
        assert all(plan.tokens_per_s > 0 for plan in policy.policies(options, work, 2**40))


def test_rows_that_a_step_touches_may_be_known() -> None:
    """Those that the formula gives change nothing; more make a lazy update longer."""
    lazy = dataclasses.replace(OPTIONS, adam="lazy")
    work = dataclasses.replace(WORK, union_share=0.05)
    formula = round(3072 * (1 - 0.95**8))
    told = [policy.predict(lazy, dataclasses.replace(work, touched=n), 2).tokens_per_s for n in (formula, 3072)]
    assert told[0] == policy.predict(lazy, work, 2).tokens_per_s > told[1]


@pytest.mark.parametrize("variant", ["meft", "meft_budget_10", "meft_budget_25", "meft_budget_50", "meft_budget_100"])
def test_the_model_is_near_what_the_simulator_replays_of_the_engines_own_code(variant: str) -> None:
    """Four layers as wide as LLaMA-7B's. Within a fifth: it is for choosing among policies."""
    config = small_config(
        layers=4, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32
    )
    shape, card, host = shape_of_config(config), cards.card("rtx3090"), cards.host("desktop")
    union = Union(rows=2048, source="two thirds", evidence="assumed")
    spec = dataclasses.replace(small_spec(variant), neurons=3072, batch=2, seq=256, union=union)
    row, _ = simulated_row(spec, Setting(config=config, shape=shape, card=card, host=host, accumulations=(1, 8)))
    for accumulation, replayed in row["time"]["tokens_per_s_by_accumulation"].items():
        work = policy.Workload(shape=shape, vocabulary=config.vocab_size, length=256, batch=2 * int(accumulation),
                               card=card, host=host, union_share=1 - (1 - 2 / 3) ** 0.5)  # fmt: skip
        made = policy.predict(MeftOptions(**row["size"]), work, 2)
        assert made.tokens_per_s == pytest.approx(replayed, rel=0.2), accumulation
