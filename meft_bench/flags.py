"""A command's flags, made from a frozen dataclass of its settings, whose fields say their kind, default and help once.

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        steps: int | None = setting(Maybe(Whole(1)), "optimizer steps", None, unset="3 epochs")

gives `--steps STEPS   optimizer steps (default: 3 epochs)`. Nothing heavy is imported here: help must be light.
"""

import argparse
import dataclasses
from dataclasses import MISSING, Field
from typing import Any

from meft_bench.fields import Choice, Flag, Kind, Maybe, Pairs, flag


def setting(
    kind: Kind,
    about: str,
    default: Any = MISSING,
    *,
    metavar: str | None = None,
    unset: str = "",
    flag: str = "",
    heading: str = "",
) -> Any:
    """A dataclass field that is also a flag and a name in a YAML file.

    about: its help. default: none makes it required, except Pairs, which start empty. unset: what happens at the
    default None or "auto", in words. flag: the option's own name, where it is not the field's. heading: of the part of
    the help that begins here.
    """
    metadata = {"kind": kind, "about": about, "metavar": metavar, "unset": unset, "flag": flag, "heading": heading}
    if isinstance(kind, Pairs):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def kinds(settings: type) -> dict[str, Kind]:
    """The kind of every setting of such a dataclass, for fields.check_table and reading.read_yaml."""
    return {field.name: field.metadata["kind"] for field in dataclasses.fields(settings)}


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add a flag for every setting. What is not given is None, so that a file's values and the defaults stay known."""
    group: Any = parser
    for field in dataclasses.fields(settings):
        about = field.metadata
        if about["heading"]:
            group = parser.add_argument_group(about["heading"])
        name = about["flag"] or f"--{field.name.replace('_', '-')}"
        group.add_argument(name, dest=field.name, help=_help(field), default=None, **_reading(about))


def _reading(about: Any) -> dict[str, Any]:
    """argparse's way to read a value of the kind."""
    kind = about["kind"].kind if isinstance(about["kind"], Maybe) else about["kind"]
    if isinstance(kind, Flag):
        return {"action": "store_true"}
    if isinstance(kind, Choice):
        return {"choices": kind.allowed}
    if isinstance(kind, Pairs):
        return {"action": "append", "metavar": about["metavar"]}
    return {"type": flag(about["kind"]), "metavar": about["metavar"]}


class Once(argparse.Action):
    """Stores a value, and refuses a second one: argparse would leave what the first one names out in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest, None) not in (None, values):
            parser.error(f"{option_string} is given twice, and takes one")
        setattr(namespace, self.dest, values)


def _help(field: "Field[Any]") -> str:
    default = field.metadata["unset"] or _shown(field.default)
    return f"{field.metadata['about']}{f' (default: {default})' if default else ''}".replace("%", "%%")


def _shown(default: Any) -> str:
    if default is MISSING or default is None or isinstance(default, bool):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)
