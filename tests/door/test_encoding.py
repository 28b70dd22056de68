"""Text is UTF-8 in every locale: each open of a text file names its encoding, and a C locale trains."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [f for name in ("meft_bench", "baselines", "tasks", "docs") for f in sorted((ROOT / name).rglob("*.py"))]


def _opens_text_without_encoding(call: ast.Call) -> bool:
    """Whether call is open(), Path.open(), os.fdopen(), gzip.open() in a text mode, read_text() or write_text()."""
    named = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if named not in ("open", "fdopen", "read_text", "write_text"):
        return False
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        if (
            named == "read_text"
            and call.func.value.id == "reading"
            or (call.func.value.id, named)
            in (
                ("os", "open"),
                ("Image", "open"),
            )
        ):
            return False
    if isinstance(call.func, ast.Name) and named == "read_text":
        return False  # the reader of this package, which names it inside
    if any(k.arg in ("encoding", None) for k in call.keywords):
        return False
    given = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    modes = [m for m in given if isinstance(m, str) and set(m) <= set("rwxabt+") and m]
    if named in ("read_text", "write_text"):
        return True
    gzipped = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "gzip"
    return not any("b" in m for m in modes) and not (gzipped and not any("t" in m for m in modes))


def test_every_open_names_its_encoding():
    assert len(SOURCES) > 100
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _opens_text_without_encoding(node)
    ]
    assert not found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("open('a')", True), ("open('a', 'w')", True), ("open('a', 'rb')", False), ("p.open(mode='w')", True),
        ("open('a', encoding='utf-8')", False), ("p.read_text()", True), ("p.write_text('x', encoding='utf-8')", False),
        ("os.open('a', 0)", False), ("os.fdopen(h, 'w')", True), ("gzip.open(p)", False), ("gzip.open(p, 'rt')", True),
        ("read_text(p)", False), ("open(p, **how)", False), ("Image.open(p)", False),
    ],
)  # fmt: skip
def test_the_check_itself(text, found):
    assert _opens_text_without_encoding(ast.parse(text).body[0].value) == found


def test_a_c_locale_trains_and_answers(tmp_path):
    row = '{"prompt": "wer ist ü ?", "completion": "niemand — 誰も"}\n'
    (tmp_path / "r.jsonl").write_text(row * 8, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    sizes = ["--steps", "1", "--batch-size", "4", "--neurons", "48", "--eval-share", "0", "--eval-rows", "2"]
    command = [sys.executable, "-m", "meft_bench", "train", "--data", "r.jsonl", "--output", "out", *sizes]
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Loading weights" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") and not (tmp_path / "out.partial").exists()
