"""The suite frontier in the report: the ratio at equal score by hand, the points that none beats, the sentence, the
figure. No number here was measured."""

from typing import Any

import pytest

from meft_bench.harness import frontier as suite
from meft_bench.harness import smollm2
from meft_bench.harness.rates import learning_rates
from meft_bench.report.figures import catalogue, output
from meft_bench.report.figures import frontier as figure
from meft_bench.report.records import frontier, quantities
from meft_bench.report.records.results import Results
from meft_bench.report.tables.frontier import frontier_table

from ..made_records import broken, make_record, results_of

FIRST, SECOND = "meft_distinctive,meft_distinctive_half 10% facts", "meft 10% facts"
N = 100
# Row -> rate -> (right of 100, nats above the base's 1.0).
KNOWN: dict[str, dict[str, tuple[int, float]]] = {
    "meft": {"0.0016": (40, 0.1), "0.004": (81, 0.4), "0.01": (90, 1.2)},
    "meft_distinctive": {"0.004": (50, 0.05), "0.01": (60, 0.06), "0.025": (70, 0.5)},
    "meft_distinctive_half": {"0.004": (60, 0.2), "0.01": (79, 0.3), "0.025": (80, 0.9)},
}


def results(monkeypatch: pytest.MonkeyPatch, lose: tuple[str, str] | None = None, short: bool = False,
            uneven: float = 0.0) -> Results:  # fmt: skip
    cells = [c for c in suite.cells() if c.row == "base" or (c.row in KNOWN and c.share == "10%")]
    nats: dict[str, float] = {}
    records: list[Any] = []
    for c in cells:
        right, above = (5, 0.0) if c.row == "base" else KNOWN[c.row][c.variant]
        nats[c.spec.run_key] = 1.0 + above + uneven * (c.row == "meft_distinctive_half" and c.spec.seed == 1)
        record = make_record(c, right=right, n=N)
        records.append(broken(record, "diverged", "loss is nan") if (c.row, c.variant) == lose else record)
    monkeypatch.setitem(quantities.MEASURES, "base_nats", lambda record: nats[record["run_key"]])
    return results_of(cells, records[:-1] if short else records)


def test_methods_are_compared_at_the_score_that_both_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both reach .80; less .02, distinctive's least is .3 (score .79), MEFT's .4 (score .81)."""
    found = frontier.forgets_at_equal_score(results(monkeypatch), FIRST, SECOND)
    assert found.by_seed == pytest.approx({0: 0.75, 1: 0.75, 2: 0.75}) and not found.missing
    assert found.evidence == "measured" and len(found.run_keys) >= 27


def test_a_rate_that_diverged_is_one_fewer_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its best rates MEFT reaches .81: the level is .78 again, and its least .4."""
    found = frontier.forgets_at_equal_score(results(monkeypatch, lose=("meft", "0.01")), FIRST, SECOND)
    assert found.by_seed[0] == pytest.approx(0.75) and not found.not_run
    lost = frontier.forgets_at_equal_score(results(monkeypatch, lose=("meft_distinctive_half", "0.01")), FIRST, SECOND)
    assert lost.by_seed[0] == pytest.approx(0.9 / 0.4)


def test_a_record_that_is_missing_leaves_the_ratio_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frontier.forgets_at_equal_score(results(monkeypatch, short=True), FIRST, SECOND).not_run
    nothing = frontier.forgets_at_equal_score(results_of([], []), FIRST, SECOND)
    assert nothing.not_run and not nothing.by_seed


def test_the_table_marks_what_none_beats_and_says_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made = results(monkeypatch)
    best = {(p.line[0], p.rate) for p in frontier.on_frontier(frontier.made(made))}
    assert best == {("meft_distinctive", "0.004"), ("meft_distinctive", "0.01"), ("meft_distinctive_half", "0.01"),
                    ("meft", "0.004"), ("meft", "0.01")}  # fmt: skip
    text = frontier_table(made).markdown
    assert "MEFT, most distinctive half updated at 10% forgets least (0.300 nats a token)" in text
    assert "forgets 0.75 times what MEFT does" in text and "so far" not in text
    assert "of those that know as much as both can, less 0.02" in text, "MEFT's run knows .81, distinctive's .79"
    assert "so far" in frontier_table(results(monkeypatch, short=True)).markdown
    assert "make replicate SUITE=frontier" in frontier_table(results_of(suite.cells(), [])).markdown


def test_the_real_models_rates_are_what_the_caption_says() -> None:
    """They end at the sweep's choice; where none was swept, they begin at MEFT's."""
    swept = learning_rates(smollm2.NAME)
    others = {c.row for c in suite.REAL_CURVES if max(c.rates) != swept.get(f"{c.row} {c.share}")}
    assert others == {"meft_distinctive", "meft_distinctive_half"}
    assert {min(c.rates) for c in suite.REAL_CURVES if c.row in others} == {swept["meft 10%"]}
    assert "updates of distinctive neurons alone were not swept and begin at MEFT's" in figure.CAPTION


def test_a_lead_that_the_seeds_do_not_show_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those above .72 half updated forgets .3 and MEFT .4; with .7 at one seed it is .43, and nobody leads."""
    assert "tell these two apart" not in frontier.sentence(results(monkeypatch))
    told = frontier.sentence(results(monkeypatch, uneven=0.4))
    assert "MEFT at 10% forgets least (0.400" in told and "(0.433); the seeds do not tell these two apart." in told


def test_on_a_pretrained_model_each_record_knows_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [c for c in suite.real_cells("local/smollm2-135m@000000000000") if c.row in ("base", "meft")]
    records = []
    for c in cells:
        record = make_record(c, right=60, n=N)
        text = {"nats_per_token": 3.5, "base_nats_per_token": 3.0, "kl_nats_per_token": 0.4, "tokens": 9}
        records.append({**record, "probes": {**record["probes"], "forgetting": {"own_text": text}}})
    made = results_of(cells, records)
    assert {p.lost for p in frontier.made(made, suite.REAL_TASK)} == {0.5}
    assert "text that the base writes" in frontier_table(made, "frontier_smollm2", suite.REAL_TASK).markdown
    assert set(figure.draw(made)) == {"frontier_smollm2.png"} and figure.draw(None) == {}
    assert figure.draw(results_of(cells, [])) == {}, "nothing was run"
    with output.settings():
        (axes,) = figure.on_real(made).axes
    names = {text.get_text() for text in axes.texts}
    assert {"MEFT", "MEFT, 34%"} <= names
    assert [len(line.get_xdata()) for line in axes.get_lines()].count(3) >= 2, "a curve for each of both sizes"


def test_the_figure_draws_every_curve_and_says_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = results(monkeypatch)
    with output.settings():
        drawn = catalogue.frontier.frontier(made, {}, {})
        empty = catalogue.frontier.frontier(results_of(suite.cells(), []), {}, {})
    assert len(drawn.axes) == len(suite.GROUPS)
    lines = [len(line.get_xdata()) for line in drawn.axes[0].get_lines()]
    assert lines.count(3) >= 3, "three curves of three rates"
    assert any("not run" in text.get_text() for text in empty.axes[0].texts)
