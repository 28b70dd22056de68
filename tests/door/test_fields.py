"""Kinds of values: what is right passes, what is not is one short line that names the field."""

import argparse
import math

import pytest

from meft_bench import fields
from meft_bench.fields import (
    FLOAT32_MAX,
    Choice,
    Flag,
    Items,
    Key,
    Maybe,
    Pairs,
    Plain,
    Real,
    Size,
    Text,
    Whole,
    memory_bytes,
)

RIGHT = [
    (Whole(), 1), (Whole(0), 0), (Whole(), 2**31 - 1), (Whole(1, 5), 5),
    (Real(), -1.5), (Real(above=0), 1), (Real(above=0), 1e-45), (Real(above=0), FLOAT32_MAX), (Real(least=0), 0),
    (Real(least=0, below=1), 0.999), (Real(above=0, most=1), 1.0),
    (Text(), "no"), (Text(), "ü" * 4096), (Text(empty=True), ""), (Choice(("a", "b")), "b"),
    (Flag(), False), (Maybe(Flag()), None), (Maybe(Flag()), True), (Maybe(Whole()), None), (Maybe(Whole()), 3),
    (Items(Choice(("a",))), ["a"]), (Items(Choice(("a",)), least=1), ("a", "a")), (Items(Whole()), []),
    (Pairs(Text()), {}), (Pairs(Text()), {"prompt": "en"}), (Plain(), None), (Plain(), True), (Plain(), 1e-3),
    (Plain(), "x"), (Plain(), 2**63 - 1), (Size(), "24GB"), (Size(), 10**6), (Size(), "1.5 GiB"), (Size(), 2**62),
    (Key(), "0"), (Key(), "0123456789ab"),
]  # fmt: skip

WRONG = [
    (Whole(), 0, "n=0 must be a whole number of at least 1"),
    (Whole(), 2**31, "n=2147483648 must be a whole number of at least 1 and at most 2,147,483,647"),
    (Whole(1, 5), 6, "at most 5"),
    (Whole(), True, "n=True must be a whole number"),
    (Whole(), 1.0, "n=1.0 must be a whole number"),
    (Whole(), "1", "n='1' must be a whole number"),
    (Whole(), None, "n=None must be a whole number"),
    (Whole(), [1], "n=[1] must be a whole number"),
    (Real(), True, "must be a number"),
    (Real(), "1", "must be a number"),
    (Real(), math.nan, "must be a number"),
    (Real(), -math.inf, "must be a number, within float32"),
    (Real(), -1e39, "must be a number, within float32"),
    (Real(), 1e39, "must be a number, within float32"),
    (Real(above=0), 1e39, "n=1e+39 must be a number above 0, within float32"),
    (Real(above=0), math.inf, "within float32"),
    (Real(above=0), 0, "n=0 must be a number above 0"),
    (Real(above=0), 1e-46, "must be a number above 0"),
    (Real(above=0, most=1), 1.01, "must be a number above 0 and at most 1"),
    (Real(least=0), -1e-9, "must be a number of at least 0"),
    (Real(least=0, below=1), 1, "n=1 must be at least 0 and below 1"),
    (Real(least=0, below=1), -0.1, "must be at least 0 and below 1"),
    (Real(least=0), 10**400, "must be a number of at least 0"),
    (Text(), "", "n='' is empty"),
    (Text(), 3, "n=3 must be text"),
    (Text(), None, "must be text"),
    (Text(), "a" * 4097, "has 4,097 characters: at most 4,096"),
    (Text(), "\ud83d", "holds what is no text"),
    (Text(), "a\0", "holds what is no text"),
    (Choice(("a", "b")), "c", "n='c' is unknown; choose one of a, b"),
    (Choice(("a", "b")), ["a"], "is unknown"),
    (Flag(), 1, "n=1 must be true or false"),
    (Maybe(Flag()), 0, "n=0 must be true or false or null"),
    (Maybe(Whole()), 0, "n=0 must be a whole number"),
    (Items(Choice(("a",))), "a", "n='a' must be a list"),
    (Items(Choice(("a",))), ["a", "b"], "n='b' is unknown"),
    (Items(Choice(("a",)), least=1), [], "n=[] is empty"),
    (Items(Whole(), most=2), [1, 2, 3], "is a list of 3: at most 2"),
    (Pairs(Text()), ["a"], "must map names to values"),
    (Pairs(Text()), {1: "a"}, "must map names to values"),
    (Pairs(Text()), {"": "a"}, "a name in n='' is empty"),
    (Pairs(Text()), {"a": 1}, "n.a=1 must be text"),
    (Pairs(Text(), most=1), {"a": "b", "c": "d"}, "has 2 names: at most 1"),
    (Plain(), [1], "must be one number, text, true or false"),
    (Plain(), math.nan, "must be one number"),
    (Plain(), 2**63, "too large"),
    (Plain(), "\0", "no text"),
    (Size(), "much", "n='much' is no size: write it as 24GB"),
    (Size(), 0, "is no size"),
    (Size(), True, "is no size"),
    (Size(), 2**62 + 1, "is no size"),
    (Size(), "9" * 30 + "TB", "is no size"),
    (Size(), "24 parsec", "n='24 parsec' is no size"),
    (Size(), "24", "n='24' is less than a megabyte: write it as 24GB"),
    (Size(), 999_999, "is less than a megabyte"),
    (Size(), [], "is no size"),
    (Key(), "", "is no run key"),
    (Key(), "/etc/passwd", "is no run key"),
    (Key(), "0123456789abc", "is no run key"),
    (Key(), "*", "is no run key"),
]


@pytest.mark.parametrize(("kind", "value"), RIGHT, ids=range(len(RIGHT)))
def test_right_values_pass(kind, value):
    kind.check("n", value)


@pytest.mark.parametrize(("kind", "value", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_are_one_line(kind, value, message):
    with pytest.raises(ValueError) as error:
        kind.check("n", value)
    said = str(error.value)
    assert message in said and said.startswith(("n=", "n.", "a name in n=")) and said.isprintable()


LONG = {
    "digits": 10**5000,
    "text": "x" * 10**6,
    "lists": [[[[[0] * 99] * 99] * 99] * 99],
    "dict": {"a" * 500: "b" * 500},
}


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_no_value_makes_a_long_line(value):
    assert len(fields.shown(value)) < 1000
    with pytest.raises(ValueError) as error:
        Whole().check("n", value)
    assert len(str(error.value)) < 1200


def test_an_error_of_many_lines_is_one():
    assert fields.one_line("a\n  b\r\nc") == "a b c" and fields.one_line(ValueError()) == "ValueError"
    assert len(fields.one_line("x y " * 1000)) == 1000 and fields.one_line("x y " * 1000).endswith(" ...")


def test_sizes_of_memory():
    assert memory_bytes("24GB") == 24_000_000_000 and memory_bytes("1.5 GiB") == 1_610_612_736
    assert (
        memory_bytes(2_000_000) == memory_bytes("2000000") == 2_000_000
        and memory_bytes(None) is None
        and memory_bytes("2000kb") == 2_000_000
    )
    with pytest.raises(ValueError, match="^gpu_memory='much' is no size"):
        memory_bytes("much", "gpu_memory")


def test_a_table_names_the_field_that_is_wrong():
    table = {"a": Whole(), "b": Text()}
    fields.check_table(table, {"a": 1, "b": "x"})
    fields.check_table(table, argparse.Namespace(a=1, b="x"))
    with pytest.raises(ValueError, match="b=2 must be text"):
        fields.check_table(table, {"a": 1, "b": 2})


def test_names_that_are_unknown_or_missing():
    fields.check_names({"a"}, {"a", "b"}, "setting", ["a"])
    with pytest.raises(ValueError, match="^unknown setting 1, c; known: a, b$"):
        fields.check_names(["c", 1], ["b", "a"], "setting")
    with pytest.raises(ValueError, match="^no setting a given$"):
        fields.check_names([], ["a"], "setting", ["a"])


@pytest.mark.parametrize(
    ("kind", "text", "value"), [(Whole(), "7", 7), (Real(), "1e-3", 1e-3), (Maybe(Whole()), "7", 7), (Text(), "7", "7")]
)
def test_flags_are_read_as_their_kind(kind, text, value):
    found = fields.flag(kind)(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [(Whole(), "0", "^0 must be a whole"), (Whole(), "x", "^'x' must be a whole"), (Real(above=0), "nan", "^nan must")],
)
def test_wrong_flags_say_their_value_once(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        fields.flag(kind)(text)
