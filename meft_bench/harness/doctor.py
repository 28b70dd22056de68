"""What this machine has, and whether the installation is whole."""

import hashlib
import json
import os
import platform
import re

import psutil
import torch

from meft_bench import host_memory
from meft_bench.harness.spec import TASKS, package_dir
from meft_bench.meft.engine import native
from meft_bench.provenance import NOT_INSTALLED, cpu_model, gpu, version_of
from meft_bench.train.methods import find_method, method_names
from meft_bench.train.models import embedded_dir
from meft_bench.version import __version__

_PACKAGES = (
    "transformers",
    "peft",
    "lm_eval",
    "datasets",
    "tokenizers",
    "safetensors",
    "pandas",
    "matplotlib",
    "scipy",
)


def report() -> tuple[list[str], bool]:
    """(lines to print, everything needed is there)."""
    found, versions = gpu(), {name: version_of(name) for name in _PACKAGES}
    lines = [
        f"meft-bench {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"processor   {cpu_model()}, {psutil.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        f"memory      {host_memory.available_bytes() / 2**30:.1f} of {host_memory.total_bytes() / 2**30:.1f} GiB free",
        f"torch       {torch.__version__}, CUDA {'ready' if torch.cuda.is_available() else 'not available'}",
        f"host        {native.status()}",
        *([f"kernels in  {_from_home(native.kernels().place)}"] if native.kernels().place else []),
        f"GPU         {found['gpu'] or found['gpu_reason']}",
        f"packages    {', '.join(f'{name} {version}' for name, version in versions.items())}",
    ]
    checks = [
        (f"package {name}", "not installed; run make setup") for name in _PACKAGES if versions[name] == NOT_INSTALLED
    ]
    checks += [("embedded base", _check_embedded())]
    checks += [(f"method {name}", _check_method(name)) for name in method_names()]
    checks += [
        (f"task {name}", "" if (package_dir("tasks") / f"{name}.yaml").is_file() else "no YAML") for name in TASKS
    ]
    broken = [f"BROKEN      {name}: {why}" for name, why in checks if why]
    lines += broken or [f"installed   {len(checks)} parts checked, all whole"]
    return lines, not broken


def _check_embedded() -> str:
    try:
        record = json.loads((embedded_dir() / "record.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256((embedded_dir() / "model.safetensors").read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        return f"{error}; run make base"
    return "" if digest == record["weights_sha256"] else "its weights are not those of its record; run make base"


def _check_method(name: str) -> str:
    try:
        find_method(name)
    except Exception as error:  # any import failure is a finding here
        return str(error)
    return ""


def _from_home(place: object) -> str:
    """A path without the user's name: what doctor prints goes into bug reports."""
    return re.sub(rf"^{re.escape(os.path.expanduser('~'))}(?=/|$)", "~", str(place))
