"""Text of a stranger's where we print or write it: on a terminal, in Markdown. Nothing heavy is imported here."""

import re

_MARKS = re.compile(r"([\\`*\[\]|~#!])")


def printable(text: object) -> str:
    """text in one line for a terminal: control characters, which could move the cursor or forge a line, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))


def cut(text: object, most: int = 60) -> str:
    """text in one line for a message: printable, white space for the rest, at most so many characters."""
    start = str(text)[: most + 1]
    short = "".join(c if c.isprintable() else " " for c in start)
    return short if len(short) <= most else f"{short[:most]}..."


def markdown(text: object) -> str:
    """text as itself in a table's cell or a heading: no mark, tag, link or new line of it takes effect."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = _MARKS.sub(r"\\\1", plain)
    # Within words GitHub leaves the underscore alone; a bare address would become a link.
    plain = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", plain)
    return re.sub(r"(https?|ftp)(://)|(www)(\.)", r"\1\3&#8203;\2\4", plain, flags=re.IGNORECASE)
