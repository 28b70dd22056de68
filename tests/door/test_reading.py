"""Files of strangers: read with limits, refused in one line, never waited for."""

import os
import time

import pytest

from meft_bench import host_memory, reading
from meft_bench.fields import Choice, Items, Maybe, Pairs, Plain, Real, Text

TABLE = {
    "data": Text(),
    "revision": Maybe(Text()),
    "columns": Pairs(Text()),
    "options": Pairs(Plain()),
    "rate": Real(above=0),
    "splits": Items(Choice(("no", "test"))),
}


def _nested(depth: int) -> list:
    return [] if depth == 1 else [_nested(depth - 1)]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("columns: {prompt: en, completion: no}", {"columns": {"prompt": "en", "completion": "no"}}),
        ("columns: {prompt: 01, completion: 1e3}", {"columns": {"prompt": "01", "completion": "1e3"}}),
        ("columns: {no: 'yes'}", {"columns": {"no": "yes"}}),
        ("data: 2024-01-01", {"data": "2024-01-01"}),
        ("revision: 0123456", {"revision": "0123456"}),
        ("revision: null", {"revision": None}),
        ("revision:", {"revision": None}),
        ("revision: 'null'", {"revision": "null"}),
        ("rate: 1e-3", {"rate": 0.001}),
        ("rate: '1e-3'", {"rate": 0.001}),
        ("rate: 'fast'", {"rate": "fast"}),
        ("options: {x: '1e-3'}", {"options": {"x": "1e-3"}}),
        ("rate: 3", {"rate": 3}),
        ("options: {rank: 8, on: true, x: 1e-3}", {"options": {"rank": 8, "on": True, "x": 1e-3}}),
        ("splits: [no, test]", {"splits": ["no", "test"]}),
        ("other: no", {"other": False}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: {<<: [{p: 1}, {p: 2, q: 3}]}", {"a": {"p": 1, "q": 3}}),
        ("", None),
        ("[" * 65 + "]" * 65, _nested(65)),
    ],
)  # fmt: skip
def test_words_are_what_their_field_is(text, value):
    assert reading.parse_yaml(text, "f", TABLE) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "f is not YAML: while parsing"),
        ("a: 1\na: 2", "f, line 2: 'a' stands twice"),
        ("? [1]\n: 2", "f, line 1: a name must be a text"),
        ("a: {<<: 3}", "f, line 1: << merges mappings"),
        ("a: !!python/object/apply:os.system [ls]", "f, line 1: lists and mappings take no tag"),
        ("a: !!int ''", "f is not YAML"),
        ("a: 2024-13-45", "f is not YAML: month"),
        ("a: " + "9" * 5000, "f is not YAML: Exceeds the limit"),
        ("[" * 3000, "f nests too deep"),
        ("[" * 70 + "]" * 70, "f nests deeper than 64 levels"),
        ("&a [*a]", "f nests deeper than 64 levels"),
        (BOMB, "f holds more than 20,000 values"),
        ("a: &a [1]\nb: {<<: [" + ",".join(["{x: *a}"] * 9000) + "]}", "f holds more than 20,000 values"),
        ("a: \ud83d", "f is not YAML: unacceptable character"),
    ],
    ids=range(14),
)
def test_yaml_that_is_refused(text, message):
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        reading.parse_yaml(text, "f", TABLE)
    assert "\n" not in str(error.value) and time.process_time() - began < 5


def test_no_tag_runs_anything(tmp_path):
    made = tmp_path / "made"
    for text in (f"a: !!python/object/apply:os.mkdir ['{made}']", "b: !!python/name:os.system x"):
        with pytest.raises(ValueError, match="tag"):
            reading.parse_yaml(text, "f", TABLE)
    assert not made.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "f is not JSON"),
        ("[NaN]", "f is not JSON: NaN is no number"),
        ("[-Infinity]", "f is not JSON: -Infinity is no number"),
        ("[1e999]", "f is not JSON: 1e999 is no number"),
        ("[" * 100_000, "f nests too deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "f nests deeper than 64 levels"),
        ("[" + "[]," * 500_000 + "0]", "f holds more than 500,000 lists and objects"),
        ("[" + "[]," * 250_000 + "{}," * 250_000 + "0]", "f holds more than 500,000 lists and objects"),
        ("9" * 5000, "f is not JSON: Exceeds the limit"),
    ],
    ids=range(9),
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        reading.parse_json(text, "f")


def test_json_at_the_limits_is_read():
    assert reading.parse_json('{"a":' * 64 + "1" + "}" * 64, "f")["a"]["a"]
    assert reading.parse_json('[1, {"a": [2.5, null, "x", true]}]', "f") == [1, {"a": [2.5, None, "x", True]}]
    assert reading.parse_json("3", "f") == 3


def test_files_that_are_none(tmp_path):
    pipe, sparse, binary = tmp_path / "pipe", tmp_path / "sparse", tmp_path / "binary"
    os.mkfifo(pipe)
    with open(sparse, "wb") as file:
        file.truncate(10**12)
    binary.write_bytes(b"ab\xff")
    for path, message in (
        (pipe, "pipe is a pipe: spec must be a file"),
        (sparse, "sparse has 1,000,000,000,000 bytes: spec may have 100"),
        (binary, r"binary is not UTF-8 text \(byte 2\): save it as UTF-8"),
        (tmp_path, "is a folder: spec must be a file"),
        (tmp_path / "gone", "no spec .*gone"),
        (tmp_path / ("x" * 300), "cannot read spec .*File name too long"),
        ("/dev/zero", "/dev/zero is a device: spec must be a file"),
        ("/proc/self/status", "/proc/self/status has more than the 100 bytes that spec may have"),
    ):
        with pytest.raises(ValueError, match=message):
            reading.read_text(path, 100, "spec")


def test_text_of_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}')
    assert reading.read_text(path) == '{"a": "ü"}' and reading.read_json(path) == {"a": "ü"}
    path.write_bytes(b"x" * 100)
    assert reading.read_text(path, 100) == "x" * 100
    with pytest.raises(ValueError, match="has 100 bytes"):
        reading.read_text(path, 99)


# ---- the memory there is ----


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    own = tmp_path / "cgroup"
    group = tmp_path / "groups" / "outer" / "inner"
    group.mkdir(parents=True)
    own.write_text("1:name=systemd:/x\n0::/outer/inner\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000\n")
    (group.parent / "memory.current").write_text("700\n")
    (group.parent / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    assert list(host_memory._limits(tmp_path / "groups", own)) == [(1000, 300)]
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "_OWN", own)
    assert host_memory.total_bytes() == 1000 and host_memory.available_bytes() == 700


def test_version_one_of_control_groups(tmp_path):
    own, group = tmp_path / "cgroup", tmp_path / "groups" / "memory" / "job"
    group.mkdir(parents=True)
    own.write_text("5:cpu,cpuacct:/other\n4:memory:/job\n")
    (group / "memory.limit_in_bytes").write_text("2000\n")
    (group / "memory.usage_in_bytes").write_text("900\n")
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100\n")
    (group.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert list(host_memory._limits(tmp_path / "groups", own)) == [(2000, 800)]


def test_without_groups_the_machine_s_memory_counts(tmp_path, monkeypatch):
    import psutil

    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_OWN", tmp_path / "gone")
    assert host_memory.total_bytes() == psutil.virtual_memory().total
    assert 0 < host_memory.available_bytes() <= host_memory.total_bytes()


def test_a_limit_of_the_shell_counts():
    import subprocess
    import sys

    code = "from meft_bench.host_memory import available_bytes; print(available_bytes())"
    found = subprocess.run(
        ["bash", "-c", f'ulimit -v 1000000; exec {sys.executable} -c "{code}"'], capture_output=True, text=True
    )
    assert 0 < int(found.stdout) < 1_000_000 * 1024, found.stderr
