"""What the documentation says can be done is done: commands, code, links. pages.py explains the comments in pages."""

import argparse
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import meft_bench
from meft_bench import cli
from meft_bench.harness import smollm2
from meft_bench.harness.suites import SEEDS
from tests.docs.command_check import check_command
from tests.docs.pages import PAGES, ROOT, Block, added, anchors, blocks, broken_links, commands

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
WITH_CODE = [name for name, text in TEXTS.items() if blocks(text)]
NEEDED = sorted({b.about for text in TEXTS.values() for b in blocks(text) if b.kind == "needs"})


def run_page(text: str, folder: Path) -> None:
    """Run the blocks of a page in order, python ones in one namespace, in folder."""
    page = types.ModuleType("page_of_the_docs")
    sys.modules[page.__name__] = page  # dataclasses look their module up
    for block in blocks(text):
        if block.kind == "file":
            (folder / block.about).write_text(block.text)
        elif block.kind == "parse" or (block.kind == "needs" and not installed(block.about)):
            continue
        elif block.language == "python":
            _run_python(block, page)
        elif block.language == "bash":
            _run_commands(block)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _run_python(block: Block, page: types.ModuleType) -> None:
    # Empty lines in front: a traceback then shows the page's own line numbers.
    exec(compile("\n" * block.line + block.text, page.__name__, "exec", dont_inherit=True), page.__dict__)


def _run_commands(block: Block) -> None:
    for words in commands(block):
        if words[0] == "meft-bench":
            assert cli.main([*words[1:], *added(block).get(words[1], [])]) == 0, " ".join(words)


@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_of_a_page_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(TEXTS[name], tmp_path)


@pytest.mark.parametrize("name", WITH_CODE)
def test_every_command_names_what_is_there(name: str) -> None:
    for block in blocks(TEXTS[name]):
        assert block.language in ("bash", "python", "text") or block.kind == "file", (
            f"line {block.line}: name a language"
        )
        for words in commands(block) if block.language == "bash" else []:
            check_command(words)


@pytest.mark.parametrize("package", NEEDED)
def test_blocks_that_need_a_package_were_run(package: str) -> None:
    if not installed(package):
        pytest.skip(f"{package} is not installed, so blocks that need it were left out")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(ROOT / name) == []


def test_every_page_is_linked_from_the_readme() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in TEXTS["README.md"], page.name


def test_the_version_is_the_same_everywhere() -> None:
    version = re.escape(meft_bench.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## \[{version}\] - \d{{4}}-\d\d-\d\d$", TEXTS["CHANGELOG.md"], re.M)


def test_seeds_of_the_real_models_suite_are_as_the_page_says() -> None:
    counts: dict[str, set[int]] = {}
    places: dict[tuple[str, ...], set[int]] = {}
    for c in smollm2.cells("local/smollm2-135m@000000000000", "local@000000000000"):
        if c.share not in smollm2.UNION_SIZES:
            places.setdefault((c.row, c.share, c.spec.task), set()).add(c.spec.seed)
    for (_, _, task), seeds in places.items():
        counts.setdefault(task, set()).add(len(seeds))
    assert counts == {"people": {3, 5}, "nq": {3}, "squad": {1}, "toolbench": {1}, "gsm8k": {1}}
    said = " ".join(TEXTS["docs/results.md"].split())
    assert "People and Natural Questions have three seeds, and five on people where claims compare the scores" in said
    assert "p is not corrected for that first look" in said, "of three seeds, before the others were planned"


def test_numbers_that_a_page_compares_are_over_the_same_seeds() -> None:
    """AdapterH from a wide start has seeds 0 to 2, the rows beside it two more: written by hand, so checked here."""
    records = [json.loads(p.read_text()) for p in (ROOT / "results" / "records").glob("*.json")]
    runs = {r["run_key"]: r for r in records}
    told = []
    for row in ("adapter_h_spread", "adapter_h", "meft"):
        cells = smollm2.cells(*_real_inputs(records))
        found = [runs[c.spec.run_key]["quality"]["test"]["metrics"]["contains"]["mean"] for c in cells
                 if (c.row, c.share, c.spec.task) == (row, "10%", "people") and c.spec.seed in SEEDS]  # fmt: skip
        assert len(found) == 3
        told.append(f"{sum(found) / 3:.2f}".lstrip("0"))
    said = " ".join(TEXTS["docs/baselines.md"].split())
    assert f"({told[0]} and {told[1]} at 10 %, asked in other words; MEFT {told[2]}; the mean of seeds 0 to 2" in said


def _real_inputs(records: list[dict[str, Any]]) -> tuple[str, str]:
    """The model and the rows that the published runs of the suite name."""
    specs = [r["spec"] for r in records if "smollm2" in r["spec"]["model"] and r["spec"]["task"] == "nq"]
    return specs[0]["model"], specs[0]["data"]


def test_the_readme_is_read_in_one_go() -> None:
    assert len(TEXTS["README.md"].split()) <= 1500


# ---- the checks themselves ----


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("meft-bench train --data x --output y --gpu-memroy 24GB", "unrecognized arguments: --gpu-memroy"),
        ("meft-bench trian --data x", "invalid choice"),
        ("meft-bench train --device tpu --data x --output y", "invalid choice"),
        ("make replciate", "no target replciate"),
        ("make replicate SIUTE=smoke", "no variable SIUTE"),
        ("pip install 'meft-bench[peer]'", "no extra peer"),
        ("pip install torch", "is not this package"),
        ("python docs/comparison/runs.py", "no script"),
        ("python docs/comparison/run.py --agian", "no option --agian"),
        ("torchrun --gpus 2 -m meft_bench train --data x --output y", "unrecognized|No module|invalid"),
        ("torchrun --nproc-per-node 2 -m meft_bench train --dta x --output y", "unrecognized arguments: --dta"),
        ("torchrun --nproc-per-node 2 train.py", "only torchrun -m meft_bench"),
        ("curl example.org", "no check for curl"),
    ],
)
def test_a_wrong_command_is_found(command: str, said: str) -> None:
    (words,) = commands(Block(1, "bash", command))
    with pytest.raises(ValueError, match=said):
        check_command(words)


def test_a_wrong_flag_inside_the_makefile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    parser.add_subparsers().add_parser("profile").add_argument("--card")  # the Makefile says --gpu
    monkeypatch.setattr(cli, "_parser", lambda: parser)
    with pytest.raises(ValueError, match="--gpu"):
        check_command(["make", "profile", "GPU=24GB"])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```\n", AssertionError),
        ("```bash\nmeft-bench generate --adapter nowhere --prompt a\n```\n", AssertionError),
    ],
)
def test_a_block_that_fails_fails_the_page(text: str, error: type, tmp_path: Path) -> None:
    with pytest.raises(error):
        run_page(text, tmp_path)


@pytest.mark.parametrize("said", ["skpi (slow)", "parse", "needs"])
def test_a_comment_that_says_nothing_known_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="says nothing known"):
        blocks(f"<!-- test: {said} -->\n```bash\nmake test\n```\n")


def test_a_comment_before_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match="before no block"):
        blocks("<!-- test: parse (slow) -->\nA paragraph.\n\n```bash\nmake test\n```\n")


def test_comments_continuation_lines_and_added_arguments() -> None:
    (block,) = blocks('<!-- test: with a --x 1; b -y -->\n```bash\nfirst \\\n  "two words"  # why\n# none\n```\n')
    assert commands(block) == [["first", "two words"]]
    assert added(block) == {"a": ["--x", "1"], "b": ["-y"]}


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A title, here\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#a-title-here) [c](gone.md) [d](other.md#gone) ![e](gone.png)\n")
    assert broken_links(page) == ["gone.md", "other.md#gone", "gone.png"]
    assert anchors("## 4-bit and 8-bit bases\n") == {"4-bit-and-8-bit-bases"}
