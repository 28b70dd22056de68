"""What is said of rows in int8 and int4, from numbers made by hand, and one small layer."""

from typing import Any

import pytest

from meft_bench.neighbours import quantised


def layer(tokens: int, seconds: tuple[float, float, float]) -> dict[str, Any]:
    ratios = {"int8": [0.5, 0.75], "int4": [1.0, 2.0]}
    named = dict(zip(quantised.ROWS, seconds, strict=True))
    return {"hidden": 4096, "neurons": 8464, "tokens": tokens, "layer_s": named, "of_fp32": ratios}


def test_what_came_out_says_bytes_scores_and_speed() -> None:
    forms = {
        "fp32": {"score": 0.9, "host_bytes": 1000, "changed": 0},
        "int8": {"score": 0.88, "host_bytes": 270, "changed": 3},
        "int4": {"score": 0.8, "host_bytes": 150, "changed": 12},
    }
    better = {**forms, "int4": {**forms["int4"], "score": 0.92}}
    found = {
        "scores": [{"seed": 0, "n": 100, "forms": forms}, {"seed": 1, "n": 100, "forms": better}],
        "generate": {"tokens_per_s": {"fp32": 100.0, "int8": 90.0, "int4": 80.0}},
        "layer": [layer(1, (0.002, 0.004, 0.001)), layer(16, (0.02, 0.04, 0.01))],
    }
    int8, int4, speed8, speed4 = quantised.findings(found)
    assert int8.says.startswith("int8: 27 % of the host bytes") and "6 of 200 answers" in int8.says
    assert "score 0.8600 (fp32 0.9000)" in int4.says and int4.interval == pytest.approx((-0.1, 0.02))
    assert "writes 90 tokens/s (fp32 100)" in speed8.says and "1 token: 4.00 ms (fp32 2.00)" in speed8.says
    assert speed4.interval == (1.0, 2.0) and speed4.n == 2 and "16 tokens: 10.00 ms" in speed4.says


def test_a_layer_is_timed_in_every_form() -> None:
    found = quantised._layer(2, quick=True)
    assert set(found["times_s"]) == set(quantised.ROWS) and all(len(times) == 1 for times in found["times_s"].values())
    assert found["row_bytes"] == {"fp32": 8 * 64, "int8": 4 * 34, "int4": 4 * 18}
    for rows in ("int8", "int4"):
        fp32, own = found["times_s"]["fp32"][0], found["times_s"][rows][0]
        assert found["of_fp32"][rows][0] == pytest.approx(fp32 / own, rel=0.05)
