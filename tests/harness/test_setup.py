"""make setup: every package is verified by digest, and two commands in a fresh clone set up once."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = ROOT / "meft_bench" / "constraints.txt"


def _pins() -> dict[str, list[str]]:
    """Package -> digests."""
    found = {}
    for entry in re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", PINS.read_text(), flags=re.M)):
        pin, *digests = entry.replace("\\\n", " ").split()
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin), pin
        assert digests and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in digests), pin
        found[re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower()] = digests
    return found


def test_every_package_but_torch_is_pinned_with_its_digests():
    pins, project = _pins(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement).group()).lower()
        assert (name in pins) == (name != "torch"), name
    # Compiled packages have files for many platforms, and all of them are listed.
    assert min(len(pins[name]) for name in ("numpy", "pandas", "pyarrow", "safetensors")) > 10
    assert "://" not in PINS.read_text(), "which registry is asked is the user's business"


_FAKE = """#!/bin/sh
case "$1 $2" in
"-c "*) exec python3 "$@" ;;
"-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> log; sleep 1 ;;
*) echo "$@" >> log ;;
esac
"""


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("python3"), reason="needs make and python3")
def test_two_commands_in_a_fresh_clone_set_up_once(tmp_path):
    (tmp_path / "meft_bench").mkdir()
    for name in ("Makefile", "pyproject.toml", "meft_bench/constraints.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "fake").write_text(_FAKE)
    (tmp_path / "fake").chmod(0o755)
    command = ["make", "replicate", f"PYTHON={tmp_path / 'fake'}"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    done = (tmp_path / "log").read_text().splitlines()
    assert done[:1] == ["venv"] and len([line for line in done if "install" in line]) == 3
    assert done[2].endswith("--no-deps --require-hashes --requirement meft_bench/constraints.txt")
    assert done[-2:] == ["-m meft_bench replicate --suite default"] * 2
