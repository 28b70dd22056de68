"""The page: whole and well formed with and without records, on its own, on a phone, and always the same bytes."""

import base64
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meft_bench.harness import suites
from meft_bench.harness.spec import PACKAGE
from meft_bench.report.claims.entries import VERDICTS, Ledger
from meft_bench.report.claims.file import load_claims
from meft_bench.report.claims.ledger import judge
from meft_bench.report.claims.words import effect
from meft_bench.report.page import page as html
from meft_bench.report.page.images import embedded
from meft_bench.report.page.markdown import to_html
from meft_bench.report.page.page import badge
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.results import Record
from meft_bench.report.tables import facts as more_tables
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.claims import claims_table
from meft_bench.report.tables.traffic import traffic_table
from meft_bench.report.text import Table

from ..made_records import broken, make_record, results_of

PAPER = PACKAGE.parent / "results" / "paper"
BOOK, REPORTED = load_claims(PAPER / "claims.yaml"), load_reported(PAPER / "reported.yaml")
CELLS, SCALE = suites.full(), suites.paper("llama-7b", "hub", "cuda")
BENCH = {
    "retrieval": {
        "evidence": "measured",
        "count_exponent_with_ke": 0.5,
        "count_exponent_without_ke": 1.0,
        "exponents_with_ke": [0.5, 0.52, 0.51],
        "exponents_without_ke": [0.9, 1.0, 0.95],
    }
}
FACTS = {"model": "embedded", "seeds": "0, 1, 2", "records": "9 of 9 planned runs", "evidence": "measured"}


def _png(colour: str) -> bytes:
    out = io.BytesIO()
    image = Image.new("RGBA", (900, 400), "white")
    image.paste(colour, (300, 100, 600, 300))
    image.save(out, "PNG")
    return out.getvalue()


DRAWN = {"figure1": _png("#D55E00"), "figure2": _png("#0072B2")}
CAPTIONS = {
    "figure1": ("Figure 1: size", "Left < right."),
    "figure2": ("Figure 2", "As it is."),
    "figure3": ("Figure 3", "Nothing to draw."),
}
VOID = {"meta", "br", "path", "circle", "rect", "use", "hr", "img"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale whose text is ASCII; Python would rescue itself to UTF-8 without the last two."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@cache
def _ledger(full: bool) -> Ledger:
    records: list[Record] = []
    if full:
        records = [make_record(c, (zlib.crc32(f"{c.row} {c.share} {c.spec.seed}".encode()) % 15) + 2) for c in CELLS]
        lost = next(i for i, c in enumerate(CELLS) if c.row == "meft_n96")
        records[lost] = broken(records[lost], "diverged", "loss is <nan> & worse")
        records[0] |= {"numerics": {}}
    return judge(BOOK, results_of(CELLS, records), results_of(SCALE, []), BENCH if full else {})


@cache
def _tables(full: bool) -> dict[str, Table]:
    results = results_of(CELLS, [make_record(c) for c in CELLS] if full else [])
    made = [
        claims_table(_ledger(full)),
        tables.table1(results, "full"),
        tables.paper_table(results, REPORTED),
        more_tables.paper_tables(results, REPORTED),
        more_tables.sizes(results),
        more_tables.ablations(results),
        more_tables.neurons(results),
        more_tables.union(results),
        more_tables.sweep(),
        traffic_table(results, "full"),
        tables.real_not_run(),
    ]
    return {t.name: t for t in made}


@cache
def _page(full: bool) -> str:
    drawn = DRAWN if full else {}
    return html.page(_ledger(full), _tables(full), drawn, CAPTIONS, FACTS).decode()


class Reader(HTMLParser):
    """Checks that tags close in order; gathers ids, links and everything that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}> is a script"
            if name == "id":
                self.ids.append(value or "")
            elif name in ("aria-labelledby", "clip-path", "fill", "stroke", "mask") and value:
                self.links += ["#" + v for v in re.findall(r"url\(#([^)]*)\)", value)]
                self.links += [f"#{value}"] * (name == "aria-labelledby")
            elif name in ("href", "xlink:href"):
                self.links.append(value or "")
            elif name in ("src", "srcset", "data", "action", "poster"):
                self.loads.append((tag, value or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("full", [False, True])
def test_the_page_is_well_formed_and_stands_alone(full: bool) -> None:
    text = _page(full)
    page = Reader(text)
    assert len(page.ids) == len(set(page.ids)), "ids are unique"
    inner = [link[1:] for link in page.links if link.startswith("#")]
    assert set(inner) <= set(page.ids), "every link inside the page leads somewhere"
    assert [link for link in page.links if not link.startswith("#")] == [html.PAPER_URL]
    assert all(tag == "img" and found.startswith("data:image/webp;base64,") for tag, found in page.loads)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\((?!#)|@import|https?://(?!arxiv\.org/abs/2406\.04984)", text)
    assert text.startswith("<!DOCTYPE html>") and 'name="viewport"' in text and 'lang="en-GB"' in text


def test_without_records_everything_is_not_run() -> None:
    page = Reader(_page(False)).text
    tested = sum("small" in c for c in BOOK["claims"])
    assert f"{tested} have a test on the embedded model ({tested} not run)" in page and "Not drawn." in page
    assert "Needs the runs of the full suite" in page and "Needs the benchmarks" in page
    assert "Needs a CUDA GPU, the weights of LLaMA-7B and the four data sets" in page
    assert "None" not in page and "nan" not in page


def test_every_claim_says_all_that_the_ledger_holds_of_it() -> None:
    text, ledger = Reader(_page(True)).text, _ledger(True)
    for claim in ledger.claims:
        assert claim.says in text and claim.note in text and claim.id in text
        assert claim.small is None or claim.small.command in text
        for part in claim.small.parts if claim.small else ():
            assert part.words in text and effect(part) in text and part.condition in text
            items = part.values.items
            assert items is None or f"[{items.low:+.3f}, {items.high:+.3f}]" in text
        for finding in (claim.small, claim.scale):
            assert all(key in text for key in finding.run_keys) if finding else True
            assert finding is None or finding.needs in text or finding.verdict != "not run"
            assert finding is None or (finding.reachable and finding.reachable in text)
        if claim.small and claim.small.verdict == "contradicted":
            assert claim.because in text
    for d in ledger.discrepancies:
        assert d.paper in text and d.code in text and d.default in text
        assert all(shown.words in text for shown in d.shows) and d.unshown in text
        assert d.shows or d.unshown, "a difference without a run says why"
    assert {c.small.verdict for c in ledger.claims if c.small} >= {"contradicted", "inconclusive"}
    assert "diverged" in text


def test_the_page_says_what_power_and_pairs_are() -> None:
    """Of the paper's effect against the bound, as the ledger computes it: a margin is not "no effect"."""
    reading = Reader(_page(True)).text.rpartition("Power is the chance")[2]
    assert "tells the paper's own effect from the bound" in reading and "against no effect" not in _page(True)
    assert "paired over the seeds that both have" in _page(True)


def test_tables_figures_captions_and_facts_are_all_there() -> None:
    text = Reader(_page(True)).text
    for title, caption in CAPTIONS.values():
        assert title in text and caption in text
    assert all(value in text for value in FACTS.values())
    markdown = _tables(True)["table1"].markdown
    for name in ("LoRA, FFN (alpha 16)", "Parallel Adapter, offloaded whole"):
        assert name in markdown and name in text
    assert _page(True).count("<img ") == len(DRAWN)


def test_a_verdict_has_a_word_and_a_shape_of_its_own() -> None:
    words = (*VERDICTS, "no test")
    shapes = [re.findall(r'(?:d|r)="[^"]*"', badge(w)) for w in words]
    assert len({str(s) for s in shapes}) == len(words) and all(s for s in shapes)
    assert all(w in Reader(badge(w)).text for w in words)
    assert badge("holds").count("supported") == 1, "a part has its own word and the verdict's look"


def test_the_same_input_gives_the_same_bytes_in_another_process() -> None:
    """With another hash seed and locale."""
    here = hashlib.sha256(_page(True).encode()).hexdigest()
    code = (
        "import hashlib, locale, sys\n"
        "from tests.report.page.test_page import _page\n"
        "print(hashlib.sha256(_page(True).encode()).hexdigest(), 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", **ASCII, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [here, "False"]


# ---- drawings ----


def test_a_drawing_is_the_same_picture_in_the_page() -> None:
    """With a marker of a few pixels, whose colour must not become another's."""
    with Image.open(io.BytesIO(DRAWN["figure1"])) as drawn:
        drawn.paste("#009E73", (10, 10, 14, 14))
        out = io.BytesIO()
        drawn.save(out, "PNG")
    kind, _, content = embedded("a", out.getvalue()).partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown, Image.open(out) as drawn:
        assert shown.convert("RGB").tobytes() == drawn.convert("RGB").tobytes()


@pytest.mark.parametrize("content", [b"", b"<svg viewBox='0 0 9 9'/>", b"\x89PNG\r\n\x1a\n broken", _png("red")[:200]])
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="figure x is no PNG"):
        embedded("x", content)


# ---- Markdown ----


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("a & b\nc < d\n", "<p>a &amp; b\nc &lt; d</p>\n"),
        ("**bold** and `x **y** <z>`", "<p><strong>bold</strong> and <code>x **y** &lt;z&gt;</code></p>\n"),
        ("headed *ours*, 2 * 3 * 4, a_b_c", "<p>headed <em>ours</em>, 2 * 3 * 4, a_b_c</p>\n"),
        ("1. one\n2. **two**\n", "<ol>\n<li>one</li>\n<li><strong>two</strong></li>\n</ol>\n"),
        ("- one\n- `two`\n", "<ul>\n<li>one</li>\n<li><code>two</code></li>\n</ul>\n"),
        ("<b>x</b>", "<p>&lt;b&gt;x&lt;/b&gt;</p>\n"),
        ("a ` b ** c", "<p>a ` b ** c</p>\n"),
    ],
)
def test_markdown(markdown: str, wanted: str) -> None:
    assert to_html(markdown) == wanted


def test_markdown_tables() -> None:
    made = to_html("| a | b |\n| --- | ---: |\n| x \\| y | 0.1 [0.0, 0.2] |\n")
    assert '<th scope="col" class="num">b</th>' in made and "<td>x | y</td>" in made
    assert '<span class="nowrap">[0.0, 0.2]</span>' in made and Reader(made).tags >= {"table", "thead", "tbody"}


@pytest.mark.parametrize(
    "markdown",
    [
        "# a",
        "```\na\n```",
        "![a](b.png)",
        "[a](b)",
        "a\n- b",
        "1. a\nb",
        "a  \nb",
        "<http://a.b>",
        "> a",
        "| a |\n| b |",
        "| a |\n| --- |\n| b | c |",
    ],
)
def test_markdown_that_our_tables_do_not_use_is_refused(markdown: str) -> None:
    with pytest.raises(ValueError):
        to_html(markdown)


# ---- in a browser ----

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def _chromium(folder: Path, text: str, *options: str) -> str:
    (folder / "page.html").write_text(text)
    command: list[Any] = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, (folder / "page.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=folder).stdout


@browser
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_no_page_scrolls_sideways(tmp_path: Path, size: tuple[int, int], full: bool) -> None:
    """A frame of the phone's width: the window of a headless browser may be no narrower than 500."""
    probe = (
        "<script>addEventListener('load', () => { const e = document.documentElement; document.title = "
        "'measured ' + e.scrollWidth + ' ' + e.clientWidth + ' ' + innerWidth; })</script></body>"
    )
    framed = _page(full).replace("</body>", probe)
    (tmp_path / "inner.html").write_text(framed)
    outer = (
        f'<iframe id="f" src="inner.html" width="{size[0]}" height="{size[1]}" style="border:0"></iframe>'
        "<script>addEventListener('load', () => { document.title = document.getElementById('f')"
        ".contentDocument.title; })</script>"
    )
    dumped = _chromium(tmp_path, outer, "--allow-file-access-from-files", "--dump-dom", "--window-size=1400,1000")
    found = re.search(r"<title>measured (\d+) (\d+) (\d+)</title>", dumped)
    assert found is not None, dumped[:500]
    wide, seen, window = map(int, found.groups())
    assert window == size[0] and wide <= seen, f"{wide} pixels wide in a window of {seen}"


@browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_something_is_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    shot = f"--screenshot={tmp_path / 'shot.png'}"
    _chromium(tmp_path, _page(True), shot, f"--window-size={size[0]},{size[1]}")
    rows = _png_rows((tmp_path / "shot.png").read_bytes())
    assert len(rows) == size[1] and len(set(rows)) > size[1] // 4, "text, not an empty page"


@browser
def test_it_prints_on_paper(tmp_path: Path) -> None:
    _chromium(tmp_path, _page(True), f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") > 10
    assert html.PAPER_URL.encode() in pdf, "the link is still one"


def _png_rows(png: bytes) -> list[bytes]:
    """The filtered scan lines of a PNG."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    raw, stride = zlib.decompress(data), 1 + width * {2: 3, 6: 4}[kind] * depth // 8
    return [raw[i * stride : (i + 1) * stride] for i in range(height)]
