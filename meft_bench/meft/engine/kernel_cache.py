"""Where built kernels lie, and when a built file may be loaded: code from there runs as the user.

A folder is used when it is the user's (or root's) and nobody else may write to it; a file is loaded when the same holds
for it and its content is that of the digest beside it. Whatever else lies there is built anew. One process builds at a
time, the others wait for it, so that many workers compile once.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from meft_bench.write import sync

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def folders() -> list[Path]:
    """Where to look and build, in this order: $MEFT_BENCH_CACHE, else meft-bench in the user's cache; then a folder of
    the user's own in the system's temporary one."""
    asked = os.environ.get("MEFT_BENCH_CACHE")
    usual = Path(asked).absolute() if asked else _users_cache()
    try:
        own = [Path(tempfile.gettempdir()) / f"meft-bench-{os.geteuid()}"]
    except OSError:  # no temporary folder can be written
        own = []
    return [*([usual] if usual else []), *own]


def _users_cache() -> Path | None:
    """None where the user has no home: HOME is unset or relative and the system knows no such user."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(asked) if os.path.isabs(asked) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "meft-bench" if cache.is_absolute() else None


def built(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """folder/name.so, sound; build(path) writes it where it is missing or not what its digest says.

    Raises OSError, with the reason, for a folder that is not the user's alone or cannot be written.
    """
    folder = _checked(folder)
    library = folder / f"{name}.so"
    if _is_sound(library):
        return library
    with _locked(folder):
        if not _is_sound(library):  # it was not built while this process waited
            _build(library, build)
    return library


def _checked(folder: Path) -> Path:
    """The folder itself, without links, made if need be."""
    _make(folder)
    real = folder.resolve()
    about = real.stat()
    if about.st_uid not in (os.geteuid(), 0):
        raise OSError(f"{folder} belongs to another user")
    if about.st_mode & _OTHERS_WRITE:
        raise OSError(f"{folder} can be written by others (chmod go-w it)")
    for above in real.parents:
        mode = above.stat().st_mode
        # A group's own folder above (umask 002) is as safe as its members; one for everybody must keep what is in it.
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OSError(f"{folder} lies in {above}, which everybody can write to")
    return real


def _make(folder: Path) -> None:
    if not folder.is_dir():
        if folder.parent != folder:
            _make(folder.parent)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make {folder} ({error.strerror})") from None


def _is_sound(library: Path) -> bool:
    """Whether others could not have written the file and its digest, and both agree."""
    try:
        for file in (library, _digest_file(library)):
            about = file.lstat()
            ours = stat.S_ISREG(about.st_mode) and about.st_uid in (os.geteuid(), 0)
            if not ours or about.st_mode & _OTHERS_WRITE:
                return False
        return _digest_file(library).read_bytes() == _digest(library)
    except OSError:
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).hexdigest().encode()


def _build(library: Path, build: Callable[[Path], None]) -> None:
    """Library and digest, on the disk before they get their names: a crash leaves both, or what is unsound."""
    folder = library.parent
    try:
        for leftover in folder.glob("building-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as place:
            made, digest = Path(place) / "made.so", Path(place) / "made.sha256"
            build(made)
            digest.write_bytes(_digest(made))
            for file in (made, digest):
                file.chmod(0o644)
                sync(file)
            os.replace(made, library)
            os.replace(digest, _digest_file(library))
        sync(folder)
    except OSError as error:
        if error.errno is None:  # build's own words
            raise
        raise OSError(f"cannot write to {folder} ({error.strerror})") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for building; the system releases it even after kill -9."""
    import fcntl  # not there on Windows, which has no compiler that takes these kernels either

    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: each builds for itself, and puts whole files in place
        yield
    finally:
        os.close(handle)
