"""Flags made from a dataclass: the kind reads and checks them, the field says what they are, None means not given."""

import argparse
from dataclasses import dataclass

import pytest

from meft_bench.fields import Choice, Flag, Maybe, Pairs, Plain, Real, Text, Whole, check_table
from meft_bench.flags import add_flags, kinds, setting


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str = setting(Text(), "who 100% needs it", heading="who")
    long_name: str = setting(Text(), "another", "embedded", metavar="NAME")
    count: int | None = setting(Maybe(Whole(1)), "how many", None, unset="all of them", heading="how")
    rate: float = setting(Real(above=0), "how fast", 1e-3)
    kind: str = setting(Choice(("a", "b")), "which", "a")
    loud: bool = setting(Flag(), "say more", False)
    options: dict = setting(Pairs(Plain()), "settings", flag="--option", metavar="NAME=VALUE")


@pytest.fixture
def parser():
    made = argparse.ArgumentParser(exit_on_error=False)
    add_flags(made, Job)
    return made


def test_what_is_not_given_is_none(parser):
    assert set(vars(parser.parse_args([])).values()) == {None} and set(kinds(Job)) == set(vars(parser.parse_args([])))
    assert Job(name="x").options == {} and Job(name="x").options is not Job(name="x").options
    with pytest.raises(TypeError, match="name"):
        Job()  # nothing but Pairs starts without a value


def test_values_are_of_their_kind(parser):
    typed = ["--name", "no", "--long-name", "x", "--count", "3", "--rate", "2", "--kind", "b", "--loud"]
    found = vars(parser.parse_args([*typed, "--option", "a=1", "--option", "b=2"]))
    assert found == {"name": "no", "long_name": "x", "count": 3, "rate": 2.0, "kind": "b", "loud": True,
                     "options": ["a=1", "b=2"]}  # fmt: skip
    check_table(kinds(Job), {**found, "options": {"a": 1}})


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--count", "0", "0 must be a whole number"), ("--name", "", "'' is empty"), ("--rate", "nan", "nan must be"),
     ("--kind", "c", "invalid choice: 'c'")],
)  # fmt: skip
def test_what_is_of_another_kind_is_named_with_its_flag(parser, flag, value, said):
    with pytest.raises(argparse.ArgumentError, match=said) as error:
        parser.parse_args([flag, value])
    assert str(error.value).startswith(f"argument {flag}: ")


def test_help_says_the_default_or_what_none_stands_for(parser):
    said = " ".join(parser.format_help().split())
    for line in ("who: --name NAME who 100% needs it --long-name NAME another (default: embedded)",
                 "how: --count COUNT how many (default: all of them) --rate RATE how fast (default: 0.001)",
                 "--kind {a,b} which (default: a) --loud say more --option NAME=VALUE settings"):  # fmt: skip
        assert line in said
