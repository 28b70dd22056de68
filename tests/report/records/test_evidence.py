"""The weakest label counts wherever numbers are joined, by an order that is written down."""

from itertools import permutations, product

import pytest

from meft_bench.harness.record import EVIDENCE
from meft_bench.harness.suites import cell
from meft_bench.report.figures.marks import how, score_mark
from meft_bench.report.records.evidence import STRONGEST_FIRST, listed, weakest
from meft_bench.report.records.results import headline
from meft_bench.report.tables import scores as tables

from ..made_records import make_record, results_of

CELLS = [cell("meft", "10%", task="facts", seed=s) for s in range(3)]
# Weakest last: a run, a capped run, our formula, a number that only the paper has, nothing.
ORDER = ("measured", "capped", "simulated", "reported", "not-run")


def test_the_order_has_every_label_of_a_record() -> None:
    assert STRONGEST_FIRST == ORDER and set(ORDER) == set(EVIDENCE)


@pytest.mark.parametrize(("one", "other"), list(product(ORDER, ORDER)))
def test_of_two_labels_the_weaker_counts(one: str, other: str) -> None:
    expected = ORDER[max(ORDER.index(one), ORDER.index(other))]
    assert weakest([one, other]) == weakest([other, one]) == expected


def test_of_none_or_of_an_unknown_label_nothing_is_claimed() -> None:
    assert weakest([]) == weakest(["measured", "guessed"]) == "not-run"
    assert listed([]) == "" and listed(["simulated", "measured", "measured"]) == "measured, simulated"


@pytest.mark.parametrize("labels", list(permutations(("measured", "simulated", "capped"))))
def test_a_score_over_seeds_has_the_label_of_its_weakest_seed(labels: tuple[str, ...]) -> None:
    """By alphabet "measured" would come before "simulated"."""
    records = [make_record(c) for c in CELLS]
    for record, label in zip(records, labels, strict=True):
        record["quality"]["evidence"] = label
    results = results_of(CELLS, records)
    assert results.score(("meft", "10%"), headline("facts")).evidence == "simulated"
    assert "Evidence of every score: **simulated**" in tables.table1(results, "full").markdown
    assert how([score_mark(results, "meft 10% facts", 1.0)]).startswith("simulated, ")
