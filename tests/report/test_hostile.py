"""Names and reasons that others chose: shown as they are, in one line, and never as markup, a formula or a marker."""

import csv
import html
import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.harness import suites
from meft_bench.report.build import _facts
from meft_bench.report.figures import catalogue, output
from meft_bench.report.page.markdown import inline, to_html
from meft_bench.report.readme import check_readme, update_readme
from meft_bench.report.records.profiles import load_profiles
from meft_bench.report.tables import profile as profile_tables
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.traffic import traffic_table
from meft_bench.report.text import csv_table, markdown_table, one_line, paragraphs, plain, visible

from .made_profiles import make_profile, write_profiles
from .made_records import broken, make_record, results_of
from .tables.test_scores import REPORTED

HOSTILE = (
    "a | b || \\| c",
    "two\nlines\r\nthree\u2028four\tfive",
    "`code` and ``` fence",
    "<script>alert(1)</script><img src=x onerror=y><!-- /results:headline -->",
    "[click](javascript:alert(1)) ![x](http://x/y.png) [a][b] [c]: http://d",
    "**bold** _lean_ __both__ *x* ~~gone~~ $x$ $\\frac{",
    "&lt;b&gt; &amp; &#60; R&D",
    "back\\slash \\* \\\\",
    "\x00\x1b[31mred\x07 \u202eevil\u202c \ud800 \ufeff",
    '=HYPERLINK("http://x","y")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
)
hostile = pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
_TAGS = re.compile(r"<[^>]*>")


def shown(markdown: str) -> str:
    """What a reader of the page sees of one line."""
    return html.unescape(_TAGS.sub("", inline(markdown)))


@given(st.one_of(st.text(max_size=40), st.text("\\`*_[]()<>|~$&;#!x =+-@\n", max_size=30)))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    assert _TAGS.findall(inline(plain(text))) == [] and shown(plain(text)) == one_line(text)
    one_line(text).encode()
    assert "\n" not in plain(text) and "\r" not in plain(text)


@hostile
def test_a_cell_stays_one_cell_with_its_text(text: str) -> None:
    table = markdown_table(("a", "b"), [(text, "second")])
    assert table.count("\n") == 3
    page = to_html(table)
    cells = [html.unescape(_TAGS.sub("", c)) for c in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    assert cells == [" ".join(one_line(text).split()), "second"]
    assert "<script" not in page and "<img" not in page and "<a " not in page and "<em>" not in page


@hostile
def test_github_sees_no_markup_in_a_cell(text: str) -> None:
    """Every character that GitHub's Markdown would act on has its backslash or entity."""
    raw = markdown_table(("a",), [(text,)]).splitlines()[2].removeprefix("| ").removesuffix(" |")
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", raw)
    assert not re.search(r"[`*|$]|~~|<[A-Za-z/!?]|\]\(|\]\[|\]:", bare)
    assert not re.search(r"(?<![^\W_])_|_(?![^\W_])", bare)


@hostile
def test_a_spreadsheet_runs_nothing(text: str) -> None:
    (_, (found, second)) = list(csv.reader(io.StringIO(csv_table(("a", "b"), [(text, "x")]))))
    assert second == "x" and found.removeprefix("'") == one_line(text)
    assert not found.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_our_own_numbers_stay_numbers() -> None:
    own = ("-0.150 [-0.150, -0.150]", "+5 %", "+0.012 †", "-1,234.5 KiB", "+1e-05", "-0.897 † [-0.926, -0.868]")
    line = next(csv.reader(io.StringIO(csv_table(own, [own]))))
    assert tuple(line) == own and csv_table(("a",), [(-0.5,)]) == "a\n-0.5\n"
    assert plain("0.897 ±0.024 [0.886, 0.907] (n = 20), p < 0.001, main_terms, R & D") == (
        "0.897 ±0.024 [0.886, 0.907] (n = 20), p < 0.001, main_terms, R & D"
    )


def test_text_in_files_is_cleaned_at_every_depth() -> None:
    assert visible({"a\n": ["b\x00", {"c": 1.5, "d": None}]}) == {"a": ["b?", {"c": 1.5, "d": None}]}


@hostile
def test_reasons_and_machines_of_records(text: str) -> None:
    cells = [replace(c, spec=replace(c.spec, device="cuda")) for c in suites.default()]
    records = []
    for i, c in enumerate(cells):
        record = make_record(c)
        record["provenance"] = {"threads": 1, "gpu": text, "packages": {"torch": text}}
        records.append(broken(record, "failed", text) if c.row in ("full", "meft") else record)
        if c.row == "meft" and i % 2:
            records[-1]["traffic"] = None
            records[-1]["traffic_reason"] = text
    results = results_of(cells, records)
    for table in (tables.table1(results, "default"), traffic_table(results, "default")):
        assert one_line(text) in html.unescape(_TAGS.sub("", to_html(table.markdown)))
        assert "<script" not in to_html(table.markdown) and "<!-- /results" not in table.markdown
        table.markdown.encode(), table.csv.encode()
        for line in csv.reader(io.StringIO(table.csv)):
            assert not any(c.startswith(("=", "@")) or re.match(r"[+-](?![\d.])", c) for c in line)
    assert one_line(text) in _facts("default", results)["versions"]


@hostile
def test_a_models_name_in_tables_and_figures(text: str) -> None:
    if "\x00" in text:
        text = text.replace("\x00", "").replace("\ud800", "")  # no run can have these in its model's name
    plain_cells = suites.real("local/x@1", "local@2")
    cells = [replace(c, spec=replace(c.spec, model=f"local/{text.replace('@', 'at')}@1")) for c in plain_cells]
    results = results_of(cells, [make_record(c) for c in cells])
    name = one_line(f"local/{text.replace('@', 'at')}")
    table = tables.real(results)
    assert name in html.unescape(_TAGS.sub("", to_html(table.markdown)))
    to_html(tables.paper_table(results, REPORTED).markdown)
    with output.settings():
        figure = catalogue._DRAWN["sizes_by_task"](results, REPORTED, {})
        assert "$" not in text or any("$" in axes.get_title("left") for axes in figure.axes)
        output.save("x", figure)


@hostile
def test_names_and_notes_of_a_profile(text: str, tmp_path) -> None:
    content = make_profile()
    content["settings"] |= {"card_title": text, "host_title": text}
    content["rows"][0] |= {"title": text}
    content["rows"][-1] |= {"state": "not-run", "reason": text}
    (profile,) = load_profiles(write_profiles(tmp_path, content))
    for table in (profile_tables.profile_table(profile), profile_tables.sweep_table(profile)):
        page = html.unescape(_TAGS.sub("", to_html(table.markdown)))
        assert one_line(text) in page and "<!-- /results" not in table.markdown


def test_a_reason_cannot_close_a_block_of_the_readme(tmp_path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:headline -->\n<!-- /results:headline -->\nthe end\n")
    block = paragraphs(f"- it failed: {plain('<!-- /results:headline --> <!-- results:headline -->')}")
    assert update_readme(readme, {"headline": block}) and check_readme(readme, {"headline": block}) == []
    assert readme.read_text().endswith("<!-- /results:headline -->\nthe end\n")
