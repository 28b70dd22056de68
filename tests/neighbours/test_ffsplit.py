"""What kept rows hold and what still crosses, by hand on a few rows; the norms against a loop."""

from types import SimpleNamespace

import pytest
import torch

from meft_bench.meft.engine import slots
from meft_bench.neighbours import ffsplit


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[[c == "x" for c in row]] for row in rows])


def test_hits_and_crossings_by_hand() -> None:
    """Two steps of two micro-batches, one layer of four rows of which the first two are kept."""
    used, kept = bools("xx..", "x.x.", "..xx", ".x.."), bools("xx..").expand(4, 1, 4)
    found = ffsplit.outcome(used, kept, 2)
    # 7 needed, 4 hits; both kept rows cross in the first step, one in the second, beside the 3 that are not kept.
    assert found == {"hit_share": round(4 / 7, 5), "crossing_share": round((3 + 2 + 1) / 7, 5)}
    assert ffsplit.outcome(used, torch.zeros_like(used), 2) == {"hit_share": 0.0, "crossing_share": 1.0}


def test_the_rows_of_the_highest_score_are_kept() -> None:
    kept = ffsplit.best(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]]), 2)
    assert kept.tolist() == [[False, True, True], [True, False, True]]


def test_a_count_that_fades_forgets() -> None:
    """One row kept. Step 1 uses row 0 twice, step 2 row 1 twice, so step 3 keeps row 1: .9 of 2 above .81 of 2."""
    assert ffsplit._FADE == slots.FADE
    kept = ffsplit.fading(bools("x.", "x.", ".x", ".x", "x.", "x."), 1, 2)
    assert kept[:, 0].tolist() == [[True, False]] * 2 + [[True, False]] * 2 + [[False, True]] * 2


def test_output_norms_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    h, keys, values = (torch.randn(n, 3, generator=generator) for n in (2, 5, 5))
    gates = torch.rand(2, 2, generator=generator)
    chosen = SimpleNamespace(union_U=torch.tensor([1, 2, 4]), local_TK=torch.tensor([[0, 2], [1, -1]]),
                             expert_TK=torch.tensor([[0, 1], [1, 0]]), gates_TN=gates)  # fmt: skip
    wanted = torch.zeros(5)
    for t, j, e in ((0, 1, 0), (0, 4, 1), (1, 2, 1)):
        wanted[j] += torch.relu(gates[t, e] * (h[t] @ keys[j])).abs() * values[j].norm()
    torch.testing.assert_close(ffsplit.output_norms(h, chosen, keys, values, "relu"), wanted)


def test_what_came_out_is_computed_from_the_record() -> None:
    hits = {
        "norm": (0.3, 0.4),
        "use": (0.5, 0.5),
        "fading": (0.5, 0.6),
        "random": (0.25, 0.25),
        "foresight": (0.6, 0.6),
    }
    rows = [
        {"seed": seed, "rule": rule, "share": 0.25, "hit_share": hit, "crossing_share": 1 - hit, "device_bytes": 2048}
        for rule, both in hits.items()
        for seed, hit in enumerate(both)
    ]
    said = ffsplit.findings({"rows": rows})
    assert len(said) == 6 and {f.evidence for f in said} == {"measured"}
    assert said[0].says.startswith("25 % of the rows (2 KiB), chosen by output norm") and "hold 35.0 %" in said[0].says
    assert "65 % of the traffic is left" in said[0].says and said[0].interval[0] < 30 < 40 < said[0].interval[1]
    assert said[-1].says.startswith("Use finds 15.0 points of the needed rows more than output norm")
    assert said[-1].interval == pytest.approx((15 - 63.5, 15 + 63.5), abs=0.1)  # t of one degree: 12.7 x 5 points
