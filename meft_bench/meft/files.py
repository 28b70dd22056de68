"""Safetensors files that a user hands over: whole and with exactly the tensors expected, or one clear error."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError when it is broken or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or save it again") from None


def check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, naming the first difference, unless found has exactly the expected names and shapes."""
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            raise ValueError(f"{path} lacks the tensor {name}")
        if name not in expected:
            raise ValueError(f"{path} holds a tensor this model does not have: {name}")
        if tuple(found[name].shape) != expected[name]:
            raise ValueError(f"{path}: {name} has shape {tuple(found[name].shape)}, the model needs {expected[name]}")
