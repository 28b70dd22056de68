"""What closed formulas say of a row without simulating it: the planner's cost model (train/policy.py) its speed, the
bytes of train/step_bytes.py its memory. A full profile keeps both beside the row, so that their error is known."""

from collections.abc import Mapping
from typing import Any

from meft_bench.meft.config import MeftOptions
from meft_bench.profile import best
from meft_bench.profile.setting import Setting
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import KNOWN, Variant
from meft_bench.train import policy
from meft_bench.train.contract import describe
from meft_bench.train.methods import find_method
from meft_bench.train.step_bytes import Step, step_bytes


def has_formula(spec: ProfileSpec) -> bool:
    """Whether a row has one: a method with its own optimizer on a plain base, without checkpointing."""
    variant = KNOWN[spec.variant]
    other = variant.optimizer != "own" or variant.quantised or variant.engine
    return not other and not spec.checkpointing


def of_row(spec: ProfileSpec, row: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """{"device_bytes", with the context, and for MEFT "tokens_per_s_by_accumulation", at the fewest micro-batches and
    at those that stand for a card} of a row that ran."""
    variant = KNOWN[spec.variant]
    made: dict[str, Any] = {"device_bytes": _device_bytes(spec, variant, row, setting)}
    if variant.is_meft:
        counts = sorted({min(setting.accumulations), best.stated_accumulation(setting.accumulations)})
        options = MeftOptions(**row["size"])
        speeds = {a: policy.predict(options, _workload(spec, setting, a), spec.batch).tokens_per_s for a in counts}
        made["tokens_per_s_by_accumulation"] = {str(a): round(v, 2) for a, v in speeds.items()}
    return made


def _workload(spec: ProfileSpec, setting: Setting, accumulation: int) -> policy.Workload:
    """The spec's optimizer step as the cost model knows it. A micro-batch of B rows uses U neurons as if each of them
    drew its own; what a step touches is logged, or drawn so too."""
    share = min(spec.union.rows / spec.neurons, 1.0) if spec.union is not None else 1.0
    return policy.Workload(
        shape=setting.shape,
        vocabulary=setting.config.get_text_config().vocab_size,
        length=spec.seq,
        batch=spec.batch * accumulation,
        card=setting.card,
        host=setting.host,
        union_share=1 - (1 - share) ** (1 / spec.batch),
        touched=spec.union.logged(accumulation, spec.neurons) if spec.union is not None else None,
    )


def _device_bytes(spec: ProfileSpec, variant: Variant, row: Mapping[str, Any], setting: Setting) -> int:
    union = spec.union.rows / spec.neurons if spec.union is not None else 1.0
    step = Step(
        shape=setting.shape,
        tokens=spec.tokens,
        dtype="bfloat16",
        vocabulary=setting.config.get_text_config().vocab_size,
        cuda=True,
        union_share=union,
    )
    options = find_method(variant.method).Options(**row["size"])
    need = step_bytes(describe(variant.method), options, row["parameters"]["trainable"], step)
    return sum(need.device.values())
