"""Where all values are checked: kinds of numbers, texts and collections, each with its check and its sentence.

Commands, YAML files, specs, records and method options name their fields in tables of these kinds, so that a bad value
is answered in one line, before any work. Nothing heavy is imported here: help must be light.
"""

import argparse
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHOLE_MAX = 2**31 - 1
"""The largest count: torch's and Arrow's indices end here."""
MOST_STEPS, MOST_EPOCHS, MOST_ROWS_A_STEP = 10**8, 10**6, 2**20
"""Of one training run; a step's rows are in memory together."""
MOST_SEED = 2**32 - 1
"""numpy takes no larger one."""
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_ZERO = 2.0**-150
"""What is no larger becomes 0 in float32."""
_LONGEST_TEXT = 4096
_LONGEST_LINE = 1000

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 6, 6, 6


def shown(value: Any) -> str:
    """A value in an error, cut to a readable length whatever it is."""
    try:
        return _short.repr(value)
    except (ValueError, RecursionError):  # more digits than Python prints
        return f"{type(value).__name__} too long to print"


def one_line(said: object) -> str:
    """An error's text, of ours or of another library, as one line of at most 1000 characters."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 4]} ..."


@dataclass(frozen=True)
class Kind:
    """A kind of value; check raises ValueError, naming the field, for values of another kind."""

    def must(self, value: Any) -> str:
        """What is wrong with value, as the end of "name=value ..."; empty if it is right."""
        raise NotImplementedError

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless value is of this kind."""
        if wrong := self.must(value):
            raise ValueError(f"{name}={shown(value)} {wrong}")

    @property
    def text(self) -> bool:
        """Whether YAML's plain words stand for themselves here (no, 01, 1e-3)."""
        return False


@dataclass(frozen=True)
class Whole(Kind):
    """An int, no bool."""

    least: int = 1
    most: int = WHOLE_MAX

    def must(self, value: Any) -> str:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and self.least <= value <= self.most:
            return ""
        above = f" and at most {self.most:,}" if is_whole and value > self.most else ""
        return f"must be a whole number of at least {self.least}{above}"


@dataclass(frozen=True)
class Real(Kind):
    """An int or a float, no bool; finite, and a number in float32 too: computing is done there."""

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float = FLOAT32_MAX

    def must(self, value: Any) -> str:
        return "" if self._fits(value) else f"must be {self._range(value)}"

    def _fits(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not -FLOAT32_MAX <= value <= self.most:
            return False
        if self.above is not None and not value > self.above or self.above == 0 and value <= FLOAT32_ZERO:
            return False
        return (self.least is None or value >= self.least) and (self.below is None or value < self.below)

    def _range(self, value: Any) -> str:
        if self.below is not None and self.least is not None:
            return f"at least {self.least:g} and below {self.below:g}"
        start = "a number" if self.above is None else f"a number above {self.above:g}"
        start += "" if self.least is None else f" of at least {self.least:g}"
        if self.most < FLOAT32_MAX:
            return f"{start} and at most {self.most:g}"
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return f"{start}, within float32" if plain and not abs(value) <= self.most else start


@dataclass(frozen=True)
class Text(Kind):
    """A str that can be written as UTF-8, of at most 4096 characters."""

    empty: bool = False
    """Whether "" is one."""
    longest: int = _LONGEST_TEXT

    def must(self, value: Any) -> str:
        if not isinstance(value, str):
            return "must be text"
        if not value and not self.empty:
            return "is empty: give a text, or leave it out"
        if len(value) > self.longest:
            return f"has {len(value):,} characters: at most {self.longest:,}"
        if "\0" in value or not _encodes(value):
            return "holds what is no text (a NUL or half a character)"
        return ""

    @property
    def text(self) -> bool:
        return True


@dataclass(frozen=True)
class Choice(Kind):
    """One of some texts."""

    allowed: tuple[str, ...]

    def must(self, value: Any) -> str:
        if isinstance(value, str) and value in self.allowed:
            return ""
        return f"is unknown; choose one of {', '.join(self.allowed)}"

    @property
    def text(self) -> bool:
        return True


@dataclass(frozen=True)
class Flag(Kind):
    """True or False."""

    def must(self, value: Any) -> str:
        return "" if isinstance(value, bool) else "must be true or false"


@dataclass(frozen=True)
class Maybe(Kind):
    """None, or the kind inside."""

    kind: Kind

    def must(self, value: Any) -> str:
        if value is None:
            return ""
        return self.kind.must(value) + (" or null" if isinstance(self.kind, Flag) and self.kind.must(value) else "")

    @property
    def text(self) -> bool:
        return self.kind.text


@dataclass(frozen=True)
class Items(Kind):
    """A list or tuple of one kind; item is what the sentence calls each."""

    kind: Kind
    least: int = 0
    most: int = 1000

    def must(self, value: Any) -> str:
        if not isinstance(value, list | tuple):
            return "must be a list"
        if len(value) < self.least:
            return "is empty"
        return f"is a list of {len(value):,}: at most {self.most:,}" if len(value) > self.most else ""

    def check(self, name: str, value: Any) -> None:
        super().check(name, value)
        for item in _each_once(value):
            self.kind.check(name, item)


@dataclass(frozen=True)
class Pairs(Kind):
    """A dict of texts to one kind."""

    kind: Kind
    most: int = 1000

    def must(self, value: Any) -> str:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return "must map names to values"
        return f"has {len(value):,} names: at most {self.most:,}" if len(value) > self.most else ""

    def check(self, name: str, value: Any) -> None:
        super().check(name, value)
        for key, inner in value.items():
            Text().check(f"a name in {name}", key)
            self.kind.check(f"{name}.{key}", inner)


@dataclass(frozen=True)
class Plain(Kind):
    """A scalar as JSON has it, finite: what a method's own table checks further."""

    def must(self, value: Any) -> str:
        if isinstance(value, str):
            return Text(empty=True).must(value)
        if value is None or isinstance(value, bool):
            return ""
        if isinstance(value, int):
            return "" if abs(value) < 2**63 else "is too large for a setting"
        return "" if isinstance(value, float) and math.isfinite(value) else "must be one number, text, true or false"


@dataclass(frozen=True)
class Anything(Kind):
    """What is checked elsewhere."""

    def must(self, value: Any) -> str:
        return ""


@dataclass(frozen=True)
class Size(Kind):
    """Bytes: "24GB", "16GiB" or a plain number."""

    def must(self, value: Any) -> str:
        bytes_ = _parsed_bytes(value)
        if bytes_ is not None and 0 < bytes_ < _LEAST_BYTES:
            return f"is less than a megabyte: {_AS_SIZE}"
        return "" if bytes_ is not None and 0 < bytes_ <= _MOST_BYTES else f"is no size: {_AS_SIZE}"

    @property
    def text(self) -> bool:
        return True


@dataclass(frozen=True)
class Key(Kind):
    """A run key or its beginning."""

    def must(self, value: Any) -> str:
        is_key = isinstance(value, str) and 0 < len(value) <= 12 and set(value) <= set("0123456789abcdef")
        return "" if is_key else "is no run key: 1 to 12 of the digits 0-9 and a-f, as meft-bench list prints them"


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
          "tib": 2**40}  # fmt: skip
_LEAST_BYTES, _MOST_BYTES = 10**6, 2**62
"""Of a size of memory. Less is a slip, such as 24 for 24GB: nothing trains in it."""
_AS_SIZE = "write it as 24GB (10^9 bytes) or 24GiB (2^30)"


def memory_bytes(text: str | int | None, name: str = "memory") -> int | None:
    """Bytes of "24GB", "16GiB" or a plain number; None for None. Raises ValueError for anything else."""
    if text is None:
        return None
    Size().check(name, text)
    return int(_parsed_bytes(text) or 0)


def _parsed_bytes(text: Any) -> float | None:
    import re

    if isinstance(text, bool) or not isinstance(text, str | int | float) or (isinstance(text, str) and len(text) > 40):
        return None
    if isinstance(text, int):
        return text if text <= _MOST_BYTES else None
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found.group(2).lower() not in _UNITS:
        return None
    return float(found.group(1)) * _UNITS[found.group(2).lower()]


def _each_once(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The values without repeats: most of a record's thousands of scores are 0 or 1."""
    try:
        return [value for _, value in dict.fromkeys(zip(map(type, values), values, strict=True))]
    except TypeError:  # a list in the list
        return list(values)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- tables ----


def check_table(table: Mapping[str, Kind], values: Mapping[str, Any] | object) -> None:
    """Raises ValueError for the first field whose value is not of its kind; values is a dict or has attributes."""
    for name, kind in table.items():
        kind.check(name, values[name] if isinstance(values, Mapping) else getattr(values, name))


def check_names(given: Collection[Any], known: Collection[str], what: str, needed: Collection[str] = ()) -> None:
    """Raises ValueError for names that are not known, or that are needed and not given."""
    if unknown := sorted(shown(name) if not isinstance(name, str) else name for name in set(given) - set(known)):
        listed = one_line(", ".join(unknown))
        raise ValueError(f"unknown {what} {listed}; known: {', '.join(sorted(known)) or 'none'}")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"no {what} {', '.join(missing)} given")


def seconds(variable: str, usual_s: float) -> float:
    """What a variable of the environment says, in seconds; usual_s where it is unset. Raises ValueError unless it is a
    positive number."""
    given = os.environ.get(variable, str(usual_s))
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e7:
        raise ValueError(f"{variable}={given!r} is no positive number of seconds: unset it, or say {usual_s:g}")
    return number


# ---- the command line ----


def flag(kind: Kind) -> Callable[[str], Any]:
    """A parser for argparse's type= of one flag of this kind."""

    def parse(text: str) -> Any:
        value = _number(kind, text)
        if wrong := kind.must(value):
            raise argparse.ArgumentTypeError(f"{text if value is not text else shown(text)} {wrong}")
        return value

    return parse


def path(text: str) -> Path:
    """A path from the command line, for argparse's type=."""
    if wrong := Text().must(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} {wrong}")
    return Path(text)


def _number(kind: Kind, text: str) -> Any:
    inner = kind.kind if isinstance(kind, Maybe) else kind
    try:
        return int(text) if isinstance(inner, Whole) else float(text) if isinstance(inner, Real) else text
    except ValueError:
        return text
