"""A disk that can be full, for tests that want a real one."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a disk needs root")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Inside, a disk of that size, such as "8k", is mounted on the folder. Skips the test where none can be."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]).returncode:
        pytest.skip("this system does not let a small disk be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
