"""Checks of a method's options before torch is imported; its Options class checks again, with what only it knows."""

from collections.abc import Mapping
from typing import Any

from meft_bench.fields import Kind, Pairs, Plain, check_table, one_line
from meft_bench.train.contract import describe, method_names


def option_kinds(method: Any) -> dict[str, Kind]:
    """Option -> what it takes; nothing for a method that is not there."""
    return dict(describe(method).kinds) if method in method_names() else {}


def check_options(method: str, given: Any, whole: bool = True) -> None:
    """Raises ValueError for options that a method does not have or take, and, if whole, for those it lacks."""
    Pairs(Plain()).check("options", given)
    if method not in method_names():
        return
    about = describe(method)
    check_names(method, given, about.kinds)
    check_table({name: about.kinds[name] for name in given}, given)
    check_needed(method, given, about.needed if whole else ())
    if about.light is not None and set(about.needed) <= set(given) and whole:
        about.light.Options(**given)


def check_names(method: str, given: Mapping[str, Any], known: Mapping[str, Any] | set[str]) -> None:
    """Raises ValueError for an option that the method does not have."""
    if unknown := sorted(set(given) - set(known)):
        listed = one_line(", ".join(unknown))
        raise ValueError(f"{method} has no option {listed}; it has: {', '.join(sorted(known)) or 'none'}")


def check_needed(method: str, given: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Raises ValueError for options that the method needs and that are not given."""
    if missing := sorted(name for name in needed if name not in given):
        raise ValueError(f"{method} needs the option {', '.join(missing)}")
