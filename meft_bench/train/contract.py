"""What a method is, as its own file tells it, without importing it: methods import torch, and what a user asks for is
checked before that.

A method is one file: baselines/<name>.py, or meft.py beside this one. It defines, as plain values,

    TITLE              how tables call it
    NUMERICS           raised by a change of what it computes
    LEARNING_RATES     the grid its sweep tries; empty where nothing is trained
    SIZE               the option that makes it larger; left out where there is none
    SHOWN              the options that tell its size to a reader (default: SIZE alone)
    CHOICES            option -> the texts it takes
    RANGES             option -> (lower, upper) of a real number: above the one and at most the other (None: no limit)
    TRAINS             "adapter" (default), or "base": the base's own parameters, in the model's dtype
    PLACE              "device" (default), or "host": parameters, gradients and moments lie in host memory
    SAVED              "tensors" (default), "peft" or "model": the files a saved adapter is made of
    EXACT_COUNT        True: count() holds on every base, given its width and the FFNs it has

and, as code,

    Options                          a frozen dataclass of its settings; raises ValueError on a bad one
    count(options, shape)            trainable parameters by group, closed formula for LLaMA-like layers
    attach(model, options, seed)     inserts its modules, freezes the rest, returns an Attached (methods.py)

and, if its optimizer is not AdamW, state_bytes(options, step), which step_bytes.py asks for what it keeps;
and, if its size does not stand for itself, sizes(limit) and options_at(size, given), as meft.py does. Options may be
the class of another file; then the method's own file gives KINDS and imports no torch.
"""

import ast
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from meft_bench.fields import Choice, Flag, Kind, Plain, Real, Whole, shown

OURS = "meft"
"""The method that the project is about; its file stands beside this one."""
_NEEDED = ("TITLE", "NUMERICS", "LEARNING_RATES")
_CONSTANTS = (*_NEEDED, "SIZE", "SHOWN", "CHOICES", "RANGES", "TRAINS", "PLACE", "SAVED", "EXACT_COUNT")
_OWN_STATE = "state_bytes"
_KINDS: dict[str, Kind] = {"int": Whole(1), "float": Real(), "bool": Flag()}


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """A method's description."""

    name: str
    title: str
    numerics: int
    learning_rates: tuple[float, ...]
    size: str | None
    shown: tuple[str, ...]
    trains: str
    place: str
    saved: str
    exact_count: bool
    own_state: bool
    """Whether its optimizer is not AdamW: it says itself what that keeps, in state_bytes()."""
    kinds: Mapping[str, Kind]
    """Option -> what it takes."""
    needed: tuple[str, ...]
    """Options without a default."""
    light: ModuleType | None
    """Its module, where that imports no torch; else None."""

    @property
    def untrained(self) -> bool:
        """Whether it trains nothing."""
        return not self.learning_rates

    @property
    def trains_base(self) -> bool:
        return self.trains == "base"

    def on_host(self, options: Mapping[str, Any]) -> bool:
        """Whether its parameters, gradients and moments lie in host memory; an option "placement" may say otherwise."""
        return self.place == "host" and options.get("placement", "host") != "device"


def method_names() -> list[str]:
    """Every method that can be named in a spec."""
    return sorted([OURS, *(m.name for m in pkgutil.iter_modules(_baselines().__path__))])


def check_method(name: Any) -> None:
    """Raises ValueError, listing the known names, for a method that is not there; imports none."""
    if not isinstance(name, str) or name not in method_names():
        raise ValueError(f"unknown method {shown(name)}; known: {', '.join(method_names())}")


def module_name(name: str) -> str:
    """Where the method is imported from."""
    return f"meft_bench.{'train' if name == OURS else 'baselines'}.{name}"


def method_file(name: str) -> Path:
    """The method's file. Raises ValueError for an unknown one."""
    check_method(name)
    folders = [Path(__file__).parent] if name == OURS else [Path(folder) for folder in _baselines().__path__]
    return next(file for folder in folders if (file := folder / f"{name}.py").is_file())


def describe(name: str) -> MethodInfo:
    """The method's description. Raises ValueError for an unknown method, and for a file that does not tell what it
    must."""
    return _described(name, method_file(name))


def _baselines() -> ModuleType:
    return importlib.import_module("meft_bench.baselines")


@cache
def _described(name: str, file: Path) -> MethodInfo:
    told, options = _read(file)
    light = None
    if options is None:
        light = importlib.import_module(module_name(name))
        without_default = [f for f in fields(light.Options) if f.default is MISSING and f.default_factory is MISSING]
        kinds, needed = light.KINDS, tuple(f.name for f in without_default)
    else:
        kinds, needed = _kinds(options, told.get("CHOICES", {}), told.get("RANGES", {}))
    size = told.get("SIZE")
    return MethodInfo(
        name=name,
        title=told["TITLE"],
        numerics=told["NUMERICS"],
        learning_rates=told["LEARNING_RATES"],
        size=size,
        shown=told.get("SHOWN", (size,) if size else ()),
        trains=told.get("TRAINS", "adapter"),
        place=told.get("PLACE", "device"),
        saved=told.get("SAVED", "tensors"),
        exact_count=told.get("EXACT_COUNT", False),
        own_state=_OWN_STATE in told,
        kinds=kinds,
        needed=needed,
        light=light,
    )


def _read(file: Path) -> tuple[dict[str, Any], ast.ClassDef | None]:
    """(the file's constants, and state_bytes if it has that; its class Options if it has one)."""
    told, options = {}, None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            options = node
        if isinstance(node, ast.FunctionDef) and node.name == _OWN_STATE:
            told[_OWN_STATE] = True
        constant, value = assignment(node)
        if constant in _CONSTANTS and value is not None:
            told[constant] = _value(value, constant, file)
    if missing := [constant for constant in _NEEDED if constant not in told]:
        raise ValueError(f"{file.name} does not define {', '.join(missing)}: see docs/add_a_method.md")
    return told, options


def assignment(node: ast.stmt) -> tuple[str, ast.expr | None]:
    """(name, value) of a line NAME = value, annotated or not; ("", None) of any other statement."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return "", None
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return (target.id, node.value) if isinstance(target, ast.Name) else ("", None)


def _value(node: ast.expr, constant: str, file: Path) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{file.name}: {constant} is read without importing the file: write out its value") from None


def _kinds(
    options: ast.ClassDef,
    choices: Mapping[str, tuple[str, ...]],
    ranges: Mapping[str, tuple[float | None, float | None]],
) -> tuple[dict[str, Kind], tuple[str, ...]]:
    """(option -> what it takes, options without a default) of a class Options. Where the annotation is not a plain one,
    the class alone checks the value."""
    found: dict[str, Kind] = {}
    needed = []
    for node in options.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            if name in choices:
                found[name] = Choice(choices[name])
            elif name in ranges:
                found[name] = in_range(ranges[name])
            else:
                found[name] = _KINDS.get(ast.unparse(node.annotation), Plain())
            if node.value is None:
                needed.append(name)
    return found, tuple(needed)


def in_range(limits: tuple[float | None, float | None]) -> Real:
    """A real number within a method's RANGES."""
    lower, upper = limits
    return Real(above=lower) if upper is None else Real(above=lower, most=upper)
