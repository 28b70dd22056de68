"""The sweep: best development score wins, ties go to the lower loss, edges are extended, failures stay visible."""

import json

import pytest

from meft_bench.harness import suites, sweep


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Make the sweep of one row from {rate: (score, loss) or a state}; returns its cells."""
    monkeypatch.setattr(sweep, "CHOSEN", tmp_path / "chosen.json")

    def make(results: dict) -> list[suites.Cell]:
        cells = [suites.cell("meft", "2%", task="facts", learning_rate=rate) for rate in results]
        records = {}
        for cell, outcome in zip(cells, results.values(), strict=True):
            record = {"state": outcome, "run_key": cell.spec.run_key}
            if isinstance(outcome, tuple):
                quality = {"validation": {"n": 9, "metrics": {"contains": {"mean": outcome[0]}}}}
                record |= {"state": "ok", "quality": quality, "curve": {"loss": [9.0, outcome[1]]}}
            folder = tmp_path / cell.spec.run_key
            folder.mkdir()
            (folder / "record.json").write_text("")
            records[folder / "record.json"] = record
        monkeypatch.setattr(sweep, "read_record", records.__getitem__)
        return cells

    return make


def chosen(tmp_path) -> float:
    return json.loads((tmp_path / "chosen.json").read_text())["chosen"]["meft 2%"]


def test_the_best_score_wins_inside_the_grid(tried, tmp_path):
    cells = tried({0.004: (0.2, 0.1), 0.01: (0.7, 0.5), 0.025: (0.3, 0.1)})
    assert "edge" not in sweep.choose(cells, tmp_path) and chosen(tmp_path) == 0.01
    assert sweep.edge_cells(cells, tmp_path) == []


def test_equal_scores_go_to_the_lower_loss(tried, tmp_path):
    sweep.choose(tried({0.004: (0.5, 0.3), 0.01: (0.5, 0.1), 0.025: (0.5, 0.2)}), tmp_path)
    assert chosen(tmp_path) == 0.01


@pytest.mark.parametrize(("scores", "further"), [((0.1, 0.2, 0.3), 0.0625), ((0.3, 0.2, 0.1), 0.0016)])
def test_a_best_at_the_edge_asks_for_one_rate_further_out(tried, tmp_path, scores, further):
    cells = tried({rate: (score, 1.0) for rate, score in zip((0.004, 0.01, 0.025), scores, strict=True)})
    (extra,) = sweep.edge_cells(cells, tmp_path)
    assert extra.spec.learning_rate == further and (extra.row, extra.share) == ("meft", "2%")
    assert "(edge of the grid)" in sweep.choose(cells, tmp_path)


def test_a_diverged_rate_is_listed_and_never_chosen(tried, tmp_path):
    table = sweep.choose(tried({0.004: (0.1, 1.0), 0.01: (0.2, 1.0), 0.025: "diverged"}), tmp_path)
    assert "0.025: diverged" in table and chosen(tmp_path) == 0.01


def test_no_score_at_all_is_an_error(tried, tmp_path):
    with pytest.raises(ValueError, match="no learning rate of meft 2% gave a score"):
        sweep.choose(tried({0.01: "diverged"}), tmp_path)
