"""Each measure on a record made by hand, against a number worked out by hand."""

from copy import deepcopy
from typing import Any

import pytest

from meft_bench.harness.suites import Cell, cell
from meft_bench.report.records import quantities as q
from meft_bench.report.records import traffic
from meft_bench.report.records.evidence import weakest
from meft_bench.report.records.results import Results

from ..made_records import broken, make_record, results_of

# Two layers of four neurons, hidden size 3, float32; two optimizer steps of two micro-batches each.
LINKED: dict[str, Any] = {
    "run_key": "by-hand",
    "spec": {
        "method": "meft",
        "options": {"neurons": 4, "experts": 2, "probed": 1, "kept": 1, "key_experts": True},
        "steps": 2,
        "accumulation": 2,
        "dtype": "float32",
        "task": "facts",
        "train_rows": 13,
    },
    "parameters": {"groups": {"keys": 24, "values": 24}, "trainable": 30},
    "traffic": {
        "per_optimizer_step_bytes": 800,
        "rows_moved_by_layer": [{"mean": 3.0}, {"mean": 2.0}],
        # Rows of a step: (3 + 2) neurons x key and value x 3 x 4 bytes x 2 micro-batches = 240; two steps.
        "by_purpose": {
            "h2d_rows_bytes": 480,
            "d2h_grads_bytes": 480,
            "d2h_hidden_bytes": 480,  # 10 tokens a step x 3 x 4 bytes x 2 layers, two steps
            "h2d_index_bytes": 40,
            "h2d_score_bytes": 20,
            "d2h_score_bytes": 20,
        },
    },
    "timing": {"tokens_padded": 20, "real_tokens_per_s": 123.5},
    "memory": {
        "accounted": {"host_moments_bytes": 9},
        "device_peak_by_phase": {"train": {"allocated_bytes": 3 * 2**29}},
        "phase_s": {"train": 5400.0},
    },
    "quality": {
        "recall": {"metrics": {"contains": {"mean": 0.5}}},
        "test": {"metrics": {"contains": {"mean": 0.4}}},
    },
    "probes": {
        "activation": {"active_share": [0.1, 0.3], "top5_share_of_token": [0.5, 0.7]},
        "base_text": {"nats_per_token": 1.75},
        "forgetting": {
            "own_text": {"nats_per_token": 1.5, "base_nats_per_token": 1.25},
            "held_out": {"kl_nats_per_token": 0.125},
        },
        "distinctive": {"overlap_by_layer": [0.75, 0.25]},
        "neurons": {"dead_share": [0.0, 0.5], "expert_entropy": [1.0, 0.8]},
        "lookahead": {"recall_per_token": [0.6, 0.4]},
        "other_reading": {"metrics": {"contains": {"mean": 0.25}}},
        "union_grid": [
            {"batch": 1, "length": 16, "share_by_layer": [0.2, 0.4]},
            {"batch": 128, "length": 16, "share_by_layer": [0.8, 1.0]},
        ],
    },
}
BY_HAND = {
    "union_share": (3 / 4 + 2 / 4) / 2,
    "kept_share": 1 / 4,
    "beta": 2.5,  # 3 and 2 rows moved, K = 1
    # 1440 main bytes / 2 steps / 2 micro-batches / 4 bytes = 90 elements; M = 48.
    "in_units_of_m": 90 / 48,
    "bytes_in_m_per_step": 180 / 48,
    "eq8_in_m": 60 / 48,
    "bytes_per_step": 800.0,
    "formula_gap": 0.0,
    # Rows, indices and scores down of four micro-batches, and the gradients of one of two layers.
    "device_bytes": (480 + 40 + 20 + 480 / 2) / 4,
    "tokens_per_s": 123.5,
    "device_peak_gib": 1.5,
    "active_share": 0.2,
    "top5_share": 0.6,
    "base_nats": 1.75,
    "own_text_nats": 0.25,
    "held_out_kl": 0.125,
    "background_overlap": 0.5,
    "dead_share": 0.25,
    "expert_entropy": 0.9,
    "lookahead_recall": 0.5,
    "reading_gap": -0.15,
    "grid_rise": 0.6,
    "bits_recalled": 0.5 * 10 * 12,  # two whole people of the 13 rows
    "bits_per_parameter": 2.0,
    "retrieval_share": (2 + 1 * 2) / 4,
    "train_hours": 1.5,
}


@pytest.mark.parametrize("name", sorted(q.MEASURES))
def test_every_measure_by_hand(name: str) -> None:
    if name == "grid_share":
        assert q.grid_share(LINKED, 128, 16) == pytest.approx(0.9)
        with pytest.raises(ValueError, match="run by-hand has no union share at 4 x 16"):
            q.grid_share(LINKED, 4, 16)
        return
    assert q.MEASURES[name](LINKED) == pytest.approx(BY_HAND[name])
    assert q.MEASURES[name].__doc__, "the page explains every measure"


def test_the_formula_gap_is_the_worst_of_the_main_terms() -> None:
    for purpose, extra in (("h2d_rows", 200), ("d2h_grads", -200), ("d2h_hidden", 200)):
        record = deepcopy(LINKED)
        record["traffic"]["by_purpose"][f"{purpose}_bytes"] += extra
        # 100 bytes a step, less the rounding of the rows: 0.005 x 2 layers x 2 x 3 x 4 bytes x 2 micro-batches.
        assert q.formula_gap(record) == pytest.approx(100 - 0.48)


def test_half_the_width_is_half_the_bytes_and_as_many_elements() -> None:
    record = deepcopy(LINKED)
    record["spec"]["dtype"] = "bfloat16"
    record["traffic"]["by_purpose"] = {k: v // 2 for k, v in record["traffic"]["by_purpose"].items()}
    assert q.formula_gap(record) == 0.0
    assert q.in_units_of_m(record) == pytest.approx(BY_HAND["in_units_of_m"])
    assert q.eq8_in_m(record) == pytest.approx(BY_HAND["eq8_in_m"])


def test_a_resident_method_holds_what_is_accounted_on_the_device() -> None:
    record = deepcopy(LINKED)
    record["spec"]["method"] = "lora"
    record["memory"]["accounted"] = {
        "device_parameters_bytes": 4,
        "device_gradients_bytes": 4,
        "device_moments_bytes": 8,
        "host_moments_bytes": 99,
    }
    assert q.device_bytes(record) == 16.0
    record["spec"]["method"] = "adalomo"
    assert q.device_bytes(record) == 12.0, "what it trains is the base, which the others hold, too"


def test_without_key_experts_every_neuron_is_searched() -> None:
    record = deepcopy(LINKED)
    record["spec"]["options"] = {"neurons": 4, "kept": 4, "key_experts": False}
    assert (q.retrieval_share(record), q.kept_share(record)) == (1.0, 1.0)


def test_no_device_peak_on_a_cpu() -> None:
    record = deepcopy(LINKED)
    record["memory"]["device_peak_by_phase"] = None
    with pytest.raises(ValueError, match="run by-hand has no device peak"):
        q.device_peak_gib(record)


# ---- over the seeds of a place ----


def _cells(row: str, seeds: range, **fields: Any) -> list[Cell]:
    return [cell(row, "10%", task="facts", seed=s, **fields) for s in seeds]


def _results() -> Results:
    meft, lora = _cells("meft", range(3)), _cells("lora", range(2))
    records = [make_record(c, right) for c, right in zip([*meft, *lora], (5, 7, 9, 4, 4), strict=True)]
    return results_of([*meft, *lora], records)


def test_references() -> None:
    assert q.parse_reference("meft 10% facts") == ("meft", "10%", "facts", "")
    assert q.parse_reference("meft 10% facts / 4 micro-batches") == ("meft", "10%", "facts", "4 micro-batches")
    for text in ("meft facts", "meft 10% facts 4", ""):
        with pytest.raises(ValueError, match="no reference of the form"):
            q.parse_reference(text)


def test_scores_by_seed_with_their_runs() -> None:
    found = q.score(_results(), "meft 10% facts")
    assert found.by_seed == pytest.approx({0: 0.25, 1: 0.35, 2: 0.45})
    assert (found.missing, found.stale, found.evidence, len(found.run_keys)) == ((), False, "measured", 3)
    assert q.score(_results(), "meft 10% facts", metric="iou").missing[0] == "meft 10% facts, seed 0: no iou on test"
    assert q.score(_results(), "meft 40% facts").missing == ("meft 40% facts: not in the suite",)


def test_differences_pair_seeds_and_items() -> None:
    found = q.difference(_results(), "meft 10% facts", "lora 10% facts")
    assert found.by_seed == pytest.approx({0: 0.05, 1: 0.15}), "only the seeds that both have"
    assert found.items is not None and (found.items.mean, found.items.n) == (pytest.approx(0.1), 40)
    recall = q.difference(_results(), "meft 10% facts", "lora 10% facts", split="recall")
    assert recall.items is None and recall.by_seed == pytest.approx(found.by_seed)


def test_ratio_and_minus_work_seed_by_seed() -> None:
    a, b = q.Values({0: 6.0, 1: 9.0, 2: 1.0}, run_keys=("a", "b")), q.Values({0: 2.0, 1: 3.0}, run_keys=("b",))
    assert q.ratio(a, b).by_seed == {0: 3.0, 1: 3.0}
    assert q.minus(a, b).by_seed == {0: 4.0, 1: 6.0}
    assert q.ratio(a, b).run_keys == ("a", "b"), "each run once"
    assert q.ratio(a, q.Values({0: 2.0, 1: 0.0})).by_seed == {0: 3.0}, "nothing is divided by zero"
    lost = q.Values({}, gaps={0: "y, seed 0: no record"})
    assert q.minus(a, lost).missing == lost.missing and q.minus(a, lost).evidence == "not-run"


def test_what_is_missing_is_named_by_seed() -> None:
    cells = _cells("meft", range(3))
    records = [make_record(cells[0]), broken(make_record(cells[1]), "oom", "no room")]
    found = q.measure(results_of(cells, records), "base_nats", "meft 10% facts")
    assert list(found.by_seed) == [0]
    assert found.missing == ("meft 10% facts, seed 1: oom", "meft 10% facts, seed 2: no record")
    plain = q.measure(results_of(cells, records[:1]), "active_share", "meft 10% facts")
    assert plain.missing[0] == "meft 10% facts, seed 0: no active_share", "MEFT has no dense activation"


def test_a_number_is_as_good_as_its_weakest_part() -> None:
    cells = _cells("meft", range(2))
    records = [make_record(c) for c in cells]
    records[1]["traffic"]["evidence"] = "simulated"
    results = results_of(cells, records)
    assert q.measure(results, "union_share", "meft 10% facts").evidence == "simulated"
    assert q.score(results, "meft 10% facts").evidence == "measured", "another block of the same records"
    joined = q.minus(q.Values({0: 1.0}, evidence="measured"), q.Values({0: 1.0}, evidence="capped"))
    assert joined.evidence == "capped" and weakest([]) == "not-run"


def test_seeds_planned_on_one_side_alone_are_no_gap() -> None:
    meft, lora = _cells("meft", range(5)), _cells("lora", range(3))
    results = results_of([*meft, *lora], [make_record(c) for c in [*meft[:3], *lora]])
    found = q.difference(results, "meft 10% facts", "lora 10% facts")
    assert sorted(found.by_seed) == [0, 1, 2] and not found.not_run
    assert q.score(results, "meft 10% facts").not_run


def test_stale_runs_make_the_quantity_stale() -> None:
    cells = _cells("meft", range(2))
    records = [make_record(c, stale=bool(c.spec.seed)) for c in cells]
    assert q.score(results_of(cells, records), "meft 10% facts").stale


def test_the_rise_of_a_shared_union_takes_the_lengths_that_were_probed() -> None:
    """A large model is probed at sequences of 64 tokens alone."""
    grid = [
        {"batch": b, "length": 64, "share_by_layer": [share, share]} for b, share in ((2, 0.25), (8, 0.5), (32, 0.75))
    ]
    assert traffic.grid_rise({"run_key": "a", "probes": {"union_grid": grid}}) == 0.5
    with pytest.raises(ValueError, match="run a has no union share at two micro-batches"):
        traffic.grid_rise({"run_key": "a", "probes": {"union_grid": grid[:1]}})
