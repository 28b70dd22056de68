"""Four ways to one output, where they cross, and what a card would take, against numbers made by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from meft_bench.meft.engine import native, products
from meft_bench.neighbours import flash_llm


def test_every_way_makes_the_same_output(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    h_TD, rows_R2D = torch.randn(5, 8, generator=generator), torch.randn(12, 2, 8, generator=generator)
    index_TK = flash_llm.chosen(5, 12, 3, generator)
    assert index_TK.shape == (5, 3) and all(len(set(row)) == 3 and row == sorted(row) for row in index_TK.tolist())
    wanted = torch.stack([
        sum(torch.relu(h @ rows_R2D[j, 0]) * rows_R2D[j, 1] for j in row) for h, row in zip(h_TD, index_TK, strict=True)
    ])  # fmt: skip
    for name, way in flash_llm.ways(h_TD, rows_R2D, index_TK).items():
        torch.testing.assert_close(way(), wanted, msg=name)
    monkeypatch.setattr(native, "fits_products", lambda *tensors: False)  # no compiler
    torch.testing.assert_close(flash_llm.pairs(h_TD, rows_R2D, index_TK), wanted)


def test_the_engines_own_switch_is_the_one_that_is_named() -> None:
    assert flash_llm.ENGINE_DENSITY == 1 / products._DENSE_BELOW


def test_a_crossing_lies_on_the_logarithm_between_two_densities() -> None:
    assert flash_llm.crossing((0.01, 0.1, 1.0), (10.0, 4.0, 0.25)) == pytest.approx(math.sqrt(0.1), abs=1e-5)
    assert flash_llm.crossing((0.01, 0.1), (0.9, 0.5)) is None
    assert flash_llm.crossing((0.01, 0.1), (5.0, 1.5)) == math.inf


def test_a_cards_seconds_by_hand() -> None:
    """Rates of 1: bytes and operations themselves. 2 tokens keep 1 of 4 neurons of width 3."""
    one = SimpleNamespace(value=1.0)
    names = ("bandwidth", "full_rate", "half_rate")
    card = SimpleNamespace(**{n: one for n in names}, bandwidth_share=one, full_share=one, half_share=one)
    made = flash_llm.card_seconds(card, 2, 0.25, 4, 3)
    union = 4 * (1 - 0.75**2)
    assert made[flash_llm.PAIRS] == max(4 * 2 * 3, 2 * (2 * 3 * 2 + 8))
    assert made[flash_llm.CSR] == 2 * (2 * 3 * 2 + 24)
    assert made[flash_llm.MASKED] == max(4 * 2 * 4 * 3, 4 * 12 + 4 * 2 * 4 * 2)
    assert made[flash_llm.UNION] == pytest.approx(2 * union * 12 + max(24 * union, union * 12 + 16 * union))


def test_what_came_out_is_computed_from_the_record() -> None:
    def row(density: float, masked: float, union: float) -> dict:
        rounds = {"pairs": [1.0, 2.0], "csr": [6.0, 12.0], "masked dense": [masked, 2 * masked],
                  "union dense": [union, 2 * union]}  # fmt: skip
        return {"tokens": 8, "density": density, "rounds_s": rounds}

    rows = [row(0.01, 4.0, 3.0), row(0.04, 1.0 / 4, 2.0)]
    at = {"pairs": 3.0, "union dense": 2.0}
    card = {"card": "24GB", "tokens": 16, "at_1_percent_s": at, "pairs_until_union_dense": 0.02}
    said = flash_llm.findings({"rows": rows, "modelled": [card]})
    assert "below a density of 2.0 % (the engine goes over at 12.5 %)" in said[0].says
    assert said[0].interval == pytest.approx((2.0, 2.0))
    assert "faster than dense products over the gathered union at every density (2.00 times" in said[1].says
    assert "take 6.0 times as long" in said[2].says and said[2].n == 2
    assert said[3].says.endswith("below a density of 2 %; at 1 % they take 1.5 times as long.")
    assert [f.evidence for f in said] == ["measured"] * 3 + ["simulated"]
