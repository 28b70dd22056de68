"""MeftOptions: an impossible choice is a ValueError that names the way out; the closed formulas are the real counts."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.meft.config import PRESETS, MeftOptions, default_experts, divisors
from meft_bench.meft.model import attach
from tests.meft.tiny_models import LAYERS, D, named, small_config, tiny_stack


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        pytest.param({"neurons": 100, "experts": 48}, "legal R is 96 .*set experts=50", id="N does not divide R"),
        pytest.param({"neurons": 70, "experts": 48}, "legal R is 48 .*set experts=35", id="R rounds down to N"),
        pytest.param({"neurons": 90, "experts": 48}, "legal R is 96 .*set experts=45", id="R rounds up to 2N"),
        pytest.param({"neurons": 32, "kept": 33}, "set kept to at most 32", id="K > R"),
        pytest.param({"neurons": 32, "kept": 33, "key_experts": False}, "set kept to at most 32", id="K > R, no KE"),
        pytest.param({"neurons": 32, "kept": 4, "experts": 8, "probed": 9}, "set probed to at most 8", id="P > N"),
        pytest.param({"neurons": 32, "kept": 4, "experts": 64}, "set experts to at most 32", id="N > R"),
        pytest.param(
            {"neurons": 32, "kept": 13, "experts": 8, "probed": 3}, "lower kept to 12 or raise probed", id="K > P*m"
        ),
        pytest.param({"neurons": 32, "kept": 4, "activation": "silu"}, "set selection='signed'", id="silu drops rows"),
        pytest.param(
            {"neurons": 32, "kept": 4, "activation": "silu", "selection": "relu_first"}, "set selection='signed'",
            id="silu after relu",
        ),
        pytest.param({"neurons": 32, "kept": 4, "key_std": 0.0}, "must be a number above 0", id="key_std 0"),
        pytest.param({"neurons": 32, "kept": 4, "key_std": -1.0}, "must be a number above 0", id="key_std negative"),
        pytest.param({"neurons": 32, "kept": 4, "key_std": math.nan}, "must be a number above 0", id="key_std nan"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_name_the_fix(fields: dict, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        MeftOptions(**fields)


@given(st.integers(8, 400), st.integers(2, 200))
def test_the_suggested_sizes_are_legal_and_nearest(neurons: int, experts: int) -> None:
    if experts > neurons or neurons % experts == 0:
        return
    with pytest.raises(ValueError, match="nearest legal R is") as caught:
        MeftOptions(neurons=neurons, experts=experts, kept=1)
    words = str(caught.value).replace("(", "").replace(")", "").split()
    nearest, fitting = int(words[words.index("is") + 1]), int(words[-1].removeprefix("experts="))
    MeftOptions(neurons=nearest, experts=experts, kept=1)
    MeftOptions(neurons=neurons, experts=fitting, kept=1)
    assert abs(nearest - neurons) == min(neurons % experts, experts - neurons % experts)
    assert abs(fitting - experts) == min(abs(d - experts) for d in range(1, neurons + 1) if neurons % d == 0)


@pytest.mark.parametrize("field", ["neurons", "kept", "experts", "probed"])
@pytest.mark.parametrize("value", [0, -1, 2.0, 1.5, True, "8"])
def test_sizes_are_whole_numbers_of_at_least_one(field: str, value) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* whole number of at least 1"):
        MeftOptions(**{"neurons": 24, "kept": 2, field: value})


@pytest.mark.parametrize("field", ["reading", "gate", "selection", "activation", "router_init", "adam", "placement"])
@pytest.mark.parametrize("value", ["other", "", None, 1])
def test_unknown_choices_list_the_known_ones(field: str, value) -> None:
    known = getattr(small_config(), field)
    with pytest.raises(ValueError, match=f"{field}=.* is unknown; choose one of .*{known}"):
        small_config(**{field: value})


def test_key_std_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="key_std"):
        small_config(key_std="wide")


@pytest.mark.parametrize("field", ["key_experts", "frozen_keys"])
def test_switches_are_true_or_false(field: str) -> None:
    """ "false" read from a command line or a file is a true value in Python."""
    with pytest.raises(ValueError, match=field):
        small_config(**{field: "false"})


def test_fields_that_do_not_exist_or_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="unknown MEFT option rank; known: .*neurons"):
        MeftOptions.from_dict({"neurons": 24, "rank": 8})
    with pytest.raises(ValueError, match="needs neurons"):
        MeftOptions.from_dict({"kept": 4})
    with pytest.raises(ValueError, match="unknown preset 'best'; choose one of default, released, paper"):
        MeftOptions.preset("best", neurons=24)


# ---- defaults ----


def test_paper_s_expert_count() -> None:
    assert default_experts(8464) == 368
    config = MeftOptions(neurons=8464)
    assert (config.experts, config.probed, config.kept, config.expert_size, config.candidates) == (368, 8, 64, 23, 184)


@given(st.integers(1, 5000))
def test_default_experts_divide_and_are_nearest(neurons: int) -> None:
    wanted = 4 * math.sqrt(neurons)
    dividing = [d for d in range(1, neurons + 1) if neurons % d == 0]
    assert divisors(neurons) == dividing
    assert default_experts(neurons) in dividing
    assert abs(default_experts(neurons) - wanted) == min(abs(d - wanted) for d in dividing)


def test_defaults_are_those_of_the_method() -> None:
    config = MeftOptions(neurons=8464)
    assert (config.reading, config.gate, config.selection) == ("per_token", "score", "positive")
    assert (config.router_init, config.adam, config.placement) == ("mean_key", "dense", "host")
    assert config.key_experts and not config.frozen_keys and config.activation == "relu"


def test_few_experts_are_all_probed() -> None:
    assert MeftOptions(neurons=24, experts=3, kept=2).probed == 3


def test_no_key_experts_means_no_gate() -> None:
    config = small_config(key_experts=False, gate="softmax")
    assert config.gate == "none" and not config.trains_router and config.candidates == 24


def test_presets_are_what_their_names_say() -> None:
    assert MeftOptions.preset("default", neurons=8464) == MeftOptions(neurons=8464)
    released = MeftOptions.preset("released", neurons=8464)
    assert (released.reading, released.gate, released.selection) == ("per_token", "score", "signed")
    assert (released.router_init, released.key_std) == ("mean_key_x50", 0.02)
    paper = MeftOptions.preset("paper", neurons=8464)
    assert (paper.reading, paper.gate, paper.selection, paper.adam) == ("union", "none", "relu_first", "lazy")
    assert not paper.trains_router
    assert MeftOptions.preset("paper", neurons=8464, adam="dense").adam == "dense", "given fields win"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"key_experts": False}, {"frozen_keys": True, "kept": 8}], ids=named)
def test_to_dict_round_trip(preset: str, changes: dict) -> None:
    config = MeftOptions.preset(preset, **{"neurons": 512, **changes})
    assert MeftOptions(**config.to_dict()) == config == MeftOptions.from_dict(config.to_dict())
    assert config.key_experts is False or None not in (config.experts, config.probed)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().kept = 3


# ---- counts ----


@pytest.mark.parametrize(
    "changes",
    [{}, {"gate": "none"}, {"gate": "softmax"}, {"key_experts": False}, {"frozen_keys": True}],
    ids=named,
)
def test_parameter_groups_are_the_trainable_tensors(changes: dict) -> None:
    config = small_config(**changes)
    meft = attach(tiny_stack(), config)
    actual = {name: sum(p.numel() for p in group) for name, group in meft.parameters_by_group().items()}
    formula = {name: count for name, count in config.parameter_groups(D, LAYERS).items() if count}
    assert actual == formula
    assert sum(formula.values()) == sum(p.numel() for p in meft.model.parameters() if p.requires_grad)
    assert formula["values"] == 24 * D * LAYERS


def test_parameter_count_of_the_paper_s_setting() -> None:
    """M = 2*D*R*L for keys and values at LLaMA-7B, R = 8464, and the router's N*D*L beside it."""
    groups = MeftOptions(neurons=8464).parameter_groups(4096, 32)
    assert groups["keys"] + groups["values"] == 2 * 4096 * 8464 * 32 == 2_218_786_816
    assert groups["router"] == 368 * 4096 * 32
