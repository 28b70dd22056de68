"""How slow may the link to host memory be? A method's speed behind each link of simulate/nodes.py, by the replay.

The bytes of a step are the same on all of them. Half speed is half of the speed with a link that takes no time.
"""

from collections.abc import Mapping
from typing import Any

from meft_bench.profile import best
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.spec import ProfileSpec
from meft_bench.simulate.nodes import LINKS, unlimited

SHARE = 0.5
"""Of the speed with a link that takes no time."""
FREE = "unlimited"


def speeds(spec: ProfileSpec, setting: Setting) -> dict[str, Any]:
    """{"title", "family", "tokens_per_s": {FREE and every link: tokens/s}} at the stated accumulation (best.py)."""
    behind = {FREE: unlimited(setting.card), **{name: link.on(setting.card) for name, link in LINKS.items()}}
    row, _ = simulated_row(spec, setting, behind.values())
    count = best.stated_accumulation(setting.accumulations)
    found = {
        name: row["elsewhere"][card.name]["tokens_per_s_by_accumulation"][str(count)] for name, card in behind.items()
    }
    return {"variant": spec.variant, "title": row["title"], "family": row["family"], "tokens_per_s": found}


def slowest(tokens_per_s: Mapping[str, float]) -> str | None:
    """The slowest link behind which a method trains at half speed; None where it does behind none."""
    good = [name for name in LINKS if tokens_per_s[name] >= SHARE * tokens_per_s[FREE]]
    return min(good, key=lambda name: LINKS[name].pinned.value, default=None)


def needed(tokens_per_s: Mapping[str, float]) -> float | None:
    """About the bytes/s of the link at which a method trains at half speed: between two links its seconds are taken to
    lie on a straight line in the seconds of a byte. 0 where the slowest will do; None where the fastest does not."""
    wanted = 1 / (SHARE * tokens_per_s[FREE])
    points = sorted((1 / LINKS[name].pinned.value, 1 / tokens_per_s[name]) for name in LINKS)
    if points[0][1] > wanted:
        return None
    for (fast, before), (slow, after) in zip(points, points[1:], strict=False):
        if after > wanted:
            return 1 / (fast + (slow - fast) * (wanted - before) / (after - before))
    return 0.0
