"""Sizes that fit: R, N, K and the micro-batch for the memory given, by closed formulas, with the reasons in words.

Nothing here is measured; every byte is predicted by formula and said to be. The formulas are upper bounds where the
truth depends on the rows (a token can use K neurons at most, so U is taken as min(R, T K)).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from meft_bench.fields import shown
from meft_bench.finetune.settings import TrainSettings, in_gb, memory_bytes
from meft_bench.finetune.spending import chosen as spent_on
from meft_bench.harness.rates import swept_rate
from meft_bench.harness.room import refuse_without_room
from meft_bench.meft.config import divisors
from meft_bench.ranks import ALONE, Ranks
from meft_bench.text import counted
from meft_bench.train.contract import OURS, describe, method_names
from meft_bench.train.meft import sizes as square_sizes
from meft_bench.train.methods import ModelShape, find_method, parse_options
from meft_bench.train.options import check_options as check_kinds
from meft_bench.train.step_bytes import Step, step_bytes

if TYPE_CHECKING:  # options are checked before torch is imported
    from meft_bench.train.counts import Counted

DEFAULT_SHARE = 0.10
"""Trainable parameters as a share of the base, where no memory is named."""
LARGEST_SHARE = 0.34
"""What a plan with memory to spare goes up to: the paper's R = 8464 at 7B, router included."""
REFERENCE_WIDTH = 128
"""Hidden size that the methods' learning rates were swept at."""
_SWEPT_AT = ("10%", "100%")
"""The size whose swept rate `train` takes for all sizes of a method."""
_CHOSEN = "neurons"
"""A method whose size is this has it chosen by the plan; the others have a default size of their own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be trained and how it is cut up. device_bytes and host_bytes: purpose to predicted bytes."""

    options: dict[str, Any]
    """The method's options, complete."""
    accumulation: int
    learning_rate: float
    steps: int
    dtype: str
    device: str
    trainable: dict[str, int]
    """Parameters by group."""
    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    reasons: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**values)

    def text(self) -> str:
        """The plan for a reader, one reason a line."""
        lines = ["plan (bytes predicted by formula, none measured):", *(f"  {reason}" for reason in self.reasons)]
        for place, parts in (("device", self.device_bytes), ("host", self.host_bytes)):
            each = ", ".join(f"{purpose} {in_gb(size)}" for purpose, size in parts.items() if size)
            lines.append(f"  {place:<6} {in_gb(sum(parts.values()))}{': ' + each if each else ''}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a plan is made for: the base's sizes and the rows' length."""

    settings: TrainSettings
    shape: ModelShape
    vocabulary: int
    rows: int
    """Training rows."""
    longest: int
    """Tokens of the longest row."""
    dtype: str
    device: str
    free_host: int
    """Bytes of host memory that are free."""
    free_device: int | None = None
    """Bytes of the GPU that are free; None without one."""
    ranks: Ranks = ALONE
    """Each runs its share of the micro-batches; those of one machine share its host memory."""
    counted: Counted | None = None
    """Counts parameters on the base itself; None takes the methods' closed formulas, which know LLaMA's layers."""

    @property
    def shares(self) -> int:
        """Into how many equal parts a step's rows are dealt: the ranks, where they go into them."""
        return 1 if self.settings.batch_size % self.ranks.count else self.ranks.count


def make_plan(job: Job) -> Plan:
    """The largest plan that the settings ask for or that fits. Raises ValueError, naming the bytes, if none does."""
    check_options(job.settings)
    settings = job.settings
    given = settings.method_options()
    chosen = describe(settings.method).size == _CHOSEN and _CHOSEN not in given
    sizes = _sizes(job, given) if chosen else [given]
    for options in sizes:
        for accumulation in _accumulations(job):
            plan = _plan(job, options, accumulation)
            if not _lacks(job, plan):
                return _spent(job, plan, chosen)
    raise ValueError(_no_fit(job, given, chosen))


def _spent(job: Job, plan: Plan, chosen: bool) -> Plan:
    """The plan with its reasons, and with what the rest of --gpu-memory buys."""
    spending = spent_on(job, plan.options)
    if spending is None:
        return replace(plan, reasons=_reasons(job, plan, chosen))
    policy, told = spending
    fewest = plan.accumulation
    if job.device == "cuda":
        options = {**plan.options, "device_budget": policy.device_budget}
        plan = _plan(job, options, policy.accumulation * job.shares)
    return replace(plan, reasons=[*_reasons(job, plan, chosen, fewest), f"budget {told}"])


def check_options(settings: TrainSettings) -> None:
    """Raises ValueError for a method that is not there or does not train, and for options it does not have or take."""
    if settings.method not in method_names() or describe(settings.method).untrained:
        trainable = [name for name in method_names() if not describe(name).untrained]
        raise ValueError(f"method {shown(settings.method)} cannot be trained; choose one of {', '.join(trainable)}")
    options = settings.method_options()
    check_kinds(settings.method, options, whole=False)
    rows = settings.batch_size // settings.accumulation if settings.accumulation else 1
    limit = memory_bytes(settings.host_memory)
    refuse_without_room(settings.method, options, rows, settings.device, settings.model, limit)
    if _CHOSEN in options:
        options = _at(settings.method, options[_CHOSEN], options)
    if describe(settings.method).size != _CHOSEN or _CHOSEN in options:
        parse_options(settings.method, options)


def _at(method: str, size: int, given: dict[str, Any]) -> dict[str, Any]:
    """The options at a size: as the method fills them in, else with the size alone set."""
    own, name = getattr(find_method(method), "options_at", None), describe(method).size
    assert name is not None
    return own(size, given) if own else {**given, name: size}


def _grid(method: str, limit: int) -> Sequence[int]:
    """The sizes to try up to limit, ascending: the method's own, else all."""
    own = getattr(find_method(method), "sizes", None)
    return own(limit) if own else range(1, limit + 1)


def _sizes(job: Job, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Options at every size from the largest wanted down."""
    share = LARGEST_SHARE if job.settings.gpu_memory else DEFAULT_SHARE
    limit = max(16, int(share * job.shape.parameters / (2 * job.shape.hidden * job.shape.layers)))
    made = []
    for neurons in reversed(square_sizes(limit)):
        if not (why := _misfit(job.settings.method, neurons, given)):
            made.append(_at(job.settings.method, neurons, given))
    if not made:
        raise ValueError(f"no size up to R={limit} goes with the options given ({why}): name --neurons too")
    return made


def _accumulations(job: Job) -> list[int]:
    """Numbers of micro-batches to try, fewest first; as many on each rank, where the rows of a step allow it."""
    if job.settings.accumulation:
        return [job.settings.accumulation]
    every = divisors(job.settings.batch_size)
    return [n for n in every if n % job.ranks.count == 0] or every


def _plan(job: Job, given: dict[str, Any], accumulation: int) -> Plan:
    settings = job.settings
    if _CHOSEN in given:
        given = _at(settings.method, given[_CHOSEN], given)
    options = parse_options(settings.method, given)
    method = find_method(settings.method)
    counted = job.counted
    trainable = counted.groups(settings.method, options) if counted else method.count(options, job.shape)
    steps = settings.steps or max(1, math.ceil((settings.epochs or 3) * job.rows / settings.batch_size))
    step = Step(
        shape=job.shape,
        tokens=math.ceil(settings.batch_size / accumulation) * job.longest,
        dtype=job.dtype,
        vocabulary=job.vocabulary,
        cuda=job.device == "cuda",
        accumulation=accumulation,
        ranks=not job.ranks.alone,
    )
    need = step_bytes(describe(settings.method), options, sum(trainable.values()), step)
    return Plan(
        options=asdict(options),
        accumulation=accumulation,
        learning_rate=settings.learning_rate or float(f"{usual_rate(settings.method)[0] * _rate_scale(job):.2g}"),
        steps=steps,
        dtype=job.dtype,
        device=job.device,
        trainable=trainable,
        device_bytes=need.device,
        host_bytes=need.host,
        reasons=[],
    )


def usual_rate(method: str) -> tuple[float, str]:
    """(peak learning rate at REFERENCE_WIDTH, where it is from): the one that the sweep on facts chose, or the middle
    of the method's grid where it was not swept."""
    for share in _SWEPT_AT:
        if (rate := swept_rate(method, share, "facts")) is not None:
            return rate, f"the best of {method} at {share} in the sweep"
    rates = find_method(method).LEARNING_RATES
    return rates[len(rates) // 2], f"the middle of {method}'s grid"


def _rate_scale(job: Job) -> float:
    """Factor from the width that rates were swept at to this one's: its inverse, and 1 for a narrower base."""
    return min(1.0, REFERENCE_WIDTH / job.shape.hidden)


def _lacks(job: Job, plan: Plan) -> str:
    """What the plan needs beyond what there is; empty when it fits."""
    device, host = sum(plan.device_bytes.values()), sum(plan.host_bytes.values())
    allowed = memory_bytes(job.settings.gpu_memory)
    if job.free_device is not None and device > job.free_device:
        return f"{in_gb(device)} on the device, {in_gb(job.free_device)} of the GPU are free"
    room = memory_bytes(job.settings.host_memory) or job.free_host
    if allowed is not None and device > allowed:
        return f"{in_gb(device)} on the device, --gpu-memory allows {in_gb(allowed)}"
    # Without a GPU the device's part lies in the same memory, once for each rank of this machine.
    need = host + (device * job.ranks.local_count if job.device == "cpu" else 0)
    if need > room:
        return f"{in_gb(need)} of host memory, {in_gb(room)} are {'given' if job.settings.host_memory else 'free'}"
    return ""


def _no_fit(job: Job, given: dict[str, Any], chosen: bool) -> str:
    """The error for a job that fits at no micro-batch: what the smallest needs, and the nearest that fits."""
    smallest = _accumulations(job)[-1]
    asked = _sizes(job, given)[-1] if chosen else given
    plan = _plan(job, asked, smallest)
    lacks = _lacks(job, plan)
    needs = f"at {counted(job.settings.batch_size // smallest, 'row')} a micro-batch this needs {lacks}"
    weights = in_gb(plan.device_bytes["base weights"])
    ways = [f"a smaller base (its weights take {weights})", "a smaller --max-length"]
    ways += ["--dtype bfloat16"] if plan.dtype != "bfloat16" else []
    every = _accumulations(replace(job, settings=replace(job.settings, accumulation=None)))
    more = [n for n in every if n > smallest and not _lacks(job, _plan(job, asked, n))]
    ways = [f"--accumulation {more[0]}", *ways] if more else ways
    others = f"{', '.join(ways[:-1])} or {ways[-1]}"
    nearest = None if chosen else _nearest(job, given, smallest)
    if nearest is not None:
        return f"{needs}: the nearest size that fits is {nearest}; or take {others}"
    about = describe(job.settings.method)
    smaller = "full fine-tuning does not fit" if about.trains_base else "no size of the method fits"
    helps = job.settings.method != OURS and "of host memory" not in lacks
    return f"{needs}: {smaller}; take {others}" + (", or --method meft, whose neurons lie in host memory" * helps)


def _nearest(job: Job, given: dict[str, Any], accumulation: int) -> str | None:
    """The largest size below the one asked that fits, as the option to give; None if there is none. Options that tell
    the size, too, are kept where some size goes with them, and otherwise named to be left out."""
    name, method = describe(job.settings.method).size, job.settings.method
    if name is None:
        return None
    asked = parse_options(job.settings.method, _plan(job, given, accumulation).options)
    top = getattr(asked, name)
    others = {option: value for option, value in given.items() if option != name}
    beside = [option for option in others if option in describe(method).shown]
    for left_out in ([], beside) if beside else ([],):
        rest = {option: value for option, value in others.items() if option not in left_out}
        grid = _grid(method, top - 1)
        if beside:
            grid = [size for size in grid if not _misfit(method, size, rest)]

        def too_much(size: int, rest: dict[str, Any] = rest) -> bool:
            return bool(_lacks(job, _plan(job, _at(method, size, rest), accumulation)))

        # Bytes grow with the size, so the largest that fits is found by halving.
        if count := bisect.bisect_left(grid, True, key=too_much):
            flag = f"--{name} {grid[count - 1]}" if name == _CHOSEN else f"--option {name}={grid[count - 1]}"
            return f"{flag} without {' and '.join(left_out)}" if left_out else flag
    return None


def _misfit(method: str, size: int, given: dict[str, Any]) -> str:
    """Why a size does not go with the options given, such as experts that do not divide it; empty where it does."""
    try:
        parse_options(method, _at(method, size, given))
    except ValueError as error:
        return str(error)
    return ""


def _reasons(job: Job, plan: Plan, chosen: bool, fewest: int | None = None) -> list[str]:
    """fewest: the micro-batches that would have fitted without what the cost model spent memory on."""
    settings, options = job.settings, plan.options
    count, base = sum(plan.trainable.values()), job.shape.parameters
    about = describe(settings.method)
    size = ", ".join(f"{n} {options[n]}" for n in about.shown if options.get(n))
    own = "the method's own default" if about.size else "the method's only size"
    why = _why_this_size(job) if chosen else "as asked" if about.size in settings.method_options() else own
    micro = settings.batch_size // plan.accumulation
    chosen_cut = "the largest that fits" if plan.accumulation > job.shares else "it fits whole"
    if fewest is not None and plan.accumulation > fewest:
        chosen_cut = f"the fastest with the budget below; {settings.batch_size // fewest} would fit"
    cut = "as asked" if settings.accumulation else chosen_cut
    dealt = "" if job.ranks.alone else f", dealt to {job.ranks.count} ranks"
    where = f"{settings.gpu_memory} on the device" if settings.gpu_memory else "no --gpu-memory given"
    rate = "as asked" if settings.learning_rate else (
        f"{usual_rate(settings.method)[1]} at width {REFERENCE_WIDTH}, times {_rate_scale(job):.3g}"
    )  # fmt: skip
    return [
        f"base   {base:,} parameters in {plan.dtype} on {plan.device}; {where}",
        f"size   {settings.method}{': ' + size if size else ''} ({why}): {count:,} trainable, "
        f"{100 * count / base:.3g} % of the base",
        f"batch  {counted(settings.batch_size, 'row')} a step in {counted(plan.accumulation, 'micro-batch')} of "
        f"{micro}{dealt}, at most "
        f"{micro * job.longest} tokens each ({cut})",
        f"steps  {plan.steps} over {counted(job.rows, 'row')} "
        f"({plan.steps * settings.batch_size / job.rows:.2f} epochs)",
        f"rate   {plan.learning_rate:g} ({rate})",
    ]


def _why_this_size(job: Job) -> str:
    if job.settings.gpu_memory:
        return f"the largest R = (4j)^2 that fits, keys and values up to {LARGEST_SHARE:.0%} of the base"
    return f"the largest R = (4j)^2 whose keys and values are at most {DEFAULT_SHARE:.0%} of the base and fit"
