"""Where all files are read: what a stranger wrote is read with limits on kind, bytes, depth and number of values.

Every function raises ValueError in one line that names the file. Nothing heavy is imported here.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft_bench.fields import Items, Kind, Maybe, Pairs, Real, one_line, shown
from meft_bench.text import cut, printable

SETTINGS_BYTES = 128 * 2**10
"""Of a YAML file of settings: a hundred times what one needs, and read in a second."""
RECORD_BYTES = 32 * 2**20
JSON_BYTES = 64 * 2**20
_COLLECTIONS = {dict, list}
_LARGEST_FILE = 2**62
_SPARSE_BYTES, _SPARSE = 2**27, 64
"""Above so many bytes, a file that claims more than so many times what it takes on the disk is not read."""
_TEXTS = (".jsonl", ".json", ".csv", ".txt")
_DEPTH = 64
_VALUES = 20_000
"""YAML values once aliases are written out."""
_CONTAINERS = 500_000
"""Lists and objects of a JSON text: each takes some 100 bytes of memory for 2 bytes of text."""


def read_bytes(path: Path, most: int, what: str = "file") -> bytes:
    """The content of a regular file of at most most bytes; a pipe, a device or a folder is refused, not waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise _cannot_read(path, what, error) from None
    try:
        _check_size(os.fstat(handle), path, most, what)
        with open(handle, "rb", closefd=False) as file:
            content = file.read(most + 1)  # files of /proc say 0 bytes
    except OSError as error:
        raise _cannot_read(path, what, error) from None
    finally:
        os.close(handle)
    if len(content) > most:
        raise ValueError(f"{printable(path)} has more than the {most:,} bytes that {what} may have")
    return content


def regular_size(path: Path, most: int = _LARGEST_FILE, what: str = "file") -> int:
    """Bytes of a regular file of at most most bytes, which is not opened; of what a link leads to."""
    try:
        about = os.stat(path)
    except (OSError, ValueError) as error:
        raise _cannot_read(path, what, error) from None
    return _check_size(about, path, most, what)


def check_regular(path: Path, what: str = "file") -> None:
    """For large files that are streamed. Raises ValueError for what is no regular file, for one that is nearly all
    holes (it says it is large and holds nothing), and for a text with any hole."""
    size = regular_size(path, what=what)
    held = 512 * os.stat(path).st_blocks
    if size > _SPARSE_BYTES and held < size // _SPARSE:
        raise ValueError(f"{printable(path)} claims {size:,} bytes and holds {held:,}: it is sparse")
    if path.suffix.lower() in _TEXTS and (hole := _first_hole(path, size)) < size:
        raise ValueError(f"{printable(path)} has a hole at byte {hole:,} of {size:,}: it is no whole text file")


def _check_size(about: os.stat_result, path: Path, most: int, what: str) -> int:
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "no file")
        raise ValueError(f"{printable(path)} is {kind}: {what} must be a file")
    if about.st_size > most:
        raise ValueError(f"{printable(path)} has {about.st_size:,} bytes: {what} may have {most:,}")
    return about.st_size


def _first_hole(path: Path, size: int) -> int:
    """Where a file's first hole begins; its size if it has none."""
    try:
        with open(path, "rb") as file:
            return os.lseek(file.fileno(), 0, os.SEEK_HOLE)
    except (OSError, AttributeError):  # an empty file, or a file system that cannot say
        return size


def _cannot_read(path: Path, what: str, error: Exception) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f"no {what} {printable(path)}")
    return ValueError(f"cannot read {what} {printable(path)} ({getattr(error, 'strerror', None) or one_line(error)})")


def read_text(path: Path, most: int = JSON_BYTES, what: str = "file") -> str:
    """The text of a UTF-8 file, a byte order mark left out."""
    try:
        return read_bytes(path, most, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}): save it as UTF-8") from None


def read_json(path: Path, most: int = JSON_BYTES, what: str = "file") -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(path, most, what), str(path))


def parse_json(text: str, where: str, depth: int | None = _DEPTH, finite: bool = True, once: bool = False) -> Any:
    """The value of a JSON text, nested no deeper than depth.

    finite: refuse NaN and infinity, which JSON does not have and Python writes. once: refuse an object that holds a
    name twice.
    """
    if text.count("[") + text.count("{") > _CONTAINERS:
        raise ValueError(f"{where} holds more than {_CONTAINERS:,} lists and objects")
    hooks: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_named_once if once else None, **hooks)
    except RecursionError:
        raise ValueError(f"{where} nests too deep") from None
    except _Refused as error:
        raise ValueError(f"{where} {error}") from None
    except json.JSONDecodeError as error:
        if "\n" in text.rstrip():
            raise ValueError(f"{where} is not JSON: {one_line(error)}") from None
        # The text is one line of a file, whose number stands in where: Python would call it line 1, or 2 behind it.
        raise ValueError(f"{where} is not JSON: {one_line(error.msg)} at character {error.pos + 1}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {one_line(error)}") from None
    if depth is not None and _deeper(value, depth):
        raise ValueError(f"{where} nests deeper than {depth} levels")
    return value


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused(f"has {cut(next(n for n in names if names.count(n) > 1))} twice")
    return found


def read_yaml(path: Path, table: Mapping[str, Kind], what: str = "spec file") -> dict[str, Any]:
    """The fields of a YAML file; the words of a field that is text in table stay as they are written (no, 01, 1e-3)."""
    fields = parse_yaml(read_text(path, SETTINGS_BYTES, what), path.name, table)
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} must map field names to values, for example task: facts")
    return fields


def parse_yaml(text: str, where: str, guide: Kind | Mapping[str, Kind] | None = None) -> Any:
    """The value of a YAML text: numbers, texts, true, false, null, lists, and mappings with texts as keys.

    guide: the kind wanted, or a table of a mapping's fields; where it is text, a plain word is that word. Aliases count
    as if written out, a name that stands twice in one mapping is refused.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return _Values(where).of(node, guide, 0) if node is not None else None
    except _Refused:
        raise
    except RecursionError:
        raise ValueError(f"{where} nests too deep") from None
    except Exception as error:  # yaml's own errors, and what int, float and datetime say of a bad word
        raise ValueError(f"{where} is not YAML: {one_line(error)}") from None


class _Refused(ValueError):
    """Read as YAML or JSON, and not taken."""


class _Values:
    """Turns nodes into values, each alias anew, until there are too many."""

    def __init__(self, where: str) -> None:
        import yaml

        self.where, self.left = where, _VALUES
        self.scalars = yaml.constructor.SafeConstructor()

    def of(self, node: Any, guide: Any, depth: int) -> Any:
        import yaml

        self.left -= 1
        if self.left < 0:
            raise _Refused(f"{self.where} holds more than {_VALUES:,} values, aliases written out")
        if depth > _DEPTH:
            raise _Refused(f"{self.where} nests deeper than {_DEPTH} levels")
        inner = guide.kind if isinstance(guide, Maybe) else guide
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, guide)
        if node.tag.rpartition(":")[2] not in ("seq", "map"):
            raise _Refused(f"{self.where}, line {node.start_mark.line + 1}: lists and mappings take no tag {node.tag}")
        if isinstance(node, yaml.SequenceNode):
            kind = inner.kind if isinstance(inner, Items) else None
            return [self.of(item, kind, depth + 1) for item in node.value]
        return self._mapping(node, inner, depth)

    def _scalar(self, node: Any, guide: Any) -> Any:
        is_null = node.tag.endswith(":null")
        if isinstance(guide, Kind) and guide.text and not (is_null and node.value in ("", "~", "null")):
            return node.value
        if node.tag.endswith(":str"):
            return _number(node, guide) if isinstance(guide, Kind) else node.value
        return self.scalars.construct_object(node)

    def _mapping(self, node: Any, guide: Any, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag.endswith(":merge"):
                merged = {**self._merge(value, guide, depth), **merged}
                continue
            name = getattr(key, "value", None)
            if not isinstance(name, str):
                raise _Refused(f"{self.where}, line {key.start_mark.line + 1}: a name must be a text")
            if name in made:
                raise _Refused(f"{self.where}, line {key.start_mark.line + 1}: {shown(name)} stands twice")
            made[name] = self.of(value, _guide(guide, name), depth + 1)
        return {**merged, **made}

    def _merge(self, node: Any, guide: Any, depth: int) -> dict[str, Any]:
        """What `<<: *name` brings in; of several the first one wins."""
        found = self.of(node, guide, depth + 1)
        parts = found if isinstance(found, list) else [found]
        if not all(isinstance(part, dict) for part in parts):
            raise _Refused(f"{self.where}, line {node.start_mark.line + 1}: << merges mappings")
        return {name: value for part in reversed(parts) for name, value in part.items()}


def _guide(guide: Any, name: str) -> Any:
    if isinstance(guide, Mapping):
        return guide.get(name)
    return guide.kind if isinstance(guide, Pairs) else None


def _number(node: Any, guide: Kind) -> Any:
    """YAML reads 1e-3 as text; where a number is wanted it is one. In quotes it is one where nothing else is taken."""
    inner = guide.kind if isinstance(guide, Maybe) else guide
    if node.style is None or isinstance(inner, Real):
        try:
            return float(node.value)
        except ValueError:
            pass
    return node.value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_constant(digits)


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and dicts nest deeper than depth, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner: list[Any] = []
        for outer in level:
            parts = outer.values() if isinstance(outer, dict) else outer
            # A set of types is quick to make: most lists hold thousands of numbers.
            if not _COLLECTIONS.isdisjoint(map(type, parts)):
                inner += [part for part in parts if type(part) in _COLLECTIONS]
        level = inner
        if not level:
            return False
    return True


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
          stat.S_IFSOCK: "a socket"}  # fmt: skip
