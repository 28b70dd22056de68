"""The grids are what their tables say: sizes that are the nearest there are, runs that the kept records belong to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from meft_bench.harness import frontier, smollm2, suites
from meft_bench.harness.estimate import KNOWN_SHAPES
from meft_bench.harness.rates import learning_rates, swept_rate
from meft_bench.harness.rows import FIGURE6_KEPT, FIGURE7_EXPERTS, PEERS, ROWS, Row, rate_source, row_options
from meft_bench.harness.sizes import SIZES
from meft_bench.harness.spec import PACKAGE, RunSpec
from meft_bench.train.contract import describe
from meft_bench.train.methods import ModelShape, find_method, parse_options

RECORDS = PACKAGE.parent / "results" / "records"
EMBEDDED = ModelShape(hidden=128, layers=4, ffn=384, query=128, value=128, parameters=1_068_928)
FREE = ("lora", "lora_ffn", "lora_all", "adapter_h", "parallel_adapter")
"""Rows with one number for a size; MEFT's is tied to its experts."""
FREE_PEERS = ("product_keys", "shira")
"""The same, sized for the embedded model alone."""
# Rank 2 of LoRA is the largest below 0.5 %; 128 is the model's width, where LoRA ends; 43 neurons hold the device bytes
# of MEFT at 10 %.
NOT_NEAREST = {("lora", "0.5%"), ("lora", "40%"), ("parallel_adapter", "4%")}


def percent(row: str, options: dict, shape: ModelShape) -> float:
    method = ROWS[row].method
    return 100 * sum(find_method(method).count(parse_options(method, options), shape).values()) / shape.parameters


def test_a_size_of_the_embedded_model_is_the_one_nearest_to_its_share() -> None:
    """Or within half a per cent of it, where rows that are compared have the same R."""
    for row in (*FREE, *FREE_PEERS):
        for share, size in SIZES["embedded"][row].items():
            if (row, share) in NOT_NEAREST:
                continue
            options, name, wanted = row_options(row, share, "embedded"), ROWS[row].size, float(share[:-1])
            assert options[name] == size
            near = [{**options, name: size + d} for d in (0, -1, 1) if size + d]
            gaps = [abs(percent(row, o, EMBEDDED) - wanted) for o in near]
            assert gaps[0] == min(gaps) or gaps[0] < 0.005 * wanted, (row, share, size)


@pytest.mark.parametrize("model", KNOWN_SHAPES)
def test_sizes_at_7b_are_within_half_a_per_cent_of_their_share(model: str) -> None:
    for row in FREE:
        for share, size in SIZES[model][row].items():
            if (model, row, size) != ("mistral-7b", "parallel_adapter", 3072):  # the paper's own, 11.1 %
                found = percent(row, row_options(row, share, model), KNOWN_SHAPES[model])
                assert found == pytest.approx(float(share[:-1]), rel=5e-3), (row, share)


def test_mefts_sizes_are_near_their_shares_and_match_the_adapter_without_a_router() -> None:
    for share, (neurons, experts, probed, kept) in SIZES["embedded"]["meft"].items():
        options = row_options("meft", share, "embedded")
        assert (options["neurons"], options["experts"], options["probed"], options["kept"]) == (
            neurons, experts, probed, kept)  # fmt: skip
        assert percent("meft", options, EMBEDDED) == pytest.approx(float(share[:-1]), rel=0.05)
        assert neurons % experts == 0 and kept <= probed * neurons // experts
    for share, (neurons, _) in SIZES["embedded"]["meft_no_ke"].items():
        assert neurons == SIZES["embedded"]["parallel_adapter"][share]
        with_router = percent("meft", row_options("meft", share, "embedded"), EMBEDDED)
        without = percent("meft_no_ke", row_options("meft_no_ke", share, "embedded"), EMBEDDED)
        assert with_router == pytest.approx(without, rel=0.05), "a fair pair trains as much"


def test_the_sweeps_change_what_they_say_and_nothing_else() -> None:
    """Figure 6: K up to R; Figure 7: N at 24 candidates a token."""
    for share, kept in FIGURE6_KEPT.items():
        base = row_options("meft_no_ke", share, "embedded")
        for k in kept:
            assert row_options(f"meft_no_ke_k{k}", share, "embedded") == {**base, "kept": k}
        assert kept[-1] == base["neurons"]
    base = row_options("meft", "10%", "embedded")
    for n in (16, *FIGURE7_EXPERTS):
        options = row_options("meft" if n == 16 else f"meft_n{n}", "10%", "embedded")
        assert options == {**base, "experts": n, "probed": n // 4}
        assert options["probed"] * options["neurons"] // n == 24


def test_every_fact_is_seen_as_often_however_many_are_taught() -> None:
    own = suites.EMBEDDED_TASKS["facts"]
    for rows, steps in suites.CAPACITY.items():
        assert steps / rows == pytest.approx(own["steps"] / own["train_rows"], rel=0.01)


def test_contrasts_have_five_seeds_and_the_rest_three() -> None:
    seeds: dict[tuple, set[int]] = {}
    for c in suites.full():
        seeds.setdefault((c.row, c.share, c.spec.task, c.variant), set()).add(c.spec.seed)
    for (row, share, _, variant), found in seeds.items():
        five = (row, share) in suites.CONTRASTED and not variant
        wanted = {0} if row == "parallel_adapter_offload" else {0, 1, 2, 3, 4} if five else {0, 1, 2}
        assert found == wanted, (row, share, variant)


def test_every_kept_record_is_of_a_run_that_a_suite_plans() -> None:
    """A changed setting gives its run another key: the record would be an orphan, and the table's place empty."""
    kept = {p.stem: p for p in RECORDS.glob("*.json")}
    orphans = set(kept) - {c.spec.run_key for c in (*suites.full(), *frontier.cells())}
    specs = {key: RunSpec.from_dict(json.loads(Path(kept[key]).read_text(encoding="utf-8"))["spec"]) for key in orphans}
    sources = {(s.model, s.data) for s in specs.values()}
    real = {c.spec.run_key for model, data in sources if data != "synthetic" for c in suites.real(model, data)}
    pretrained = {c.spec.run_key for model, data in sources for c in smollm2.cells(model, data)}
    curves = {c.spec.run_key for model, _ in sources for c in frontier.real_cells(model)}
    assert orphans <= real | pretrained | curves and all(spec.run_key == key for key, spec in specs.items())
    assert len(kept) - len(orphans) > 400, "the repository keeps the embedded suites' records"
    assert orphans & real and orphans & pretrained, "and those of both suites on models of their own"


def test_facts_are_swept_over_the_methods_grid_and_other_tasks_around_what_facts_chose() -> None:
    grids = {name: (0.001, 0.1) for name in {c.spec.method for c in suites.full()}}
    cells = suites.sweep(grids)
    rates: dict[tuple[str, str, str], list[float]] = {}
    for c in cells:
        assert c.spec.splits == ("validation",) and c.spec.seed == 0 and not rate_source(c.row)
        rates.setdefault((c.row, c.share, c.spec.task), []).append(c.spec.learning_rate)
    chosen = learning_rates()
    for (row, share, task), found in rates.items():
        around = [chosen[f"{row} {share}"] * f for f in (1 / 2.5, 1, 2.5)] if task != "facts" else []
        wanted = (0.001, 0.1) if task == "facts" else tuple(around)
        assert found == pytest.approx(wanted, rel=1e-2), (row, share, task)
    assert {task for row, share, task in rates if (row, share) == ("meft", "10%")} == set(suites.EMBEDDED_TASKS)
    assert not any(row == "base" for row, _, _ in rates)


def test_a_rate_of_another_task_is_that_of_the_task_where_it_was_swept_else_that_of_facts() -> None:
    chosen = learning_rates()
    assert swept_rate("meft", "10%", "arithmetic") == chosen["meft 10% arithmetic"] != chosen["meft 10%"]
    assert swept_rate("lora_all", "10%", "tools") == chosen["lora_all 10%"]
    assert swept_rate("meft_n8", "10%", "facts") == chosen["meft 10%"]
    assert swept_rate("meft", "77%", "facts") is None


@pytest.mark.parametrize("sized", [True, False])
def test_a_row_among_the_peers_is_in_the_full_suite_alone(monkeypatch, sized) -> None:
    """What docs/add_a_method.md asks for: a row and, where its method has a size, one size of the embedded model."""
    row, options = Row("Mine", "shira", {"targets": "all", "mask": "random"}), {"targets": "all", "mask": "random"}
    monkeypatch.setitem(ROWS, "mine", row)
    monkeypatch.setitem(PEERS, "mine", row)
    if sized:
        monkeypatch.setitem(SIZES["embedded"], "mine", {"10%": 11})
        options["rank"] = 11
    else:
        no_size = {"shira": replace(describe("shira"), size=None)}
        monkeypatch.setattr("meft_bench.harness.rows.describe", lambda name: no_size.get(name) or describe(name))
    found = [c for c in suites.full() if c.row == "mine"]
    assert {(c.share, c.spec.task, c.spec.seed) for c in found} == {("10%", "facts", seed) for seed in suites.SEEDS}
    assert all(c.spec.options == options for c in found)
    others = (*suites.default(), *suites.smoke(), *suites.real("a/b", "hub"), *suites.paper("a/b", "hub", "cuda"))
    assert not any(c.row == "mine" for c in others)
    grids = {name: describe(name).learning_rates for name in {r.method for r in ROWS.values()}}
    assert len([c for c in suites.sweep(grids) if c.row == "mine"]) == len(describe(row.method).learning_rates)
