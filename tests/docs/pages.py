"""Pages as the tests read them: fenced blocks with the HTML comment before them, links, headings.

A block in bash or python is run unless the comment on the line before its fence says otherwise:
<!-- test: with train --steps 2; run --set steps=1 -->   run, with these arguments added to those commands
<!-- test: needs trl -->                                 run where the package is installed
<!-- test: file job.yaml -->                             the block is written to this file
<!-- test: parse (why it is not run) -->                 commands are checked against parser and Makefile, as all are
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^(?:<!-- test: (?P<said>[^\n]*?) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_KINDS = ("with", "needs", "file", "parse")


@dataclass(frozen=True)
class Block:
    """One fenced block. kind is "run" or what the comment says, about the rest of the comment."""

    line: int
    language: str
    text: str
    kind: str = "run"
    about: str = ""


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page. Raises ValueError for a comment of no known kind or without its reason."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        kind, _, about = (match["said"] or "run").partition(" ")
        if kind not in ("run", *_KINDS) or (kind != "run" and not about):
            raise ValueError(
                f"line {line}: <!-- test: {match['said']} --> says nothing known; kinds: {', '.join(_KINDS)}"
            )
        found.append(Block(line, match["language"], match["text"], kind, about))
    if text.count("<!-- test:") != sum(block.kind != "run" for block in found):
        raise ValueError("a test comment stands before no block")
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words, comments and continuation lines dealt with."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def added(block: Block) -> dict[str, list[str]]:
    """Subcommand to the arguments that a "with" comment adds to it."""
    parts = [shlex.split(part) for part in block.about.split(";")] if block.kind == "with" else []
    return {part[0]: part[1:] for part in parts}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of the page they name."""
    text = _FENCE.sub("", page.read_text())
    broken = []
    for target in _LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (fragment and path.suffix == ".md" and fragment not in anchors(path.read_text())):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
