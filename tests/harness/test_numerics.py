"""Which numbers a record was made with, and that it counts while they are today's."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest

from meft_bench.cli import main
from meft_bench.harness import published, suites
from meft_bench.harness.numerics import (
    bench_numerics,
    comparison_numerics,
    goes_on,
    numerics,
    profile_numerics,
)
from meft_bench.harness.record import read_record
from meft_bench.harness.spec import SYNTHETIC_TASKS, TASKS
from meft_bench.harness.suites import full, smoke
from meft_bench.provenance import git_commit
from meft_bench.train import contract
from meft_bench.train.methods import find_method, method_names
from meft_bench.write import write_json
from tests.report.made_records import make_record

PARTS = {"method", "task", "training", "evaluation", "probes"}


@pytest.mark.parametrize("method", method_names())
def test_every_part_has_a_number_that_its_module_gives(method: str) -> None:
    for task in TASKS:
        found = numerics(task, method, "local/other@0")
        assert set(found) == PARTS and all(isinstance(n, int) and n >= 1 for n in found.values())
        assert found["method"] == find_method(method).NUMERICS


def test_the_embedded_base_is_named_by_its_weights() -> None:
    assert re.fullmatch("[0-9a-f]{12}", str(numerics(SYNTHETIC_TASKS[0], "lora")["base"]))


def test_a_raised_number_is_seen(tmp_path, monkeypatch) -> None:
    before = numerics("facts", "lora", "x/y")
    text = contract.method_file("lora").read_text().replace("NUMERICS = 1\n", "NUMERICS = 12\n")
    (tmp_path / "lora.py").write_text(text.replace("import torch", "import nothing_that_exists"))
    monkeypatch.setattr(contract, "_baselines", lambda: SimpleNamespace(__path__=[str(tmp_path)]))
    numerics.cache_clear()
    try:
        assert numerics("facts", "lora", "x/y") == {**before, "method": 12}
    finally:
        numerics.cache_clear()


def test_the_first_records_are_read_and_have_no_numerics(tmp_path) -> None:
    record = make_record(smoke()[0])
    del record["numerics"]
    write_json(tmp_path / "old.json", record | {"code_digest": "0" * 12})
    assert read_record(tmp_path / "old.json")["numerics"] == {}
    assert json.loads((tmp_path / "old.json").read_text())["code_digest"]


def _finished(runs, **provenance) -> str:
    """A finished run of today's code in the folder runs; its key."""
    record = make_record(full()[0])
    spec = record["spec"]
    record["numerics"] = numerics(spec["task"], spec["method"], spec["model"])
    record["provenance"] |= provenance
    write_json(runs / record["run_key"] / "record.json", record)
    return record["run_key"]


def _checkout(folder, monkeypatch, capsys, *flags: str) -> tuple[int, str, list[str]]:
    """Exit code, error and files of `publish` in a made checkout."""
    (folder / "results" / "paper").mkdir(parents=True, exist_ok=True)
    (folder / "results" / "paper" / "reported.yaml").write_text("")
    monkeypatch.chdir(folder)
    code = main(["publish", *flags])
    return code, capsys.readouterr().err, [p.stem for p in (folder / "results" / "records").glob("*.json")]


def test_a_record_of_a_clean_tree_is_published(tmp_path, monkeypatch, capsys) -> None:
    key = _finished(tmp_path / "results" / "runs", dirty=False)
    assert _checkout(tmp_path, monkeypatch, capsys) == (0, "", [key])
    assert read_record(tmp_path / "results" / "records" / f"{key}.json")["run_key"] == key


def test_real_rows_on_two_models_are_shown_of_the_one_with_more_runs() -> None:
    cells = {model: suites.real(model, "local@0") for model in ("local/first@0", "local/second@0")}
    few, many = cells["local/first@0"][:1], cells["local/second@0"][:3]
    records = [{"spec": c.spec.to_dict(), "run_key": c.spec.run_key} for c in (*few, *many)]
    shown = published.published_cells(records)["real"]
    assert {c.spec.model for c in shown} == {"local/second@0"} and len(shown) == 3


@pytest.mark.parametrize("dirty", [True, None])
def test_a_record_of_changed_files_is_not_published(tmp_path, monkeypatch, capsys, dirty) -> None:
    _finished(tmp_path / "results" / "runs", dirty=dirty, **({} if dirty else {"dirty_reason": "no checkout"}))
    code, said, published = _checkout(tmp_path, monkeypatch, capsys)
    assert (code, published) == (2, []) and said.count("\n") == 1 and "1 records are left out" in said


def test_a_record_of_earlier_numbers_is_not_published(tmp_path, monkeypatch, capsys) -> None:
    key = _finished(tmp_path / "results" / "runs", dirty=False)
    monkeypatch.setattr(published, "numerics", lambda task, method, model: {"method": 99})
    code, said, kept = _checkout(tmp_path, monkeypatch, capsys)
    assert (code, kept) == (2, []) and f"{key} was made by an earlier version of the code" in said


def test_runs_of_another_checkout_are_published_when_the_history_has_their_commit(
    tmp_path, monkeypatch, capsys
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    _git(tmp_path, "init", "-q", str(ours))
    (ours / "code.py").write_text("one")
    _git(ours, "add", "-A")
    _git(ours, "commit", "-qm", "all")
    _git(ours, "worktree", "add", "-q", "--detach", str(theirs))
    key = _finished(theirs / "results" / "runs", **git_commit(theirs))
    flags = ("--runs", str(theirs / "results" / "runs"))
    assert _checkout(ours, monkeypatch, capsys, *flags) == (0, "", [key])
    (theirs / "code.py").write_text("two")
    _git(theirs, "commit", "-qam", "on no branch")
    _finished(theirs / "results" / "runs", **git_commit(theirs))
    code, said, _ = _checkout(ours, monkeypatch, capsys, *flags)
    assert code == 2 and f"made from commit {git_commit(theirs)['commit']}, which this history lacks" in said


@pytest.mark.parametrize(
    "old, dirty, kept, taken",
    [
        (False, False, True, "local"),
        (True, False, True, "published"),
        (False, True, True, "published"),
        (True, True, False, "local"),
    ],
)
def test_a_report_takes_a_local_record_that_counts(tmp_path, monkeypatch, old, dirty, kept, taken) -> None:
    made = make_record(full()[0])
    today = numerics(*(made["spec"][name] for name in ("task", "method", "model")))

    def write(path, place: str, counts: bool, dirty: bool) -> None:
        provenance = {**made["provenance"], "dirty": dirty, "cpu": place}
        write_json(path, {**made, "numerics": today if counts else {**today, "method": 0}, "provenance": provenance})

    monkeypatch.setattr(published, "RECORDS", tmp_path / "records")
    write(tmp_path / "records" / f"{made['run_key']}.json", "published", kept, False)
    write(tmp_path / "runs" / made["run_key"] / "record.json", "local", not old, dirty)
    (found,) = published.known_records(tmp_path / "runs")
    assert found["provenance"]["cpu"] == taken


@pytest.mark.parametrize("dirty, old", [(False, False), (True, False), (False, True)])
def test_publish_names_files_that_do_not_count(tmp_path, monkeypatch, capsys, dirty, old) -> None:
    results, made = tmp_path / "results", {"evidence": "simulated", "provenance": {"dirty": dirty}}
    write_json(results / "bench" / "layer.json", {**made, "numerics": bench_numerics("layer")})
    raised = {"simulator": 0} if old else {}
    numbers = profile_numerics(["meft"]) | raised
    write_json(results / "profile" / "llama-7b_24GB.json", {**made, "rows": [], "numerics": numbers})
    numbers = comparison_numerics("meft_loop") | ({"comparison": 0} if old else {})
    write_json(results / "comparison" / "meft_loop-0.json", {**made, "numerics": numbers})
    baseline = "baseline-product_keys"  # runs a method of ours, and seed 1 of it is no other method
    numbers = comparison_numerics(baseline) | ({"comparison": 0} if old else {})
    write_json(results / "comparison" / f"{baseline}-1.json", {**made, "numerics": numbers})
    code, said, _ = _checkout(tmp_path, monkeypatch, capsys)
    named = {"bench/layer.json": dirty, "profile/llama-7b_24GB.json": dirty or old}
    named["comparison/meft_loop-0.json"] = named[f"comparison/{baseline}-1.json"] = dirty or old
    assert code == (2 if any(named.values()) else 0)
    assert all((name in said) is wanted for name, wanted in named.items()), said
    assert ("changed files" in said) is dirty and ("earlier version" in said) is old


def test_publish_names_files_of_a_method_that_is_gone(tmp_path, monkeypatch, capsys) -> None:
    made = {"evidence": "measured", "provenance": {"dirty": False}, "numerics": {"method": 1}}
    write_json(tmp_path / "results" / "comparison" / "baseline-gone-0.json", made)
    key = _finished(tmp_path / "results" / "runs", dirty=False)
    code, said, kept = _checkout(tmp_path, monkeypatch, capsys)
    assert (code, kept) == (2, [key]) and said.count("\n") == 1
    assert "comparison/baseline-gone-0.json cannot be judged (unknown method 'gone'" in said


def test_what_stands_in_a_file_is_gone_on_with_only_by_equals() -> None:
    today, clean, dirty = profile_numerics(["meft", "lora"]), {"dirty": False}, {"dirty": True}
    made = {"numerics": profile_numerics(["meft"]), "provenance": clean}
    assert goes_on(made, today, clean) and goes_on(made, today, dirty)
    assert goes_on({**made, "provenance": dirty}, today, dirty)
    assert not goes_on({**made, "provenance": dirty}, today, clean)
    assert not goes_on({**made, "numerics": {**today, "meft": 0}}, today, clean)
    assert not goes_on({**made, "numerics": {**today, "forgotten": 1}}, today, clean)
    assert not goes_on({"provenance": clean}, today, clean) and not goes_on({"numerics": [1]}, today, clean)


def _git(folder, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True)


def test_what_runs_write_makes_no_tree_dirty(tmp_path) -> None:
    _git(tmp_path, "init", "-q")
    for name in ("README.md", "code.py", "results/tables/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "all")
    assert git_commit(tmp_path)["dirty"] is False
    (tmp_path / "README.md").write_text("two")
    (tmp_path / "results" / "tables" / "a.md").write_text("two")
    assert git_commit(tmp_path / "results")["dirty"] is False
    (tmp_path / "code.py").write_text("two")
    assert git_commit(tmp_path / "results")["dirty"] is True
    _git(tmp_path, "commit", "-qam", "two")
    (tmp_path / "notes.py").write_text("no code of the package")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    assert git_commit(tmp_path)["dirty"] is False


@pytest.mark.parametrize("name", ["baselines/mine.py", "tasks/mine.yaml", "meft_bench/meft/engine/mine.c"])
def test_code_that_git_does_not_know_makes_a_tree_dirty(tmp_path, name) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("one")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "all")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).with_suffix(".json").write_text("{}")
    assert git_commit(tmp_path)["dirty"] is False
    (tmp_path / name).write_text("new")
    assert git_commit(tmp_path)["dirty"] is True
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "mine")
    assert git_commit(tmp_path)["dirty"] is False


@pytest.mark.parametrize("ignored", [True, False])
def test_a_package_below_somebodys_project_has_no_commit(tmp_path, ignored) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(".venv\n" if ignored else "")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "all")
    package = tmp_path / ".venv" / "meft_bench"
    package.mkdir(parents=True)
    (package / "provenance.py").write_text("")
    found = git_commit(package)
    assert (found["commit"], found["dirty"]) == (None, None) and found["commit_reason"] and found["dirty_reason"]
