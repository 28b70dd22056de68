"""Building and loading the C files beside this one, with the machine's C compiler.

The instruction set is that of the processor at run time, not of the one they were built on: each set has its own file
in the cache.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from meft_bench.fields import shown
from meft_bench.meft.engine import cores, kernel_cache

_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-Wno-psabi")
# Element-wise kernels round every product and sum, as torch does; dot products may fuse them.
_SOURCES = {"elementwise": "-ffp-contract=off", "products": "-ffp-contract=fast", "pool": "-pthread"}
# The sets of x86-64-v3 and v4 one by one: gcc before 11 does not know them by these names.
_AVX2 = tuple("-mcx16 -msahf -mpopcnt -msse4.2 -mavx2 -mfma -mbmi -mbmi2 -mf16c -mlzcnt -mmovbe".split())
_AVX512 = (*_AVX2, *"-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512".split())
_LEVELS = {"AVX512_BF16": (*_AVX512, "-mavx512bf16"), "AVX512": _AVX512, "AVX2": _AVX2}


def compiler() -> tuple[list[str], str]:
    """(command, version line). Raises OSError when there is none."""
    named = os.environ.get("CC") or ""
    try:
        asked = shlex.split(named)
    except ValueError as error:
        raise OSError(f"CC={shown(named)} is no command line ({error})") from None
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            command = [found, *command[1:]]
            done = subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=True)
            return command, (done.stdout.decode(errors="replace").splitlines() or ["a compiler"])[0].strip()
    raise OSError(f"no C compiler found (looked for {asked[0] if asked else 'cc, gcc, clang'})")


def load(level: str, command: list[str], version: str) -> tuple[dict[str, Any], str]:
    """(libraries by name, where they lie) from the first folder that can be trusted and used. Raises OSError when none
    can, ValueError for cores that cannot be bound to."""
    problems: list[str] = []
    for folder in kernel_cache.folders():
        try:
            files = {name: _library(folder, name, level, command, version) for name in _SOURCES}
            # A folder that no code may be loaded from (noexec) says so here.
            loaded = {name: ctypes.CDLL(str(file)) for name, file in files.items()}
        except OSError as error:
            problems.append(str(error))
            continue
        _prepare(loaded)
        return loaded, "; ".join([str(folder), *problems])
    raise OSError("; ".join(dict.fromkeys(problems)) or "no folder to build in")


def _library(folder: Path, name: str, level: str, command: list[str], version: str) -> Path:
    source = Path(__file__).with_name(f"{name}.c")
    flags = (*_FLAGS, _SOURCES[name], *_LEVELS.get(level, ()))
    key = "\n".join((source.read_text(encoding="utf-8"), *flags, *command, version, platform.machine()))

    def build(made: Path) -> None:
        line = [*command, *flags, str(source), "-o", str(made), "-lm"]
        environment = {**os.environ, "TMPDIR": str(made.parent)}  # the compiler's own files: /tmp may be full
        done = subprocess.run(line, capture_output=True, timeout=300, env=environment)
        if done.returncode:
            raise OSError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")

    return kernel_cache.built(folder, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}", build)


def _prepare(loaded: dict[str, Any]) -> None:
    """Say what functions take, and where the pool's threads belong; they end with the process."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    pool, products, given = loaded["pool"], loaded["products"], cores.given()
    pool.run.argtypes, pool.run.restype = (pointer, pointer, number, number, number), None
    for sort in (products.sort_pairs, products.sort_places):
        sort.argtypes, sort.restype = (pointer, number, number, pointer, pointer), None
    pool.bind_helpers((number * len(given))(*given), number(len(given)))
    atexit.register(pool.end_helpers)
