"""Built kernels are loaded only when they are the user's own and whole; every odd home works, and compiles once."""

import os
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meft_bench.meft.engine import kernel_cache, native

needs_kernels = pytest.mark.skipif(native.kernels().elementwise is None, reason=native.status())
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Builder:
    """Writes words and counts how often it was asked."""

    def __init__(self, words: bytes = b"whole") -> None:
        self.words, self.times = words, 0

    def __call__(self, path: Path) -> None:
        self.times += 1
        path.write_bytes(self.words)


def test_what_is_there_and_sound_is_not_built_again(cache: Path) -> None:
    build = Builder()
    file = kernel_cache.built(cache, "a", build)
    assert kernel_cache.built(cache, "a", build) == file and build.times == 1 and file.read_bytes() == b"whole"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(p.name for p in cache.iterdir()) == ["a.sha256", "a.so", "lock"]


def damage_truncated(file: Path) -> None:
    os.truncate(file, 3)


def damage_other_content(file: Path) -> None:
    file.write_bytes(b"other")


def damage_no_digest(file: Path) -> None:
    file.with_suffix(".sha256").unlink()


def damage_writable_by_the_group(file: Path) -> None:
    file.chmod(0o664)


def damage_digest_writable_by_all(file: Path) -> None:
    file.with_suffix(".sha256").chmod(0o646)


def damage_a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


@pytest.mark.parametrize("damage", [f for name, f in sorted(globals().items()) if name.startswith("damage_")])
def test_what_is_not_sound_is_built_again(cache: Path, damage) -> None:
    build = Builder()
    damage(kernel_cache.built(cache, "a", build))
    file = kernel_cache.built(cache, "a", build)
    assert build.times == 2 and file.read_bytes() == b"whole" and not file.is_symlink()
    kernel_cache.built(cache, "a", build)
    assert build.times == 2


@needs_root
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_another_users_file_is_built_again(cache: Path, suffix: str) -> None:
    build = Builder()
    os.chown(kernel_cache.built(cache, "a", build).with_suffix(suffix), 54321, 54321)
    assert kernel_cache.built(cache, "a", build).stat().st_uid == 0 and build.times == 2


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(cache: Path, mode: int) -> None:
    build = Builder()
    kernel_cache.built(cache, "a", build)
    cache.chmod(mode)
    with pytest.raises(OSError, match="can be written by others"):
        kernel_cache.built(cache, "a", build)


def test_a_folder_below_one_that_everybody_can_write_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(OSError, match="lies in .*open, which everybody can write to"):
        kernel_cache.built(tmp_path / "open" / "cache", "a", Builder())
    (tmp_path / "open").chmod(0o1777)  # as /tmp
    kernel_cache.built(tmp_path / "open" / "cache", "a", Builder())


@needs_root
def test_another_users_folder_is_not_used(cache: Path) -> None:
    cache.mkdir()
    os.chown(cache, 54321, 54321)
    with pytest.raises(OSError, match="belongs to another user"):
        kernel_cache.built(cache, "a", Builder())


def test_a_build_that_fails_or_was_killed_leaves_nothing(cache: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no such target")

    with pytest.raises(OSError, match="^no such target$"):
        kernel_cache.built(cache, "a", fail)
    assert [p.name for p in cache.iterdir()] == ["lock"]
    (cache / "building-killed").mkdir()
    (cache / "building-killed" / "made.so").write_bytes(b"half")
    kernel_cache.built(cache, "a", Builder())
    assert sorted(p.name for p in cache.iterdir()) == ["a.sha256", "a.so", "lock"]


def test_both_files_are_on_the_disk_before_they_get_their_names(cache: Path, monkeypatch) -> None:
    done = []
    real_sync, real_replace = kernel_cache.sync, os.replace
    monkeypatch.setattr(kernel_cache, "sync", lambda path: (done.append(("sync", Path(path).name)), real_sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("name", Path(b).name)), real_replace(a, b)))
    kernel_cache.built(cache, "a", Builder())
    assert done == [("sync", "made.so"), ("sync", "made.sha256"), ("name", "a.so"), ("name", "a.sha256"),
                    ("sync", "cache")]  # fmt: skip


def test_many_at_once_build_once(cache: Path) -> None:
    slow = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from meft_bench.meft.engine import kernel_cache
        def build(path):
            print("building", flush=True)
            time.sleep(1)
            path.write_bytes(b"whole")
        kernel_cache.built(Path(sys.argv[1]), "a", build)
    """)
    children = [
        subprocess.Popen([sys.executable, "-c", slow, str(cache)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [child.communicate()[0] for child in children].count("building\n") == 1
    assert all(child.returncode == 0 for child in children)


# ---- homes ----


def test_the_usual_places(monkeypatch, tmp_path: Path) -> None:
    private = Path(kernel_cache.tempfile.gettempdir()) / f"meft-bench-{os.geteuid()}"
    monkeypatch.delenv("MEFT_BENCH_CACHE", raising=False)
    for variables, first in (
        ({"HOME": "/home/a", "XDG_CACHE_HOME": ""}, Path("/home/a/.cache/meft-bench")),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/scratch"}, Path("/scratch/meft-bench")),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, Path("/home/a/.cache/meft-bench")),
        ({"HOME": "relative", "XDG_CACHE_HOME": ""}, None),
        ({"HOME": "/home/a", "MEFT_BENCH_CACHE": str(tmp_path)}, tmp_path),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert kernel_cache.folders() == [*([first] if first else []), private], variables


def test_a_user_whom_the_system_does_not_know(monkeypatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MEFT_BENCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernel_cache.Path, "home", unknown)
    assert [folder.name for folder in kernel_cache.folders()] == [f"meft-bench-{os.geteuid()}"]


# Homes are tried in a process of its own; as root, by a user who has no name.
_STRANGER = """
import os, sys
import torch
from meft_bench.meft.engine import kernels, native
if os.geteuid() != %d:
    os.setgid(54321); os.setuid(54321)
x = torch.arange(6.0).view(3, 2)
assert kernels.gather(x, torch.tensor([2, 0]), torch.empty(2, 2)).tolist() == [[4, 5], [0, 1]]
print(native.status())
print(native.kernels().place)
"""


def _compiler_that_counts(folder: Path) -> Path:
    """A quick one: what it makes is not timed here."""
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo once >> {folder}/count\nexec cc "$@" -O0\n')
    script.chmod(0o755)
    (folder / "count").touch()
    (folder / "count").chmod(0o666)
    return script


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that strangers may pass through, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="meft-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def _strangers_uid() -> int:
    """Of a user without a name, where this one is root and the package can be read by anybody."""
    readable = all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(native.__file__).parents)
    return 54321 if os.geteuid() == 0 and readable else os.geteuid()


@needs_kernels
@pytest.mark.parametrize(("home", "processes"), [("none", 2), ("unwritable", 1)])
def test_odd_homes_work_and_compile_once(open_folder: Path, home: str, processes: int) -> None:
    uid = _strangers_uid()
    (open_folder / "tmp").mkdir()
    (open_folder / "tmp").chmod(0o1777)
    (open_folder / "unwritable").mkdir(mode=0o555)
    if home == "unwritable" and os.geteuid() == uid == 0:
        pytest.skip("everything can be written by root")
    environment = {**os.environ, "TMPDIR": str(open_folder / "tmp"), "CC": str(_compiler_that_counts(open_folder))}
    for name in ("HOME", "XDG_CACHE_HOME", "MEFT_BENCH_CACHE"):
        environment.pop(name, None)
    if home == "unwritable" or uid == os.geteuid():
        environment["HOME"] = str(open_folder / home) if home == "unwritable" else "relative"
    with ThreadPoolExecutor(processes) as pool:
        runs = list(pool.map(lambda _: _python(_STRANGER % uid, environment), range(processes)))
    for run in runs:
        assert run.returncode == 0 and run.stdout.startswith("native kernels"), run
        assert f"{open_folder}/tmp/meft-bench-{uid}" in run.stdout
    assert (open_folder / "count").read_text().split() == ["once"] * 3, "each source once, not once per process"


def _python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


# ---- what is loaded ----

_PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen("%s", "w")); }
"""


@needs_kernels
def test_truncated_files_are_rebuilt_and_planted_ones_never_run(tmp_path: Path, cache: Path) -> None:
    compiler = str(_compiler_that_counts(tmp_path))
    environment = {**os.environ, "MEFT_BENCH_CACHE": str(cache), "TMPDIR": str(tmp_path), "CC": compiler}
    code = _STRANGER % os.geteuid()
    assert _python(code, environment).returncode == 0
    for library in cache.glob("*.so"):
        os.truncate(library, 4096)  # its pages are gone: touching them is SIGBUS
    again = _python(code, environment)
    assert again.returncode == 0 and again.stdout.splitlines()[1] == str(cache), again

    (tmp_path / "planted.c").write_text(_PLANTED % (tmp_path / "it-ran"))
    planted = tmp_path / "planted.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "planted.c"), "-o", str(planted)], check=True)
    for library in cache.glob("*.so"):
        library.write_bytes(planted.read_bytes())
        library.with_suffix(".sha256").write_bytes(kernel_cache._digest(planted))
    cache.chmod(0o777)
    run = _python(code, environment)
    assert run.returncode == 0 and not (tmp_path / "it-ran").exists()
    assert run.stdout.splitlines()[1].endswith(f"; {cache} can be written by others (chmod go-w it)"), run
    # The plant is a live one: loading it runs it.
    subprocess.run([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(planted)], check=True)
    assert (tmp_path / "it-ran").exists()
