"""How slow a link may be, by the replay: a slower one is never faster. Here, as it needs the simulated GPU."""

import dataclasses

from meft_bench.neighbours import links as neighbour


def test_a_slower_link_is_never_faster_and_every_method_answers() -> None:
    sizes = dataclasses.replace(neighbour._QUICK, variants=())
    for name in ("meft", "meft_budget_50"):
        row = neighbour._replayed(name, sizes)
        speeds = list(row["tokens_per_s"].values())
        assert speeds == sorted(speeds, reverse=True), name
        assert (row["slowest"] is None) == (row["needed_bytes_per_s"] is None)
