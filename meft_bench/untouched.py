"""A refusal leaves nothing behind: folders that a refused command made are removed again."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def untouched(folder: Path, keep: Callable[[], bool]) -> Iterator[None]:
    """If the block raises an error, remove folder, and the folders above it, as far as they were not there before.

    keep: true when folder holds work that is worth going on with; then nothing is removed. A kill or ctrl-C removes
    nothing either.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except Exception:
        if new and not keep():
            shutil.rmtree(folder, ignore_errors=True)
            for place in new[1:]:
                try:
                    place.rmdir()
                except OSError:  # someone else has put something there
                    break
        raise
