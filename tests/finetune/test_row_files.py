"""Files that are no files, have no end or are damaged: one line each, before memory is taken."""

import gzip
import json
import os
import tracemalloc

import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

from meft_bench import reading
from meft_bench.finetune import row_files
from meft_bench.finetune.row_files import BrokenRow, records
from meft_bench.finetune.user_rows import read_prompts

PAIR = {"prompt": "a", "completion": "b"}


def lines(count: int) -> bytes:
    return b"".join(json.dumps({**PAIR, "n": n}).encode() + b"\n" for n in range(count))


def refused(path, read=records) -> str:
    with pytest.raises(ValueError) as error:
        list(read(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_line_without_end_takes_no_memory(tmp_path):
    with gzip.open(tmp_path / "r.jsonl.gz", "wb", 1) as file:
        file.write(b'{"prompt": "')
        for _ in range(40):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    said = refused(tmp_path / "r.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said == "r.jsonl.gz, line 1 has more than 16,777,216 bytes: no row is that long" and peak < 60e6


@pytest.mark.parametrize("name", ["teknium/OpenHermes-2.5", "HuggingFaceH4/ultrachat_200k", "a/b.c"])
def test_a_data_set_s_name_may_have_a_dot(name):
    assert row_files.source_name(name) == name


@pytest.mark.parametrize("name", ["data/facts.jsonl", "data/FACTS.CSV", "data/r.jsonl.gz", "data/r.parquet", "x.json"])
def test_a_missing_file_is_no_data_set(name):
    with pytest.raises(ValueError, match="no data file"):
        row_files.source_name(name)


def test_dates_that_python_does_not_reach(tmp_path):
    types = [pa.timestamp("s"), pa.date32(), pa.duration("us"), pa.timestamp("us", tz="Nowhere/Town"), pa.time32("s")]
    dates = {str(t): pa.array([None, 10**7 if t == pa.date32() else 10**13 if t != types[-1] else 5], t) for t in types}
    table = pa.table({"prompt": ["a", "c"], "completion": ["b", "d"], **dates})
    parquet.write_table(table, tmp_path / "r.parquet")
    read = [(values["prompt"], values["completion"]) for _, values in records(tmp_path / "r.parquet")]
    assert read == [("a", "b"), ("c", "d")]
    inner = pa.array([[None], [{"at": 10**13}]], pa.list_(pa.struct([("at", pa.timestamp("s"))])))
    parquet.write_table(pa.table({"prompt": ["a", "c"], "d": inner}), tmp_path / "r.parquet")
    assert "row 1 or soon after: a list or object holds a date or time" in refused(tmp_path / "r.parquet")


@pytest.mark.parametrize("damage", ["cut", "bits", "checksum"])
def test_damaged_archives(tmp_path, damage):
    whole = bytearray(gzip.compress(lines(5000)))
    if damage == "cut":
        whole = whole[: len(whole) // 2]
    elif damage == "bits":
        whole[20:60] = bytes(range(40))
    else:
        whole[-8] ^= 1
    for name, reader in {"r.jsonl.gz": records, "p.txt.gz": read_prompts}.items():
        (tmp_path / name).write_bytes(whole)
        assert f"cannot read {name}: " in refused(tmp_path / name, reader)
    (tmp_path / "p.txt.gz").write_bytes(b"who ?")
    assert "cannot read p.txt.gz: Not a gzipped file" in refused(tmp_path / "p.txt.gz", read_prompts)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name, kind in {"pipe.jsonl": "a pipe", "zero.jsonl": "a device"}.items():
        assert f"is {kind}: data must be a file" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet", "r.jsonl.gz"])
def test_sparse_files(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.write(lines(1))
        file.truncate(10**12)
    if (tmp_path / name).stat().st_blocks > 10**6:
        pytest.skip("this file system writes holes out")
    assert "claims 1,000,000,000,000 bytes and holds" in refused(tmp_path / name)


def test_a_hole_in_a_text_file_is_named_before_it_is_read(tmp_path):
    with open(tmp_path / "r.jsonl", "wb") as file:
        file.write(lines(2))
        file.seek(2**20)
        file.write(lines(1))
    if reading._first_hole(tmp_path / "r.jsonl", 2**20) == 2**20:
        pytest.skip("this file system does not say where holes are")
    assert "has a hole at byte" in refused(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ' + "[" * 100_000, "line 1 nests too deep"),
        ('{"prompt": "a", "prompt": "b"}', "line 1 has prompt twice"),
        ('{"prompt": {"a": 1, "a": 2}}', "line 1 has a twice"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
    ],
)
def test_json_that_is_no_row(tmp_path, line, message):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    assert message in refused(tmp_path / "r.jsonl")


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "one\u2028two\x85three\x0bfour"
    (tmp_path / "r.jsonl").write_bytes(json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n")
    assert list(records(tmp_path / "r.jsonl")) == [(1, {"prompt": text})]


def test_csv_as_programs_write_it(tmp_path):
    long = "x " * 70_000
    cells = '\ufeffprompt,completion,01\r\n"a\r\nb","say ""c""",\r\n\r\nd,' + long + ",e\r\n"
    (tmp_path / "r.csv").write_bytes(cells.encode())
    assert list(records(tmp_path / "r.csv")) == [
        (3, {"prompt": "a\r\nb", "completion": 'say "c"', "01": ""}),
        (5, {"prompt": "d", "completion": long, "01": "e"}),
    ]
    (tmp_path / "r.csv").write_bytes(b"prompt,completion\n" + b"x" * (2**24 + 1))
    assert "line 2 has more than 16,777,216 characters" in refused(tmp_path / "r.csv")
    (tmp_path / "r.csv").write_bytes(b"\xff\xfea\0,\0b\0")
    assert "cannot read r.csv" in refused(tmp_path / "r.csv")


def test_parquet_names_each_column_once(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "r.parquet")
    assert "r.parquet must name each column once: it has prompt, prompt" in refused(tmp_path / "r.parquet")
    pandas.DataFrame({"a": [1, 2]}, index=["x", "y"]).to_parquet(tmp_path / "i.parquet")
    assert [number for number, _ in records(tmp_path / "i.parquet")] == [1, 2]


def test_messages_stay_short_and_on_one_line(tmp_path):
    assert row_files.listed([f"column\n{i}" for i in range(1000)]).endswith("column 11, ...")


def test_the_file_that_is_named_in_a_broken_row_is_a_value_error():
    assert issubclass(BrokenRow, ValueError)


def test_a_number_that_python_writes_for_a_missing_one_is_read(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "score": NaN, "length": -Infinity}\n')
    ((number, values),) = records(tmp_path / "r.jsonl")
    assert number == 1 and values["prompt"] == "a" and values["score"] != values["score"]
