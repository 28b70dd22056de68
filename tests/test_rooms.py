"""The rooms of the package stand in an order, and no import climbs back. The order is the package's own docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

import meft_bench

ROOT = Path(meft_bench.__file__).parent
ORDER = [line.split()[0] for line in (meft_bench.__doc__ or "").splitlines() if line.startswith("    ")]
OUTSIDE = {"baselines": ROOT.parent / "baselines", "tasks": ROOT.parent / "tasks"}
"""Rooms that stand beside the package in a checkout."""


def room_of(module: str) -> str:
    """ "meft_bench.train.loop" -> "train"; a file of the package's top that has no place of its own is "(root)"."""
    name = module.split(".")[1]
    return name if name in ORDER else "(root)"


def files() -> Iterator[tuple[str, Path]]:
    """(module, file) of the whole package; the two front modules are left out, since they name and load nothing."""
    for folder, package in [(ROOT, "meft_bench"), *((f, f"meft_bench.{name}") for name, f in OUTSIDE.items())]:
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if (package, parts) not in (("meft_bench", ("__init__",)), ("meft_bench", ("__main__",))):
                yield ".".join([package, *parts]).removesuffix(".__init__"), file


def imported(source: str) -> Iterator[str]:
    """Every module of ours that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("meft_bench"))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "meft_bench":
            yield from (f"meft_bench.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("meft_bench."):
            yield node.module or ""


def arrows() -> dict[tuple[str, str], str]:
    """(from room, to room) -> one file that has the arrow."""
    return {
        (room_of(module), room_of(name)): str(file)
        for module, file in files()
        for name in imported(file.read_text(encoding="utf-8"))
    }


def test_every_folder_is_a_room_of_the_docstring():
    folders = {f.name for f in ROOT.iterdir() if f.is_dir() and (f / "__init__.py").is_file()} | set(OUTSIDE)
    assert folders <= set(ORDER) and len(ORDER) == len(set(ORDER))
    modules = {f.stem for f in ROOT.glob("*.py")}
    assert set(ORDER) - folders <= modules | {"(root)"}


def test_no_import_climbs_back():
    place = {room: i for i, room in enumerate(ORDER)}
    found = arrows()
    climbing = {arrow: file for arrow, file in found.items() if place[arrow[0]] < place[arrow[1]]}
    assert not climbing
    assert ("harness", "train") in found and ("baselines", "train") in found, "arrows are seen at all"


def test_no_room_imports_the_public_names_of_the_package():
    """The package looks its public names up in integrations: a room that imported one would stand in a circle."""
    public = {name for name in (*meft_bench._LAZY, "__version__")}
    through = [(m, n) for m, f in files() for n in imported(f.read_text(encoding="utf-8")) if n.split(".")[1] in public]
    assert not through


def test_an_arrow_against_the_order_is_seen():
    for line in ("import meft_bench.bench.layer", "from meft_bench.bench import layer", "from meft_bench import bench"):
        names = list(imported(f"def f():\n    {line}\n"))
        assert [room_of(name) for name in names] == ["bench"]
    assert ORDER.index("harness") < ORDER.index("bench")
