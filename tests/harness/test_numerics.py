"""Which numbers a record was made with, and that it counts while they are today's."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest

from meft_bench.cli import main
from meft_bench.harness.numerics import numerics
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


def _checkout(folder, monkeypatch, capsys, dirty: bool | None) -> tuple[int, str, list[str]]:
    """Exit code, error and files of `publish` in a made checkout with one record."""
    (folder / "results" / "paper").mkdir(parents=True)
    (folder / "results" / "paper" / "reported.yaml").write_text("")
    record = make_record(full()[0])
    record["provenance"] |= {"dirty": dirty} if dirty is not None else {"dirty": None, "dirty_reason": "no checkout"}
    write_json(folder / "results" / "runs" / record["run_key"] / "record.json", record)
    monkeypatch.chdir(folder)
    code = main(["publish"])
    return code, capsys.readouterr().err, [p.stem for p in (folder / "results" / "records").glob("*.json")]


def test_a_record_of_a_clean_tree_is_published(tmp_path, monkeypatch, capsys) -> None:
    assert _checkout(tmp_path, monkeypatch, capsys, False) == (0, "", [full()[0].spec.run_key])


@pytest.mark.parametrize("dirty", [True, None])
def test_a_record_of_changed_files_is_not_published(tmp_path, monkeypatch, capsys, dirty) -> None:
    code, said, published = _checkout(tmp_path, monkeypatch, capsys, dirty)
    assert (code, published) == (2, []) and said.count("\n") == 1 and "1 records are left out" in said


def test_what_runs_write_makes_no_tree_dirty(tmp_path) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    git("init", "-q")
    for name in ("README.md", "code.py", "results/tables/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    git("add", "-A")
    git("commit", "-qm", "all")
    assert git_commit(tmp_path)["dirty"] is False
    (tmp_path / "README.md").write_text("two")
    (tmp_path / "results" / "tables" / "a.md").write_text("two")
    assert git_commit(tmp_path / "results")["dirty"] is False
    (tmp_path / "code.py").write_text("two")
    assert git_commit(tmp_path / "results")["dirty"] is True
