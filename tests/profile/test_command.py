"""`meft-bench profile` from end to end on a small model: files, resuming, errors."""

import json

import pytest

from meft_bench.cli import main
from meft_bench.profile import results, selection
from meft_bench.profile.command import Request, simulate_profile
from meft_bench.profile.matrix import Rows, matrix
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import VARIANTS
from meft_bench.simulate import cards
from tests.profile.small import small_config

CHOSEN = ("base", "lora_attention", "parallel_adapter", "parallel_adapter_zero3", "full", "meft", "meft_no_sparse")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with nothing but a config: no weights are needed."""
    folder = tmp_path_factory.mktemp("models") / "Small"
    small_config(layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def profiled(model, tmp_path_factory):
    """(output folder, printed text) of one run of the command."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("profile")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(command(model, out))
    assert code == 0
    return out, text.getvalue()


def command(model, out, *more: str) -> list[str]:
    return ["profile", "--gpu", "12GB", "--model", str(model), "--batch", "2", "--seq", "16", "--neurons", "64,128",
            "--variants", ",".join(CHOSEN), "--accumulation", "1,4", "--output", str(out), "--workers", "2",
            *more]  # fmt: skip


def the_file(out):
    return next(p for p in out.glob("small_*.json") if not p.name.endswith(".trace.json"))


def test_every_number_says_how_it_came_to_be(profiled):
    profile = results.read_profile(the_file(profiled[0]))
    assert profile["evidence"] == "simulated" and "simulated" in profiled[1]
    assert {r["variant"] for r in profile["rows"]} == set(CHOSEN)
    for row in profile["rows"]:
        assert row["state"] == "ok" and row["evidence"] == row["time"]["evidence"] == "simulated"
        assert row["modelled"] or not VARIANTS[row["variant"]].engine
        if row["union"] and row["variant"] in ("meft", "meft_no_ke"):
            assert row["union"]["evidence"] in ("measured", "assumed") and row["union"]["source"]
    meft = [r["union"]["evidence"] for r in profile["rows"] if r["variant"] == "meft" and r["neurons"] == 64]
    assert sorted(set(meft)) == ["assumed", "measured"]
    constants = profile["settings"]["constants"]
    assert constants and all(c["source"] for c in constants.values())


def test_rows_hold_together(profiled):
    for row in results.read_profile(the_file(profiled[0]))["rows"]:
        memory, traffic = row["memory"], row["traffic"]
        assert memory["device_peak_bytes"] == sum(memory["by_category"].values()) == max(memory["by_phase"].values())
        one, four = (traffic["by_accumulation"][a] for a in "14")
        if not VARIANTS[row["variant"]].engine:
            for way in ("h2d", "d2h"):
                micro, update = traffic[f"{way}_bytes_per_micro_batch"], traffic[f"{way}_bytes_per_update"]
                assert one[f"{way}_bytes_per_step"] == micro + update
                assert four[f"{way}_bytes_per_step"] == 4 * micro + update
        seconds = row["time"]["step_s_by_accumulation"]
        assert 0 < seconds["1"] < seconds["4"]
    resident = [r for r in results.read_profile(the_file(profiled[0]))["rows"] if r["variant"] == "parallel_adapter"]
    assert resident and all(r["time"]["practicality"] == 1.0 for r in resident)


def test_a_second_call_simulates_nothing(profiled, model, monkeypatch):
    before = the_file(profiled[0]).read_bytes()
    monkeypatch.setattr("meft_bench.profile.command.simulated_row", None)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", None)
    assert main(command(model, profiled[0])) == 0
    assert the_file(profiled[0]).read_bytes() == before


def test_a_cut_off_profile_goes_on(profiled, model, tmp_path):
    whole = the_file(profiled[0])
    cut = json.loads(whole.read_text())
    cut["rows"], cut["largest"] = cut["rows"][:-6], cut["largest"][:-2]
    (tmp_path / "selection.json").write_bytes((profiled[0] / "selection.json").read_bytes())
    results.write_profile(tmp_path / whole.name, cut)
    assert main(command(model, tmp_path)) == 0
    again, first = json.loads((tmp_path / whole.name).read_text()), json.loads(whole.read_text())
    assert again["rows"] == first["rows"] and again["largest"] == first["largest"]


def test_trace_opens_as_one(profiled):
    out, _ = profiled
    profile = json.loads(the_file(out).read_text())
    traces = list(out.glob("*.trace.json"))
    # The step that is drawn is the one at the paper's R.
    assert bool(traces) == ("timeline" in profile)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "25GB"], "known: 12GB"),
        (["--gpu", ""], "known: 12GB"),
        (["--model", "no-such-model"], "known shapes are llama-7b, mistral-7b"),
        (["--accumulation", "1,x"], "whole numbers"),
        (["--accumulation", "0"], "at least 1"),
        (["--neurons", "-64"], "at least 1"),
        (["--variants", "meft,magic"], "unknown variant magic"),
        (["--host", "moon"], "known: desktop, server"),
        (["--workers", "0"], "at least 1"),
        (["--batch", "0"], "batch=0"),
        (["--constants", "nowhere.json"], "--calibrate"),
        (["--union", "1.5"], "at most 1"),
    ],
)
def test_bad_input_is_one_line(arguments, said, model, profiled, capsys, tmp_path):
    (tmp_path / "selection.json").write_bytes((profiled[0] / "selection.json").read_bytes())
    base = command(model, tmp_path)
    for name in arguments[::2]:
        if name in base:
            place = base.index(name)
            del base[place : place + 2]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("meft-bench: ")
    assert not list(tmp_path.glob("small_*"))


def test_a_model_without_known_ffn_is_refused(tmp_path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50).save_pretrained(tmp_path / "odd")
    request = Request(model=str(tmp_path / "odd"), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64)
    with pytest.raises(ValueError, match="no FFN|decoder layers"):
        simulate_profile(request, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_u_is_never_made_up():
    with pytest.raises(ValueError, match="needs U"):
        ProfileSpec(model="x", variant="meft", neurons=64)
    specs = matrix("x", Rows(log=None, share=0.5, why="a test"), 2, 16, 1, (64,))
    unions = [s.union for s in specs if s.union is not None]
    assert unions and all(u.evidence == "assumed" and u.rows == 32 for u in unions)


def test_a_logged_selection_is_what_routing_does(model, tmp_path):
    """The log's U lies between K and R, is larger for more tokens, and is interpolated between its sizes alone."""
    path = tmp_path / "selection.json"
    few = selection.log_selection(str(model), 1, 4, path, (256, 1024))
    selection.log_selection(str(model), 2, 64, path, (256, 1024))
    log = selection.read_log(path)
    assert len(log["entries"]) == 8 and len(few["entries"]) == 4

    def rows(tokens: int, neurons: int):
        return selection.logged_union(log, str(model), tokens, neurons, True)

    assert rows(4, 1024).rows < rows(128, 1024).rows <= 1024
    between = rows(128, 512)
    assert "interpolated" in between.source and rows(128, 256).rows < between.rows < rows(128, 1024).rows
    assert rows(128, 2048) is None and rows(64, 1024) is None


def test_broken_files_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="broken.json"):
        selection.read_log(broken)
    with pytest.raises(ValueError, match="broken.json"):
        results.read_profile(broken)
