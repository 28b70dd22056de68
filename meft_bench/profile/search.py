"""The largest R that fits a card and its host, found by simulating, not by a table."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from meft_bench.profile.best import SEARCH_ENDED
from meft_bench.profile.matrix import UnionSource
from meft_bench.profile.runs import memory_of
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import VARIANTS

STEP = 64
"""R is searched in multiples of this, so that Key-Experts can divide it."""
LIMIT = 32768
"""Where the search ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """neurons is the largest R that fits, 0 if none does; limit says what the next larger one lacks."""

    neurons: int
    limit: str


Lack = tuple[float, str]
"""Bytes beyond a limit (negative: to spare), and which limit is nearest to being broken."""


def largest_fitting(
    spec: ProfileSpec, setting: Setting, host_bytes: int, source: UnionSource, known: Mapping[int, tuple[int, int]]
) -> tuple[Found, dict[str, Any] | None]:
    """Search R of spec's variant, checkpointing and kind of union (logged or assumed) on setting.card, for steps of the
    most micro-batches of the setting; also returns the row of the R that was found.

    known holds (device, host) peaks of such steps of sizes that are simulated already. Memory is nearly affine in R, so
    a straight line through the bracket's ends lands next to the answer; the bracket closes on two neighbouring
    multiples of 64, both simulated.
    """
    room = int(setting.card.usable_bytes.value - setting.card.context_bytes.value)

    def over(device: int, host: int) -> Lack:
        both = {"device memory": device - room, "host memory": host - host_bytes}
        name = max(both, key=lambda n: both[n])
        return both[name], name

    def lacking(neurons: int) -> Lack:
        most = dataclasses.replace(sized(spec, neurons, source), accumulation=max(setting.accumulations))
        memory = memory_of(most, setting)
        return over(memory["device_peak_bytes"], memory["host_peak_bytes"])

    found = bisect(lacking, {n: over(*peaks) for n, peaks in known.items() if n % STEP == 0})
    if not found.neurons:
        return found, None
    return found, simulated_row(sized(spec, found.neurons, source), setting)[0]


def bisect(
    lacking: Callable[[int], Lack], known: Mapping[int, Lack] | None = None, step: int = STEP, limit: int = LIMIT
) -> Found:
    """The largest multiple of step, up to limit, that lacks nothing; lacking grows with R. What is known is not asked
    again."""
    known = known or {}
    fitting = {n: lack for n, lack in known.items() if lack[0] <= 0}
    failing = {n: lack for n, lack in known.items() if lack[0] > 0}
    low = max(fitting, default=step)
    low_over, what = fitting.get(low) or lacking(step)
    if low_over > 0:
        return Found(neurons=0, limit=what)
    high = min(failing, default=limit)
    high_over, what = failing.get(high) or known.get(high) or lacking(limit)
    if high_over <= 0:
        return Found(neurons=limit, limit=SEARCH_ENDED)
    look_above = False
    while high - low > step:
        # The straight line's crossing; when that fits, it is most likely the answer, so the next look is right above.
        crossing = low if look_above else low + (high - low) * -low_over / (high_over - low_over)
        middle = min(high - step, max(low + step, int(crossing) // step * step))
        over, name = lacking(middle)
        look_above = over <= 0 and not look_above
        if over <= 0:
            low, low_over = middle, over
        else:
            high, high_over, what = middle, over, name
    return Found(neurons=low, limit=what)


def sized(spec: ProfileSpec, neurons: int, source: UnionSource) -> ProfileSpec:
    """The same at another R, with U of the same kind. Raises ValueError when the log does not reach that R."""
    if spec.union is None:
        return dataclasses.replace(spec, neurons=neurons)
    found: Any = [
        u
        for u in source.unions(VARIANTS[spec.variant], spec.model, spec.tokens, neurons)
        if u is not None and u.evidence == spec.union.evidence
    ]
    if not found:
        raise ValueError(
            f"the selection log does not reach R={neurons}: delete selection.json and run meft-bench profile again"
        )
    return dataclasses.replace(spec, neurons=neurons, union=found[0])
