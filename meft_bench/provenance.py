"""Where a number comes from: code, packages, machine. No host name, user name or path of the machine."""

import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets", "tokenizers", "safetensors", "numpy")

_WRITTEN = ("results", "README.md", "docs/comparison.md", "docs/scale.md")
"""What a suite renders."""


_CODE = ("meft_bench", "baselines", "tasks")
_CODE_FILES = (".py", ".c", ".yaml")


def git_commit(folder: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that has files of folder; nulls with a reason where there is none: a package
    installed below somebody's project is no part of it. Code that git does not know makes a tree dirty, too. Pages and
    records that runs themselves write do not: no run reads them."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if git("ls-files", "."):
            top = git("rev-parse", "--show-toplevel")
            changed = git("-C", top, "status", "--porcelain", "-uno", "--", ".", *(f":!{path}" for path in _WRITTEN))
            unknown = git("-C", top, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE).split("\0")
            dirty = bool(changed) or any(name.endswith(_CODE_FILES) for name in unknown)
            return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        pass
    reason = "not run from a git checkout"
    return {"commit": None, "commit_reason": reason, "dirty": None, "dirty_reason": reason}


def code_digest(root: Path) -> str:
    """Digest of the code of a checkout, by git's own names of its files' contents, so that a checkout with a git can
    tell which commit it was (commit_of). Needs no git."""
    names = {}
    for folder in _CODE:
        for file in (root / folder).rglob("*"):
            if file.suffix in _CODE_FILES and file.is_file() and not file.is_symlink():
                content = file.read_bytes()
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
                names[file.relative_to(root).as_posix()] = blob
    return _digest(names)


def commit_of(root: Path, code: str, newest: int = 500) -> str | None:
    """The newest commit of the checkout's history with this code_digest, in 12 digits; None where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    try:
        for commit in git("rev-list", f"--max-count={newest}", "HEAD").split():
            names = {}
            for line in git("ls-tree", "-r", "--full-tree", commit, *_CODE).splitlines():
                about, _, name = line.partition("\t")
                mode, _, blob = about.split()
                if mode != "120000" and name.endswith(_CODE_FILES):
                    names[name] = blob
            if _digest(names) == code:
                return commit[:12]
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def _digest(names: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{names[n]} {n}\n" for n in sorted(names)).encode()).hexdigest()


@cache
def in_history(folder: Path, commit: Any) -> bool | None:
    """Whether the checkout that holds folder has the commit among its HEAD's ancestors; None where there is no checkout
    to ask."""

    def answers(*arguments: str) -> bool:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=20).returncode == 0

    try:
        return answers("merge-base", "--is-ancestor", str(commit), "HEAD") if answers("rev-parse", "HEAD") else None
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """{"gpu", "driver"} of the CUDA device in use, else of the first that CUDA_VISIBLE_DEVICES leaves, by NVML; nulls
    with a reason without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = _device(pynvml)
        name, driver = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        return {"gpu": name, "driver": driver}
    except Exception as error:  # NVML raises its own kinds, and ImportError where the package is missing
        reason = f"no NVIDIA GPU answers ({type(error).__name__})"
        return {"gpu": None, "gpu_reason": reason, "driver": None, "driver_reason": reason}


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, as it names them: indices or UUIDs; empty where none answers."""
    if not gpu()["gpu"]:
        return []
    left = os.environ.get("CUDA_VISIBLE_DEVICES")
    if left is not None:
        names = (name.strip() for name in left.split(","))
        return list(takewhile(lambda name: name.isdecimal() or name.startswith(_UUID), names))  # as CUDA reads it
    import pynvml

    pynvml.nvmlInit()
    count = pynvml.nvmlDeviceGetCount()
    pynvml.nvmlShutdown()
    return [str(index) for index in range(count)]


def gpu_bytes() -> int:
    """Memory of the smallest of visible_gpus(), since a run may be made on any of them; 0 without one."""
    names = visible_gpus()
    if not names:
        return 0
    import pynvml

    pynvml.nvmlInit()
    least = min(int(pynvml.nvmlDeviceGetMemoryInfo(_named_device(pynvml, name)).total) for name in names)
    pynvml.nvmlShutdown()
    return least


_UUID = ("GPU-", "MIG-")


def _device(nvml: Any) -> Any:
    """NVML numbers the machine's devices, and CUDA may number them otherwise: a UUID says which one is meant."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return device_of(nvml, str(torch.cuda.get_device_properties(None).uuid))
    return _named_device(nvml, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip())


def device_of(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the device to which CUDA gives this UUID: a GPU, or a part of one (MIG), which NVML calls by
    another prefix."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _named_device(nvml: Any, name: str) -> Any:
    """Of a name in CUDA_VISIBLE_DEVICES; raises where that is empty."""
    if name.startswith(_UUID):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    return nvml.nvmlDeviceGetHandleByIndex(int(name))


NOT_INSTALLED = "not installed"


def version_of(package: str) -> str:
    """NOT_INSTALLED where it is missing: profiling and calibration run without datasets and lm-eval."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def provenance(threads: int) -> dict[str, Any]:
    """The block that goes into every record."""
    from meft_bench.meft.engine import native  # brings torch, which the other questions here do without

    return {
        **git_commit(Path(__file__).parent),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": threads,
        "host_kernels": native.status(),
        **gpu(),
    }
