"""The metric rules, quirks of the released evaluation included."""

import random
import string
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meft_bench.tasks import metrics as m
from meft_bench.tasks import world

# ---- containment: ours asks for words, the released one for a substring ----


@pytest.mark.parametrize(
    ("output", "answers", "sensitive", "lowered", "released"),
    [
        pytest.param("He lives in Paris.", ["Paris"], 1, 1, (1, 1), id="inside a sentence"),
        pytest.param("he lives in paris", ["Paris"], 0, 1, (0, 1), id="case"),
        pytest.param("PARIS", ["paris"], 0, 1, (0, 1), id="case of the output"),
        pytest.param("a party", ["art"], 0, 0, (1, 1), id="inside a word"),
        pytest.param("Parisians", ["Paris"], 0, 0, (1, 1), id="beginning of a word"),
        pytest.param("in 1984", ["98"], 0, 0, (1, 1), id="inside a number"),
        pytest.param("it is 1.5", ["5"], 0, 0, (1, 1), id="behind a decimal point"),
        pytest.param("it is -5", ["5"], 0, 0, (1, 1), id="behind a sign"),
        pytest.param("minus \u22125", ["-5"], 1, 1, (0, 0), id="Unicode's minus"),
        pytest.param("written in C++", ["C"], 0, 0, (1, 1), id="C in C++"),
        pytest.param("written in C#", ["C"], 0, 0, (1, 1), id="C in C#"),
        pytest.param("C# and C++", ["C#"], 1, 1, (1, 1), id="C#"),
        pytest.param("it is 1,000", ["1000"], 1, 1, (0, 0), id="thousands separator"),
        pytest.param("on 25.12.2020", ["2020"], 1, 1, (1, 1), id="a date is three numbers"),
        pytest.param("from 1990-95", ["95"], 1, 1, (1, 1), id="a range is two numbers"),
        pytest.param("it costs $5", ["5"], 1, 1, (1, 1), id="currency"),
        pytest.param("(Paris,France)", ["Paris"], 1, 1, (1, 1), id="punctuation parts words"),
        pytest.param("Paris", ["Paris France"], 0, 0, (0, 0), id="half an answer"),
        pytest.param("France and Paris", ["Paris France"], 0, 0, (0, 0), id="order counts"),
        pytest.param("caf\u00e9", ["cafe\u0301"], 1, 1, (0, 0), id="composed and decomposed"),
        pytest.param("\uff11\uff15", ["15"], 1, 1, (0, 0), id="full-width digits"),
        pytest.param("\u6771\u4eac\u90fd\u306b\u3042\u308b", ["\u6771\u4eac"], 1, 1, (1, 1), id="no spaces"),
        pytest.param("Rome", ["Paris", "Rome"], 1, 1, (1, 1), id="any of several answers"),
        pytest.param("Oslo", ["Paris", "Rome"], 0, 0, (0, 0), id="none of several answers"),
        pytest.param("the  United  States", ["United States"], 1, 1, (0, 0), id="white space"),
        pytest.param("is it ?", ["?"], 1, 1, (1, 1), id="an answer of punctuation"),
        pytest.param("it is", ["?"], 0, 0, (0, 0), id="no answer of punctuation"),
        pytest.param("", ["Paris"], 0, 0, (0, 0), id="empty output"),
        pytest.param("Paris", [""], 0, 0, (1, 1), id="an empty answer"),
        pytest.param("", [""], 0, 0, (1, 1), id="an empty answer and output"),
        pytest.param("Paris", [], 0, 0, (0, 0), id="no answers"),
    ],
)
def test_containment(output: str, answers: list[str], sensitive: int, lowered: int, released: tuple[int, int]) -> None:
    assert (m.contains(output, answers), m.contains(output, answers, lower=True)) == (sensitive, lowered)
    assert (m.released_contains(output, answers), m.released_contains(output, answers, lower=True)) == released


def test_words_of_the_embedded_world_are_contained_as_the_released_code_finds_them() -> None:
    """So no published score of a synthetic task depends on which containment is asked."""
    rng, vocabulary = random.Random(0), [*world.World().vocabulary(), *map(str, range(120))]
    for _ in range(3000):
        output = rng.choices(vocabulary, k=5)
        for answer in (output[1:3], output[:1], rng.choices(vocabulary, k=2)):
            text, wanted = " ".join(output), [" ".join(answer)]
            assert m.contains(text, wanted) == m.released_contains(f" {text} ", [f" {wanted[0]} "])


def test_the_released_reading_is_a_mode_of_its_own() -> None:
    doc, output = {"answers": ["ART"]}, "A Party"
    assert m.process_squad(doc, [output])["contains"] == 0.0
    assert m.as_released(m.process_squad)(doc, [output]) == {"contains": 1.0, "exact_match": 0.0, "f1": 0.0}
    assert m.as_released(m.process_nq)({"answers": ["arty"]}, [output])["contains"] == 1.0
    assert m.as_released(m.process_nq)({"answers": ["ARTY"]}, [output])["contains"] == 0.0
    assert m.as_released(m.process_tools) is m.process_tools and m.as_released(m.process_number) is m.process_number


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
        assert scores["exact_match"] == scores["f1"] == 1.0
        assert scores["contains"] == 1.0 or not m.fold(output).strip()
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
        ("the the", "the"),  # an article stands before a word
        ("vitamin A", "vitamin a"),
        ("state-of-the-art", "stateoftheart"),  # punctuation goes first, so this "the" stays
        ("", ""),
        ("?!", "?!"),  # nothing would be left
        ("1.5 and 1,500.5, 3-4", "1.5 and 1500.5 3-4"),
        (".5 +5 -5 \u22125", "0.5 5 -5 -5"),
        ("C++ & C#: 5% of $3", "c++ & c# 5% of $3"),
        ("\u201cParis\u201d \u2014 `France`", "paris france"),
        ("\uff30aris\u00a0\ufb01nd co\u00adop", "paris find coop"),
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
        ("the", ["a"], 0, 0.0),
        ("", ["a"], 0, 0.0),
        ("", ["?"], 0, 0.0),
        ("<", [">"], 0, 0.0),
        ("?", ["?"], 1, 1.0),
        ("1.5", ["15"], 0, 0.0),
        ("1,5", ["15"], 0, 0.0),
        ("1,500", ["1500"], 1, 1.0),
        ("1234,567", ["1234567"], 0, 0.0),
        ("1.500", ["1500"], 0, 0.0),
        ("-5", ["5"], 0, 0.0),
        ("\u22125", ["-5"], 1, 1.0),
        ("5-3", ["53"], 0, 0.0),
        ("1/2", ["12"], 0, 0.0),
        ("5\u00b2", ["52"], 0, 0.0),
        ("C", ["C++"], 0, 0.0),
        ("F", ["F#"], 0, 0.0),
        ("5", ["5%"], 0, 0.0),
        ("vitamin", ["vitamin A"], 0, 2 / 3),
        ("cafe\u0301", ["caf\u00e9"], 1, 1.0),
        ("STRASSE", ["stra\u00dfe"], 1, 1.0),
        ("\uff11\uff15", ["15"], 1, 1.0),
        ("\u0661\u0665", ["15"], 1, 1.0),
        ("\u201cParis\u201d", ["Paris"], 1, 1.0),
        ("Paris", [""], 0, 0.0),
        ("Paris", [], 0, 0.0),
    ],
)
def test_exact_match_and_f1(output: str, answers: list[str], exact: int, f1: float) -> None:
    assert m.exact_match(output, answers) == exact
    assert m.f1(output, answers) == pytest.approx(f1)


def squads(text: str) -> str:
    """SQuAD's own normal form."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=5), max_size=5), st.sampled_from(["", ".", "!", " ?", ","]))
def test_plain_words_have_squads_normal_form(plain: list[str], end: str) -> None:
    text = " ".join([*plain, "last"]) + end
    assert m.normalise(text) == squads(text)


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
        pytest.param("caf\u00e9 b", ["cafe\u0301 b"], 1.0, id="composed and decomposed"),
        pytest.param("a , b", ["a , b"], 1.0, id="a separator in a name parts both"),
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
        ("it falls to \u22127.5", -7.5),
        ("from 10-3", 3),
        ("half is 1/2", 0.5),
        ("-1 1/4", -1.25),
        ("on 12/25/2020", 2020),
        ("1/0", None),
        ("1.5e3", 1500),
        ("1\u202f000", 1000),
        ("\uff11\uff15", 15),
        ("the answer is 5 (not 6)", 6),
        ("007", 7),
        ("12, 13", 13),  # a list, not a thousands separator
        ("12,13", 13),
        ("100%", 100),
        ("no idea", None),
        ("", None),
        ("-", None),
        ("-1e1000000", Decimal("-1e1000000")),  # as long as it may be for Decimal, and equal to no answer
        ("5e1000000000000000000000", None),
    ],
)
def test_final_number(text: str, number: float | Decimal | None) -> None:
    assert m.final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        pytest.param("the odds are .5", 0.5, id="no digit before the point"),
        pytest.param("the loss is -$5", -5, id="sign before the currency"),
        pytest.param("the loss is -€5", -5, id="sign before another currency"),
        pytest.param("the loss is £-1,500.50", -1500.5, id="sign behind another currency"),
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
        ("1/2", ["2"], 0),
        ("2e3", ["3"], 0),
        ("9007199254740993", ["9007199254740992"], 0),  # equal as floats
        ("1" * 400, ["2" * 400], 0),  # both infinite as floats
    ],
)
def test_number_match(output: str, answers: list[str], right: int) -> None:
    assert m.number_match(output, answers) == right
    assert m.process_number({"answers": answers}, [output]) == {"accuracy": right}
