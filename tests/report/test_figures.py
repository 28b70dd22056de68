"""Every figure: drawn from any set of records, always the same bytes, and never silent about what it lacks."""

import hashlib
import io
import os
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from PIL import Image

from meft_bench.harness import suites
from meft_bench.harness.spec import PACKAGE
from meft_bench.report.figures import catalogue, marks, output, panel, size
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.results import Results, headline

from .made_records import KERNELS, RETRIEVAL, TIMELINE, broken, make_record, results_of

REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")
CELLS = suites.full()
BENCH = {"timeline": TIMELINE, "kernels": KERNELS, "retrieval": RETRIEVAL}
PAPERS = {"figure1": 4, "sizes_by_task": 2, "figure6": 2, "figure7": 2}
"""Figures with a panel of the paper's points, and its curves."""


NAMED_AT_ENDS = ("figure1", "pareto", "rows_moved", "experts", "kernels")
"""Figures with the most names at the ends of lines, which must not touch."""


def _right(cell: Any) -> int:
    return min(20, len(cell.row) % 7 + cell.spec.seed + len(cell.share))


def _full() -> Results:
    return results_of(CELLS, [make_record(c, _right(c)) for c in CELLS])


def _half() -> Results:
    """Some places with all seeds, some with one, some with none, one diverged, one stale."""
    kept = [make_record(c, _right(c), stale=i == 20) for i, c in enumerate(CELLS) if i * 7 % 10 < 5]
    return results_of(CELLS, [*kept[:5], broken(kept[5], "diverged", "nan"), *kept[6:]])


def drawn_digests() -> str:
    """Of every figure with full records; run in another process, too."""
    files = catalogue.draw(_full(), REPORTED, BENCH)
    return "\n".join(f"{name} {hashlib.sha256(files[name]).hexdigest()}" for name in sorted(files))


def _texts(results: Results, name: str, bench: dict[str, Any] = BENCH) -> str:
    """Everything written in a figure."""
    with output.settings():
        figure = catalogue._DRAWN[name](results, REPORTED, bench)
    found = [t.get_text() for axes in figure.axes for t in axes.findobj(matplotlib.text.Text)]
    return "\n".join(t for t in found if t)


@pytest.fixture(scope="module")
def full() -> Results:
    return _full()


@pytest.fixture(scope="module")
def files(full: Results) -> dict[str, bytes]:
    return catalogue.draw(full, REPORTED, BENCH)


def test_every_figure_has_a_caption_and_is_a_small_picture(files: dict[str, bytes]) -> None:
    assert list(catalogue.FIGURES) == list(catalogue._DRAWN)
    assert sorted(files) == sorted(f"{n}.png" for n in catalogue.FIGURES)
    for title, caption in catalogue.FIGURES.values():
        assert title and caption.endswith(".") and "—" not in title + caption
    assert sum(map(len, files.values())) < 1.4e6 and max(map(len, files.values())) < 150_000
    for content in files.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.mode == "P" and image.width == panel.WIDTH * output.DPI
            assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_svg_comes_on_request(full: Results) -> None:
    made = catalogue.draw(full, REPORTED, BENCH, ["lookahead"], ("png", "svg"))
    assert sorted(made) == ["lookahead.png", "lookahead.svg"]
    assert made["lookahead.svg"].startswith(b"<?xml") and b"<dc:date>" not in made["lookahead.svg"]
    assert made == catalogue.draw(full, REPORTED, BENCH, ["lookahead"], ("png", "svg"))


def test_a_png_keeps_the_colours_of_its_lines(full: Results) -> None:
    made = catalogue.draw(full, REPORTED, BENCH, ["figure1"])["figure1.png"]
    with Image.open(io.BytesIO(made)) as image:
        found = image.convert("RGB").getcolors(image.width * image.height)
    colours = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in found}
    assert {panel.STYLE[row][0] for row in ("lora", "adapter_h", "parallel_adapter", "meft")} <= colours


def test_boxes_are_spread_as_little_as_needed() -> None:
    assert panel.spread([0.1, 0.5], [0.1, 0.1]) == pytest.approx([0.1, 0.5])
    assert panel.spread([0.5, 0.5], [0.1, 0.1]) == pytest.approx([0.55, 0.45]), "the first on top"
    assert panel.spread([0.3, 0.34, 0.9], [0.1, 0.1, 0.1]) == pytest.approx([0.27, 0.37, 0.9])
    assert panel.spread([1.0, 1.0], [0.1, 0.1]) == pytest.approx([0.97, 0.87]), "none above the top"
    placed = panel.spread([0.4, 0.41, 0.5, 0.52], [0.1, 0.2, 0.1, 0.2])
    assert placed[1] - placed[0] >= 0.15 - 1e-9 and placed[2] - placed[1] >= 0.15 - 1e-9


def test_all_figures_draw_with_half_of_the_records() -> None:
    assert len(catalogue.draw(_half(), REPORTED, {})) == len(catalogue.FIGURES)


def test_without_records_every_figure_says_what_it_needs() -> None:
    empty = results_of(CELLS, [])
    assert len(catalogue.draw(empty, REPORTED, {})) == len(catalogue.FIGURES)
    for name in catalogue.FIGURES:
        said = _texts(empty, name, {})
        assert "not run" in said and "needs" in said and "make" in said, name


def test_one_question_few_lines_named_on_the_spot_and_no_text_cut_off_or_overlapping(full: Results) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for results in (full, _half()):
        for name, draw in catalogue._DRAWN.items():
            with output.settings():
                figure = draw(results, REPORTED, BENCH)
                FigureCanvasAgg(figure).draw()
            width, height = figure.bbox.size
            for text in _written(figure):
                box = text.get_window_extent()
                inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
                assert inside, f"{name}: {text.get_text()!r}"
            assert figure.get_suptitle().count("?") == 1, name
            for axes in figure.axes:
                _at_most_eight_lines_named_on_the_spot(axes, name)
            for of_axes in ("_left_title", "xaxis.label"):
                texts = [attrgetter(of_axes)(axes) for axes in figure.axes]
                boxes = [t.get_window_extent() for t in texts if t.get_text()]
                assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), f"{name}: {of_axes}"


def _at_most_eight_lines_named_on_the_spot(axes: Any, name: str) -> None:
    assert axes.get_legend() is None, name
    named = {label for h, label in zip(*axes.get_legend_handles_labels(), strict=True) if not _is_level(h)}
    assert len(named - {"Pareto front"}) <= 8, (name, named)
    if name not in NAMED_AT_ENDS:
        return
    notes = [t for t in axes.texts if isinstance(t, Annotation) and t.get_text()]
    boxes = [Text.get_window_extent(t) for t in notes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), name


def _is_level(handle: Any) -> bool:
    """A horizontal line from side to side: what others are compared with."""
    return isinstance(handle, Line2D) and list(handle.get_xdata()) == [0, 1]


def _written(figure: Any) -> list[Any]:
    """Titles, labels, notes and legends; not the ticks, some of which lie unseen beyond the axes."""
    found = [*figure.texts, *(t for box in figure.legends for t in box.get_texts())]
    for axes in figure.axes:
        found += [axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        found += axes.get_legend().get_texts() if axes.get_legend() else []
    return [t for t in found if t.get_text().strip()]


def test_missing_failed_and_stale_are_told() -> None:
    said = _texts(_half(), "figure1")
    assert "seeds missing so far" in said and "stale (made by other code)" in said
    lost = next(c for c in CELLS if (c.row, c.share, c.spec.task, c.spec.seed) == ("lora", "0.5%", "facts", 0))
    others = [c for c in CELLS if (c.row, c.share) != ("lora", "0.5%")]
    results = results_of(CELLS, [broken(make_record(lost), "diverged", "nan"), *(make_record(c) for c in others)])
    assert "diverged: LoRA 0.5%" in _texts(results, "figure1")


def test_a_first_seed_that_ran_out_of_memory_hides_neither_the_size_nor_the_others() -> None:
    def record(c: Any) -> Any:
        made = make_record(c, _right(c))
        if (c.row, c.share) != ("lora", "0.5%") or c.spec.seed:
            return made
        return broken({**made, "parameters": None, "parameters_reason": "out of memory"}, "oom", "out of memory")

    results = results_of(CELLS, [record(c) for c in CELLS])
    assert results.parameters(("lora", "0.5%"))["trainable_percent_of_base"] == 0.5
    for name in ("figure1", "pareto"):
        assert "LoRA" in _texts(results, name)
    every = [broken({**make_record(c), "parameters": None, "parameters_reason": "oom"}, "oom", "oom") for c in CELLS]
    assert "oom" in _texts(results_of(CELLS, every), "figure1")


def test_every_row_of_table_1_is_in_the_pareto_figure(full: Results) -> None:
    said = " ".join(_texts(full, "pareto").split())
    rows = {row for row, _ in full.lines("table1")} - {"base"}
    assert {"adalomo", "shira"} < rows
    for row in rows:
        assert marks.title(row) in said or marks.title(row).replace(", ", " ") in said, row


def test_an_ablation_without_key_experts_is_drawn_beside_meft_without_them() -> None:
    """MEFT 12 of 20, without Key-Experts 8: a change of the latter that changes nothing lies at 0."""
    right = {"meft": 12, "meft_no_ke": 8, "meft_no_ke_device": 8}
    said = _texts(results_of(CELLS, [make_record(c, right.get(c.row, 5)) for c in CELLS]), "ablations")
    assert "+0.000" in said and "-0.200" not in said


@pytest.mark.parametrize("name", PAPERS)
def test_ours_are_filled_and_the_papers_open_and_apart(full: Results, name: str) -> None:
    with output.settings():
        ours, theirs = catalogue._DRAWN[name](full, REPORTED, BENCH).axes
    no_points = ("None", "", "|", "_")
    open_in = [
        [line.get_markerfacecolor() == "white" for line in axes.lines if line.get_marker() not in no_points]
        for axes in (ours, theirs)
    ]
    assert open_in[0] and not any(open_in[0])
    assert len(open_in[1]) == PAPERS[name] and all(open_in[1])
    assert "PAPER" in (said := theirs.get_title("left")) and "reported" in said and "OURS" in ours.get_title("left")


def test_means_are_over_seeds_and_bars_over_items(full: Results) -> None:
    mark = marks.score_mark(full, "meft 10% facts", 10.0)
    scores = [_right(c) / 20 for c in CELLS if (c.row, c.share, c.spec.task, c.variant) == ("meft", "10%", "facts", "")]
    assert sorted(mark.by_seed.values()) == scores and len(scores) == 5
    assert mark.mean == pytest.approx(sum(scores) / 5)
    score = full.score(("meft", "10%"), headline("facts"))
    assert (mark.mean, mark.low, mark.high) == (pytest.approx(score.value), score.low, score.high)
    assert "n = 20 items a seed, 5 seeds" in marks.how([mark])


def test_places_with_other_numbers_of_seeds_are_named(full: Results) -> None:
    """A line may join three seeds and five: the panel says which is which, and no caption says three for all."""
    said = " ".join(_texts(full, "figure1").split())
    assert "5 seeds: LoRA 2%; AdapterH 2%; Parallel Adapter 2%, 10%; MEFT 10%; Full fine-tuning 100%; others 3" in said
    assert "1 seed: Parallel Adapter, offloaded whole 2%, 10%; 5 seeds:" in " ".join(_texts(full, "forgetting").split())
    for name in ("figure2", "figure3", "figure8", "lookahead", "experts", "forgetting", "accumulation"):
        caption = catalogue.FIGURES[name][1]
        assert "seeds planned" not in caption and "says over how many seeds" in caption, name


def test_a_figure_changes_with_a_score(files: dict[str, bytes]) -> None:
    changed = [make_record(c, 19 if (c.row, c.share, c.spec.seed) == ("meft", "10%", 1) else _right(c)) for c in CELLS]
    names = ("figure1", "figure4", "figure7", "ablations", "pareto", "capacity", "figure8")
    after = catalogue.draw(results_of(CELLS, changed), REPORTED, BENCH, names)
    same = {n for n in names if after[f"{n}.png"] == files[f"{n}.png"]}
    assert same == {"figure8"}, "which shows no score"


def test_bytes_do_not_depend_on_call_process_locale_or_settings(files: dict[str, bytes], tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.formatter.use_locale": True}):
        again = catalogue.draw(_full(), REPORTED, BENCH)
    assert again == files
    (tmp_path / "matplotlibrc").write_text("font.size: 25\nlines.linewidth: 9\nfigure.dpi: 40\nsavefig.bbox: tight\n")
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(PACKAGE.parent), "MPLCONFIGDIR": str(tmp_path),
           "LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}  # fmt: skip
    code = (
        "import sys, meft_bench.report.figures.catalogue\n"
        "assert not {'torch', 'matplotlib', 'scipy'} & set(sys.modules), 'heavy imports'\n"
        "from tests.report.test_figures import drawn_digests\n"
        "print(drawn_digests())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = "\n".join(f"{name} {hashlib.sha256(files[name]).hexdigest()}" for name in sorted(files))
    assert done.stdout.strip() == here


def test_the_front_keeps_what_nothing_smaller_reaches() -> None:
    points = [(4.0, 0.9), (1.0, 0.2), (2.0, 0.5), (2.0, 0.4), (3.0, 0.5), (5.0, 0.8)]
    drawn = [marks.Mark(x=x, by_seed={0: y, 1: y}) for x, y in points]
    found = size.pareto_front([*drawn, marks.Mark(x=0.5, by_seed={})])
    assert [(m.x, m.mean) for m in found] == [(1.0, 0.2), (2.0, 0.5), (4.0, 0.9)]


def test_benchmark_figures_say_exponents_machine_and_what_was_not_run(full: Results) -> None:
    said = _texts(full, "retrieval")
    assert "R^0.52 (dot products: R^0.50)" in said and "D = 4096" in said
    narrow = {k: v for k, v in RETRIEVAL.items() if k != "wide"}
    assert "not run" in _texts(full, "retrieval", {"retrieval": narrow})
    said = _texts(full, "kernels")
    assert "a processor, 2 threads" in said and "as many bytes at the rate of" in said
    assert "not run" in _texts(full, "kernels", {})
