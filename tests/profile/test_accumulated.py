"""Steps of all layers and of several micro-batches, made from few of both, against such steps as they are."""

import dataclasses

import pytest

from meft_bench.profile.runs import runs_of, size_of, trained_by
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated import simulate_layers
from meft_bench.profile.simulated_row import crossed_bytes
from meft_bench.simulate import cards
from meft_bench.simulate.accumulate import Recorded, replay_accumulated
from tests.profile.small import shape_of_config, small_config, small_spec

CARD, HOST = cards.card("24GB"), cards.host("desktop")
VARIANTS = ["parallel_adapter_host_optimizer_gradients", "parallel_adapter_streamed", "meft", "meft_budget_100"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_two_and_four_layers_give_the_work_of_every_number(variant):
    """What an update does for all layers at once, such as gradients' norms, and what one queue does for all of them,
    such as a host optimizer's, grows with the layers, as what each layer's own queue does."""
    config, layers = small_config(layers=7), 7
    spec = small_spec(variant, neurons=1024)

    def recorded(*counts: int) -> Recorded:
        one, three = (
            tuple(simulate_layers(dataclasses.replace(spec, accumulation=a), config, n).program for n in counts)
            for a in (1, 3)
        )
        return Recorded(one, layers, counts[0] == layers, three)

    told, seen = (replay_accumulated(recorded(*n), CARD, HOST, (1, 3)) for n in ((2, 4), (layers, layers)))
    for count in (1, 3):
        for part in ("gpu", "h2d", "d2h", "gradients", "adam", "other_host"):
            # What rows of a device budget are held goes by draws.
            assert told[count].components_s[part] == pytest.approx(
                seen[count].components_s[part], rel=0.02 if "budget" in variant else 5e-3, abs=1e-6
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_crosses_in_steps_of_several_micro_batches_is_told_as_it_is(variant):
    """The router, which the host updates, crosses once a step, however many micro-batches it has."""
    config, spec = small_config(), small_spec(variant)
    setting = Setting(config=config, shape=shape_of_config(config), card=CARD, host=HOST)
    size = size_of(spec, setting.counted)
    whole = runs_of(spec, setting, size, trained_by(spec, setting.counted, size)).whole
    for count in (1, 2, 5):
        step = simulate_layers(dataclasses.replace(spec, accumulation=count), config, 4, size)
        seen = {way: sum(c[way] for c in step.crossed.values()) for way in ("h2d", "d2h")}
        assert crossed_bytes(spec, whole, count) == pytest.approx(seen, abs=64)
