"""Effects against the size of the base: one panel a claim, what decides, what the paper says, what lacks."""

import matplotlib.text

from meft_bench.report.claims.entries import Claim, Finding, Ledger, Part
from meft_bench.report.figures import bases, output
from meft_bench.report.records.quantities import Values


def _part(values: list[float], verdict: str = "holds", label: str = "a minus b") -> Part:
    made = Values(dict(enumerate(values)), evidence="measured", run_keys=("a run",))
    return Part(label=label, words=label, values=made, bound="above", limits=(0.1,), verdict=verdict)


def _finding(verdict: str, *parts: Part) -> Finding:
    return Finding(verdict=verdict, reason="", parts=parts, decisive=parts[0] if verdict != "not run" else None)


def _claim(name: str, small: Finding | None, pretrained: Finding | None) -> Claim:
    return Claim(
        id=name, where="Table 9", family="f", says="", paper=0.3, note="", because="", small=small,
        pretrained=pretrained, scale=None, shows=(),
    )  # fmt: skip


LEDGER = Ledger({}, {}, (
    _claim("t1-best-24g-nq", _finding("supported", _part([0.5, 0.6, 0.7]), _part([0.8])),
           _finding("contradicted", _part([-0.2, 0.0], "fails"))),
    _claim("another", _finding("supported", _part([0.5])), _finding("not run", _part([], "not run"))),
    _claim("untested", _finding("supported", _part([0.5])), None),
), ())  # fmt: skip
SIZES = {"small": 1e6, "pretrained": 1e8, "scale": 7e9}


def _figure():
    with output.settings():
        return bases.base_sizes(LEDGER, SIZES)


def test_a_panel_for_each_claim_with_a_test_on_the_pretrained_base():
    shown = [a for a in _figure().axes if a.get_visible()]
    titles = [" / ".join(a.get_title(loc="left").split("\n")) for a in shown]
    assert len(shown) == 2
    assert (
        titles[0]
        == "MEFT at 10 % beats others at 2 % / embedded: supported (3 seeds), / SmolLM2: contradicted (2 seeds)"
    )
    assert titles[1] == "Table 9 / embedded: supported (1 seed), / SmolLM2: not run"


def test_points_are_means_at_the_size_of_their_base_with_the_paper_and_the_bound():
    axes = _figure().axes[0]
    marked = [line for line in axes.lines if line.get_marker() in ("o", "D", "s")]
    points = {(round(float(x)), round(float(y), 3)) for line in marked for x, y in line.get_xydata()}
    assert {(10**6, 0.6), (1_350_000, 0.8), (10**8, -0.1), (int(bases.PAPER_PARAMETERS), 0.3)} <= points
    assert any(list(line.get_ydata()) == [0.1, 0.1] for line in axes.lines)


def test_equal_ledgers_draw_equal_bytes_and_words_say_what_is_open():
    assert bases.draw(LEDGER, SIZES) == bases.draw(LEDGER, SIZES)
    words = "\n".join(t.get_text() for t in _figure().findobj(matplotlib.text.Text))
    assert "SmolLM2-135M" in words and "reported" in words
