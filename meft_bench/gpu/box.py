"""What the machine has. What is missing for a session is one ValueError that says what to do; the rest is a fact."""

import importlib.util
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import Any

_NEEDED = ("torch", "transformers", "psutil", "tqdm", "yaml")
"""Packages of a session; nothing else has to be there."""
LEAST_VERSIONS = {"torch": "2.11", "transformers": "5.17"}
"""As the package asks for them."""
LEAST_BYTES = 20 * 2**30
"""Free device memory that a 7B base in bfloat16 and the smaller rows take."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One device and what is around it."""

    device: str
    gpu: str
    """The card's name; "none" on the CPU."""
    memory_bytes: int
    free_bytes: int


def find(tiny: bool) -> Box:
    """The box. tiny: the CPU will do. Raises ValueError for a missing package, a torch without a GPU and a card that
    holds too little."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pip = " ".join("pyyaml" if name == "yaml" else name for name in missing)
        raise ValueError(f"a GPU session needs {', '.join(missing)}: pip install {pip}")
    import torch

    if tiny:
        return Box(device="cpu", gpu="none", memory_bytes=0, free_bytes=0)
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA GPU"
        raise ValueError(
            f"torch {torch.__version__} {built}: run this on a machine with a GPU, or try it here with --tiny"
        )
    try:
        free, total = torch.cuda.mem_get_info()  # the process's first work there
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the GPU does not answer ({said}): end what else uses it, or see nvidia-smi") from None
    if free < LEAST_BYTES:
        raise ValueError(
            f"{free / 2**30:.1f} GiB of the card's {total / 2**30:.1f} GiB are free, the rows at the 7B shape need "
            f"{LEAST_BYTES / 2**30:.0f}: end what else uses the card"
        )
    return Box(device="cuda", gpu=torch.cuda.get_device_name(0), memory_bytes=total, free_bytes=free)


def too_old(error: ImportError) -> str:
    """What to say where packages are there, but not what is needed of them."""
    needed = ", ".join(f"{name} {least} or newer" for name, least in LEAST_VERSIONS.items())
    here = ", ".join(f"{name} {metadata.version(name)}" for name in LEAST_VERSIONS)
    return f"a GPU session needs {needed}; here are {here} ({error}): pip install --upgrade {' '.join(LEAST_VERSIONS)}"


def facts() -> dict[str, Any]:
    """What a record says beside provenance(): the driver where NVML's package is missing, and torch's CUDA."""
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda or "none"}
    asked = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
    ways = [asked]
    if torch.cuda.is_initialized():  # its slot may be another than the first card's; a part of a card has no line
        ways.insert(0, [*asked, f"--id=GPU-{torch.cuda.get_device_properties(None).uuid}"])
    for way in ways:
        try:
            said = subprocess.run(way, capture_output=True, text=True, check=True, timeout=20).stdout
            driver, generation, width = (part.strip() for part in said.splitlines()[0].split(","))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
        return {**found, "nvidia_smi": {"driver": driver, "pcie": f"{generation} x{width}"}}
    return {**found, "nvidia_smi": None, "nvidia_smi_reason": "nvidia-smi does not answer"}
