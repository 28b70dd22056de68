"""The plan at scale in tables, on docs/scale.md and in its figure: labelled simulated, and never silent."""

import json
from pathlib import Path

import pytest

from meft_bench.harness.numerics import scale_numerics
from meft_bench.harness.spec import PACKAGE
from meft_bench.profile.scale import plan
from meft_bench.profile.scale.point import meft
from meft_bench.profile.scale.rank import Team
from meft_bench.report.figures import scale as figure
from meft_bench.report.page.profile import profile_report
from meft_bench.report.readme import check_readme, update_readme
from meft_bench.report.records.scale import load_plans
from meft_bench.report.tables.scale import page_blocks, scale_tables
from tests.profile.test_scale import job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, where = job(), tmp_path_factory.mktemp("plans")
    teams = [Team(gpus=g, nodes=w) for w in (1, 4) for g in (1, 2)]
    settings = {"model": "small", "shape": {"parameters": 400_000}, "card": "a100", "card_title": "A100",
                "host_title": "a host", "host_memory_bytes": 2**34, "gpus": 2, "batch": 1, "seq": 20, "neurons": 16,
                "accumulation": 1, "union_share": 0.259, "union_source": "a test", "network": "100gbe"}  # fmt: skip
    content = {
        "schema": 1, "evidence": "simulated", "settings": settings, "numerics": scale_numerics(),
        "points": [p.row() for team in teams for p in plan.points(made, team)],
        "largest": [{"gpus": 1, "evidence": "simulated", "fsdp_adapter": None,
                     "meft": {"neurons": 64, **meft(made, teams[0], kept=False).row()}}],
        "replayed": [{"title": "MEFT", "gpus": 2, "evidence": "simulated", "modelled_tokens_per_s_per_gpu": 110.0,
                      "replayed_tokens_per_s_per_gpu": 100.0, "difference": 0.1}],
        "provenance": {"dirty": False},
    }  # fmt: skip
    content["points"][-1] |= {"state": "does not fit", "lacks": "9 GiB in a host of 8 GiB"}
    (where / "scale_small.json").write_text(json.dumps(content))
    return where


def test_tables_hold_every_point_with_its_evidence(folder: Path) -> None:
    points, largest, replayed = scale_tables(load_plans(folder))
    rows = points.csv.splitlines()[1:]
    assert len(rows) == 4 * 6 and all(row.endswith(",simulated") for row in rows)
    assert "lacks 9 GiB in a host of 8 GiB" in rows[-1] and rows[-1].count("does not fit") == 3
    assert "| MEFT | 64 |" in largest.markdown and "none fits" in largest.markdown
    assert "| MEFT | 2 | 110 | 100 | +10 % | simulated |" in replayed.markdown
    report = profile_report(folder, {})
    assert {"scale", "scale_largest", "scale_replayed"} <= set(report.tables)
    assert set(report.draw(("svg",))) == {"scale.svg"}


def test_without_a_plan_it_says_what_makes_one(tmp_path: Path) -> None:
    assert page_blocks([])["scale"] == "Not run: `make profile GPU=a100 GPUS=8 MODEL=llama-70b`."
    assert figure.draw([]) == {} and "scale" not in profile_report(tmp_path, {}).tables


def test_the_page_takes_the_plan_up_between_its_marks(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    page.write_text((PACKAGE.parent / "docs" / "scale.md").read_text())
    blocks = page_blocks(load_plans(folder))
    update_readme(page, blocks)
    assert check_readme(page, blocks) == []
    told = [line for line in blocks["scale"].splitlines() if any(c.isdigit() for c in line) and line[0] not in "|!"]
    assert len(told) >= 4 and all("imulated" in line for line in told)
    assert (
        "| 2 | 4 |" in page.read_text()
        and "by the replay of the code that trains 100 (both simulated)" in page.read_text()
    )
    assert "Stale" not in page.read_text()


@pytest.mark.parametrize(("change", "said"), [({"points": [{}]}, "a point lacks method"), ({"schema": 2}, "schema"),
                                              ({"evidence": "measured"}, "not simulated")])  # fmt: skip
def test_a_broken_plan_is_named(folder: Path, tmp_path: Path, change: dict, said: str) -> None:
    content = json.loads((folder / "scale_small.json").read_text()) | change
    (tmp_path / "scale_x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"cannot read the plan scale_x.json .*{said}"):
        load_plans(tmp_path)


def test_a_plan_of_other_code_is_stale(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "scale_small.json").read_text()) | {"numerics": {"scale": 0}}
    (tmp_path / "scale_x.json").write_text(json.dumps(content))
    assert "**Stale:** scale_x was made by an earlier version" in scale_tables(load_plans(tmp_path))[0].markdown
