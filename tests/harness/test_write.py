"""Files are replaced whole, for good, and only when they change."""

import os
import stat

import pytest

from meft_bench import write


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("sync", os.fstat(handle).st_size)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", os.path.basename(b))), replace(a, b)))
    write.replace(tmp_path / "new" / "file", b"content")
    assert events == [("sync", 7), ("name", "file")]
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write file \(No space left on device\)"):
        write.write_if_changed(tmp_path / "file", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_the_same_content_is_not_written(tmp_path):
    assert write.write_if_changed(tmp_path / "file", b"content")
    before = (tmp_path / "file").stat().st_ino
    assert not write.write_if_changed(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_ino == before
    assert write.write_if_changed(tmp_path / "file", b"other") and (tmp_path / "file").read_bytes() == b"other"


def test_what_is_there_is_never_written_over(tmp_path):
    write.write_new({tmp_path / "a": b"one"})
    before = (tmp_path / "a").stat().st_ino
    write.write_new({tmp_path / "a": b"one", tmp_path / "new" / "b": b"two"})
    assert (tmp_path / "a").stat().st_ino == before and (tmp_path / "new" / "b").read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    for other in ({tmp_path / "a": b"other"}, {tmp_path / "folder": b"one"}):
        with pytest.raises(ValueError, match="is there and holds something else: move it away"):
            write.write_new({tmp_path / "c": b"three"} | other)
    assert (tmp_path / "a").read_bytes() == b"one" and not (tmp_path / "c").exists()


def test_a_tree_is_synced_whole(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text(name)
    synced = []
    monkeypatch.setattr(write, "sync", lambda path: synced.append(path.relative_to(tmp_path).as_posix()))
    write.sync_tree(tmp_path)
    assert sorted(synced) == [".", "a", "deep", "deep/b"]
