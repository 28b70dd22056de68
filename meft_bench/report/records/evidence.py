"""How strong a label of evidence is: the one order for every place where numbers of several labels are joined."""

from collections.abc import Iterable

STRONGEST_FIRST = ("measured", "capped", "simulated", "reported", "not-run")
"""A run on the card that is named; one on a larger card under a cap; a formula that anyone can work out again from this
code; a number of the paper, which nobody here can repeat; nothing. A label that is not listed counts as the last."""


def weakest(labels: Iterable[str]) -> str:
    """The evidence of a number made from numbers with these labels; not-run of none."""
    ranks = [STRONGEST_FIRST.index(x) if x in STRONGEST_FIRST else len(STRONGEST_FIRST) - 1 for x in labels]
    return STRONGEST_FIRST[max(ranks, default=len(STRONGEST_FIRST) - 1)]


def listed(labels: Iterable[str]) -> str:
    """Every label once, the strongest first, for a caption over numbers that keep their own; "" of none."""
    found = set(labels)
    return ", ".join([x for x in STRONGEST_FIRST if x in found] + sorted(found - set(STRONGEST_FIRST)))
