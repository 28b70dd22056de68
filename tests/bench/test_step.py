"""The step benchmark's structure and arithmetic at tiny sizes; no test depends on how fast anything is."""

import json

import pytest
import torch

from meft_bench.bench import step, timed_step
from meft_bench.bench.step import step_benchmark
from meft_bench.bench.timed_step import COMPONENTS, VARIANTS, Sizes, Trainer
from tests.meft.tiny_models import hidden, make_adapter, small_config

TINY = {
    "length": 8, "hidden": 16, "ffn": 32, "heads": 2, "vocabulary": 12, "neurons": 64, "kept": 2, "experts": 16,
    "probed": 4, "warmup": 1,
}  # fmt: skip


def trainers(**changes) -> dict[str, Trainer]:
    sizes = Sizes(**{**TINY, **changes})
    return {variant.name: Trainer(variant, sizes) for variant in VARIANTS}


def token_ids(seed: int = 0, length: int = 8, vocabulary: int = 12) -> torch.Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, step.json as written, the Markdown) of one tiny step benchmark."""
    folder = tmp_path_factory.mktemp("bench")
    text = step_benchmark(folder, repeats=3, **TINY)
    return folder, json.loads((folder / "step.json").read_text()), text


# ---- the benchmark ----


def test_step_has_the_agreed_fields(written):
    folder, result, text = written
    assert set(result) == {"evidence", "about", "settings", "variants", "events", "provenance", "numerics"}
    assert result["evidence"] == "measured" and "not PCIe" in result["about"]
    assert result["settings"]["repeats"] == 3 and result["settings"]["experts"] == 16
    assert [v["name"] for v in result["variants"]] == [
        "parallel_adapter", "meft", "meft_no_ke", "meft_no_sparse", "meft_neither"
    ]  # fmt: skip
    for v in result["variants"]:
        assert set(v["median_s"]) == set(v["components_s"]) == set(COMPONENTS)
        assert len(v["totals_s"]) == len(v["ratio_to_parallel_adapter"]) == 3
        assert v["total_low_s"] == min(v["totals_s"]) <= v["total_s"] <= v["total_high_s"] == max(v["totals_s"])
    assert result["variants"][0]["ratio_to_parallel_adapter"] == [1.0] * 3
    assert (folder / "step.md").read_text() == text


def test_components_add_up_to_the_total_of_every_step(written):
    for v in written[1]["variants"]:
        for i, total_s in enumerate(v["totals_s"]):
            assert sum(v["components_s"][name][i] for name in COMPONENTS) == pytest.approx(total_s, abs=1e-5)


def test_a_resident_adapter_has_no_part_on_the_host(written):
    resident, *offloaded = written[1]["variants"]
    assert [name for name in COMPONENTS if resident["median_s"][name]] == ["device", "adam"]
    for v in offloaded:
        assert all(seconds > 0 for name in COMPONENTS for seconds in v["components_s"][name])


def test_events_follow_one_another_through_the_whole_step(written):
    result = written[1]
    events = result["events"]
    assert all(set(e) == {"lane", "name", "layer", "start_s", "end_s", "phase"} for e in events)
    assert events[0]["start_s"] == 0 and events[-1]["end_s"] in result["variants"][1]["totals_s"]
    # Pieces that round to nothing are left out.
    gaps = [b["start_s"] - a["end_s"] for a, b in zip(events, events[1:], strict=False)]
    assert all(-1e-9 <= gap <= 2e-6 for gap in gaps)
    assert list(dict.fromkeys(e["phase"] for e in events)) == ["forward", "backward", "update"]


@pytest.mark.parametrize("phase, order", [("forward", [0, 1]), ("backward", [1, 0])])
def test_events_name_what_each_layer_did_in_order(phase, order):
    trainer = trainers()["meft"]
    trainer.step(token_ids())
    step = trainer.step(token_ids(1))
    names = {
        "forward": ["hidden d2h", "select", "gather", "rows h2d", "score h2d", "index h2d"],
        "backward": ["score d2h", "grads d2h", "add_gradients", "add_router_gradient", "router_hidden h2d"],
    }[phase]  # fmt: skip
    # The spans themselves, as an event may round to nothing. Layer 0 needs no gradient for its input.
    expected = [(layer, n) for layer in order for n in names if not (layer == 0 and n.startswith("router_hidden"))]
    marks = {s: max(m for m in step.marks if m.start_s <= s.start_s) for s in step.spans}
    assert [(m.layer, s.name) for s, m in marks.items() if m.phase == phase] == expected
    assert all(m.part == "adapter" for m in marks.values() if m.phase == phase)


def test_events_lie_on_the_lanes_and_in_the_layers_of_a_made_step():
    made = timed_step.Step(
        marks=[timed_step.Mark(1.0, "forward", -1, "model"), timed_step.Mark(2.0, "forward", 0, "adapter")],
        spans=[
            timed_step.Span("retrieval", "host", "select", 2.5, 3.0),
            timed_step.Span("gather", "host", "g", 3.0, 3.5),
        ],
        end_s=4.0,
    )
    found = [(e["lane"], e["name"], e["layer"], e["start_s"], e["end_s"]) for e in step.events(made)]
    assert found == [
        ("device", "model", -1, 0.0, 1.0), ("device", "adapter", 0, 1.0, 1.5), ("host", "select", 0, 1.5, 2.0),
        ("host", "g", 0, 2.0, 2.5), ("device", "adapter", 0, 2.5, 3.0),
    ]  # fmt: skip
    parts = made.components_s()
    assert parts["retrieval"] == parts["gather"] == 0.5 and parts["device"] == 2.0 and made.total_s == 3.0


def test_all_rows_variants_move_exactly_r_rows_both_ways_and_meft_fewer():
    row_bytes, rows = 16 * 4, 64
    for name, trainer in trainers().items():
        if name == "parallel_adapter":
            continue
        step, link = trainer.step(token_ids()), trainer.attached.link
        moved = sum(step.rows_moved)
        # A key and a value per row down, the gradients of both back, in each of two layers.
        assert link.bytes["h2d", "rows"] == link.bytes["d2h", "grads"] == 2 * moved * row_bytes
        assert step.h2d_bytes + step.d2h_bytes == sum(link.bytes.values())
        if name in ("meft_no_sparse", "meft_neither"):
            assert step.rows_moved == [rows, rows]
        else:
            assert 0 < max(step.rows_moved) < rows


@pytest.mark.parametrize("whole, sparse", [("meft_no_sparse", "meft"), ("meft_neither", "meft_no_ke")])
def test_moving_all_rows_trains_exactly_as_moving_the_needed_ones(whole, sparse):
    sizes = {"length": 32, "vocabulary": 60}
    runs = trainers(**sizes, neurons=128, experts=32)
    for seed in range(4):
        moved = {name: runs[name].step(token_ids(seed, **sizes)).rows_moved for name in (whole, sparse)}
        # K = 2 is small against U, so that products.py sums the same pairs in the same order for both.
        assert moved[whole] == [128, 128] and all(8 * 2 < rows < 128 for rows in moved[sparse])
    logits = [runs[name].model(input_ids=token_ids(9, **sizes)).logits for name in (whole, sparse)]
    assert torch.equal(*logits)
    for a, b in zip(runs[whole].adapters, runs[sparse].adapters, strict=True):
        for (name, p), q in zip(a.store.named_parameters(), b.store.parameters(), strict=True):
            assert torch.equal(p, q), name
        assert a.store.values.detach().any()


@pytest.mark.parametrize("padded", [0, 3, 6])
def test_moving_all_rows_keeps_empty_places_empty(padded):
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[:, 6 - padded :] = 0
    whole, sparse = (make_adapter(small_config(), mask) for _ in range(2))
    timed_step.move_all_rows(whole)
    h = hidden()
    chosen, reference = (a.select(h.reshape(12, -1), a.batch.valid_tokens(h)) for a in (whole, sparse))
    assert chosen.union_U.tolist() == list(range(24))
    filled = reference.local_TK >= 0
    assert torch.equal(chosen.local_TK >= 0, filled)
    assert torch.equal(chosen.local_TK[filled], reference.union_U[reference.local_TK[filled]])
    torch.testing.assert_close(whole(h), sparse(h), rtol=1e-5, atol=1e-6)


def test_variants_start_from_the_same_model_and_keys():
    runs = trainers()
    weights = [dict(t.model.named_parameters())["model.layers.0.mlp.up_proj.weight"] for t in runs.values()]
    assert all(torch.equal(weights[0], w) for w in weights)
    resident, *stores = [getattr(t.adapters[1], "store", t.adapters[1]) for t in runs.values()]
    assert all(torch.equal(resident.keys, s.keys) for s in stores)


def test_spans_lie_one_after_the_other_where_the_engine_would_overlap(monkeypatch):
    """As it does on a GPU."""
    monkeypatch.setattr("meft_bench.meft.engine.host_part.GPUS", ("cpu",))
    trainer = trainers()["meft"]
    trainer.step(token_ids(0))
    spans = trainer.step(token_ids(1)).spans
    assert not trainer.adapters[0].store.queue.background
    assert all(one.end_s <= other.start_s for one, other in zip(spans, spans[1:], strict=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_step_runs_on_a_gpu(tmp_path):
    step_benchmark(tmp_path, repeats=1, **TINY, device="cuda", dtype="bfloat16")
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["about"].startswith("One GPU") and len(result["variants"]) == len(VARIANTS)


# ---- what goes wrong ----


def test_files_are_replaced_whole(written, tmp_path, monkeypatch):
    """A run that fails while writing leaves the old files and nothing else."""
    for name in ("step.json", "step.md"):
        (tmp_path / name).write_text("old")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        step_benchmark(tmp_path, repeats=1, **TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step.json", "step.md"]
    assert {p.read_text() for p in tmp_path.iterdir()} == {"old"}
    assert not [p for p in written[0].iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"repeats": 0}, "repeats=0 must be a whole number"),
        ({"neurones": 4}, "step has no size neurones; known: batch"),
        ({"batch": 0}, "batch=0 must be a whole number"),
        ({"hidden": 18}, "hidden=18 must be a multiple of 2 x heads = 4"),
        ({"length": 1}, "length=1 must be at least 2"),
        ({"experts": 5}, "experts N=5 does not divide neurons R=64"),
        ({"kept": 65}, "kept K=65 exceeds neurons R=64"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
    ],
)
def test_step_refuses_bad_sizes_before_writing_anything(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        step_benchmark(tmp_path / "new", **{"repeats": 1, **TINY, **sizes})
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_step_without_a_gpu_says_so(tmp_path):
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        step_benchmark(tmp_path, **TINY, device="cuda")
