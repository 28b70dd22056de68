"""The metric rules, quirks of the released evaluation included."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meft_bench.tasks import metrics as m

# ---- containment, as released ----


@pytest.mark.parametrize(
    ("output", "answers", "sensitive", "lowered"),
    [
        pytest.param("He lives in Paris.", ["Paris"], 1, 1, id="inside a sentence"),
        pytest.param("he lives in paris", ["Paris"], 0, 1, id="case"),
        pytest.param("PARIS", ["paris"], 0, 1, id="case of the output"),
        pytest.param("a party", ["art"], 1, 1, id="inside a word counts"),
        pytest.param("in 1984", ["98"], 1, 1, id="inside a number counts"),
        pytest.param("Rome", ["Paris", "Rome"], 1, 1, id="any of several answers"),
        pytest.param("Oslo", ["Paris", "Rome"], 0, 0, id="none of several answers"),
        pytest.param("the  United  States", ["United States"], 0, 0, id="white space is not folded"),
        pytest.param("U.S.A.", ["USA"], 0, 0, id="punctuation is not dropped"),
        pytest.param("", ["Paris"], 0, 0, id="empty output"),
        pytest.param("Paris", [""], 1, 1, id="an empty answer is in anything"),
        pytest.param("", [""], 1, 1, id="an empty answer is in nothing"),
        pytest.param("Paris", [], 0, 0, id="no answers"),
    ],
)
def test_containment(output: str, answers: list[str], sensitive: int, lowered: int) -> None:
    assert m.contains(output, answers) == sensitive
    assert m.contains(output, answers, lower=True) == lowered


def test_nq_compares_case_and_squad_does_not() -> None:
    doc = {"answers": ["New York"]}
    assert m.process_nq(doc, ["it is new york"])["contains"] == 0.0
    assert m.process_squad(doc, ["it is NEW york"])["contains"] == 1.0
    assert m.process_nq(doc, ["it is New York"]) == {"contains": 1.0, "exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert m.process_nq(doc, ["The new york."]) == {"contains": 0.0, "exact_match": 1.0, "f1": 1.0}


@settings(max_examples=20)
@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=3))
def test_an_answer_is_contained_in_itself_and_scores_stay_in_0_1(output: str, answers: list[str]) -> None:
    doc = {"answers": answers + [output]}
    for scores in (m.process_nq(doc, [output]), m.process_squad(doc, [output])):
        assert set(scores.values()) == {1.0}
    for score in m.process_nq({"answers": answers or ["x"]}, [output]).values():
        assert 0.0 <= score <= 1.0


# ---- normalised exact match and F1 ----


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Beatles!", "beatles"),
        ("  a   Cat ", "cat"),
        ("An apple, a day.", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre and anthem", "theatre and anthem"),  # articles are whole words
        ("the the", ""),
        ("state-of-the-art", "stateoftheart"),  # punctuation goes first, so this "the" stays
        ("", ""),
        ("?!", ""),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert m.normalise(text) == normal
    assert m.normalise(normal) == normal


@pytest.mark.parametrize(
    ("output", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1.0),
        ("Eiffel tower in Paris", ["the Eiffel Tower"], 0, 2 / 3),
        ("Paris", ["Rome", "Paris"], 1, 1.0),
        ("Paris France", ["Rome", "Paris"], 0, 2 / 3),
        ("Rome", ["Paris"], 0, 0.0),
        ("ha ha ha", ["ha ha"], 0, 0.8),  # repeats count as often as they occur in both
        ("ha", ["ha ha ha"], 0, 0.5),
        ("", ["Paris"], 0, 0.0),
        ("", [""], 1, 1.0),
        ("the", ["a"], 1, 1.0),  # both are empty in normal form
        ("Paris", [""], 0, 0.0),
        ("Paris", [], 0, 0.0),
    ],
)
def test_exact_match_and_f1(output: str, answers: list[str], exact: int, f1: float) -> None:
    assert m.exact_match(output, answers) == exact
    assert m.f1(output, answers) == pytest.approx(f1)


# ---- sets of APIs ----


@pytest.mark.parametrize(
    ("output", "answers", "score"),
    [
        pytest.param("a b , c d", ["a b", "c d"], 1.0, id="all"),
        pytest.param("c d,a b", ["a b", "c d"], 1.0, id="order"),
        pytest.param("a b , a b , a b", ["a b"], 1.0, id="repeats"),
        pytest.param("  a   b ,\tc d ", ["a b", "c  d"], 1.0, id="white space"),
        pytest.param("a b ,, , ", ["a b"], 1.0, id="empty entries"),
        pytest.param("a b", ["a b", "c d"], 0.5, id="one lacking"),
        pytest.param("a b , e f", ["a b", "c d"], 1 / 3, id="one lacking and one too many"),
        pytest.param("a b , c d , e f , g h", ["a b"], 0.25, id="naming everything does not pay"),
        pytest.param("A b", ["a b"], 0.0, id="case counts"),
        pytest.param("", ["a b"], 0.0, id="empty output"),
        pytest.param("", [], 1.0, id="nothing asked, nothing named"),
    ],
)
def test_iou(output: str, answers: list[str], score: float) -> None:
    assert m.iou(output, answers, ",") == pytest.approx(score)
    scores = m.process_tools({"answers": answers}, [output])
    assert scores == {"iou": pytest.approx(score), "exact_match": float(score == 1.0)}


def test_toolbench_names_are_parted_by_semicolons() -> None:
    """A tool's name may hold a comma."""
    doc = {"answers": ["Maps, Inc : route", "Mail : send"]}
    assert m.process_toolbench(doc, ["Mail : send ; Maps, Inc :  route"]) == {"iou": 1.0, "exact_match": 1.0}
    assert m.process_toolbench(doc, ["Mail : send , Maps, Inc : route"]) == {"iou": 0.0, "exact_match": 0.0}


@given(st.lists(st.sampled_from(["a", "b", "c d", "e"]), max_size=5), st.randoms())
def test_iou_ignores_order_and_repeats(names: list[str], rng) -> None:
    shuffled = rng.sample(names, len(names)) + names[:1]
    assert m.iou(" , ".join(shuffled), names, ",") == 1.0


# ---- final numbers ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is: 42", 42),
        ("so 3 and 4 make 7.", 7),  # the last one, without the full stop
        ("it costs 1,234,567 coins", 1234567),
        ("$1,000.50", 1000.5),
        ("3.25 miles", 3.25),
        ("€-12", -12),
        ("it falls to -7.5", -7.5),
        ("the answer is 5 (not 6)", 6),
        ("007", 7),
        ("12, 13", 13),  # a list, not a thousands separator
        ("12,13", 13),
        ("100%", 100),
        ("no idea", None),
        ("", None),
        ("-", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert m.final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        pytest.param("the odds are .5", 0.5, id="no digit before the point"),
        pytest.param("the loss is -$5", -5, id="sign before the currency"),
    ],
)
def test_final_number_in_rarer_spellings(text: str, number: float) -> None:
    assert m.final_number(text) == number


@given(st.integers(-(10**9), 10**9))
def test_numbers_are_read_as_written_with_and_without_separators(number: int) -> None:
    assert m.final_number(f"so 17 becomes {number}") == m.final_number(f"#### {number:,}.") == number


@pytest.mark.parametrize(
    ("output", "answers", "right"),
    [
        ("it is 1,200", ["1200"], 1),
        ("it is 1200.00", ["1,200"], 1),
        ("first 3 then 5", ["3"], 0),
        ("-5", ["5"], 0),
        ("6", ["5", "6"], 1),
        ("none", ["5"], 0),
        ("none", ["none"], 0),  # an answer without a number is matched by nothing
        ("", ["0"], 0),
    ],
)
def test_number_match(output: str, answers: list[str], right: int) -> None:
    assert m.number_match(output, answers) == right
    assert m.process_number({"answers": answers}, [output]) == {"accuracy": right}
