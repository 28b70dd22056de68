"""Whatever is handed over, bad input is one line, exit 2, within two seconds, in little memory, with nothing left."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meft_bench import cli
from meft_bench.fields import Key, Kind, Maybe, Real, Whole, flag
from meft_bench.finetune.settings import FIELDS as TRAIN
from meft_bench.harness.spec import FIELDS as RUN
from meft_bench.train.contract import describe, method_names

LONG = 1200
_COUNT = Maybe(Whole(1))
_OWN = ("options", "columns", "drop_empty", "drop_overlong")
"""Settings whose flags are pairs, or take no value."""
FLAGS: dict[tuple[str, ...], dict[str, Kind]] = {
    ("train", "--data", "example", "--output", "out"): {
        f"--{name.replace('_', '-')}": kind for name, kind in TRAIN.items() if name not in _OWN
    },
    ("run", "--task", "facts", "--method", "full"): {"--workers": Whole(1, 1024), "--device": RUN["device"]},
    ("replicate", "--suite", "smoke"): {"--workers": Whole(1, 1024)},
    ("generate", "--adapter", "gone", "--prompt", "a"): {
        "--new-tokens": _COUNT,
        "--batch-size": TRAIN["batch_size"],
        "--dtype": TRAIN["dtype"],
    },
    ("evaluate", "--adapter", "gone", "--tasks", "facts"): {"--limit": _COUNT, "--seed": Whole(0, 2**32 - 1)},
    ("bench",): {"--pairs": Whole(1, 10**6)},
    ("show",): {"": Key()},
    ("profile",): {
        "--batch": Whole(1, 2**24),
        "--seq": Whole(2, 2**24),
        "--union": Real(above=0, most=1),
        "--host-memory": Real(above=0, most=2**32),
        "--workers": Whole(1, 1024),
    },
}
_NUMBERS = ("0", "-1", "1e9", "1e300", "1e39", "nan", "inf", "-inf", "1.5", "99999999999999999999", "9" * 5000, "true")
_TEXTS = ("", "no", "null", "[1]", "{a: 1}", "/etc/passwd", "../..", "*", "x" * 5000, "[" * 300, "a\nb", "&a [*a]", "%")
TEXTS = st.sampled_from(_NUMBERS + _TEXTS) | st.integers().map(str) | st.floats().map(repr) | st.text(max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 1e39]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def refused(kind: Kind, value: object) -> bool:
    try:
        kind.check("x", value)
    except ValueError:
        return True
    return False


def refused_flag(kind: Kind, text: str) -> bool:
    try:
        flag(kind)(text)
    except Exception:
        return True
    return False


@st.composite
def bad_flags(draw: st.DrawFn) -> list[str]:
    """A command with one flag whose value is of another kind."""
    command = draw(st.sampled_from(sorted(FLAGS)))
    name, kind = draw(st.sampled_from(sorted(FLAGS[command].items(), key=lambda pair: pair[0])))
    text = draw(TEXTS.filter(lambda text: refused_flag(kind, text) and "\0" not in text))
    if not name:
        return [*command, "--", text]
    return [*command, f"{name}={text}"]


@st.composite
def bad_pairs(draw: st.DrawFn) -> list[str]:
    """NAME=VALUE pairs whose value is of another kind: --set of run, --option of run and train."""
    if draw(st.booleans()):
        name, kind = draw(st.sampled_from(sorted(RUN.items(), key=lambda pair: pair[0])))
        start, option = ["run", "--task", "facts", "--method", "full"], "--set"
    else:
        method = draw(st.sampled_from([m for m in method_names() if describe(m).kinds]))
        name, kind = draw(st.sampled_from(sorted(describe(method).kinds.items(), key=lambda pair: pair[0])))
        run = ["run", "--task", "facts", "--method", method]
        train = ["train", "--data", "example", "--output", "out", "--method", method]
        start, option = draw(st.sampled_from([run, train])), "--option"
    empty = name == "options"  # null is an empty mapping
    value = draw(VALUES.filter(lambda v: refused(kind, v) and _as_text(kind, v) and not (v is None and empty)))
    return [*start, option, f"{name}={_as_text(kind, value)}"]


def _as_text(kind: Kind, value: object) -> str:
    """The value as it is typed; "" where what is typed would be right."""
    text = value if isinstance(value, str) else json.dumps(value)
    if "\0" in text or (kind.text and not refused(kind, text)):
        return ""
    try:
        typed = text if kind.text else yaml.safe_load(text)
        typed = float(typed) if isinstance(typed, str) and not kind.text else typed
    except Exception:
        return text
    return text if refused(kind, typed) else ""


@st.composite
def bad_yaml(draw: st.DrawFn) -> tuple[str, dict[str, object]]:
    """A file for train or run with one value of another kind, or a name that is none."""
    command, table, whole = draw(
        st.sampled_from(
            [("train", TRAIN, {"data": "example", "output": "out"}), ("run", RUN, {"task": "facts", "method": "full"})]
        )
    )
    name, kind = draw(st.sampled_from(sorted(table.items(), key=lambda pair: pair[0])))
    value = draw(VALUES.filter(lambda value: _is_bad_in_yaml(name, kind, value)))
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.text(min_size=1, max_size=8).filter(lambda text: text not in table))
    return command, {**whole, name: value}


def _is_bad_in_yaml(name: str, kind: Kind, value: object) -> bool:
    if value is None and name in ("options", "columns", "data", "output"):
        return False  # an empty mapping; the command line could still name the others
    plain = value is not None and not isinstance(value, str | dict | list)
    return refused(kind, value) and not (kind.text and plain)


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    before, began = sorted(os.listdir(folder)), time.process_time()
    code = cli.main(arguments)
    took, said = time.process_time() - began, capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("meft-bench: ") and said.count("\n") == 1 and len(said) < LONG, said
    assert took < 2 and sorted(os.listdir(folder)) == before
    return said


MANY = settings(max_examples=170, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@MANY
@given(arguments=bad_flags())
def test_flags(arguments, capsys, folder):
    answer(arguments, capsys, folder)


@MANY
@given(arguments=bad_pairs())
def test_pairs(arguments, capsys, folder):
    answer(arguments, capsys, folder)


@MANY
@given(case=bad_yaml())
def test_files(case, capsys, folder):
    command, values = case
    (folder / "job.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="replace")
    answer([command, "job.yaml"], capsys, folder)


@settings(MANY, max_examples=60)
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_files_of_anything(text, capsys, folder):
    (folder / "job.yaml").write_bytes(text)
    for command in ("train", "run"):
        answer([command, "job.yaml"], capsys, folder)
