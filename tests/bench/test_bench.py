"""The benchmarks' structure and arithmetic at tiny sizes; no test depends on how fast anything is."""

import dataclasses
import importlib.util
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from meft_bench.bench import (
    cli,
    common,
    hostbytes,
    kernels,
    layer,
    narrow,
    neighbours,
    peers,
    pretrained,
    ranks,
    residency,
)
from meft_bench.bench import threads as threads_part
from meft_bench.bench.changes import frame, gradients, priorities
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.bench.common import fitted_exponent
from meft_bench.bench.retrieval import Wide, dot_products_per_token, retrieval_benchmark
from meft_bench.bench.step import step_benchmark
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import adamw, native, workers
from meft_bench.meft.engine.adamw import RowState
from tests.harness import golden

SMALL = {"hidden": 16, "tokens": 6, "kept": 4, "touched": 20}
LAYER = Sizes(neurons=64, **SMALL)
NARROW = Wide(neurons=(64, 256), hidden=16, narrow_neurons=64, neighbours_neurons=64, updated=10)
WINDOW = {"hidden": 16, "neurons": 64, "kept": 4, "length": 8, "micro_batches": 3, "repeated": 2, "device": "cpu"}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def check_head(result):
    """What every result says of itself."""
    assert result["evidence"] == "measured" and result["cpu"] and result["provenance"]["packages"]["torch"]
    assert result["settings"]["threads"] == torch.get_num_threads() and result["settings"]["kernels"]
    assert set(result["numerics"]) == {"part", "bench", "meft"}


# ---- rounds ----


def test_rounds_interleave_drop_the_first_and_run_slow_ones_less_often():
    called: list[str] = []
    contenders = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    times = common.timed_rounds(contenders, 3, lambda: called.append("fresh"), slow={"b": 1})
    assert called == ["fresh", "a", "fresh", "a", "b", "fresh", "a", "fresh", "a"]
    assert len(times["a"]) == 3 and None not in times["a"]
    assert times["b"][0] is not None and times["b"][1:] == [None, None]
    assert common.ratios([2.0, None, 9.0], [1.0, 1.0, 3.0]) == [2.0, 3.0] and common.median([3.0, None, 1.0]) == 2.0


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with common.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.7])
def test_exponents_of_made_up_times(power):
    sizes = [1024, 4096, 65536]
    assert fitted_exponent(sizes, [3e-4 * s**power for s in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("sizes, values", [([4], [1.0]), ([4, 4], [1.0, 2.0]), ([4, 8], [1.0, 0.0]), ([4, 8], [1.0])])
def test_no_exponent_without_two_sizes_and_positive_times(sizes, values):
    with pytest.raises(ValueError, match="an exponent needs"):
        fitted_exponent(sizes, values)


# ---- kernels ----


def test_kernels_writes_every_contender_and_round(tmp_path):
    text = kernels.kernels_benchmark(tmp_path, 2, neurons=(64, 256), **SMALL)
    result = read(tmp_path, "kernels")
    check_head(result)
    assert [(r["neurons"], r["kernel"]) for r in result["rows"]] == [
        (R, k) for R in (64, 256) for k in (*kernels.BYTES, "search_experts")
    ]
    for r in result["rows"]:
        assert r["n"] == 2 and all(len(t) == 2 for t in r["rounds_s"].values())
        assert {kernels.OURS, kernels.PLAIN, common.TRIAD} <= set(r["rounds_s"])
        assert set(r["times_faster_than"]) == set(r["rounds_s"]) - {kernels.OURS, common.TRIAD}
        if r["kernel"] in kernels.BYTES:
            doubled = 2 if r["kernel"].startswith(("gather", "accumulate")) else 1
            assert r["bytes"] == kernels.BYTES[r["kernel"]] * 20 * 16 * doubled
    missing = importlib.util.find_spec("deepspeed") is None
    assert (peers.DEEPSPEED in result["not_installed"]) is missing and ("not installed" in text) is missing
    assert (tmp_path / "kernels.md").read_text() == text


def test_every_search_that_is_timed_finds_the_same():
    layer = kernels.Layer(256, kernels.Sizes(neurons=(256,), **SMALL))
    found = {name: search() for name, search in kernels.contenders_of("search_experts", layer).items()}
    assert set(found) == {
        kernels.OURS, kernels.NARROW, kernels.BY_EXPERT, kernels.NARROW_BY_EXPERT, kernels.PLAIN
    }  # fmt: skip
    right_TK, right = (t.sort(1).values for t in found.pop(kernels.PLAIN))
    for name in (kernels.NARROW, kernels.NARROW_BY_EXPERT):  # which of two nearly equal neurons is kept may differ
        torch.testing.assert_close(found.pop(name)[1].sort(1).values, right, rtol=2e-2, atol=2e-2)
    for neuron_TK, output_TK in found.values():
        assert torch.equal(neuron_TK.sort(1).values, right_TK)
        torch.testing.assert_close(output_TK.sort(1).values, right)


def test_bytes_of_an_adam_step_are_28_and_20():
    assert (kernels.BYTES["advance_fp32"], kernels.BYTES["advance_bf16"]) == (28, 20)


def test_a_size_beyond_memory_is_said_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(common.host_memory, "available_bytes", lambda: 1000)
    text = kernels.kernels_benchmark(tmp_path, 1, neurons=(64,), **SMALL)
    assert "not run: needs" in text and read(tmp_path, "kernels")["rows"][0]["skipped"]


def test_every_peer_makes_the_step_that_torch_adamw_makes():
    """From zero moments, at step 1; what all of them are timed on."""
    made = {}
    start_RD, grads_RD = torch.randn(2, 40, 8).unbind()
    index_U = torch.arange(0, 40, 3)
    for name in ("torch", *peers.row_adamw(_state(start_RD), grads_RD, lambda: index_U)):
        state = _state(start_RD)
        if name == "torch":
            whole = torch.nn.Parameter(start_RD.clone())
            whole.grad = torch.zeros_like(whole).index_copy_(0, index_U, grads_RD[index_U])
            torch.optim.AdamW([whole], lr=1e-3, weight_decay=0.0).step()
            made[name] = whole.detach()
            continue
        steps = peers.row_adamw(state, grads_RD, lambda: index_U)
        if name == "torch.optim.SparseAdam" or name.endswith("dense rows"):
            steps[name]()
            continue  # on matrices of its own
        steps[name]()
        made[name] = state.rows_RX
    assert torch.equal(made["torch"][1], start_RD[1]) and not torch.equal(made["torch"][0], start_RD[0])
    # Counted from step 2 as the gathered ones are, or without bias correction: the direction is the gradient's.
    for name, moved_RD in made.items():
        assert torch.equal((moved_RD - start_RD).sign()[index_U], -grads_RD.sign()[index_U]), name
        untouched = torch.ones(40, dtype=torch.bool).index_fill_(0, index_U, False)
        assert torch.equal(moved_RD[untouched], start_RD[untouched]), name


def test_dense_peers_step_as_many_rows_as_are_touched():
    start_RD, grads_RD = torch.randn(2, 40, 8).unbind()
    step = peers.row_adamw(_state(start_RD), grads_RD, lambda: torch.arange(0, 40, 3))[peers.DENSE]
    (parameter,) = step.__self__.param_groups[0]["params"]
    before = parameter.detach().clone()
    step()
    assert parameter.shape == (14, 8) and (parameter != before).all()


def _state(start_RD):
    zeros = [torch.zeros_like(start_RD) for _ in range(2)]
    done_R, still_R = torch.zeros(40, dtype=torch.int32), torch.zeros(40, dtype=torch.bool)
    return RowState(start_RD.clone(), *zeros, done_R, still_R, 0)


# ---- changes ----


def test_changes_writes_every_pair_with_its_interval(tmp_path):
    text = frame.changes_benchmark(tmp_path, 2, neurons=64, **SMALL)
    result = read(tmp_path, "changes")
    check_head(result)
    assert {r["file"] for r in result["rows"]} == set(frame.files()) >= {"rows"}
    for r in result["rows"]:
        assert r["n"] == 2 and all(len(t) == 2 for t in r["rounds_s"].values())
        low, high = r["interval"]
        assert low <= r["times_faster"] <= high and r["coverage"] == 0.5
        assert f"| {r['change']} |" in text
    names = [r["change"] for r in result["rows"]]
    assert len(set(names)) == len(names) and (tmp_path / "changes.md").read_text() == text


def test_a_change_alternates_who_comes_first_on_fresh_inputs():
    called: list[str] = []
    change = frame.Change(
        name="a", old=lambda: called.append("old"), new=lambda: called.append("new"), sizes={}, counts={},
        before=lambda: called.append("fresh"), ready=lambda: called.append("|"),
    )  # fmt: skip
    old_s, new_s = frame.alternated(change, 2)
    assert " ".join(called) == "fresh | new | old fresh | old | new fresh | new | old"
    assert len(old_s) == len(new_s) == 2


def test_old_and_new_adamw_both_have_a_step_to_make(monkeypatch):
    behind: list[int] = []
    advance = adamw.advance

    def noting(state, grads, index_U, step, *rest, **options):
        behind.append(int((state.done_R[index_U] < step).sum()))
        advance(state, grads, index_U, step, *rest, **options)

    (pair,) = (c for c in gradients.changes(LAYER) if c.name == "AdamW: keys and values in one call")
    monkeypatch.setattr(adamw, "advance", noting)
    frame.alternated(pair, 2)
    assert sorted(behind) == [LAYER.touched] * 6 + [2 * LAYER.touched] * 3


def test_by_priority_a_search_waits_for_its_own_layer_alone(monkeypatch):
    monkeypatch.setattr(workers, "WORKERS", 1)
    monkeypatch.setattr(workers, "_shared", None)
    done: list[str] = []
    queued, submit = threading.Event(), workers.HostQueue.submit

    def noting(queue, work, *args, priority):
        task = submit(queue, work, *args, priority=priority)
        if not args:  # the search
            queued.set()
        return task

    def update(layers, rows_U):
        assert queued.wait(20)
        done.append("update")
        yield

    monkeypatch.setattr(workers.HostQueue, "submit", noting)
    monkeypatch.setattr(priorities._Layers, "_update", update)
    monkeypatch.setattr(priorities._Layers, "_search", lambda layers: done.append("search"))
    (pair,) = priorities.changes(LAYER)
    for work, first in ((pair.old, 4), (pair.new, 1)):
        queued.clear()
        work()
        pair.ready()  # nothing is left to the next call
        assert len(done) == 5 and done.index("search") == first
        done.clear()


@pytest.mark.parametrize(
    "n, low, high, coverage", [(1, 0, 0, 0.0), (5, 0, 4, 0.9375), (6, 0, 5, 0.96875), (9, 1, 7, 0.9609375)]
)
def test_the_interval_of_a_median_is_that_of_order_statistics(n, low, high, coverage):
    """Hollander and Wolfe's table for the sign test: 9 values, the second smallest and largest, 96.1 %."""
    values = [float(v) for v in range(n)]
    assert frame.interval(values[::-1]) == (low, high, coverage)


# ---- retrieval ----


def test_dot_products_per_token_are_those_of_the_paper():
    paper = MeftOptions(neurons=8464, probed=8)
    assert (paper.experts, paper.expert_size) == (368, 23)
    assert dot_products_per_token(paper) == 368 + 8 * 23 == 552
    assert dot_products_per_token(dataclasses.replace(paper, key_experts=False)) == 8464


def test_retrieval_writes_raw_times_exponents_and_exact_counts(tmp_path):
    text = retrieval_benchmark(tmp_path, 3, neurons=(64, 256, 1024), hidden=8, tokens=6, kept=4, wide=NARROW)
    result = read(tmp_path, "retrieval")
    check_head(result)
    assert [(r["neurons"], r["experts"], r["expert_size"]) for r in result["rows"]] == [
        (64, 32, 2), (256, 64, 4), (1024, 128, 8)
    ]  # fmt: skip
    assert [r["dot_products_per_token_with_ke"] for r in result["rows"]] == [48, 96, 192]
    assert [r["dot_products_per_token_without_ke"] for r in result["rows"]] == [64, 256, 1024]
    assert (result["count_exponent_with_ke"], result["count_exponent_without_ke"]) == (0.5, 1.0)
    assert len(result["exponents_with_ke"]) == len(result["exponents_without_ke"]) == 3
    for r in result["rows"]:
        assert len(r["with_ke_times_s"]) == len(r["without_ke_times_s"]) == len(r["without_over_with"]) == 3
    assert (result["wide"]["hidden"], [r["neurons"] for r in result["wide"]["rows"]]) == (16, [64, 256])
    assert [r["scoring"] for r in result["narrow"]["rows"]] == list(narrow.SCORINGS)
    assert result["narrow"]["rows"][0]["recall"] == 1.0
    assert (tmp_path / "retrieval.md").read_text() == text and "| 1024 | 128 | 8 | 192 | 1024 |" in text


def test_dense_searches_may_run_in_fewer_rounds(tmp_path):
    wide = dataclasses.replace(NARROW, dense_repeats=1)
    retrieval_benchmark(tmp_path, 2, neurons=(64, 256), hidden=8, tokens=6, kept=4, wide=wide)
    made = read(tmp_path, "retrieval")["wide"]
    assert len(made["exponents_with_ke"]) == 2 and len(made["exponents_without_ke"]) == 1
    assert all(r["without_ke_times_s"][1] is None for r in made["rows"])


def test_recall_counts_what_was_found_of_what_was_wanted():
    found = torch.tensor([[0, 1, -1], [2, 3, 4]])
    assert narrow.recall(found, found, 5) == 1.0
    assert narrow.recall(found, torch.tensor([[1, 2, -1], [2, 3, 4]]), 5) == 4 / 5


@pytest.mark.parametrize("name", list(neighbours.CONTENDERS))
def test_every_search_finds_a_key_that_was_updated_to_be_the_best(name):
    package, make = neighbours.CONTENDERS[name]
    if package is not None:
        pytest.importorskip(package)
    generator = torch.Generator().manual_seed(0)
    keys_RD, h_TD = (torch.randn(n, 16, generator=generator) for n in (256, 2))
    index = make(keys_RD, 4)
    index_U = torch.tensor([7, 200])
    index.update(index_U, 10 * h_TD)
    keys_RD[index_U] = 10 * h_TD
    exact = (h_TD @ keys_RD.T).topk(4, dim=1).indices
    found = index.search(h_TD)
    assert found.shape == (2, 4)
    assert narrow.recall(found, exact, 256) == 1.0 if name == "all keys (exact)" else found.dtype == torch.int64
    if package == "hnswlib":
        assert 7 in found[0] and 200 in found[1]


def test_a_missing_index_is_a_row_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(neighbours.importlib.util, "find_spec", lambda name: None)
    found = neighbours.neighbours(64, 8, 4, 4, 10, steps=1)
    assert [r["name"] for r in found["rows"] if "pip install" in r.get("skipped", "")] == ["faiss IVF", "hnswlib"]
    assert found["rows"][0]["recall"] == {"random": 1.0, "leaning": 1.0}


# ---- layer, threads ----


def test_layer_benchmark_writes_its_pairs(tmp_path):
    text = layer.layer_benchmark(tmp_path, 2, sizes=((16, 1024),), tokens=4)
    result = read(tmp_path, "layer")
    check_head(result)
    (row,) = result["rows"]
    assert row["neurons"] == 1024 and len(row["ratios"]) == row["n"] == 2 and 0 < row["rows_moved"] <= 4 * 64
    assert all(len(t) == 2 for t in row["rounds_s"].values())
    assert (tmp_path / "layer.md").read_text() == text


def test_threads_benchmark_runs_every_count(tmp_path):
    text = threads_part.threads_benchmark(tmp_path, 1, most=2, neurons=64, **SMALL)
    result = read(tmp_path, "threads")
    check_head(result)
    assert [r["kernel"] for r in result["rows"]] == [*kernels.BYTES, "search_experts", common.TRIAD, "layer, MEFT"]
    assert all(set(r["rounds_s"]) == {"1", "2"} for r in result["rows"])
    assert (tmp_path / "threads.md").read_text() == text
    assert threads_part.counts_up_to(3) == [1, 2, 3] and threads_part.counts_up_to(24) == [*range(1, 9), 16, 24]


def test_ranks_benchmark_compares_one_rank_with_two(tmp_path):
    text = ranks.ranks_benchmark(
        tmp_path, 2, length=8, hidden=16, layers=1, ffn=32, heads=2, neurons=256, kept=4, warmup=1
    )
    result = read(tmp_path, "ranks")
    check_head(result)
    assert result["tokens"] == 2 * 2 * 8 and result["parameters"] == 256 * 2 * 16 + 64 * 16
    assert len(result["ratios"]) == len(result["processor_ratios"]) == result["n"] == 2
    # Rows, gradients and moments are 16 bytes a parameter; what is noted of a row is a lot of one this narrow.
    one, node = (result["host_bytes_per_parameter"][name] for name in ("one", "ranks"))
    assert 16 < one < 18 and one < node < 1.1 * one
    assert (tmp_path / "ranks.md").read_text() == text


# ---- residency ----


@pytest.mark.parametrize("kind", list(residency.STATES))
def test_without_a_budget_the_count_is_the_formula_to_the_byte(kind):
    sizes = residency.Sizes(**WINDOW)
    made = residency.window(sizes, kind, 0.0)
    for union, counted in zip(made["raw"]["union"], made["raw"]["bytes"], strict=True):
        assert counted == residency.crossing(sizes, union)
    assert made["raw"]["bytes_at_step"] == {}
    assert made["formula_m_per_micro_batch"] == made["total_m_per_micro_batch"]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_of_rows_on_the_device_nothing_crosses_but_their_keys(share):
    """The host selects. Of the others each micro-batch sends what it uses, and their gradients come back."""
    sizes = residency.Sizes(**WINDOW)
    made, held = residency.window(sizes, "random", share), round(share * sizes.neurons)
    crossed = made["bytes_per_micro_batch"]
    assert crossed["d2h keys"] == pytest.approx(held * sizes.hidden * 4 / sizes.micro_batches, abs=0.1)
    assert crossed.get("d2h grads", 0) == crossed.get("h2d rows", 0)
    assert crossed.get("h2d rows", 0) <= 2 * (sizes.neurons - held) * sizes.hidden * 2
    assert (crossed.get("h2d rows", 0) > 0) == (made["host_updated_share"] > 0) == (share < 1)
    assert made["device_bytes"] == made["device_budget_bytes"] == sizes.config(share).device_budget


def test_the_closed_formula_is_of_a_host_that_finds_the_experts():
    """On a GPU a router of its own does, and neither its share of hidden gradients nor scores cross."""
    told = residency.formula(residency.Sizes(**WINDOW), 0.0, [4, 6])
    assert told == (sum(residency.crossing(residency.Sizes(**WINDOW), 4).values())
                    + sum(residency.crossing(residency.Sizes(**WINDOW), 6).values())) / 2  # fmt: skip
    gpu = residency.Sizes(**{**WINDOW, "device": "cuda"})
    assert "a GPU finds them itself" in residency.formula(gpu, 0.0, [4, 6])


def test_residency_writes_windows_and_host_bytes(tmp_path, monkeypatch):
    fake = {"parameters": 10, "bytes": dict.fromkeys(hostbytes.PARTS, 40), "growth_bytes": 200}
    ended = SimpleNamespace(returncode=0, stdout=json.dumps(fake))
    native.kernels()  # which may run a compiler
    monkeypatch.setattr(hostbytes.subprocess, "run", lambda *a, **k: ended)
    text = residency.residency_benchmark(tmp_path, **WINDOW)
    result = read(tmp_path, "residency")
    check_head(result)
    assert len(result["windows"]) == sum(map(len, residency.WINDOWS.values()))
    assert [h["accounted_per_parameter"] for h in result["host"]] == [16.0, 16.0]
    assert "| 20.00 | 20.00 |" in text and (tmp_path / "residency.md").read_text() == text


@pytest.mark.parametrize("moments, expected", [("fp32", 16), ("bf16", 12)])
def test_host_bytes_are_those_of_parameters_gradients_and_moments(moments, expected):
    made = hostbytes._train(8, 64, 4, 4, moments, "cpu", True)
    assert made["parameters"] == (2 * 64 + 32) * 8
    own = sum(made["bytes"][part] for part in ("parameters", "gradients", "moments"))
    assert own == expected * made["parameters"] and made["bytes"]["in flight"] > 0


@pytest.mark.slow
def test_host_bytes_are_measured_in_another_process():
    made = hostbytes.measure(64, 512, 8, 16, "fp32", "cpu")
    assert made["accounted_per_parameter"] >= 16 and len(made["growth_per_parameter"]) == 2


# ---- all together, and what goes wrong ----


@pytest.mark.parametrize("dirty", [False, True])
def test_all_benchmarks_run_in_order_with_the_same_repeats(tmp_path, monkeypatch, dirty):
    monkeypatch.setattr(cli, "_part", lambda name: lambda folder, pairs: f"{name} {pairs}\n")
    monkeypatch.setattr(cli, "git_commit", lambda folder: {"commit": "0" * 12, "dirty": dirty})
    end = "\nmade from changed files: pages say so until make bench runs from a commit\n" * dirty
    said = cli.all_benchmarks(5, tmp_path / "new")
    assert said == "\n".join(f"{name} 5\n" for name in cli.PARTS) + end
    assert cli.all_benchmarks(5, tmp_path, ["step", "kernels"]) == "kernels 5\n\nstep 5\n" + end


@pytest.mark.parametrize("name", cli.PARTS)
def test_every_part_takes_pairs_and_a_folder(name, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="cannot write into .*taken"):
        cli._part(name)(tmp_path / "taken", 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: retrieval_benchmark(f, repeats=-1), "repeats=-1 must be a whole number"),
        (lambda f: retrieval_benchmark(f, neurons=(64,)), "at least two sizes"),
        (lambda f: retrieval_benchmark(f, neurons=(64, 128), kept=70), "kept K=70 exceeds neurons R=64"),
        (lambda f: retrieval_benchmark(f, tokens=0), "tokens=0 must be a whole number"),
        (lambda f: kernels.kernels_benchmark(f, 0), "repeats=0 must be"),
        (lambda f: kernels.kernels_benchmark(f, neurons=(64,), kept=64), "neurons=64 has too few candidates"),
        (lambda f: layer.layer_benchmark(f, 0), "repeats=0 must be"),
        (lambda f: residency.residency_benchmark(f, micro_batches=0), "micro_batches=0 must be"),
        (lambda f: threads_part.threads_benchmark(f, touched=0), "touched=0 must be"),
        (lambda f: step_benchmark(f, repeats=0), "repeats=0 must be"),
        (lambda f: ranks.ranks_benchmark(f, ranks=0), "ranks=0 must be"),
        (lambda f: cli.all_benchmarks(0, f), "pairs=0 must be"),
        (lambda f: cli.all_benchmarks(1, f, ["speed"]), "only='speed' is unknown"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- a pretrained model ----


def test_a_step_on_a_pretrained_model_is_divided_by_its_contenders(tmp_path):
    text = pretrained.pretrained_benchmark(tmp_path, 3, golden.embedded_contenders(), "embedded")
    result = read(tmp_path, "pretrained")
    check_head(result)
    meft, lora = result["rows"]
    assert (meft["row"], lora["row"]) == ("meft", "lora") and meft["first_over_this"] == [1.0] * 3
    assert lora["first_over_this"] == common.ratios(meft["times_s"], lora["times_s"])
    assert lora["trainable"] == 4 * 2 * 8 * (128 + 128) and "| LoRA" in text and "task facts, 4 rows" in text


def test_contenders_take_the_same_step_as_training_does(tmp_path):
    _, spec = golden.embedded_contenders()[0]
    contender = pretrained.Contender(spec, "embedded")
    before = [p.detach().clone() for p in contender._attached.parameters()]
    contender.step()
    contender._optimizer.settle()
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(contender._attached.parameters(), before, strict=True)]
    assert max(moved) == pytest.approx(spec.learning_rate, rel=0.01)  # Adam's first step moves by the rate


def test_without_the_weights_the_part_is_left_out_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "make base MODEL=smollm2-135m" in pretrained.pretrained_benchmark(tmp_path / "out", 3)
    assert not list((tmp_path / "out").iterdir())


def test_the_contenders_are_the_suites_own_runs():
    rows = dict(pretrained.contenders())
    assert list(rows) == list(pretrained.CONTENDERS) and {s.task for s in rows.values()} == {"people"}
    assert rows["meft"].options["neurons"] == 360 and rows["lora"].options["rank"] == 233
