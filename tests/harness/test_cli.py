"""Bad input gives one clear line on stderr, exit code 2, no traceback and nothing half-written."""

import argparse
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from meft_bench import cli
from meft_bench.harness import cli as harness_cli
from meft_bench.harness import runner
from tests.methods import short_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(capsys, monkeypatch, tmp_path):
    """Run a command in the checkout with its runs in tmp_path; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MEFT_DATA", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        extra = ["--runs", str(tmp_path / "runs")] if arguments[0] in ("run", "replicate", "show", "list") else []
        code = cli.main([*arguments, *extra])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


BAD = [
    (["run", "--task", "poetry", "--method", "full"], "unknown task 'poetry'; known: facts"),
    (["run", "--task", "facts", "--method", "magic"], "unknown method 'magic'; known: adalomo, adapter_h"),
    (["run", "--method", "full"], "no task given"),
    (["run", "--task", "facts", "--method", "full", "--model", "./nowhere"], "no model folder ./nowhere"),
    (["run", "--task", "facts", "--method", "lora", "--option", "rank=-1"], "rank=-1 must be a whole number"),
    (
        ["run", "--task", "facts", "--method", "lora", "--option", "colour=1"],
        "lora has no option colour; it has: alpha",
    ),
    (["run", "--task", "facts", "--method", "lora", "--option", "rank"], "'rank' is not NAME=VALUE"),
    (["run", "--task", "facts", "--method", "meft", "--option", "experts=4"], "meft needs the option neurons"),
    (
        [
            "run",
            "--task",
            "facts",
            "--method",
            "meft",
            "--option",
            "neurons=100",
            "--option",
            "experts=16",
            "--option",
            "kept=8",
        ],
        "experts N=16 does not divide neurons R=100: the nearest legal R is 96",
    ),
    (["run", "--task", "facts", "--method", "meft", "--option", "neurons=32"], "kept K=64 exceeds neurons R=32"),
    (
        [
            "run",
            "--task",
            "facts",
            "--method",
            "meft",
            "--option",
            "neurons=96",
            "--option",
            "experts=4",
            "--option",
            "probed=9",
        ],
        "probed P=9 exceeds experts N=4",
    ),
    (["run", "--task", "facts", "--method", "full", "--set", "batch_size=-2"], "batch_size=-2"),
    (["run", "--task", "facts", "--method", "full", "--set", "speed=9"], "unknown spec field speed"),
    (["run", "missing.yaml"], "no spec file missing.yaml"),
    (["run", "--task", "nq", "--method", "full"], "nq needs real rows: give a folder with --data or MEFT_DATA"),
    (["run", "--task", "nq", "--method", "full", "--data", "nowhere"], "no data folder nowhere"),
    (["replicate", "--suite", "huge"], "unknown suite 'huge'; known: smoke"),
    (["replicate", "--suite", "smoke", "--workers", "0"], "--workers 0 must be a whole number of at least 1"),
    (["replicate", "--suite", "real"], "the real suite needs --model FOLDER"),
    (["replicate", "--suite", "smoke", "--model", "no/such"], "the suite smoke takes no --model (these do: real,"),
    (["replicate", "--suite", "default", "--model", "./nowhere"], "the suite default takes no --model"),
    (["replicate", "--suite", "full", "--data", "./nowhere"], "the suite full takes no --data"),
    (["replicate", "--suite", "neighbours", "--data", "hub"], "the suite neighbours takes no --data"),
    (["replicate", "--suite", "frontier", "--data", "hub"], "(these do: real, smollm2, paper): leave it out"),
    (["replicate", "--suite", "sweep", "--data", "hub"], "the suite sweep takes no --data"),
    (["replicate", "--suite", "sweep", "--model", "./nowhere"], "no model folder ./nowhere"),
    (
        ["replicate", "--suite", "sweep", "--model", "owner/llama"],
        "the sweep is on smollm2-135m (--model smollm2-135m)",
    ),
    (["show", "ffffff"], "no record begins with 'ffffff'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_is_one_line(bench, tmp_path, arguments, message):
    code, out, err = bench(*arguments)
    assert code == 2
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [facts", "spec.yaml is not YAML"),
        ("- facts", "must map field names to values"),
        ("task: facts\nmethod: full\nnoise: 3", "unknown spec field noise"),
    ],
)
def test_broken_yaml(bench, tmp_path, text, message):
    (tmp_path / "spec.yaml").write_text(text)
    code, _, err = bench("run", str(tmp_path / "spec.yaml"))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": ["b"]}\n{"question": "a"}\n', "train.jsonl, line 2 lacks answer"),
        ('{"question": "a", "answer": ["b"]}\n{oops}\n', "train.jsonl, line 2 is not JSON"),
        ("", "train.jsonl holds no rows"),
    ],
)
def test_broken_data_is_named_and_nothing_else_lost(bench, tmp_path, content, message):
    folder = tmp_path / "data" / "nq_open"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(content)
    (folder / "validation.jsonl").write_text('{"question": "a", "answer": ["b"]}\n')
    code, out, err = bench("run", "--task", "nq", "--method", "full", "--data", str(tmp_path / "data"))
    # The row is only read by the worker, which tells the progress bar; the run is kept as failed and can be repeated.
    assert code == 1 and message in err + out and "Traceback" not in err + out


def test_sequence_longer_than_the_model(bench):
    code, out, err = bench("run", "--task", "facts", "--method", "full", "--set", "max_length=5")
    assert code == 1 and "training rows exceed max_length=5 tokens" in err + out


def test_results_folder_that_is_a_file(bench, tmp_path):
    (tmp_path / "runs").write_text("")
    code, _, err = bench("run", "--task", "facts", "--method", "base")
    assert code == 2 and "cannot write to the runs folder" in err and len(err.strip().splitlines()) == 1


def test_full_disk_is_one_line(bench, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "record.json")

    monkeypatch.setattr(harness_cli, "execute", full)
    code, _, err = bench("run", "--task", "facts", "--method", "base")
    assert code == 2 and err == "meft-bench: No space left on device: record.json; check free space and permissions\n"


def test_list_and_doctor(bench):
    code, out, _ = bench("list", "--suite", "smoke")
    assert code == 0 and out.count(" missing ") == len(out.splitlines()) == 9
    assert "meft" in bench("list")[1]
    assert cli.main(["doctor"]) == 0


def test_doctor_names_a_package_that_is_missing(capsys, monkeypatch):
    version = metadata.version

    def without(package):
        if package == "scipy":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "scipy not installed" in out and "BROKEN      package scipy: not installed; run make setup" in out


def test_doctor_names_no_user(monkeypatch):
    from meft_bench.harness.doctor import _from_home

    monkeypatch.setenv("HOME", "/home/some.one")
    assert _from_home("/home/some.one/.cache/meft-bench") == "~/.cache/meft-bench"
    assert (
        _from_home("/home/some.ones") == "/home/some.ones"
        and _from_home("/tmp/x/home/some.one") == "/tmp/x/home/some.one"
    )


def test_paper_plan_says_what_each_cell_needs(bench):
    code, out, _ = bench("replicate", "--suite", "paper")
    assert code == 0
    meft = next(line for line in out.splitlines() if line.startswith("nq         meft "))
    assert "not run (needs" in meft and "weights" in meft
    assert out.rstrip().endswith("0 can run here")


@pytest.fixture
def empty_checkout(tmp_path, monkeypatch):
    """A repository's folder that holds the paper's numbers, the claims and the README, and no record."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_without_any_record_says_not_run_everywhere(empty_checkout, capsys):
    assert cli.main(["report"]) == 0
    claims = (empty_checkout / "results" / "tables" / "claims.csv").read_text()
    assert "not run" in claims and "supported" not in claims and "contradicted" not in claims
    page = (empty_checkout / "results" / "report.html").read_text()
    assert "not run" in page and len(list((empty_checkout / "results" / "figures").glob("*.png"))) >= 9
    assert "29 have a test on the embedded model (29 not run)" in (empty_checkout / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["report"]) == 0 and capsys.readouterr().out == "", "a second call changes nothing"
    assert cli.main(["report", "--check"]) == 0


def test_a_broken_claim_stops_the_report_before_it_writes(empty_checkout, capsys):
    book = empty_checkout / "results" / "paper" / "claims.yaml"
    book.write_text(book.read_text().replace("measure: grid_rise", "measure: grid_fall", 1))
    before = (empty_checkout / "README.md").read_text()
    assert cli.main(["report"]) == 2
    said = capsys.readouterr().err
    assert "claims.yaml, f8-rises-with-batch: unknown measure 'grid_fall'" in said
    assert len(said.strip().splitlines()) == 1 and not (empty_checkout / "results" / "tables").exists()
    assert (empty_checkout / "README.md").read_text() == before


def test_help_and_import_are_light():
    code = (
        "import sys, meft_bench.cli as c; c._parser(); sys.exit(bool({'torch', 'pandas', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("by_worth", "tasks"), [(True, ["people", "nq", "people"]), (False, ["people", "people", "nq"])]
)
def test_runs_are_made_in_the_order_of_their_worth_where_a_suite_has_one(tmp_path, monkeypatch, by_worth, tasks):
    first, second = short_spec("meft", task="people", seed=0), short_spec("meft", task="nq", data="hub", seed=1)
    third = short_spec("lora", task="people", seed=0)
    made: list[str] = []

    def noting(planned, *_, **__):
        made.extend(p.spec.task for p in planned)
        return {}

    monkeypatch.setattr(runner, "execute", noting)
    args = argparse.Namespace(runs=tmp_path, workers=1)
    assert harness_cli.execute([first, second, third], args, {}, by_worth=by_worth) == 0
    assert made == tasks


def test_publish_says_when_there_are_no_runs(bench, tmp_path):
    code, _, err = bench("publish", "--runs", str(tmp_path / "none"))
    assert code == 2 and err.startswith("meft-bench: no folder of runs ") and len(err.splitlines()) == 1
