"""Where a run works until it is whole: OUTPUT.partial, renamed to OUTPUT at the end.

OUTPUT.partial/run.json     the settings, and the plan once there is one
OUTPUT.partial/rows/        the tokenised rows
OUTPUT.partial/checkpoints/ complete checkpoints, newest kept
OUTPUT.partial/adapter/     the result while it is written; it becomes OUTPUT
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from meft_bench.finetune.background import background_texts
from meft_bench.finetune.chat import read_template
from meft_bench.finetune.settings import NOT_NUMBERS, TrainSettings
from meft_bench.harness.runner import Taken, locked
from meft_bench.harness.spec import canonical_json
from meft_bench.host_memory import asked_of, is_out_of_memory
from meft_bench.write import disk_error, is_forbidden, replace, sync, sync_tree

RUN, TRAINING, PARTIAL = "run.json", "training.json", ".partial"


def partial_folder(settings: TrainSettings) -> Path:
    """The folder beside the output that a run works in."""
    output = settings.destination.absolute()
    return output.with_name(f"{output.name}{PARTIAL}")


def settings_digest(settings: TrainSettings, data_digest: str) -> str:
    """First 12 hex digits over what decides the result: the settings, the rows' content and that of other files."""
    files = _files(settings)
    parts = [settings.deciding(), data_digest, *([files] if files else [])]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:12]


def _files(settings: TrainSettings) -> dict[str, str]:
    """Digests of the texts of the files that settings name beside the rows. Raises ValueError for one not there."""
    texts = {"chat_template": read_template(settings.chat_template), "background": background_texts(settings)}
    return {
        name: hashlib.sha256(canonical_json(text).encode()).hexdigest()[:12]
        for name, text in texts.items()
        if text is not None
    }


def finished(settings: TrainSettings, data_digest: str, resume: bool) -> bool:
    """True when the output already holds this run's result and resume was asked. Raises ValueError for an output
    folder that holds anything else.

    What a run left beside its result, because it was killed between publishing and cleaning, is removed.
    """
    output = settings.destination
    made = made_before(output)
    if made is None:
        check_place(settings)
        return False
    if made != settings_digest(settings, data_digest):
        changed = _difference(_read(output / TRAINING), _about(settings, data_digest))
        raise ValueError(f"{output} holds the result of other settings or rows ({changed}): choose another --output")
    _clean(partial_folder(settings), made)
    if not resume:
        raise ValueError(f"{output} already holds the result of these settings: use it, or choose another --output")
    return True


def check_place(settings: TrainSettings) -> None:
    """Raises ValueError where no run could be made or published: a folder that this user must not write in, and one
    that the finished adapter cannot be renamed to."""
    output, folder = settings.destination.absolute(), partial_folder(settings)
    if output.is_dir() and (os.path.ismount(output) or output.samefile(Path.cwd())):
        what = "where a disk is mounted" if os.path.ismount(output) else "the folder that this is called in"
        raise ValueError(
            f"{output} is {what}, and the finished adapter takes its folder's place: choose a folder in it, such as "
            f"--output {output / 'adapter'}"
        )
    there = next(place for place in folder.parents if place.exists())
    for place in [there, *([folder] if folder.is_dir() else [])]:
        if not place.is_dir():
            raise ValueError(f"{place} is no folder: choose another --output")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write in {place}: let this user write there, or choose another --output")


def made_before(output: Path) -> str | None:
    """The settings digest of the result in an output folder; None for none. Raises ValueError for what is no folder,
    and for one that holds anything else."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output} is no folder: choose another --output")
    if not output.is_dir() or not any(output.iterdir()):
        return None
    if made := _digest_in(output / TRAINING):
        return made
    raise ValueError(f"{output} is not empty and no run of meft-bench train: choose another --output")


def _digest_in(path: Path) -> str | None:
    """The settings digest that a JSON file names; None where it names none."""
    digest = _read(path).get("settings_digest")
    return None if digest is None else str(digest)


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _clean(folder: Path, digest: str) -> None:
    """Remove a partial folder whose run is finished, unless a process is at work there or it is another run's."""
    if folder.is_dir() and _holds(folder, digest):
        with suppress(Taken), locked(folder):
            _remove(folder)


def _holds(folder: Path, digest: str) -> bool:
    if {file.name for file in folder.iterdir()} <= {"lock"}:
        return True
    return _digest_in(folder / RUN) == digest


def _remove(folder: Path) -> None:
    """What says whose folder it is goes last, so that a kill leaves what the next command knows how to remove."""
    for part in folder.iterdir():
        if part.name not in (RUN, "lock"):
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def claim(settings: TrainSettings, data_digest: str, resume: bool) -> dict[str, Any]:
    """Begin a run in its partial folder, or go on with one; returns what run.json holds.

    What stopped before its first checkpoint is begun anew. Raises ValueError when an unfinished run is there and resume
    was not asked, or its settings are others.
    """
    folder, digest = partial_folder(settings), settings_digest(settings, data_digest)
    about = _about(settings, data_digest)
    if not (folder / RUN).is_file():
        strange = [f.name for f in folder.iterdir() if f.name != "lock"] if folder.is_dir() else []
        if strange:
            raise ValueError(f"{folder} holds {strange[0]} and is no run of meft-bench train: move it away")
    if not any((folder / "checkpoints").glob("step-*")):
        write_json(folder / RUN, about)
        return about
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
        before = found["settings_digest"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / RUN} is broken: delete {folder} to start anew") from None
    if before != digest:
        raise ValueError(
            f"{folder} holds an unfinished run of other settings or rows ({_difference(found, about)}): repeat those "
            f"to go on with it, choose another --output, or delete {folder}"
        )
    if not resume:
        raise ValueError(f"{folder} holds an unfinished run: go on with --resume, or delete it to start anew")
    return dict(found)


def _about(settings: TrainSettings, data_digest: str) -> dict[str, Any]:
    files = _files(settings)
    return {
        "settings_digest": settings_digest(settings, data_digest),
        "settings": settings.to_dict(),
        "data_digest": data_digest,
        **({"files": files} if files else {}),
    }


def check_shared(folder: Path, about: dict[str, Any]) -> None:
    """Raises ValueError where this rank sees another folder than rank 0, which began the run about there."""
    if _digest_in(folder / RUN) != about["settings_digest"]:
        raise ValueError(f"a rank does not see {folder} as rank 0 does: put --output on a disk that all machines share")


def _difference(found: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, in words; at most three."""
    if found.get("data_digest") != now["data_digest"]:
        return "the rows' content changed"
    before = found.get("settings")
    if not isinstance(before, dict):
        return "it does not say which"
    deciding = [(n, v) for n, v in now["settings"].items() if n not in NOT_NUMBERS]
    changed = [f"{n} was {before.get(n)!r}" for n, v in deciding if before.get(n) != v]
    had = found.get("files")
    if isinstance(had, dict):
        files = now.get("files", {}).items()
        changed += [f"the content of {n} changed" for n, digest in files if had.get(n, digest) != digest]
    return ", ".join(changed[:3]) or "settings of another version"


def write_json(path: Path, value: Any) -> None:
    """Write path whole or not at all."""
    replace(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def publish(settings: TrainSettings, adapter: Path) -> None:
    """Rename the finished adapter, once all of it is on the disk, to the output; remove what the run worked with."""
    output = settings.destination.absolute()
    sync_tree(adapter)
    if output.is_dir():
        output.rmdir()  # an empty one, or this fails
    os.replace(adapter, output)
    sync(output.parent)
    _remove(partial_folder(settings))


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """When the run ends with an error before its first checkpoint, remove its folder, and those made for it, if there
    was none before: a refusal leaves the disk as it was. Ctrl-C keeps the tokenised rows."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except Exception as error:
        if folder in missing and not isinstance(error, Taken) and not any((folder / "checkpoints").glob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # one that holds something else by now stays
                for place in missing[1:]:
                    place.rmdir()
        raise


@contextmanager
def full_disk_said(settings: TrainSettings) -> Iterator[None]:
    """Turn a failed write, which safetensors reports as its own kind, into one line that says what is kept."""
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        from meft_bench.train.checkpoints import newest_checkpoint  # brings torch

        folder = partial_folder(settings)
        checkpoint = newest_checkpoint(folder / "checkpoints")
        for rest in ("adapter", "rows.writing"):
            shutil.rmtree(folder / rest, ignore_errors=True)
        kept = f"{checkpoint.name} is kept" if checkpoint else "no checkpoint was written yet"
        do = "let this user write there" if is_forbidden(reason) else "free space"
        raise ValueError(f"cannot write to {folder} ({reason}); {kept}: {do} and go on with --resume") from None


@contextmanager
def no_memory_said(settings: TrainSettings) -> Iterator[None]:
    """Where memory, a GPU's or the host's, runs out after a checkpoint, say that it is kept: what took the memory may
    be another process, and a smaller batch would begin anew."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        from meft_bench.train.checkpoints import newest_checkpoint  # brings torch

        checkpoint = newest_checkpoint(partial_folder(settings) / "checkpoints")
        if checkpoint is None:
            raise
        raise ValueError(
            f"out of memory ({asked_of(error)}); {checkpoint.name} is kept: go on with --resume once other processes "
            "have let go of memory, or start anew with a larger --accumulation or a smaller --gpu-memory"
        ) from None
