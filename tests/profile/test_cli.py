"""`meft-bench profile` from end to end on a small model: files, resuming, errors."""

import argparse
import dataclasses
import json
import os
import re
import shutil

import pytest
from transformers import BloomConfig, MambaConfig, PretrainedConfig, T5Config

from meft_bench.cli import main
from meft_bench.profile import cli, jobs, pool, results, selection, simulate_matrix
from meft_bench.profile.begun import begun
from meft_bench.profile.matrix import UnionSource, matrix
from meft_bench.profile.request import Request
from meft_bench.profile.simulate_matrix import simulate_profile
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import VARIANTS
from meft_bench.report.records.profiles import load_profiles
from meft_bench.report.tables.profile_tokens import tokens_table
from meft_bench.simulate import cards
from tests.profile.small import small_config
from tests.report.made_profiles import make_row

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
            "--full", *more]  # fmt: skip


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


def test_the_heading_has_the_hosts_memory_as_it_was_named(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "meft_bench.profile.simulate_matrix.simulate_profile", lambda *_, on_row, **__: told.append(on_row) or {}
    )
    for gib in ("2.5", "0.4", "64"):
        given = ["--variants", "parallel_adapter", "--host-memory", gib, "--output", str(tmp_path)]
        assert main(["profile", *given]) == 0
        assert f" with {gib} GiB, micro-batches" in told[-1].about and told[-1].host_room == round(float(gib) * 2**30)


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
        more = memory["accumulated"]
        assert memory["device_peak_bytes"] <= more["device_peak_bytes"] and (memory["fits"] or not more["fits"])
    resident = [r for r in results.read_profile(the_file(profiled[0]))["rows"] if r["variant"] == "parallel_adapter"]
    assert resident and all(r["time"]["practicality"] == 1.0 for r in resident)


def test_a_second_call_simulates_nothing(profiled, model, monkeypatch):
    before = the_file(profiled[0]).read_bytes()
    monkeypatch.setattr("meft_bench.profile.jobs.simulated_row", None)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", None)
    assert main(command(model, profiled[0])) == 0
    assert the_file(profiled[0]).read_bytes() == before


def test_a_cut_off_profile_goes_on(profiled, model, tmp_path):
    whole = the_file(profiled[0])
    cut = json.loads(whole.read_text())
    cut["rows"], cut["largest"] = cut["rows"][:-6], cut["largest"][:-2]
    cut["provenance"]["commit"] = "f" * 12  # an earlier one, with the same numbers, that need not know of all rows
    (tmp_path / "selection.json").write_bytes((profiled[0] / "selection.json").read_bytes())
    results.write_profile(tmp_path / whole.name, cut)
    assert main(command(model, tmp_path)) == 0
    again, first = json.loads((tmp_path / whole.name).read_text()), json.loads(whole.read_text())
    assert again["rows"] == first["rows"] and again["largest"] == first["largest"]
    assert again["provenance"] == first["provenance"]


def test_the_answer_comes_first_and_a_full_profile_takes_its_rows_over(profiled, model, tmp_path, capsys, monkeypatch):
    """By default: the size asked for, checkpointing where a row does not fit without, and the best of each card."""
    shutil.copy(profiled[0] / "selection.json", tmp_path)
    short = [a for a in command(model, tmp_path) if a != "--full"]
    assert main(short) == 0
    lines = capsys.readouterr().out.splitlines()
    (file,) = tmp_path.glob("small_*_answer.json")
    made = results.read_profile(file)
    assert not made["complete"] and made["largest"] == [] and load_profiles(tmp_path) == []
    asked = {(r["variant"], r["neurons"], r["checkpointing"]) for r in made["rows"] if r["neurons"] in (64, 128)}
    assert ("meft", 64, False) in asked and not any(saved for *_, saved in asked), "everything fits 12 GB"
    best = next(i for i, line in enumerate(lines) if line.startswith("The best that fits"))
    first = next(i for i, line in enumerate(lines) if line.startswith("Parallel Adapter  "))
    assert first < best and [line.split(",")[0].strip() for line in lines[best + 1 : best + 7]] == [
        "12GB", "12GB", "16GB", "24GB", "48GB", "80GB"]  # fmt: skip
    found = {k: [i for i, line in enumerate(lines) if f"MEFT (U {k})  " in line] for k in ("logged", "assumed")}
    assert found["logged"] and max(found["logged"]) < best < min(found["assumed"]), "no answer rests on an assumed U"
    assert lines.index("Beside these, with the U that is assumed:") < min(found["assumed"])
    assert "--full" in lines[-1]
    again = []
    monkeypatch.setattr(
        simulate_matrix.pool.Pool, "each", lambda self, f, wanted, what="": iter(again.append((f, wanted)) or ())
    )
    whole = Request(model=str(model), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64, seq=16,
                    accumulations=(1, 4), neurons=(64, 128), variants=CHOSEN, full=True, search=False,
                    selection=tmp_path / "selection.json")  # fmt: skip
    simulate_matrix.simulate_profile(whole, tmp_path / "whole.json", kept=(file,))
    (missing,) = [wanted for f, wanted in again if f is jobs.rows and wanted]
    assert all(spec.checkpointing for (group,) in missing for spec in group), (
        "what the answer had is not simulated again"
    )


def test_rows_with_a_device_budget_are_made_anew_alone(profiled, model):
    """Where their own number was raised and no other."""
    file = the_file(profiled[0])
    made = results.read_profile(file)
    setting = simulate_matrix.setting_of(asked := Request(
        model=str(model), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64, seq=16,
        accumulations=(1, 4), neurons=(64, 128), variants=CHOSEN, full=True, selection=profiled[0] / "selection.json",
    ))  # fmt: skip
    budget = {**made["rows"][0], "key": "budget", "variant": "meft_budget_25"}
    old = {**made, "rows": [*made["rows"], budget], "numerics": {**made["numerics"], "budgets": 0}}
    other = file.with_name("other.json")
    for content, kept in ((old, False), (old | {"numerics": made["numerics"]}, True)):
        other.write_text(json.dumps(content))
        profile, rows = begun(asked, setting, [other])
        assert ("budget" in rows) == kept and {r["key"] for r in made["rows"]} <= rows.keys()
        assert profile["numerics"] == made["numerics"]
    other.unlink()


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
        (["--accumulation", "1," + "9" * 400], "at most 2,147,483,647"),
        (["--neurons", "-64"], "at least 1"),
        (["--variants", "meft,magic"], "unknown variant magic"),
        (["--host", "moon"], "known: desktop, server"),
        (["--workers", "0"], "at least 1"),
        (["--batch", "0"], "--batch 0 must be a whole number of at least 1"),
        (["--constants", "nowhere.json"], "--calibrate"),
        (["--union", "1.5"], "at most 1"),
        (["--union", "0"], "--union 0 must be a number above 0"),
        (["--union", "nan"], "--union nan must be a number above 0"),
        (["--host-memory", "0"], "--host-memory 0 must be a number above 0"),
        (["--host-memory", "-3"], "--host-memory -3 must be a number above 0"),
        (["--host-memory", "inf"], "--host-memory inf must be a number above 0"),
        (["--neurons", ""], "whole numbers"),
        (["--neurons", "1000000000"], "--neurons 1000000000: the keys and values"),
        (["--rank", "0"], "at least 1"),
        (["--rank", "x"], "whole numbers"),
        (["--rank", "1000000000"], "--rank 1000000000: the matrices"),
        (["--rank", "8", "--variants", "meft"], "--rank is LoRA's"),
        (["--seq", "1"], "--seq 1 must be a whole number of at least 2"),
        (["--seq", "2049"], "longer than the model's 2048 positions"),
        (["--seq", "1000000000"], "at most 16,777,216"),
        (["--batch", "10000000"], "the logits alone would take"),
        (["--batch", "1000000000"], "at most 16,777,216"),
        (["--workers", "1000"], "give at most"),
        (["--workers", "1000000"], "at most 1,024"),
        (["--constants", "/dev/zero"], "not a regular file"),
        (["--output", "/dev/null"], "cannot write into /dev/null"),
    ],
)
def test_bad_input_is_one_line(arguments, said, model, capsys, tmp_path, monkeypatch):
    """And it is said before anything is logged or simulated: there is no selection log here."""
    monkeypatch.setattr("meft_bench.profile.selection.log_selection", None)
    base = command(model, tmp_path)
    for name in arguments[::2]:
        if name in base:
            place = base.index(name)
            del base[place : place + 2]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("meft-bench: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "not a calibration"),
        (b'{"schema": 2}', "constants or provenance is missing"),
        (b" " * (2**20 + 1), "more than such a file has"),
    ],
)
def test_broken_constants_are_one_line(content, said, model, capsys, tmp_path):
    file = tmp_path / "c.json"
    file.write_bytes(content)
    assert main([*command(model, tmp_path / "out"), "--constants", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_pipe_is_no_file_of_constants(model, capsys, tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert main([*command(model, tmp_path / "out"), "--constants", str(tmp_path / "pipe")]) == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50), {}, "no FFN|decoder layers"),
        (T5Config(d_model=32, num_layers=2, num_heads=4, vocab_size=50), {}, "no causal language model"),
        (small_config(layers=2), {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (small_config(layers=2), {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (small_config(layers=2), {"hidden_act": "wobble"}, "wobble"),
        (small_config(layers=2), {"vocab_size": 10**12}, "--model: the embedding"),
        (small_config(layers=2), {"vocab_size": "many"}, "config"),
        (small_config(layers=2), {"hidden_size": 0}, "config"),
    ],
    ids=lambda v: str(v)[:30] if not isinstance(v, PretrainedConfig) else type(v).__name__,
)
def test_a_model_that_cannot_be_profiled_is_one_line(config, changes, said, capsys, tmp_path):
    folder = tmp_path / "odd"
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert main(["profile", "--model", str(folder), "--output", str(tmp_path / "out"), "--seq", "8"]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1 and error.startswith("meft-bench: ")
    assert not (tmp_path / "out").exists()


def test_positions_without_a_limit_profile(tmp_path, capsys):
    """BLOOM and MPT have no max_position_embeddings; LoRA's rank is named, and no selection is logged for it."""
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96).save_pretrained(tmp_path / "bloom")
    out = tmp_path / "out"
    assert main(["profile", "--model", str(tmp_path / "bloom"), "--variants", "lora_attention,full", "--rank", "4,8",
                 "--seq", "8", "--accumulation", "2,4", "--output", str(out), "--workers", "1",
                 "--full"]) == 0  # fmt: skip
    assert [p.name for p in out.iterdir()] == ["bloom_24GB_2x8-a2-4_rank4-8_lora_attention-full.json"]
    printed = capsys.readouterr().out
    assert "LoRA, attention q v, rank 4" in printed and "no logged selection" not in printed
    profile = results.read_profile(next(out.iterdir()))
    lora = [r for r in profile["rows"] if r["variant"] == "lora_attention" and not r["checkpointing"]]
    assert [r["title"] for r in lora] == [f"LoRA, attention q v, rank {rank}" for rank in (4, 8)]
    assert [r["size"]["rank"] for r in lora] == [4, 8] and profile["largest"] == []
    assert [r["parameters"]["trainable"] for r in lora] == [2 * rank * 4 * 32 for rank in (4, 8)]
    assert all(r["state"] == "ok" and r["memory"]["after_step"]["device_bytes"] for r in profile["rows"])
    for row in profile["rows"]:
        assert ("formula" in row) is not row["checkpointing"]
        if "formula" in row:
            assert row["formula"]["device_bytes"] == pytest.approx(row["memory"]["device_total_bytes"], rel=0.2)


def test_what_is_asked_alone_is_logged(model, tmp_path, monkeypatch):
    """Without a search only the sizes asked for, and what a log holds is not logged again."""
    asked = []

    def logged(name, batch, seq, path, sizes):
        asked.append(list(sizes))
        return log(name, batch, seq, path, sizes)

    log = selection.log_selection
    monkeypatch.setattr(selection, "log_selection", logged)
    only = ["profile", "--model", str(model), "--seq", "8", "--variants", "meft", "--full", "--no-search",
            "--accumulation", "1", "--output", str(tmp_path), "--workers", "1"]  # fmt: skip
    assert main([*only, "--neurons", "64"]) == 0 and main([*only, "--neurons", "64,128"]) == 0
    assert asked == [[64], [128]]
    (rows,) = [results.read_profile(p)["rows"] for p in tmp_path.glob("*r64-128*.json")]
    told = [r["formula"]["tokens_per_s_by_accumulation"] for r in rows if not r["checkpointing"]]
    assert told and all(set(t) == {"1"} and t["1"] > 0 for t in told)
    assert {e["neurons"] for e in selection.read_log(tmp_path / "selection.json")["entries"]} == {64, 128}


def test_a_long_list_of_sizes_has_a_name_that_fits(model, tmp_path):
    few, many = ",".join(map(str, range(1, 60))), ",".join(map(str, range(1, 90)))
    names = {cli._name(asked("--model", str(model), "--neurons", n), "24GB", (1,)) for n in (few, many)}
    assert len(names) == 2 and all(len(f"{name}.trace.json.tmp") < 200 for name in names)


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args(arguments)
    cli.check(args)
    return args


def test_profiles_of_other_settings_have_other_names(tmp_path):
    (one, other) = (tmp_path / name for name in ("one.json", "other.json"))
    one.write_text("1")
    other.write_text("2")
    usual, every = cli._name(asked(), "24GB", (1, 4, 8, 16, 32)), []
    assert usual == "llama-7b_24GB"
    for change in (("--union", "0.3"), ("--union", "0.31"), ("--host", "server"), ("--host-memory", "96"),
                   ("--constants", str(one)), ("--constants", str(other))):  # fmt: skip
        every.append(cli._name(asked(*change), "24GB", (1, 4, 8, 16, 32)))
    assert every[:4] == [f"{usual}_u0.3", f"{usual}_u0.31", f"{usual}_server", f"{usual}_96gib"]
    assert len({usual, *every}) == 7 and every[4].startswith(f"{usual}_constants-")
    for same in (("--host", "Desktop"), ("--host-memory", "64")):
        assert cli._name(asked(*same), "24GB", (1, 4, 8, 16, 32)) == usual


def test_a_row_that_fails_is_a_row(model, tmp_path, monkeypatch):
    """One variant's failure is no reason to lose the others, and what a call had when it was cut off is kept."""

    def each(processes, function, jobs, what=""):
        pool.shared.update(processes.known)
        for job in jobs:
            yield job[0], function(*job)

    def broken(spec, setting, others=()):
        if spec.variant == "full":
            raise RuntimeError("first line\nsecond line")
        if spec.variant == "lora_all":
            raise KeyboardInterrupt
        return real(spec, setting, others)

    real = jobs.simulated_row
    monkeypatch.setattr(pool.Pool, "each", each)
    monkeypatch.setattr(jobs, "simulated_row", broken)
    request = Request(model=str(model), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64, seq=8,
                      neurons=(64,), variants=("lora_attention", "full"), full=True,
                      search=False)  # fmt: skip
    rows = simulate_profile(request, tmp_path / "x.json")["rows"]
    failed = [r for r in rows if r["variant"] == "full"]
    assert {r["reason"] for r in failed} == {"failed: RuntimeError: first line"}
    assert all(r["state"] == "ok" for r in rows if r["variant"] == "lora_attention")
    cut = dataclasses.replace(request, variants=("lora_attention", "lora_all"))
    with pytest.raises(KeyboardInterrupt):
        simulate_profile(cut, tmp_path / "y.json")
    assert [r["variant"] for r in results.read_profile(tmp_path / "y.json")["rows"]] == ["lora_attention"]


def test_a_model_without_known_ffn_is_refused(tmp_path):
    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50).save_pretrained(tmp_path / "odd")
    request = Request(model=str(tmp_path / "odd"), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64)
    with pytest.raises(ValueError, match="no FFN|decoder layers"):
        simulate_profile(request, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_u_is_never_made_up():
    with pytest.raises(ValueError, match="needs U"):
        ProfileSpec(model="x", variant="meft", neurons=64)
    specs = matrix("x", UnionSource(log=None, share=0.5, why="a test"), 2, 16, 1, (64,))
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
    other = tmp_path / "other" / model.name
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert selection.logged_union(log, str(other), 128, 1024, True) is None, "another model of the same name"


_ENTRY = {"model": "x", "tokens": 4, "neurons": 64, "key_experts": True, "union_by_layer": [3, 4]}


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "[]", "7", json.dumps({"schema": 1, "entries": 3}),
                                  *(json.dumps({"schema": 1, "entries": [_ENTRY | change]})
                                    for change in ({"union_by_layer": []}, {"neurons": "64"}, {"tokens": 0},
                                                   {"union_by_layer": [1.5]}, {"model": None, "union_by_layer": 3}))],
                         ids=lambda t: t[:60])  # fmt: skip
def test_broken_logs_are_named(text, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text(text)
    with pytest.raises(ValueError, match="broken.json is no selection log") as caught:
        selection.read_log(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"rows": 5}, {"rows": [3]}, {"rows": [{"key": "x"}]}, {"settings": []},
                                    {"largest": None}, {"schema": 2}], ids=str)  # fmt: skip
def test_broken_profiles_are_named(change, tmp_path):
    row = {"key": "x", "variant": "full", "checkpointing": False, "state": "ok"}
    whole = {"schema": 1, "settings": {}, "rows": [row], "largest": [], "paper": []}
    (tmp_path / "broken.json").write_text(json.dumps(whole))
    assert results.read_profile(tmp_path / "broken.json") == whole
    (tmp_path / "broken.json").write_text(json.dumps(whole | change))
    with pytest.raises(ValueError, match="broken.json is not a profile"):
        results.read_profile(tmp_path / "broken.json")


def test_a_broken_profile_is_refused_before_a_selection_is_logged(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("meft_bench.profile.selection.log_selection", None)
    args = asked("--model", str(model), "--seq", "16", "--neurons", "64,128", "--variants", ",".join(CHOSEN))
    name = cli._name(args, "12GB", (1, 4))
    (tmp_path / f"{name}.json").write_text("{")
    assert main(command(model, tmp_path)) == 2
    assert "is not a profile" in capsys.readouterr().err and (tmp_path / f"{name}.json").read_text() == "{"


def test_a_full_profile_has_larger_micro_batches(model, tmp_path, monkeypatch):
    """Every method that was asked for, at T = 32 and 64 beside 16, with checkpointing where it does not fit without; U
    grows as independent draws would make it. What a row is made of stands in for the simulation."""
    made: list[ProfileSpec] = []

    def each(processes, function, asked, what=""):
        pool.shared.update(processes.known)
        for job in asked:
            yield job[0], function(*job)

    def made_up(spec, setting, others=()):
        made.append(spec)
        row = make_row(spec.variant, spec.neurons, spec.checkpointing, "assumed")
        speeds = {str(a): float(spec.tokens) for a in setting.accumulations}
        row["time"] |= {"tokens_per_s_by_accumulation": speeds, "step_s_by_accumulation": speeds}
        row["memory"] |= {"fits": spec.tokens < 64 or spec.checkpointing, "device_total_bytes": 2**30 * spec.tokens}
        if spec.union is not None:
            row["union"] |= {"union": spec.union.rows, "source": spec.union.source}
        return row | {"key": spec.key}, None

    monkeypatch.setattr(pool.Pool, "each", each)
    monkeypatch.setattr(jobs, "simulated_row", made_up)
    monkeypatch.setattr(jobs, "_is_drawn", lambda spec: False)
    monkeypatch.setattr(jobs, "of_row", lambda *_: {"device_bytes": 1})
    request = Request(model=str(model), card=cards.card("12GB"), host=cards.host("desktop"), host_gib=64, batch=1,
                      seq=16, accumulations=(1, 4, 16), union=0.5, neurons=(64,),
                      variants=("parallel_adapter", "meft"), full=True, search=False,
                      longer=((2, 16), (4, 16)))  # fmt: skip
    (tmp_path / "out").mkdir()
    rows = simulate_profile(request, tmp_path / "out" / "x.json")["longer"]
    told = [(r["variant"], r["batch"], r["checkpointing"], (r["union"] or {}).get("union")) for r in rows]
    assert told == [
        ("parallel_adapter", 2, False, None), ("meft", 2, False, 48),
        ("parallel_adapter", 4, False, None), ("parallel_adapter", 4, True, None),
        ("meft", 4, False, 60), ("meft", 4, True, 60),
    ]  # fmt: skip
    assert all(set(r["time"]["tokens_per_s_by_accumulation"]) == {"1", "4"} for r in rows)
    assert "32 tokens as 2 independent draws" in rows[1]["union"]["source"]
    count = len(made)
    simulate_profile(request, tmp_path / "out" / "x.json")
    assert len(made) == count, "what the file has is not simulated again"
    (profile,) = load_profiles(tmp_path / "out")
    lines = [line.split(",") for line in tokens_table([profile]).csv.splitlines()[1:]]
    assert len(lines) == 6 + 2 and {line[5] for line in lines} == {"16", "32", "64"}


def test_more_tokens_than_a_model_has_positions_are_left_out(model, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    parsed = argparse.ArgumentParser()
    cli.add_arguments(parsed)
    found = []
    alibi = BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=128, architectures=["BloomForCausalLM"])
    for positions in (2048, 256, None):
        made = {**config, "max_position_embeddings": positions} if positions else alibi.to_dict()
        (folder / "config.json").write_text(json.dumps(made))
        args = parsed.parse_args(["--model", str(folder), "--full"])
        cli.check(args)
        found.append(cli._request(args, cards.card("24GB"), cards.host("desktop")).longer)
    assert found == [((4, 512), (8, 512)), (), ((4, 512), (8, 512))], "ALiBi sets no limit"
