"""The sentences of the summary say no more than the interval does."""

from meft_bench.harness import suites
from meft_bench.harness.spec import PACKAGE
from meft_bench.report.paper import figure1_points, load_reported
from meft_bench.report.verdict import verdict_lines

from .made_records import broken, make_record, results_of

REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")
CELLS = suites.default()
RIGHT = {("meft", "10%"): 15, ("lora", "2%"): 2, ("parallel_adapter", "10%"): 15, ("full", "100%"): 20}


def _lines(records: list[dict]) -> list[str]:
    return verdict_lines(results_of(CELLS, records), REPORTED)


def _line(lines: list[str], part: str) -> str:
    return next(line for line in lines if part in line)


def test_each_contrast_says_its_word_with_interval_n_and_seeds() -> None:
    lines = _lines([make_record(c, RIGHT.get((c.row, c.share), 5)) for c in CELLS])
    assert 5 <= len(lines) <= 8
    higher = _line(lines, "LoRA 2%")
    assert higher.startswith("MEFT 10% is higher than LoRA 2%: difference +0.650, 95 % interval [+0.4")
    assert "n = 20, seeds = 1 (measured)" in higher and "+0.108 (reported)" in higher
    assert _line(lines, "Full").startswith("MEFT 10% is lower than Full fine-tuning: difference -0.250")
    assert "is inconclusive: difference +0.000, 95 % interval [+0.000, +0.000]" in _line(lines, "Parallel Adapter 10%")
    assert lines[-1].startswith("One seed on a 1 M-parameter model decides nothing about LLaMA-7B")


def test_a_trend_compares_the_largest_size_run_with_the_smallest() -> None:
    records = [make_record(c, 18 if c.share == "40%" else 5) for c in CELLS]
    assert _line(_lines(records), "Size: LoRA").startswith("Size: LoRA 40% is higher than LoRA 0.5%")
    without = [r for r, c in zip(records, CELLS, strict=True) if c.share != "40%"]
    assert "Size: LoRA 10% against LoRA 0.5% is inconclusive" in _line(_lines(without), "Size: LoRA")


def test_missing_and_failed_runs_give_no_verdict() -> None:
    lines = _lines([])
    assert all("not run" in line for line in lines[:-1])
    records = [make_record(c) for c in CELLS]
    records = [
        broken(r, "diverged", "nan") if (c.row, c.share) == ("full", "100%") else r
        for r, c in zip(records, CELLS, strict=True)
    ]
    assert "not run (Full fine-tuning: diverged)" in _line(_lines(records), "Full")


def test_stale_records_are_said() -> None:
    assert "stale records" in _lines([make_record(c, code="old") for c in CELLS])[0]


def test_the_papers_sizes_are_exact_percentages() -> None:
    points = dict(figure1_points(REPORTED, "parallel_adapter"))
    assert [round(x, 2) for x in points][:3] == [0.06, 0.5, 1.99]
    ((percent, accuracy),) = figure1_points(REPORTED, "meft")
    assert (round(percent, 1), accuracy) == (33.6, 0.413), "R = 8464 with the router, not the printed 10 %"
