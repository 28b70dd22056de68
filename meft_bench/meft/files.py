"""Files that a user hands over: regular, of a bounded size, whole, and with exactly the tensors expected, or one clear
error that names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from safetensors import SafetensorError, safe_open

from meft_bench.reading import parse_json, read_text, regular_size
from meft_bench.text import printable

if TYPE_CHECKING:  # headers are checked before torch is imported
    from torch import Tensor

JSON_BYTES = 4 * 2**20
"""The largest description of an adapter or a model that is read; real ones have some thousand bytes."""
_LARGEST_HEADER = 16 * 2**20
_NAMED = 3
_CHUNK = 1 << 24  # elements of a tensor that are looked at together
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    """As the format writes it: F32, BF16, I64, ..."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class _Shaped(Protocol):
    @property
    def shape(self) -> Any: ...


# ---- text ----


def read_json(path: Path, most: int = JSON_BYTES, what: str = "file") -> dict[str, Any]:
    """A JSON object of a bounded size. Raises ValueError."""
    # A training.json may hold an infinite perplexity.
    found = parse_json(read_text(path, most, what), printable(path), finite=False)
    if not isinstance(found, dict):
        raise ValueError(f"{printable(path)} must hold a JSON object")
    return found


# ---- safetensors ----


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file whose header agrees with its bytes, as the library checks it. Raises ValueError."""
    size = regular_size(path, what="safetensors file")
    try:
        with open(path, "rb") as start:
            claimed = int.from_bytes(start.read(8), "little")
        if claimed > min(size, _LARGEST_HEADER):
            raise SafetensorError(f"its header claims {claimed:,} bytes of {size:,}")
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{printable(path)} is not a whole safetensors file ({printable(error)}): copy or save it again"
        ) from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name to dtype and shape, from the header alone; no tensor is read. Raises ValueError unless the file is whole."""
    # "np", as torch would map the whole file into private memory already here.
    with _opened(path, "np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError when it is broken or cut short."""
    with _opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def check_tensors(path: Path, found: Mapping[str, _Shaped], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, naming the first few, unless found has exactly the expected names and shapes.

    found: tensors, or what read_header gives, so that nothing need be read before it is known to fit.
    """
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{printable(path)} lacks {named(missing)}: copy the whole file, or save it again")
    if foreign := [name for name in found if name not in expected]:
        what = "a tensor" if len(foreign) == 1 else f"{len(foreign):,} tensors"
        raise ValueError(f"{printable(path)} holds {what} this model does not have: {_listed(foreign)}")
    for name in sorted(expected):
        if tuple(found[name].shape) != tuple(expected[name]):
            raise ValueError(
                f"{printable(path)}: {name} has shape {tuple(found[name].shape)}, the model needs {expected[name]}"
            )


def check_floats(path: Path, header: Mapping[str, TensorInfo]) -> None:
    """Raises ValueError for tensors that no training leaves: integers, bits, 8-bit floats."""
    if wrong := [f"{name} ({about.dtype})" for name, about in header.items() if about.dtype not in FLOATS]:
        raise ValueError(f"{printable(path)} holds {named(wrong)} that are not in {', '.join(FLOATS)}")


def named(names: Iterable[str]) -> str:
    """ "the tensor a", or "5 tensors (a, b, c and 2 more)"."""
    found = list(names)
    return f"the tensor {_listed(found)}" if len(found) == 1 else f"{len(found):,} tensors ({_listed(found)})"


def _listed(names: Iterable[str]) -> str:
    found = [printable(name) for name in sorted(names)]
    rest = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + rest


# ---- numbers ----


def check_finite(where: str, tensors: Iterable[tuple[str, Tensor]], next_step: str) -> None:
    """Raises ValueError, naming the tensors, for NaN or infinity in any of them; where begins the line, next_step ends
    it. One pass over the memory, without a copy."""
    if broken := [name for name, tensor in tensors if not _finite(tensor)]:
        raise ValueError(f"{where} holds NaN or infinity in {named(broken)}: {next_step}")


def check_finite_file(path: Path, next_step: str) -> None:
    """check_finite over a safetensors file of F32 matrices, a piece at a time: no more than 64 MiB are held."""
    import torch

    def pieces() -> Iterator[tuple[str, Tensor]]:
        with _opened(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                rows, width = part.get_shape()
                step = max(1, _CHUNK // max(1, width))
                # The first piece that is broken is enough to name the tensor.
                broken = any(not _finite(torch.from_numpy(part[i : min(i + step, rows)])) for i in range(0, rows, step))
                yield name, torch.tensor(math.nan if broken else 0.0)

    check_finite(printable(path), pieces(), next_step)


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    # NaN and infinity reach the extremes, which are found ten times faster than by isfinite.
    low, high = (tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()).aminmax()
    return bool(low.isfinite() & high.isfinite())
