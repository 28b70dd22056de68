"""The frame of the neighbours' suite, on a neighbour of a few lines: what is due, what is written, what is shown."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meft_bench import neighbours
from meft_bench.cli import main
from meft_bench.harness import cluster, local_jobs, numerics
from meft_bench.harness.cluster import Jobs
from meft_bench.harness.suites import smoke
from meft_bench.neighbours import suite
from meft_bench.neighbours.finding import Finding, extent
from meft_bench.report import cli as report_cli
from meft_bench.report.page.page import body
from meft_bench.report.tables.neighbours import neighbours_table
from meft_bench.write import write_json
from tests.report.made_records import make_record

TINY = '''"""Counts."""

from meft_bench.neighbours.finding import Finding

NUMERICS = 1
TITLE = "Tiny"
PAPER = "0000.00000"
CLAIM = "Three are three | always."
TESTED = "Whether three are three."
MINUTES = 2
USES = ("meft", "facts", "training", "simulator", "embedded")
calls = []


def run(quick):
    calls.append(quick)
    if len(calls) > 2:
        raise RuntimeError("no fourth")
    return {"evidence": "measured", "values": [3, 3, 4]}


def findings(found):
    v = found["values"]
    return [Finding(says=f"{min(v)} at least", evidence="measured", n=len(v), of="rounds",
                    interval=(min(v), max(v)), covers="times, lowest to highest", digits=1),
            Finding(says="and no more", evidence="simulated", n=1, of="shape")]
'''


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout-like folder whose only neighbour is tiny.py, run in this process."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "tiny.py").write_text(TINY)
    (folder / "shared.py").write_text("WHAT = 'neighbours share'\n")
    monkeypatch.setattr(numerics, "NEIGHBOURS", folder)
    monkeypatch.setattr(neighbours, "__path__", [*neighbours.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "meft_bench.neighbours.tiny", raising=False)
    monkeypatch.setattr(suite, "apart", lambda function, *given: function(*given))
    yield tmp_path
    sys.modules.pop("meft_bench.neighbours.tiny", None)


def test_a_neighbour_is_one_file_that_tells_what_it_is(tiny: Path) -> None:
    assert numerics.neighbour_names() == ["tiny"]
    today = numerics.neighbour_numerics("tiny")
    assert set(today) == {"part", "meft", "facts", "training", "simulator", "embedded"} and today["part"] == 1
    (tiny / "code" / "half.py").write_text("NUMERICS = 1\nTITLE = 'Half'\n")
    with pytest.raises(ValueError, match="half.py does not define PAPER, CLAIM, TESTED, MINUTES, USES"):
        numerics.neighbour_facts("half")


def test_what_is_there_is_not_run_again(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, runs = tiny / "out", tiny / "runs"
    assert suite.run_suite(out, runs) == 0
    assert "1 neighbours to run, 0 are there; about 2 minutes" in capsys.readouterr().out
    first = (out / "tiny.json").read_bytes()
    kept = json.loads(first)
    assert kept["values"] == [3, 3, 4] and kept["provenance"]["packages"]["torch"] and kept["quick"] is False
    assert suite.run_suite(out, runs) == 0 and (out / "tiny.json").read_bytes() == first
    assert "0 neighbours to run, 1 are there" in capsys.readouterr().out
    text = (tiny / "code" / "tiny.py").read_text()
    (tiny / "code" / "tiny.py").write_text(text.replace("NUMERICS = 1", "NUMERICS = 2"))
    assert not suite.is_fresh(out, "tiny") and numerics.neighbour_why_not("tiny", kept).startswith("made by an earlier")
    assert suite.run_suite(out, runs) == 0 and json.loads((out / "tiny.json").read_bytes())["numerics"]["part"] == 2


def test_a_neighbour_that_fails_is_named_and_the_others_go_on(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "code" / "another.py").write_text(TINY.replace("len(calls) > 2", "calls"))
    try:
        assert suite.run_suite(tiny / "out", tiny / "runs") == 1
    finally:
        sys.modules.pop("meft_bench.neighbours.another", None)
    assert "another failed: no fourth" in capsys.readouterr().out
    assert [f.name for f in (tiny / "out").iterdir()] == ["tiny.json"]


def test_the_table_shows_what_came_out_and_what_is_stale(tiny: Path) -> None:
    before = neighbours_table(tiny / "out")
    assert "| not run | make replicate SUITE=neighbours ONLY=tiny | not run | not run |" in before.markdown
    suite.run_suite(tiny / "out", tiny / "runs", quick=True)
    shown = neighbours_table(tiny / "out")
    assert (
        "| Three are three \\| always. | Whether three are three. | measured † | 3 at least | 3 rounds |"
        in shown.markdown
    )
    assert "| as above | as above | simulated † | and no more | 1 shape | one value |" in shown.markdown
    assert "3.0 to 4.0 (times, lowest to highest)" in shown.csv
    assert "† Tiny was made at the sizes of a test (make replicate SUITE=neighbours)." in shown.markdown
    assert "<td>3 at least</td>" in body(shown)
    (tiny / "out" / "tiny.json").write_text('{"evidence": "measured", "other": 1}')
    assert "| not run † | make replicate SUITE=neighbours ONLY=tiny |" in neighbours_table(tiny / "out").markdown
    (tiny / "out" / "tiny.json").write_text("[]")
    with pytest.raises(ValueError, match="tiny.json"):
        neighbours_table(tiny / "out")


def test_runs_that_are_published_or_here_are_not_made_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A neighbour that looks at two runs: one is published, the other is made."""
    one, two = [c.spec for c in smoke()[:2]]
    text = TINY.replace("def run(quick):", "def run(quick, records):").replace("[3, 3, 4]", "[len(records)] * 3")
    (tiny / "code" / "tiny.py").write_text(f"{text}\n\ndef specs(quick):\n    return SPECS\n")
    monkeypatch.setattr(suite, "RECORDS", tiny / "records")
    for folder in ("records", "made"):  # made_record's numbers are not today's
        for cell in smoke()[:2]:
            made = make_record(cell)
            made["numerics"] = numerics.numerics(cell.spec.task, cell.spec.method, cell.spec.model)
            write_json(tiny / folder / f"{cell.spec.run_key}.json", made)
    (tiny / "records" / f"{two.run_key}.json").unlink()
    asked = []

    def execute(planned: list, runs: Path, places: dict, workers: int) -> None:
        for p in planned:
            asked.append(p.spec)
            (runs / p.spec.run_key).mkdir(parents=True)
            (tiny / "made" / f"{p.spec.run_key}.json").rename(runs / p.spec.run_key / "record.json")

    monkeypatch.setattr(suite.runner, "execute", lambda *given, **named: None)
    importlib.import_module("meft_bench.neighbours.tiny").SPECS = [one, two]
    assert suite.run_suite(tiny / "out", tiny / "runs") == 1 and "1 of its runs did not end" in capsys.readouterr().out
    monkeypatch.setattr(suite.runner, "execute", execute)
    assert suite.run_suite(tiny / "out", tiny / "runs") == 0 and asked == [two]
    assert json.loads((tiny / "out" / "tiny.json").read_bytes())["values"] == [2, 2, 2]


def test_a_neighbour_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert suite.run_suite(tmp_path / "out", tmp_path / "runs", only=["flash_llm"], quick=True) == 0
    shown = neighbours_table(tmp_path / "out").markdown
    assert "| Flash-LLM | arXiv 2309.10285 |" in shown and "| measured † | At 4 tokens on this CPU" in shown


def test_the_command_runs_what_is_due_and_renders_the_table(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "results" / "paper").mkdir(parents=True)
    (tiny / "results" / "paper" / "reported.yaml").write_text("")
    monkeypatch.chdir(tiny)
    assert main(["replicate", "--suite", "neighbours", "--only", "tiny"]) == 0
    assert "3 at least" in (tiny / "results" / "tables" / "neighbours.md").read_text()
    assert (tiny / "results" / "tables" / "neighbours.csv").read_text().startswith("neighbour,paper,")
    assert main(["replicate", "--suite", "neighbours"]) == 0
    assert "0 neighbours to run, 1 are there" in capsys.readouterr().out
    assert main(["replicate", "--suite", "neighbours", "--only", "nobody"]) == 2


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_training_runs_of_neighbours_can_be_jobs(
    kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Local jobs are waited for; Slurm's bring the neighbours when the command is given again."""
    (tiny / "results" / "paper").mkdir(parents=True)
    (tiny / "results" / "paper" / "reported.yaml").write_text("")
    monkeypatch.chdir(tiny)
    text = TINY.replace("def run(quick):", "def run(quick, records):").replace("[3, 3, 4]", "[len(records)] * 3")
    (tiny / "code" / "tiny.py").write_text(f"{text}\n\ndef specs(quick):\n    return SPECS\n")
    the_cell = smoke()[0]
    importlib.import_module("meft_bench.neighbours.tiny").SPECS = [the_cell.spec]
    runs, asked = tiny / "results" / "runs", list[str]()

    def make(planned: list, *given: Any) -> bool:
        asked.extend(p.spec.run_key for p in planned)
        made = make_record(the_cell)
        made["numerics"] = numerics.numerics(the_cell.spec.task, the_cell.spec.method, the_cell.spec.model)
        write_json(runs / the_cell.spec.run_key / "record.json", made)
        return True

    monkeypatch.setattr(report_cli, "asked_jobs", lambda args: Jobs(cluster=kind))
    monkeypatch.setattr(local_jobs, "run", make)
    monkeypatch.setattr(cluster, "submit", lambda planned, *given: asked.extend(p.spec.run_key for p in planned))
    assert main(["replicate", "--suite", "neighbours"]) == 0 and asked == [the_cell.spec.run_key]
    if kind == "slurm":
        assert "when the same command finds these runs done" in capsys.readouterr().out
        assert not (tiny / "results" / "neighbours" / "tiny.json").exists()
        make([])
        assert main(["replicate", "--suite", "neighbours"]) == 0 and len(asked) == 1
    assert json.loads((tiny / "results" / "neighbours" / "tiny.json").read_bytes())["values"] == [1, 1, 1]


def test_an_unknown_neighbour_and_a_stray_flag_are_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="tiny"):
        suite.run_suite(tiny / "out", tiny / "runs", only=["nobody"])
    assert main(["replicate", "--suite", "smoke", "--only", "tiny"]) == 2
    assert "--only names neighbours" in capsys.readouterr().err


def test_a_finding_says_its_evidence_and_what_its_interval_is() -> None:
    assert extent([3.0, 1.0, 2.0]) == (1.0, 3.0)
    with pytest.raises(AssertionError, match="guessed"):
        Finding(says="so", evidence="guessed", n=1, of="seed")
    with pytest.raises(AssertionError, match="covers"):
        Finding(says="so", evidence="measured", n=1, of="seed", interval=(0, 1))


@pytest.mark.parametrize("name", numerics.neighbour_names())
def test_every_neighbour_tells_what_it_is(name: str) -> None:
    facts = numerics.neighbour_facts(name)
    assert facts["CLAIM"].endswith(".") and any(c.isdigit() for c in facts["CLAIM"]) and facts["TESTED"].endswith(".")
    assert all(numerics.neighbour_numerics(name).values())


def test_the_suite_stays_below_an_hour() -> None:
    minutes = sum(numerics.neighbour_facts(name)["MINUTES"] for name in numerics.neighbour_names())
    assert minutes <= suite.MOST_MINUTES
