"""U of a trained model: counted as single micro-batches say, logged and resumed by R, and used by the profile."""

import json

import pytest
import torch

from meft_bench.cli import main
from meft_bench.harness import probes
from meft_bench.harness.published import not_counting
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.model import attach
from meft_bench.profile.trained import log as files
from meft_bench.profile.trained import measure
from meft_bench.profile.trained.look import look
from meft_bench.train import models

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


def test_other_settings_do_not_overwrite_a_log(logged):
    import dataclasses

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
