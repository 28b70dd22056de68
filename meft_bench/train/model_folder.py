"""The files of a base model's folder, perhaps a stranger's, looked at without torch and without transformers.

What its config claims and its weight files do not hold is refused by arithmetic, without memory or time for it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft_bench.meft.files import JSON_BYTES, TensorInfo, read_header, read_json
from meft_bench.reading import regular_size
from meft_bench.text import printable

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_LARGEST_INDEX = 24 * 2**20
_LARGEST_TOKENIZER = 128 * 2**20
_LAYERS = re.compile(r"((n|num)_(\w+_)?layers?|(encoder|decoder)_layers)")
_LARGEST_COUNT = 1 << 18
"""Of heads, experts, labels and whatever else a config counts as num_...; layers are compared with the tensors."""
_AT_LEAST_ONE = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "n_heads",
                 "hidden_size", "n_embd", "d_model", "vocab_size", "intermediate_size", "max_position_embeddings",
                 "n_positions", "max_seq_len")  # fmt: skip
ONE_MODEL = "put the config and the weights of one model there"
_TOKENIZER = re.compile(r"(tokenizer\.|vocab|merges|tekken|spiece).*|.*\.(model|bpe|tiktoken|spm)")


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError for a folder without any file of a tokenizer."""
    if not any(_TOKENIZER.fullmatch(entry.name) for entry in folder.iterdir()):
        raise ValueError(f"no tokenizer.json in the model folder {printable(folder)}: copy the tokenizer's files there")


def check_files(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """(config, name to dtype and shape of every tensor). Raises ValueError, in one line, for a folder that holds no
    model in safetensors, or whose config counts more than its weight files can hold."""
    entries_of(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(f"no {CONFIG} in {printable(folder)}: give the folder of a transformers model")
    config = read_json(folder / CONFIG, what="model config")
    header = read_weights_header(folder, config)
    _check_counts(folder, config, len(header))
    return config, header


def entries_of(folder: Path) -> tuple:
    """The state of a folder whose files are regular and of a bounded size; raises ValueError for others."""
    if not folder.is_dir():
        raise ValueError(f"no model folder {printable(folder)}")
    state: list[Any] = [str(folder.resolve())]
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.is_dir():
            continue
        most = JSON_BYTES if entry.suffix in (".json", ".jinja") else 1 << 62
        if entry.name.startswith(("tokenizer", "vocab", "merges", "added_tokens")):
            most = _LARGEST_TOKENIZER
        if entry.name.endswith(".index.json"):
            most = _LARGEST_INDEX
        state += [entry.name, regular_size(entry, most, "model file"), entry.stat().st_mtime_ns]
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{printable(folder)} holds adapter_config.json, so it is an adapter and no base model: give the folder "
            "of its base, or that of the merged model"
        )
    return tuple(state)


def weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files transformers would read, in order. Raises ValueError where they are pickles or missing."""
    chosen = config.get("transformers_weights")
    if chosen is not None and not (isinstance(chosen, str) and Path(chosen).name == chosen):
        raise ValueError(
            f"the config of {printable(folder)} must name a file of its own folder in transformers_weights"
        )
    for name in [chosen] if isinstance(chosen, str) else [WEIGHTS, INDEX]:
        if not (folder / name).is_file() or Path(name).name != name:
            continue
        if not name.endswith(".json"):
            return [folder / name]
        shards = read_json(folder / name, _LARGEST_INDEX, "index of weights").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise ValueError(f"{printable(folder / name)} must map tensors to files of its own folder in weight_map")
        return [folder / shard for shard in sorted(set(shards.values()))]
    pickles = [name for name in _PICKLES if (folder / name).exists()] or [f.name for f in sorted(folder.glob("*.bin"))]
    if pickles:
        raise ValueError(
            f"no {WEIGHTS} in {printable(folder)}, and {printable(pickles[0])} is a pickle, which can run code and is "
            "never read: take the model's safetensors version, or, if you trust it, write one elsewhere with "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise ValueError(f"no {WEIGHTS} in the model folder {printable(folder)}: only safetensors weights are loaded")


def read_weights_header(folder: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Name to dtype and shape over all weight files of a folder. Raises ValueError for missing and broken ones."""
    header: dict[str, TensorInfo] = {}
    for file in weight_files(folder, config):
        header |= read_header(file)
    if not header:
        raise ValueError(f"the weight files of the model {printable(folder.name)} hold no tensor")
    return header


def _check_counts(folder: Path, config: Mapping[str, Any], tensors: int, depth: int = 0) -> None:
    """Layers and other counts that a config is turned into lists of, before anything compares them with the weights."""
    for name, value in config.items():
        if isinstance(value, dict) and depth < 8:
            _check_counts(folder, value, tensors, depth + 1)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        where = f"the config of the model {printable(folder.name)} has {printable(name)}={value}"
        if _LAYERS.fullmatch(name) and value > tensors:
            raise ValueError(
                f"{where}, and its weight files hold {tensors:,} tensors: one of the two is another model's"
            )
        if name in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"{where}, and must have at least 1: such a model cannot be adapted")
        if (name.startswith("num_") and abs(value) > _LARGEST_COUNT) or not -(2**63) <= value < 2**63:
            raise ValueError(f"{where}: that is no model's")
