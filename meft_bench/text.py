"""Text of a stranger's where we print or write it: on a terminal, in Markdown. Nothing heavy is imported here."""

import re
import unicodedata

_HIDDEN = {"Cc", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that cannot be seen or written: control characters, lone surrogates, private use, line ends."""
_MOVING = set("\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
"""Marks that turn the direction of what stands beside them, or have no width."""
# What Markdown, on GitHub, reads as markup; "_" and "<" only where they are, since names and p-values are full of them.
_MARKUP = re.compile(r"[\\`*$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\])\(|(?<=\])\[|(?<=\]):")
_TAG = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")


def printable(text: object) -> str:
    """text in one line for a terminal: control characters, which could move the cursor or forge a line, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))


def counted(number: int, what: str) -> str:
    """So many of a thing: "1 row", "2,000 rows", "2 micro-batches"."""
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{ending}"


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its kind where the text alone says little."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, ValueError | OSError) and said:
        return printable(said)
    return printable(f"{kind}: {said}" if said else kind)


def cut(text: object, most: int = 60) -> str:
    """text in one line for a message: printable, white space for the rest, at most so many characters."""
    start = str(text)[: most + 1]
    short = "".join(c if c.isprintable() else " " for c in start)
    return short if len(short) <= most else f"{short[:most]}..."


def one_line(text: object) -> str:
    """Any text as one line of characters that can be seen and written as UTF-8; a space or ? stands for the others."""
    kept = (c if c.isspace() or not _is_hidden(c) else "?" for c in str(text))
    return " ".join("".join(kept).split())


def plain(text: object) -> str:
    """text for a line of Markdown that shows it as it is: markup escaped, tags as entities."""
    escaped = _MARKUP.sub(r"\\\g<0>", one_line(text))
    # Not a backslash: README blocks are found by their comment marks, which must not stand in one.
    return _TAG.sub(lambda found: "&lt;" if found[0] == "<" else "&amp;", escaped)


def markdown(text: object) -> str:
    """text as itself in a table's cell or a heading, its control characters as escapes; a bare address is no link."""
    cell = plain(printable(text)).replace("|", "\\|")
    return re.sub(r"(https?|ftp)(://)|(www)(\.)", r"\1\3&#8203;\2\4", cell, flags=re.IGNORECASE)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN or character in _MOVING
