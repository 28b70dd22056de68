"""The tables of settings, specs and MEFT's options: what stands at each limit passes, what is beyond it does not."""

from dataclasses import fields

import pytest

from meft_bench.fields import FLOAT32_MAX
from meft_bench.finetune import settings
from meft_bench.finetune.settings import TrainSettings
from meft_bench.harness import spec
from meft_bench.harness.spec import RunSpec
from meft_bench.meft import config
from meft_bench.meft.config import MeftOptions

_MOST = 2**31 - 1
_RATES = {"warmup_share": (0, 0.999, [-1e-9, 1]), "weight_decay": (0, FLOAT32_MAX, [-1e-9, 1e39])}
_ABOVE = (1e-45, FLOAT32_MAX, [0, 1e-46, 1e39, float("nan"), float("inf")])
TRAIN = {
    **_RATES, "learning_rate": _ABOVE, "clip": _ABOVE, "checkpoint_minutes": _ABOVE, "eval_share": (0, 0.999, [1]),
    "epochs": (1e-45, 10**6, [0, 10**6 + 1, 1e300, float("inf")]), "steps": (1, 10**8, [0, 10**8 + 1]),
    "batch_size": (1, 2**20, [0, 2**20 + 1]), "seed": (0, 2**63 - 1, [-1, 2**63]), "neurons": (1, _MOST, [0]),
    "kept": (1, _MOST, [0, _MOST + 1]), "max_length": (1, _MOST, [0, _MOST + 1]), "eval_rows": (1, _MOST, [0]),
    "checkpoint_steps": (1, _MOST, [0]), "accumulation": (1, 16, [0, _MOST + 1]),
}  # fmt: skip
RUN = {
    **_RATES, "learning_rate": _ABOVE, "clip": _ABOVE, "train_rows": (1, 10**6, [0, 10**6 + 1]),
    "eval_rows": (1, 10**6, [0, 10**6 + 1]), "steps": (0, 10**8, [-1, 10**8 + 1]), "accumulation": (1, 64, [0]),
    "batch_size": (1, 2**20, [0, 2**20 + 1]), "max_length": (1, _MOST, [0]), "seed": (0, 2**32 - 1, [-1, 2**32]),
}  # fmt: skip


def trained(**values) -> TrainSettings:
    return TrainSettings(data="a", output="b", **values)


def run(**values) -> RunSpec:
    return RunSpec(task="facts", method="full", **values)


@pytest.mark.parametrize(
    ("make", "name", "limits"),
    [(trained, n, v) for n, v in TRAIN.items()] + [(run, n, v) for n, v in RUN.items()],
    ids=[f"train {n}" for n in TRAIN] + [f"run {n}" for n in RUN],
)
def test_limits(make, name, limits):
    least, most, beyond = limits
    for value in (least, most):
        assert getattr(make(**{name: value}), name) == value
    for value in (*beyond, "1", True, [1]):
        with pytest.raises(ValueError, match=f"^{name}="):
            make(**{name: value})


@pytest.mark.parametrize(
    ("table", "kind"), [(settings.FIELDS, TrainSettings), (spec.FIELDS, RunSpec), (config.FIELDS, MeftOptions)]
)
def test_every_field_has_its_kind(table, kind):
    assert set(table) == {f.name for f in fields(kind)}


def test_options_of_meft_at_their_limits():
    for name, value in (("device_budget", 2**62), ("lookahead", 0), ("overlap", None), ("key_std", 1e-45)):
        assert getattr(MeftOptions(neurons=64, kept=8, **{name: value}), name) == value
    for name, value in (("device_budget", -1), ("device_budget", 2**62 + 1), ("lookahead", -1), ("overlap", 1),
                        ("key_std", 1e39), ("neurons", 2**31), ("kept", None), ("experts", 0)):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}="):
            MeftOptions(**{"neurons": 64, "kept": 8, name: value})


def test_values_stay_what_they_are():
    """A key is a digest of the values as given: a whole number does not become a float."""
    assert run(learning_rate=1).run_key != run(learning_rate=1.0).run_key
    assert run(splits=["test"]) == run(splits=("test",))
