"""Digests that name data in a spec."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from meft_bench.reading import check_regular

_CONTENT: dict[tuple[str, int, int], bytes] = {}


def _content(file: Path) -> bytes:
    """A file's digest, remembered within the process (a suite asks for the same files many times)."""
    stat = file.stat()
    key = (str(file), stat.st_mtime_ns, stat.st_size)
    if key not in _CONTENT:
        check_regular(file)
        with open(file, "rb") as content:
            _CONTENT[key] = hashlib.file_digest(content, "sha256").digest()
    return _CONTENT[key]


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """First 12 hex digits over the data files that the named sets use. Raises ValueError if there are none."""
    names = list(names)
    files = sorted(f for name in names for f in (folder / name).glob("*.jsonl*"))
    if not files:
        raise ValueError(f"no {' or '.join(names)}/*.jsonl[.gz] in the data folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.parent.name}/{file.name}".encode())
        digest.update(_content(file))
    return digest.hexdigest()[:12]
