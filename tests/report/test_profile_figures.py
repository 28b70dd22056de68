"""Figures of a profile: all drawn from any profile, always the same bytes, and never silent about what they lack."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest

from meft_bench.harness.spec import PACKAGE
from meft_bench.profile import best
from meft_bench.report.figures import lanes, output, panel, profile, profile_frontier
from meft_bench.report.page.images import embedded
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.profiles import Profile, load_profiles, step_s, union_of

from .made_profiles import GIB, make_profile, make_row, write_profiles

REPORTED = load_reported(PACKAGE.parent / "results" / "paper" / "reported.yaml")


def _profiles(folder: Path) -> list[Profile]:
    other = make_profile("mistral-7b", "48GB", 47.2)
    return load_profiles(write_profiles(folder, make_profile(), make_profile(card="48GB", usable=47.2), other))


def drawn_digest(folder: Path) -> str:
    """Of every figure; run in another process, too."""
    files = profile.draw(_profiles(folder), REPORTED)
    return hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()


def _axes(profiles: list[Profile], name: str) -> list[Any]:
    with output.settings():
        return list(profile._DRAWN[name](profiles, REPORTED).axes)


def _texts(axes: list[Any]) -> str:
    found = [t.get_text() for a in axes for t in a.findobj(matplotlib.text.Text)]
    return "\n".join(t for t in found if t)


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[Profile]:
    return _profiles(tmp_path_factory.mktemp("made"))


def test_every_figure_has_a_caption_and_both_files(profiles: list[Profile]) -> None:
    files = profile.draw(profiles, REPORTED, ("png", "svg"))
    assert list(profile.FIGURES) == list(profile._DRAWN)
    assert sorted(files) == sorted(f"{n}.{s}" for n in profile.FIGURES for s in ("png", "svg"))
    for name, (title, caption) in profile.FIGURES.items():
        assert title and caption.endswith(".") and embedded(name, files[f"{name}.png"])


def test_figures_do_not_depend_on_process_or_settings(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None}):
        here = drawn_digest(tmp_path / "here")
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.report.test_profile_figures import drawn_digest\n"
        f"print(drawn_digest(Path({str(tmp_path / 'there')!r})), 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [here, "False"]


def test_memory_bars_add_up_and_are_hatched_when_simulated(tmp_path: Path) -> None:
    rows = [make_row("parallel_adapter", 3072, False), make_row("lora_all", 3072, False, evidence="measured")]
    found = load_profiles(write_profiles(tmp_path, make_profile(rows=rows)))
    (axes,) = _axes(found, "profile_memory")
    by_row: dict[float, list[Any]] = {}
    for bar in axes.patches:
        by_row.setdefault(round(bar.get_y(), 3), []).append(bar)
    simulated, measured = (bars for _, bars in sorted(by_row.items(), reverse=True))
    total = rows[0]["memory"]["device_total_bytes"] / GIB
    for bars, hatched in ((simulated, "////"), (measured, "")):
        assert sum(b.get_width() for b in bars) == pytest.approx(total)
        assert {b.get_hatch() or "" for b in bars} == {hatched}
    text = _texts([axes])
    assert f"{total:.1f}" in text and "24GB" in text and "measured, simulated" in text


def test_traffic_shows_the_claim_and_both_sources_of_u(profiles: list[Profile]) -> None:
    left, right = _axes(profiles, "profile_traffic")
    text = _texts([left, right])
    assert "MEFT (U logged)" in text and "MEFT (U assumed)" in text and "0.56 M a micro-batch" in text
    lines = {line.get_label(): line for line in right.lines}
    meft = next(line for label, line in lines.items() if label.startswith("MEFT, R = 6,144, U/R 0.25"))
    assert list(meft.get_ydata()) == [0.5, 2.0, 8.0, 16.0] and meft.get_linestyle() == "--"
    streamed = next(line for line in left.lines if "streamed" in str(line.get_label()))
    assert len(set(streamed.get_ydata())) == 1, "it moves everything again for every micro-batch"


def test_latency_has_the_five_variants_and_says_what_is_missing(tmp_path: Path, profiles: list[Profile]) -> None:
    panels = _axes(profiles, "profile_latency")
    assert [len(a.get_yticks()) for a in panels] == [5, 5]
    assert "U/R 0.90 logged" in _texts(panels[:1]) and "U/R 0.25 assumed" in _texts(panels[1:])
    (key,) = panels[0].figure.legends
    assert "8.00 s" in _texts(panels) and "other host" in [t.get_text() for t in key.get_texts()]
    rows = [r for r in make_profile()["rows"] if (r.get("union") or {}).get("evidence") != "assumed"]
    lacking = load_profiles(write_profiles(tmp_path, make_profile(rows=rows, timeline={})))
    (only,) = _axes(lacking, "profile_latency")
    assert "U/R 0.90 logged" in _texts([only]) and len(only.get_yticks()) == 5
    assert "make profile GPU=24GB" in _texts(_axes(lacking, "profile_timeline"))


def test_the_frontier_names_what_nothing_beats_and_greys_the_rest(profiles: list[Profile]) -> None:
    """The optimizer on the host (1.5 s) beats MEFT (4 s) and what streams at every size; the resident ones fit with
    checkpointing at the smaller one."""
    panels = _axes(profiles, "profile_frontier")
    assert [a.get_title(loc="left").splitlines()[0] for a in panels] == [
        "1 micro-batch a step", "32 micro-batches a step"]  # fmt: skip
    text = _texts(panels[:1])
    assert "Parallel Adapter,\ncheckpointing" in text and "MEFT (U logged)" in text and "(U assumed)" not in text
    assert "streamed" not in text and "Key-Experts" not in text, "beaten, so without a name"
    colours = {line.get_label().replace("\n", " "): line.get_color() for line in panels[0].lines}
    assert colours["MEFT (U logged)"] == panel.GREY
    named = {name for name, colour in colours.items() if colour not in (panel.GREY, "#BBBBBB")}
    assert named == {"Parallel Adapter, checkpointing", "Parallel Adapter, optimizer on the host"}


def test_no_two_methods_that_lead_look_alike() -> None:
    """As many as have led on a card so far, and more."""
    variants = [best.OURS, *(f"{best.OURS}_{i}" for i in range(4)), *(f"peer_{i}" for i in range(7))]
    points = [
        SimpleNamespace(
            variant=v, union="", checkpointing=False, neurons=i + 1, fits=lambda accumulation: True,
            tokens_per_s={1: 100.0 - i}, family=best.OURS if v.startswith(best.OURS) else "adapter",
        )
        for i, v in enumerate(variants)
    ]  # fmt: skip
    looks = profile_frontier._colours(points, (1,)).values()
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(variants)


def test_variants_of_meft_that_end_alike_are_one_line(profiles: list[Profile]) -> None:
    text = _texts(_axes(profiles, "profile_largest"))
    assert "MEFT (either U)" in text and "LoRA, all linear" in text
    timeline = _texts(_axes(profiles, "profile_timeline"))
    assert "simulated" in timeline and "update" in timeline


def test_a_timeline_is_of_all_layers_and_says_where_the_next_step_begins(tmp_path: Path) -> None:
    """The update of a step of 4 s ends after 9 s, beside the next forward pass."""
    spans = [("gpu", "forward", 0.0, 1.0), ("gpu", "backward", 1.0, 3.0), ("workers", "update", 3.0, 9.0)]
    events = [{"lane": a, "phase": p, "start_s": start, "end_s": end, "name": "x"} for a, p, start, end in spans]
    told: dict[str, Any] = {"variant": "meft", "neurons": 3072, "events": events}
    found = load_profiles(write_profiles(tmp_path, make_profile(timeline=told)))
    (row,) = [r for r in found[0].found("meft", 3072, False) if union_of(r) == "assumed"]
    step, share = step_s(row), row["union"]["union_share"]
    (axes,) = _axes(found, "profile_timeline")
    heading = axes.get_title(loc="left").replace("\n", " ")
    assert f"U/R {share:.2f} assumed" in heading and "layers" not in heading
    assert "few layers" not in profile.FIGURES["profile_timeline"][1]
    said = " ".join(t.get_text() for t in axes.figure.texts).replace("\n", " ")
    assert f"A step takes {step:.2f} s" in said
    events[-1]["end_s"] = step
    short = load_profiles(write_profiles(tmp_path / "short", make_profile(timeline=told)))
    (axes,) = _axes(short, "profile_timeline")
    assert "A step takes" not in " ".join(t.get_text() for t in axes.figure.texts)


def test_phases_follow_the_device_whatever_the_workers_do() -> None:
    """Workers still update the last step's neurons while the next forward runs."""
    spans = [("workers", "update", 0.0, 9.0), ("gpu", "forward", 0.0, 2.0), ("host", "backward", 1.0, 4.0),
             ("gpu", "backward", 2.0, 5.0), ("gpu", "update", 0.5, 0.6)]  # fmt: skip
    events = [{"lane": a, "phase": p, "start_s": start, "end_s": end, "name": "x"} for a, p, start, end in spans]
    assert lanes._phases(events) == [("forward", 0.0, 2.0), ("backward", 2.0, 5.0), ("update", 5.0, 9.0)]


def test_a_profile_without_rows_draws_and_says_so(tmp_path: Path) -> None:
    empty = make_profile(rows=[], largest=[], paper=[], timeline={})
    found = load_profiles(write_profiles(tmp_path, empty))
    assert len(profile.draw(found, REPORTED)) == len(profile.FIGURES)
    for name in profile.FIGURES:
        assert "not run" in _texts(_axes(found, name)), name


def test_what_a_gpu_held_stands_on_the_simulated_bar(tmp_path: Path) -> None:
    seen = make_row("parallel_adapter", 3072, False, evidence="capped")
    seen["memory"] = {**seen["memory"], "device_total_bytes": 20 * GIB}
    other = make_profile(card="h200-capped", evidence="capped", rows=[seen], largest=[], paper=None, timeline=None)
    found = load_profiles(write_profiles(tmp_path, make_profile(), other))
    (axes,) = _axes(found, "profile_memory")
    points = [(line.get_xdata()[0], line.get_markerfacecolor()) for line in axes.lines if line.get_marker() == "D"]
    assert points == [(20.0, panel.BLACK)]
    assert "h200-capped" not in _texts([axes]), "only the cards of the simulation have a line"
    (largest,) = _axes(found, "profile_largest")
    assert largest.figure is not None and "h200-capped" not in _texts([largest, *largest.figure.legends]), (
        "none searched"
    )


def test_a_gpu_that_ran_other_micro_batches_is_not_on_the_bar(tmp_path: Path) -> None:
    seen = make_row("parallel_adapter", 3072, False, evidence="measured")
    other = make_profile(card="h200", evidence="measured", rows=[seen], largest=[], paper=None, timeline=None)
    other["settings"] |= {"batch": 8, "seq": 512}
    found = load_profiles(write_profiles(tmp_path, make_profile(), other))
    (axes,) = _axes(found, "profile_memory")
    assert not [line for line in axes.lines if line.get_marker() == "D"]
