"""Names of strangers, shown as themselves."""

import html

import pytest
from markdown_it import MarkdownIt

from meft_bench.text import counted, cut, markdown, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("facts-2 (new).jsonl", "facts-2 (new).jsonl"),
        ("Fragen größer 5 ✓.csv", "Fragen größer 5 ✓.csv"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J\x07\x00\x9b1m", "\\x1b[2J\\x07\\x00\\x9b1m"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_control_characters_become_escapes(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("my_facts_2.jsonl", "my_facts_2.jsonl"),
        ("_it_", "\\_it\\_"),
        ("a | b", "a \\| b"),
        ("<b>&amp;", "&lt;b>&amp;amp;"),
        ("[l](x) `c` *s* ~d~ # h ![i](x)", "[l]\\(x) \\`c\\` \\*s\\* \\~d\\~ # h ![i]\\(x)"),
        ("a\nb", "a\\\\nb"),
        ("see https://x.y and www.x.y", "see https&#8203;://x.y and www&#8203;.x.y"),
    ],
)
def test_no_mark_of_markdown_takes_effect(text, shown):
    assert markdown(text) == shown
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).renderInline(markdown(text))
    assert html.unescape(rendered).replace("\u200b", "") == printable(text) and "<" not in rendered


def test_one_is_singular() -> None:
    told = [counted(*given) for given in ((1, "row"), (2000, "row"), (1, "micro-batch"), (0, "micro-batch"))]
    assert told == ["1 row", "2,000 rows", "1 micro-batch", "0 micro-batches"]


def test_what_is_cut_stays_short_and_on_one_line():
    assert cut("a" * 100) == "a" * 60 + "..." and cut("a\tb\u2028c") == "a b c" and cut(12345, 3) == "123..."
