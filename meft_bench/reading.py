"""The one door for files: what a stranger wrote is read with limits on kind, bytes, depth and number of values.

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

SETTINGS_BYTES = 128 * 2**10
"""Of a YAML file of settings: a hundred times what one needs, and read in a second."""
RECORD_BYTES = 32 * 2**20
JSON_BYTES = 64 * 2**20
_COLLECTIONS = {dict, list}
_SPARSE_BYTES = 2**30
_DEPTH = 64
_VALUES = 20_000
"""YAML values once aliases are written out."""
_CONTAINERS = 500_000
"""Lists and objects of a JSON text: each takes some 100 bytes of memory for 2 bytes of text."""


def read_bytes(path: Path, most: int, what: str = "file") -> bytes:
    """The content of a regular file of at most most bytes; a pipe, a device or a folder is refused, not waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ValueError(f"no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {what} {path} ({_reason(error)})") from None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(about.st_mode), 'no file')}: {what} must be a file")
        if about.st_size > most:
            raise ValueError(f"{path} has {about.st_size:,} bytes: {what} may have {most:,}")
        with open(handle, "rb", closefd=False) as file:
            content = file.read(most + 1)  # files of /proc say 0 bytes
    except OSError as error:
        raise ValueError(f"cannot read {what} {path} ({_reason(error)})") from None
    finally:
        os.close(handle)
    if len(content) > most:
        raise ValueError(f"{path} has more than the {most:,} bytes that {what} may have")
    return content


def check_regular(path: Path, what: str = "file") -> None:
    """For large files that are streamed. Raises ValueError for what is no regular file, and for one that is nearly all
    holes: it says it is large and holds nothing."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        raise ValueError(f"no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {what} {path} ({_reason(error)})") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(about.st_mode), 'no file')}: {what} must be a file")
    if about.st_size > _SPARSE_BYTES and 512 * about.st_blocks < about.st_size // 1000:
        raise ValueError(f"{path} says it has {about.st_size:,} bytes and is nearly all holes: {what} must hold data")


def read_text(path: Path, most: int = JSON_BYTES, what: str = "file") -> str:
    """The text of a UTF-8 file, a byte order mark left out."""
    try:
        return read_bytes(path, most, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}): save it as UTF-8") from None


def read_json(path: Path, most: int = JSON_BYTES, what: str = "file") -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(path, most, what), str(path))


def parse_json(text: str, where: str, depth: int = _DEPTH) -> Any:
    """The value of a JSON text. NaN and infinity, which JSON does not have, are refused, and so is deep nesting."""
    if text.count("[") + text.count("{") > _CONTAINERS:
        raise ValueError(f"{where} holds more than {_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"{where} nests too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {one_line(error)}") from None
    if _deeper(value, depth):
        raise ValueError(f"{where} nests deeper than {depth} levels")
    return value


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
    """Read as YAML, and not taken."""


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


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
          stat.S_IFSOCK: "a socket"}  # fmt: skip
