"""U of a trained model: counted as single micro-batches say, logged and resumed by R, and used by the profile."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from meft_bench.cli import main
from meft_bench.harness import probes
from meft_bench.harness.numerics import selection_numerics
from meft_bench.harness.published import not_counting
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.model import attach
from meft_bench.profile import jobs, search, selection, simulate_matrix
from meft_bench.profile.matrix import at_more_tokens
from meft_bench.profile.request import Request, setting_of
from meft_bench.profile.simulated_row import _touched, union_of
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.trained import log as files
from meft_bench.profile.trained import measure
from meft_bench.profile.trained.look import look
from meft_bench.profile.trained.use import trained_union, usable_log
from meft_bench.provenance import provenance
from meft_bench.simulate import cards
from meft_bench.train import models
from tests.profile.small import small_config

SETTINGS = measure.Settings(model="embedded", task="facts", learning_rate=1e-2, steps=2, batch_size=4, max_length=64,
                            rows=12, dtype="float32", block=16, before=2, after=4)  # fmt: skip
SOURCE = measure.Source(model="embedded")


def test_joined_blocks_are_larger_micro_batches_and_several_of_a_step():
    """Against the selection of single micro-batches, on rows of another length than a block."""
    loaded = models.load_model("embedded", None, "float32", "cpu")
    meft = attach(loaded.model, MeftOptions(neurons=48, experts=12, probed=3, kept=4), 0)
    loaded.model.eval()
    rows = torch.randint(5, 200, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    found = look(loaded.model, loaded, meft.adapters, rows, block=24, blocks=8)
    assert [(p["tokens"], p["samples"]) for p in found["unions"]] == [(24, 8), (48, 4), (96, 2), (192, 1)]

    used = [torch.zeros(8, 48, dtype=torch.bool) for _ in meft.adapters]
    for number in range(8):
        with probes.watched(meft.adapters) as seen, torch.no_grad():
            loaded.model(input_ids=torch.tensor(rows[2 * number : 2 * number + 2]), use_cache=False)
        for marks, (_, chosen) in zip(used, seen, strict=True):
            marks[number, chosen.union_U] = True
    for point, together in zip(found["unions"], (1, 2, 4, 8), strict=True):
        steps = [m.view(8 // together, together, 48).any(1) for m in used]
        assert point["share_by_layer"] == [round(float(s.float().mean()), 4) for s in steps]
        experts = [s.view(-1, 12, 4).any(2).float().mean() for s in steps]
        assert point["experts_by_layer"] == [round(float(e), 4) for e in experts]
    assert all(0 < share <= 4 / 48 for share in found["kept_share_by_layer"])
    assert all(0 < share < 1 for share in found["active_share_by_layer"])
    assert all(0 < share <= 1 for share in found["expert_entropy_by_layer"])


def test_padding_keeps_nothing_and_too_few_tokens_are_refused():
    loaded = models.load_model("embedded", None, "float32", "cpu")
    meft = attach(loaded.model, MeftOptions(neurons=48, experts=12, probed=3, kept=4), 0)
    loaded.model.eval()
    short, long = [7, 8, 9, 10], list(range(20, 48))
    (alone,) = look(loaded.model, loaded, meft.adapters, [short, long], block=32, blocks=1)["unions"]
    with probes.watched(meft.adapters) as seen, torch.no_grad():
        loaded.model(input_ids=torch.tensor([short]), use_cache=False)
        loaded.model(input_ids=torch.tensor([long]), use_cache=False)
    half = len(meft.adapters)
    pairs = zip(seen[:half], seen[half:], strict=True)
    together = [len({*a.union_U.tolist(), *b.union_U.tolist()}) for (_, a), (_, b) in pairs]
    assert alone["share_by_layer"] == [round(n / 48, 4) for n in together]
    with pytest.raises(ValueError, match="the rows have 32 tokens, 64 are looked at"):
        look(loaded.model, loaded, meft.adapters, [short, long], block=32, blocks=2)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(path, log) of one R."""
    path = tmp_path_factory.mktemp("logged") / files.FILE
    return path, measure.log_trained(SETTINGS, SOURCE, (32,), path)


def test_a_log_says_what_was_trained_and_looked_at(logged):
    path, log = logged
    assert files.read_log(path) == log and log["evidence"] == "measured"
    (entry,) = log["entries"]
    assert (entry["neurons"], entry["kept"], entry["steps"]) == (32, 16, 2)
    assert [len(entry[when]["unions"]) for when in ("before", "after")] == [2, 3]
    assert entry["trained_tokens"] > 0 and entry["before"]["tokens"] == 32 and entry["after"]["tokens"] == 64
    shares = [p["share_by_layer"] for p in entry["after"]["unions"]]
    assert all(a <= b for few, more in zip(shares, shares[1:], strict=False) for a, b in zip(few, more, strict=True))
    assert log["numerics"].keys() == {"selection", "method", "task", "training", "base"}


def test_it_goes_on_with_the_next_r_and_begins_anew_when_numbers_changed(logged, tmp_path, monkeypatch, capsys):
    path = tmp_path / files.FILE
    path.write_bytes(logged[0].read_bytes())
    made = []
    whole = measure._entry
    monkeypatch.setattr(measure, "_entry", lambda *given: made.append(given[2]) or whole(*given))
    log = measure.log_trained(SETTINGS, SOURCE, (32, 64), path)
    assert made == [64] and [e["neurons"] for e in log["entries"]] == [32, 64]
    assert log["entries"][0] == logged[1]["entries"][0] and "1 there, 1 to make" in capsys.readouterr().out
    old = json.loads(path.read_text())
    old["numerics"]["selection"] -= 1
    path.write_text(json.dumps(old))
    assert len(measure.log_trained(SETTINGS, SOURCE, (32,), path)["entries"]) == 1 and made == [64, 32]


def test_two_commands_that_log_at_once_keep_what_both_made(tmp_path, monkeypatch):
    path = tmp_path / files.FILE
    (entry,) = made((256, 48))["entries"]

    def while_another_ends(settings, source, neurons, *_):
        if neurons == 64:
            measure.log_trained(SETTINGS, SOURCE, (32,), path)
        return {**entry, "neurons": neurons}

    monkeypatch.setattr(measure, "_entry", while_another_ends)
    assert [e["neurons"] for e in measure.log_trained(SETTINGS, SOURCE, (64, 128), path)["entries"]] == [32, 64, 128]
    assert [e["neurons"] for e in files.read_log(path)["entries"]] == [32, 64, 128]


def test_two_profiles_that_log_at_once_keep_what_both_made(tmp_path, monkeypatch):
    path = tmp_path / "selection.json"
    one_entry = selection._entry

    def while_another_ends(model, tokens, neurons, variant, hidden):
        if (model, neurons, variant) == ("llama-7b", 64, "meft"):
            selection.log_selection("llama-13b", 1, 8, path, [128])
        return one_entry(model, tokens, neurons, variant, hidden)

    monkeypatch.setattr(selection, "_ffn_inputs", lambda *_: [torch.zeros(8, 1)])
    monkeypatch.setattr(selection, "_union_size", lambda *_: 5)
    monkeypatch.setattr(selection, "_entry", while_another_ends)
    selection.log_selection("llama-7b", 1, 8, path, [64, 256])
    kept = [(e["model"], e["neurons"]) for e in json.loads(path.read_text())["entries"] if e["key_experts"]]
    assert sorted(kept) == [("llama-13b", 128), ("llama-7b", 64), ("llama-7b", 256)]


def test_other_settings_do_not_overwrite_a_log(logged):
    with pytest.raises(ValueError, match=r"holds a log with steps = 2: delete it, or name another folder"):
        measure.log_trained(dataclasses.replace(SETTINGS, steps=3), SOURCE, (32,), logged[0])


def test_publish_names_a_log_that_does_not_count(logged, tmp_path):
    room = tmp_path / "profile"
    room.mkdir()
    log = json.loads(logged[0].read_text())

    def said(**changed):
        (room / files.FILE).write_text(json.dumps({**log, **changed}))
        return not_counting(tmp_path)

    clean = {**log["provenance"], "dirty": False}
    assert said(provenance=clean) == []
    assert said(provenance={**clean, "dirty": True}) == [
        "profile/trained_selection.json was made from changed files (make selection)"]  # fmt: skip
    for change in ({"numerics": {}}, {"settings": 3}, {"settings": {"task": "x", "model": "y"}}):
        assert "an earlier version of the code" in said(provenance=clean, **change)[0]


@pytest.mark.parametrize("change", [{"schema": 2}, {"entries": 3}, {"entries": [{}]}, {"settings": None}], ids=str)
def test_broken_logs_are_named(logged, change, tmp_path):
    (tmp_path / files.FILE).write_text(json.dumps({**logged[1], **change}))
    with pytest.raises(ValueError, match="trained_selection.json is no logged selection of a trained model"):
        files.read_log(tmp_path / files.FILE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--task", "cloze"), "--task 'cloze' is none of people, nq"),
        (("--neurons", "3,x"), "must be whole numbers"),
        (("--neurons", "0"), "--neurons"),
        (("--task", "nq", "--data", "/nowhere"), "no data folder /nowhere"),
        (("--task", "people", "--data", "hub"), "people makes its own rows"),
        (("--model", "./gone"), "no model folder ./gone"),
    ],
)
def test_wrong_input_is_one_line(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MEFT_DATA", raising=False)
    assert main(["selection", "--output", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- the profile's use of it ----


def made(*sizes: tuple[int, int]) -> dict:
    """A log as it stands in a file, of (R, K): U / R grows with the tokens and falls with R."""

    def union(neurons: int, tokens: int) -> dict:
        share = min(1.0, tokens / neurons / 4)
        return {"tokens": tokens, "samples": 1, "share_by_layer": [share - 0.02, share + 0.02 * (share < 1)]}

    entries = [
        {"neurons": n, "kept": k, "steps": 40, "after": {"unions": [union(n, t) for t in (32, 64, 128, 256)]}}
        for n, k in sizes
    ]
    settings = {"model": "local/smollm2-135m@0", "task": "nq"}
    return {"schema": 1, "settings": settings, "entries": entries, "numerics": selection_numerics("nq", "x/y"),
            "provenance": {**provenance(1), "dirty": False}}  # fmt: skip


def test_a_logged_point_is_taken_as_it_is():
    union = trained_union(made((256, 16), (1024, 16)), tokens=64, neurons=1024, kept=16, key_experts=True)
    assert union.rows == 16 and union.window == ((1, 16), (2, 32), (4, 64))
    assert (union.model, union.evidence) == ("SmolLM2-135M", "measured")
    assert union.source == (
        "logged, SmolLM2-135M after 40 steps on nq: R=1024, K=16, T=64; rows touched by up to 4 micro-batches are "
        "logged, by more taken as of 4"
    )
    after = union.touched(1024)
    assert [after(a) for a in (1, 2, 4, 32)] == [16, 32, 64, 64] and 32 < after(3) < 64
    assert union.logged(2, 1024) == 32


@pytest.mark.parametrize(
    ("asked", "said", "share"),
    [
        ({"neurons": 1500}, "R=1024, K=16, T=64, the nearest to R=1500, K=16, T=64;", 64 / 1024 / 4),
        ({"neurons": 512}, "R=256, K=16, T=64, the nearest to R=512, K=16, T=64;", 64 / 256 / 4),  # both twice away
        ({"tokens": 100}, "T=128, the nearest to R=1024, K=16, T=100;", 128 / 1024 / 4),
        ({"kept": 8}, "R=1024, K=16, T=64, the nearest to R=1024, K=8, T=64;", 64 / 1024 / 4),
        ({"key_experts": False}, "R=1024, K=16, T=64 with Key-Experts, the nearest to R=1024, K=16, T=64 without;",
         64 / 1024 / 4),
    ],
)  # fmt: skip
def test_another_point_is_called_so(asked, said, share):
    wanted = {"tokens": 64, "neurons": 1024, "kept": 16, "key_experts": True, **asked}
    union = trained_union(made((256, 16), (1024, 16)), **wanted)
    assert said in union.source and union.rows == round(share * wanted["neurons"])


def test_u_is_never_more_than_every_token_keeps():
    union = trained_union(made((256, 16)), tokens=256, neurons=65536, kept=2, key_experts=True)
    assert union.rows == 512 < 0.25 * 65536 and union.window == ((1, 512),)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "Small"
    small_config(layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_a_profile_takes_u_from_it_and_a_named_share_wins(small, tmp_path, capsys):
    (tmp_path / files.FILE).write_text(json.dumps(made((256, 48))))
    assert main(["profile", "--gpu", "12GB", "--model", str(small), "--batch", "2", "--seq", "16", "--neurons", "256",
                 "--variants", "meft", "--accumulation", "4", "--output", str(tmp_path), "--workers", "1",
                 "--union", "0.3"]) == 0  # fmt: skip
    printed, (path,) = capsys.readouterr().out, tmp_path.glob("small_*.json")
    rows = {r["union"]["evidence"]: r["union"] for r in json.loads(path.read_text())["rows"] if r["neurons"] == 256}
    assert not (tmp_path / "selection.json").exists(), "nothing was logged with random weights"
    told, answer = printed.split("The best that fits")
    assert "MEFT (U logged, SmolLM2-135M)" in told and "SmolLM2" not in answer
    assert (rows["measured"]["union"], rows["measured"]["model"]) == (8, "SmolLM2-135M")
    assert rows["measured"]["touched_share"] == {"1": 0.03125, "2": 0.0625, "4": 0.125, "8": 0.25}
    assert rows["assumed"]["source"] == "assumed: given on the command line" and "model" not in rows["assumed"]


def test_largest_sizes_that_another_log_gave_are_searched_again(small, tmp_path):
    """And a whole profile that is begun again is whole when all of it is made."""
    (tmp_path / files.FILE).write_text(json.dumps(log := made((256, 48))))
    request = Request(model=str(small), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64, seq=16,
                      neurons=(256,), variants=("meft", "parallel_adapter"), full=True, search=True,
                      trained=tmp_path / files.FILE)  # fmt: skip
    setting, path = setting_of(request), tmp_path / "small.json"

    def work() -> simulate_matrix._Work:
        return simulate_matrix._Work(request, setting, path, ())

    first = work()
    assert not first.found
    for spec in jobs.searched(first.specs):
        entry = {"variant": spec.variant, "checkpointing": spec.checkpointing, "state": "ok", "neurons": 1024}
        moved = union_of(search.sized(spec, 1024, first.source))
        first.found[jobs.search_place(spec)] = {**entry, **moved, "union_evidence": jobs.search_place(spec)[2]}
    first.profile["complete"] = True
    first.save()
    assert work().found == first.found and {evidence for *_, evidence in first.found} == {"", "assumed", "measured"}
    for entry in log["entries"]:
        for point in entry["after"]["unions"]:
            point["share_by_layer"] = [share / 2 for share in point["share_by_layer"]]
    (tmp_path / files.FILE).write_text(json.dumps(log))
    again = work()
    assert set(again.found) == {place for place in first.found if place[2] != "measured"}

    class CutOff:
        def begin(self) -> None:
            pass

        def each(self, *_) -> None:
            raise KeyboardInterrupt

    assert again.profile["complete"]
    with pytest.raises(KeyboardInterrupt):
        again.simulate(CutOff(), again.specs[:1])
    assert not again.profile["complete"]


def test_an_update_is_of_the_rows_that_were_logged():
    union = trained_union(made((256, 48)), tokens=32, neurons=256, kept=48, key_experts=True)
    spec = ProfileSpec(model="x", variant="meft", neurons=256, union=union)
    ffns = SimpleNamespace(layers=2, hidden=64)
    place = {"neurons": 256, "kept": 8}, SimpleNamespace(counted=SimpleNamespace(ffns=ffns))
    touched = _touched(spec, *place)
    assert touched.updated(4, 1) == 32 / 8 and touched.filled(4) == 0.0
    drawn = dataclasses.replace(spec, union=dataclasses.replace(union, window=()))
    assert _touched(drawn, *place).updated(4, 1) < 4 and "window" not in drawn.to_dict()["union"]
    assert spec.key != drawn.key


def test_a_log_that_does_not_count_is_left_alone(tmp_path):
    log, now = made((256, 48)), {**provenance(1), "dirty": False}
    assert usable_log(tmp_path, now) == (None, "")
    path = tmp_path / files.FILE
    path.write_text(json.dumps(log))
    assert usable_log(tmp_path, now) == (path, "") == usable_log(tmp_path, {**now, "dirty": True})
    for change in ({"numerics": {**log["numerics"], "selection": 0}}, {"provenance": {**now, "dirty": True}}):
        path.write_text(json.dumps({**log, **change}))
        found, why = usable_log(tmp_path, now)
        assert found is None and "does not count (make selection)" in why
    path.write_text(json.dumps({**log, "entries": []}))
    assert usable_log(tmp_path, now) == (None, "")


def test_u_of_a_larger_micro_batch_is_that_of_several_where_they_are_logged():
    window = ((1, 40), (2, 55), (4, 70), (8, 82))
    union = Union(rows=40, source="logged", evidence="measured", window=window, model="SmolLM2-135M")
    spec = ProfileSpec(model="tiny", variant="meft", neurons=96, batch=2, seq=8, union=union)
    (longer,) = at_more_tokens([spec], 4, 8)
    assert longer.union is not None and longer.union.evidence == "measured"
    assert longer.union.rows == 55 and longer.union.window == ((1, 55), (2, 70), (4, 82))
    (unlogged,) = at_more_tokens([spec], 6, 8)
    assert unlogged.union is not None and unlogged.union.evidence == "assumed"
    assert unlogged.union.rows == round(96 * (1 - (1 - 40 / 96) ** 3)) and not unlogged.union.window
