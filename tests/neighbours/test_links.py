"""How slow a link may be: the answer from speeds by hand. What the replay gives: tests/simulate/test_slow_links.py."""

import pytest

from meft_bench.neighbours import links as neighbour
from meft_bench.profile import links
from meft_bench.simulate import cards, nodes
from meft_bench.simulate.nodes import LINKS


def by_hand(seconds: float, nbytes: float) -> dict[str, float]:
    """Tokens/s of a step of a token that computes for so many seconds and then copies so many bytes."""
    free = {links.FREE: 1 / seconds}
    return free | {name: 1 / (seconds + nbytes / link.pinned.value) for name, link in LINKS.items()}


def test_half_speed_is_where_the_copies_take_as_long_as_the_rest() -> None:
    one = by_hand(1.0, 20e9)  # half speed at 20 GB/s: PCIe 4 gives 25, PCIe 3 gives 12.5
    assert links.slowest(one) == "pcie4" and links.needed(one) == pytest.approx(20e9)
    assert links.slowest(by_hand(1.0, 0.0)) == "1gbe" and links.needed(by_hand(1.0, 0.0)) == 0.0
    assert links.slowest(by_hand(1.0, 1e12)) is None and links.needed(by_hand(1.0, 1e12)) is None


def test_links_are_in_order_and_replace_a_cards_own() -> None:
    pinned = [link.pinned.value for link in LINKS.values()]
    assert pinned == sorted(pinned, reverse=True) and list(LINKS) == ["pcie5", "pcie4", "pcie3", "100gbe", "10gbe",
                                                                      "1gbe"]  # fmt: skip
    own, behind = cards.card("24GB"), nodes.link("PCIe3").on(cards.card("24GB"))
    assert behind.name == "24GB-pcie3" and behind.h2d_pinned.value == 12.5e9 and behind.half_rate == own.half_rate
    assert nodes.link("pcie4").on(own).h2d_pinned.value == own.h2d_pinned.value
    assert nodes.unlimited(own).copy_latency.value == 0


def test_what_came_out_is_computed_from_the_record() -> None:
    rows = [
        {"variant": name, "title": name.upper(), "family": family, "tokens_per_s": speeds,
         "slowest": links.slowest(speeds), "needed_bytes_per_s": links.needed(speeds)}
        for name, family, speeds in (("meft", "meft", by_hand(1.0, 20e9)), ("lora_all", "lora", by_hand(1.0, 0.0)))
    ]  # fmt: skip
    said = neighbour.findings({"methods": rows})
    counted = "2 behind PCIe 5, 2 behind PCIe 4, 1 behind PCIe 3, 1 behind 100 GbE, 1 behind 10 GbE, 1 behind 1 GbE."
    assert said[0].says.endswith(counted) and said[0].n == 2
    assert said[1].says == "MEFT trains at half speed down to PCIe 4 (it takes about 20 GB/s)."
    assert said[1].interval == pytest.approx((1 / (1 + 20e9 / LINKS["1gbe"].pinned.value), 1 / (1 + 20 / 55)))
    assert said[2].interval == pytest.approx((20.0, 20.0)) and all(f.evidence == "simulated" for f in said)
