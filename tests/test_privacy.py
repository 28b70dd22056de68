"""No room reaches into meft/: what is private there may be renamed, and nobody puts a method in another's place."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "meft_bench" / "meft"
OTHERS = sorted(f for folder in ("meft_bench", "baselines") for f in (ROOT / folder).rglob("*.py")
                if not f.is_relative_to(METHOD))  # fmt: skip
_TORCH = {name for kind in (torch.nn.Module, torch.optim.Optimizer) for name in dir(kind)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """Names of functions and classes, and of all that is assigned: variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def methods(tree: ast.AST) -> set[str]:
    """Names of the methods of the classes in tree."""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return {item.name for kind in classes for item in kind.body if isinstance(item, ast.FunctionDef)}


@cache
def method_names() -> tuple[set[str], set[str]]:
    """(private names, names of methods) of meft/."""
    trees = [ast.parse(file.read_text()) for file in METHOD.rglob("*.py")]
    private = {name for tree in trees for name in defined(tree) if is_private(name)} - _TORCH
    return private, {name for tree in trees for name in methods(tree)}


def taken_from_the_method(tree: ast.AST) -> set[str]:
    """Modules, classes and functions of meft/ that a file imports, as it calls them."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    ours = (node for node in imports if (node.module or "").startswith("meft_bench.meft"))
    return {name.asname or name.name for node in ours for name in node.names}


def reached(tree: ast.AST, private: set[str], patchable: set[str]) -> Iterator[str]:
    """What code of another room reads, sets, imports or names of meft/'s private parts, and what it patches."""
    own, taken = defined(tree), taken_from_the_method(tree)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            if node.attr in private and not mine:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("meft_bench.meft"):
            yield from (f"import {name.name}" for name in node.names if is_private(name.name))
        elif isinstance(node, ast.Call):
            called = _called(node)
            named = {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
            patches = called == "object" and bool({ast.unparse(arg) for arg in node.args[:1]} & taken)
            if called == "setattr" and any(_is_function(arg, functions) for arg in node.args[2:]):
                patches |= not named or bool(named & patchable)  # a name that the code makes may be any method's
            if named & private or patches:
                yield ast.unparse(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                method = isinstance(target, ast.Attribute) and target.attr in patchable
                if method and _is_function(node.value, functions):
                    yield ast.unparse(target)


def _called(call: ast.Call) -> str:
    """The last name of what is called: "object" of mock.patch.object(...)."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_function(value: ast.expr, functions: set[str]) -> bool:
    """Whether a value is a function: a lambda, a partial, or one that this file defines."""
    if isinstance(value, ast.Call):
        return _called(value) in {"partial", *functions}
    return isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)


def test_no_room_reaches_into_the_method() -> None:
    private, patchable = method_names()
    found = {str(file.relative_to(ROOT)): list(reached(ast.parse(file.read_text()), private, patchable))
             for file in OTHERS}  # fmt: skip
    assert len(found) > 50 and not {file: places for file, places in found.items() if places}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("link._copy(x)", ["link._copy"]),
        ("updates._advance = lambda *_: None", ["updates._advance", "updates._advance"]),
        ("from meft_bench.meft.layer import _SparseAdapter", ["import _SparseAdapter"]),
        ("clock.wrap(link, '_copy', 'transfer')", ["clock.wrap(link, '_copy', 'transfer')"]),
        ("def timed(): pass\nsetattr(target, name, timed)", ["setattr(target, name, timed)"]),
        ("def select(h): pass\nadapter.select = select", ["adapter.select"]),
        ("optimizer.zero_grad = functools.partial(f, 1)", ["optimizer.zero_grad"]),
        ("class A:\n def f(self): self._copy = self._copy", []),
        ("class A:\n def f(self): return self._copy", ["self._copy"]),
        (
            "from meft_bench.meft.engine import native\nmock.patch.object(native, name, f)",
            ["mock.patch.object(native, name, f)"],
        ),
        ("adapter.on_select = note", []),
    ],
)
def test_what_counts_as_reaching_in(code: str, found: list[str]) -> None:
    assert list(reached(ast.parse(code), *method_names())) == found
