"""Blocks between markers: replaced, checked, and refused when the markers do not fit."""

from pathlib import Path

import pytest

from meft_bench.report.readme import check_readme, update_readme

TEXT = (
    "# Title\r\n\nbefore <!-- results:a -->\nold\n<!-- /results:a --> after\n\n<!-- results:b --><!-- /results:b -->\n"
)
BLOCKS = {"a": "| x |\n", "b": "two\nlines\n"}


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_bytes(TEXT.encode())
    return path


def test_blocks_are_replaced_and_the_rest_is_kept(readme: Path) -> None:
    assert check_readme(readme, BLOCKS) == ["a", "b"]
    assert readme.read_bytes() == TEXT.encode(), "a check writes nothing"
    assert update_readme(readme, BLOCKS)
    text = readme.read_bytes().decode()
    assert text.startswith("# Title\r\n\nbefore <!-- results:a -->\n\n| x |\n\n<!-- /results:a --> after\n")
    assert "<!-- results:b -->\n\ntwo\nlines\n\n<!-- /results:b -->\n" in text and "old" not in text
    assert check_readme(readme, BLOCKS) == [] and not update_readme(readme, BLOCKS)
    assert check_readme(readme, {**BLOCKS, "b": "three"}) == ["b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT.replace("<!-- /results:a -->", ""), "needs <!-- results:a -->"),
        (TEXT.replace("<!-- results:b -->", ""), "needs <!-- results:b -->"),
        (TEXT + TEXT, "once each"),
        ("<!-- /results:a --><!-- results:a -->" + "<!-- results:b --><!-- /results:b -->", "in this order"),
        ("<!-- results:a --><!-- results:b --><!-- /results:a --><!-- /results:b -->", "overlap"),
        (TEXT + "<!-- results:c --><!-- /results:c -->", "c is no block"),
    ],
)
def test_markers_that_do_not_fit_are_one_clear_error(readme: Path, text: str, said: str) -> None:
    readme.write_text(text)
    before = readme.read_bytes()
    for work in (update_readme, check_readme):
        with pytest.raises(ValueError, match=f"markers do not fit.*{said}"):
            work(readme, BLOCKS)
    assert readme.read_bytes() == before


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read README.md"):
        check_readme(tmp_path / "README.md", BLOCKS)
