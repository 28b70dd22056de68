"""Long prompts: U / R from records and random weights, small simulated rows, and the sentences from numbers by hand.

Here and not in tests/neighbours: torch takes a simulated device only before its first backward pass.
"""

import dataclasses

import pytest

from meft_bench.neighbours import jora

RECORD = {
    "run_key": "0" * 12,
    "spec": {"seed": 3, "options": {"neurons": 1536, "kept": 8}},
    "probes": {
        "union_grid": [
            {"length": 64, "tokens": 256, "share_by_layer": [0.2, 0.4]},
            {"length": 32, "tokens": 256, "share_by_layer": [0.9, 0.9]},
            {"length": 64, "tokens": 128, "share_by_layer": [0.1, 0.1]},
        ]
    },
}


def test_the_union_of_a_run_is_that_of_whole_rows_at_the_prompts_lengths() -> None:
    (row,) = jora.trained_unions(RECORD, (256, 4096))
    assert row == {"run_key": "0" * 12, "seed": 3, "neurons": 1536, "kept": 8, "tokens": 256, "share": 0.3}


def test_the_specs_are_those_of_the_full_suite() -> None:
    found = jora.specs(False)
    assert {s.options["neurons"] for s in found} == {384, 1536} and {s.task for s in found} == {"facts"}
    assert {s.seed for s in found} == {0, 1, 2} and len(found) == 6


def test_more_tokens_use_more_neurons_and_none_is_counted_twice() -> None:
    sizes = dataclasses.replace(jora._QUICK, neurons=256)
    few, many = (jora.random_union(n, sizes)["share_by_layer"] for n in (2, 32))
    assert len(few) == 5 and all(0 < a < b <= 1 for a, b in zip(few, many, strict=True))


def test_a_longer_prompt_takes_more_memory_and_moves_fewer_bytes_a_token() -> None:
    found = jora.run(True, [RECORD])
    meft = [r for r in found["rows"] if r["method"] == "meft"]
    assert [r["tokens"] for r in meft] == [16, 32] and meft[0]["device_peak_bytes"] < meft[1]["device_peak_bytes"]
    assert meft[0]["bytes_per_token"] > meft[1]["bytes_per_token"] and set(meft[0]["fits"]) == {"24GB", "80GB"}
    resident = [r for r in found["rows"] if r["method"] == "parallel_adapter"]
    assert all(r["tokens_per_s"]["24GB"] > 0 for r in resident) and "union_share" not in resident[0]


def row(method: str, tokens: int, checkpointing: bool, gb: float, speed: float, fits: bool) -> dict:
    return {"method": method, "tokens": tokens, "checkpointing": checkpointing, "device_peak_bytes": gb * 1e9,
            "activation_bytes": gb * 5e8, "bytes_per_token": 4e6 / tokens * 256, "tokens_per_s": {"24GB": speed},
            "fits": {"24GB": fits}}  # fmt: skip


def test_what_came_out_is_computed_from_the_record() -> None:
    trained = [{"neurons": 9, "kept": 1, "seed": s, "tokens": n, "share": v}
               for s in (0, 1) for n, v in ((256, 0.4), (512, 0.8 + s / 10))]  # fmt: skip
    random = [
        {"tokens": n, "neurons": 9, "kept": 2, "share_by_layer": [v, v + 0.1]} for n, v in ((256, 0.5), (512, 0.8))
    ]
    rows = [row("meft", 256, False, 10, 30, True), row("meft", 512, False, 20, 80, True),
            row("parallel_adapter", 256, False, 20, 60, True), row("parallel_adapter", 512, False, 25, 100, False),
            row("meft", 512, True, 9, 20, True), row("parallel_adapter", 512, True, 19, 90, True)]  # fmt: skip
    found = {"rows": rows, "trained": trained, "random": random, "settings": {"cards": ["24GB"]}}
    used, fresh, moved, speed, memory, longest = jora.findings(found)
    assert "use 40 % of them for 256 tokens and 85 % for 512" in used.says and used.n == 2
    assert "55 %" in fresh.says and fresh.interval == pytest.approx((80, 90))
    assert "moves 4.00 MB" in moved.says and moved.interval == pytest.approx((2, 4)) and moved.evidence == "simulated"
    assert "at 50 % of" in speed.says and speed.interval == pytest.approx((50, 80))
    assert "5.0 GB at 256 tokens and 10.0 GB at 512" in memory.says and "from 50 to 20 %" in memory.says
    assert "MEFT 512 and 512; the resident Parallel Adapter 256 and 512." in longest.says
