"""Write files in one step and for good, results among them as JSON; and know a full disk from other errors."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, *_FORBIDDEN)


def write_if_changed(path: Path, content: bytes) -> bool:
    """True if path was written; a reader sees the old file or the new one. Raises ValueError when it cannot be."""
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        replace(path, content)
    except OSError as error:
        raise ValueError(f"cannot write {path.name} ({error.strerror}): free space or check the folder") from None
    return True


def write_new(files: Mapping[Path, bytes]) -> None:
    """Write each file; one that holds the same already stays. Raises ValueError, before any is written, where a path
    holds something else, and OSError."""
    for path, content in files.items():
        if path.exists() and not (path.is_file() and path.read_bytes() == content):
            raise ValueError(f"{path} is there and holds something else: move it away, or choose another folder")
    for path, content in files.items():
        if not path.exists():
            replace(path, content)


def replace(path: Path, content: bytes) -> None:
    """Put content in the place of path, on the disk before it gets its name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def result_bytes(value: Any) -> bytes:
    """value as the JSON of every file under results/: a block a line, and where a block holds nothing but objects, an
    object a line. Equal values are equal bytes, and a difference names its block. Raises ValueError for NaN."""
    if not value or not isinstance(value, dict):
        return (_compact(value) + "\n").encode()
    return (
        "{\n" + ",\n".join(_block(f" {json.dumps(name)}:", value[name]) for name in sorted(value)) + "\n}\n"
    ).encode()


def write_json(path: Path, value: Any) -> None:
    """Replace path by result_bytes(value) in one step: a reader sees the old file or the new one, never half of it.
    Raises OSError, and ValueError for a number that JSON does not have."""
    replace(path, result_bytes(value))


def _block(start: str, block: Any) -> str:
    """A block on its line, or opened: its objects on a line each."""
    if isinstance(block, list) and _only_objects(block):
        return f"{start}[\n  " + ",\n  ".join(map(_compact, block)) + "\n ]"
    if isinstance(block, dict) and _only_objects(block.values()):
        lines = [f"{json.dumps(name)}:{_compact(block[name])}" for name in sorted(block)]
        return f"{start}{{\n  " + ",\n  ".join(lines) + "\n }"
    return start + _compact(block)


def _only_objects(parts: Collection[Any]) -> bool:
    return len(parts) > 0 and all(isinstance(part, dict) for part in parts)


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """sync() for everything below folder, and folder itself."""
    for place, _, files in os.walk(folder):
        for name in files:
            sync(Path(place) / name)
        sync(Path(place))


def disk_error(error: BaseException) -> str | None:
    """What the system says of a write that failed ("No space left on device"); None for any other error.

    safetensors reports such errors as its own kind, with the number in the text.
    """
    code = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"os error (\d+)", str(error))
        code = int(found.group(1)) if found else None
    return os.strerror(code) if code in _DISK else None


def is_forbidden(reason: str) -> bool:
    """Whether what disk_error() says is that this process may not write there: more space would not help."""
    return reason in map(os.strerror, _FORBIDDEN)
