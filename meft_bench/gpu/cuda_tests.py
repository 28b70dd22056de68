"""The tests that need a GPU, run by a session: one process, some seconds at the most, a log that can be sent back."""

import contextlib
import functools
import re
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from meft_bench.write import write_if_changed

_LAST_WORDS_S = 10.0
"""For tests that were interrupted to say what failed."""
_ROOT = Path(__file__).parents[2]


def run(log_file: Path, limit_s: float) -> str:
    """Run them and write what they print; returns their last line, or why they did not run."""
    found = files()
    if not found:
        return "CUDA tests: not run, this checkout has no tests"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *found]
    log, stopped = printed(command, limit_s)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(log_file, without_places(log).encode())
    if "No module named pytest" in log:
        return "CUDA tests: not run, pytest is not installed"
    last = (log.strip().splitlines() or ["nothing was printed"])[-1]
    return f"CUDA tests: {last}" + (f" (stopped after {limit_s:.0f} s)" if stopped else "")


def files() -> list[str]:
    """Test files with the mark gpu, from the checkout's root, the engine's first: time may not suffice for all."""
    engine = _ROOT / "tests/meft"
    found = sorted((_ROOT / "tests").rglob("test_*.py"), key=lambda file: (not file.is_relative_to(engine), file))
    return [str(f.relative_to(_ROOT)) for f in found if re.search(r"mark\.gpu\b", f.read_text(encoding="utf-8"))]


def printed(command: list[str], limit_s: float) -> tuple[str, bool]:
    """(what a command prints, whether it was stopped). When its time is up it is interrupted first, as by ctrl-C, and
    killed only when that does not end it: pytest then says what failed, and ends the processes that it started, which
    would be at work on the GPU beside the rows."""
    process = subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    stops: Iterator[Callable[[], None]] = iter([functools.partial(process.send_signal, signal.SIGINT), process.kill])
    wait_s, stopped = limit_s, False
    try:
        while True:
            try:
                return process.communicate(timeout=wait_s)[0], stopped
            except subprocess.TimeoutExpired as error:
                stop = next(stops, None)
                if stop is None:  # something else holds its output open
                    return _text(error.stdout), True
                stop()
                wait_s, stopped = _LAST_WORDS_S, True
    finally:
        process.kill()


def without_places(log: str) -> str:
    """Without the folders of this machine, which may hold a user's name. pytest prints them whole, or from here on."""
    packages = [*site.getsitepackages(), site.getusersitepackages(), sys.prefix, sys.base_prefix]
    named = {str(_ROOT): ".", **dict.fromkeys(packages, "PYTHON"), tempfile.gettempdir(): "TMP"}
    with contextlib.suppress(RuntimeError):  # a container's user may have none
        named[str(Path.home())] = "~"
    for place in sorted(named, key=len, reverse=True):
        if place != "/":
            log = re.sub(rf"{re.escape(place)}(?![\w.-])", named[place], log)
    return re.sub(r"pytest-of-[^/\s]+", "pytest", log)


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
