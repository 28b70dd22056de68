"""Adapters that earlier versions of MeftModel.save wrote, adapter.json and adapter.safetensors: read, no more written.

adapter.json: {format 1, config, hidden_size, layers}; tensors are called layers.<number>.<keys, values or router>.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.files import check_finite, check_tensors, read_header, read_json, read_safetensors

WEIGHTS_NAME, CONFIG_NAME, FORMAT = "adapter.safetensors", "adapter.json", 1


def is_old(folder: Path) -> bool:
    """Whether a folder holds a file of the old format. (`meft-bench train` writes an adapter.json of its own, beside
    files of the new one.)"""
    return any((folder / name).is_file() for name in (WEIGHTS_NAME, CONFIG_NAME))


def read(
    folder: Path, choices: Mapping[str, Any], width: int, layers: int
) -> tuple[MeftOptions, list[dict[str, Tensor]]]:
    """(the configuration with these choices on top, the tensors of each layer by name) for a base of this shape.

    Raises ValueError for a broken or truncated file, another base's shape, missing or foreign tensors, and
    FileNotFoundError for a missing file.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: give the folder that MeftModel.save wrote")
    config, trained_on = _read_config(folder / CONFIG_NAME, choices)
    if trained_on != (width, layers):
        raise ValueError(
            f"{folder} was trained on {trained_on[1]} layers of width {trained_on[0]}; this model has {layers} of "
            f"{width}: load it on the base it was trained on"
        )
    shapes = {"keys": (config.neurons, width), "values": (config.neurons, width)}
    if config.experts is not None and config.key_experts:
        shapes["router"] = (config.experts, width)
    expected = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    check_tensors(folder / WEIGHTS_NAME, read_header(folder / WEIGHTS_NAME), expected)
    tensors = read_safetensors(folder / WEIGHTS_NAME)
    check_finite(str(folder / WEIGHTS_NAME), tensors.items(), "the training diverged or the file is damaged")
    return config, [{name: tensors[f"layers.{i}.{name}"] for name in shapes} for i in range(layers)]


def _read_config(path: Path, choices: Mapping[str, Any]) -> tuple[MeftOptions, tuple[int, int]]:
    """The configuration, and (width, layers) of the base that it was trained on."""
    try:
        about = read_json(path, what="adapter description")
        config = MeftOptions.from_dict({**about["config"], **choices})
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, this version reads {FORMAT}")
        return config, (about["hidden_size"], about["layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an adapter description: {error}") from None
