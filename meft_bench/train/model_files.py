"""A base model's folder, perhaps a stranger's: looked at before transformers opens it, so that what its config claims
and its weight files do not hold is refused by arithmetic, without memory or time for it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM

from meft_bench.meft.files import (
    FLOATS,
    JSON_BYTES,
    TensorInfo,
    check_finite,
    named,
    read_header,
    read_json,
)
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
_ONE_MODEL = "put the config and the weights of one model there"
_SLACK = 1 << 24
"""Elements that a model may have beyond its files: 64 MiB in float32, for positions that are computed, not kept."""


def check_folder(folder: Path) -> None:
    """Raises ValueError, in one line, for a folder that holds no decoder of transformers in safetensors, whose config
    asks for more than its weight files hold, or whose tensors are not the model's. No tensor is read."""
    if not folder.is_dir():
        raise ValueError(f"no model folder {printable(folder)}")
    if (state := _check_entries(folder)) in _CHECKED:
        return
    if not (folder / CONFIG).exists():
        raise ValueError(f"no {CONFIG} in {printable(folder)}: give the folder of a transformers model")
    config = read_json(folder / CONFIG, what="model config")
    header = read_weights_header(folder, config)
    _check_counts(folder, config, len(header))
    elements = sum(tensor.elements for tensor in header.values())
    if quantized := isinstance(config.get("quantization_config"), dict):  # several weights share a byte
        elements = 8 * sum(file.stat().st_size for file in _weight_files(folder, config))
    with _limit(folder, 4 * len(header) + 64, 4 * elements + 4 * _SLACK):
        model = meta_model(read_config(folder, None), folder.name)
    # Masks and tables of positions are in no file; some grow with the square of a length that costs a file little.
    if (tables := sum(buffer.nbytes for buffer in model.buffers())) > 4 * (elements + 4 * _SLACK):
        raise ValueError(
            f"the model {printable(folder.name)} computes tables of {tables / 2**30:,.1f} GiB by its config, beyond "
            f"{elements:,} weights in its files: {_ONE_MODEL}"
        )
    if not quantized:
        _check_dtypes(folder, header, model)
        _check_tensors(folder)
    _CHECKED.add(state)


_CHECKED: set[tuple] = set()
"""Folders that were found right in this process, by the sizes and times of their files."""


def _check_tensors(folder: Path) -> None:
    """transformers' own matching of names and shapes, on the meta device. What it cannot do there, loading will say."""
    decoders: Any = AutoModelForCausalLM
    try:
        with quiet():
            model, found = decoders.from_pretrained(
                folder,
                device_map="meta",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they can be named
                trust_remote_code=False,
                local_files_only=True,
            )
    except Exception:
        return
    check_names(folder.name, model, found)


def _check_entries(folder: Path) -> tuple:
    """The state of a folder whose files are regular and of a bounded size; raises ValueError for others."""
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


def _weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
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
    for file in _weight_files(folder, config):
        header |= read_header(file)
    if not header:
        raise ValueError(f"the weight files of the model {printable(folder.name)} hold no tensor")
    return header


def _check_dtypes(folder: Path, header: Mapping[str, TensorInfo], model: nn.Module) -> None:
    """Raises ValueError for parameters kept as integers or 8-bit floats with nothing that says their scale."""
    own, prefix = {name for name, _ in model.named_parameters()}, getattr(model, "base_model_prefix", "")
    wrong = [
        f"{name} ({about.dtype})"
        for name, about in header.items()
        if about.dtype not in FLOATS and (name in own or f"{prefix}.{name}" in own)
    ]
    if wrong:
        raise ValueError(
            f"the weight files of the model {printable(folder.name)} hold {named(wrong)} that are not in "
            f"{', '.join(FLOATS)}, and its config names no quantization_config"
        )


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


def read_config(source: str | Path, revision: str | None) -> Any:
    """transformers' config of a folder or hub id, never by code that lies beside it. Raises ValueError."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision or "main")
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        said = first_line(error)
        if "trust_remote_code" in str(error):
            said = (
                "it needs code that lies beside it (auto_map), which is never run; take a model transformers has itself"
            )
        raise ValueError(f"cannot read the config of {printable(_name(source))}: {said}") from None


def meta_model(config: Any, name: str) -> nn.Module:
    """The decoder that a config describes, on the meta device: shapes without memory. Raises ValueError."""
    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except KeyError as error:  # an activation, a kind of layer or of positions
        raise ValueError(
            f"the config of {printable(name)} makes no decoder: it names {printable(error)}, which transformers does "
            "not know"
        ) from None
    except Exception as error:  # whatever a config that is no model's makes of the model's code
        raise ValueError(f"the config of {printable(name)} makes no decoder: {first_line(error)}") from None


class _TooLarge(Exception):
    """Stops the making of a model."""


@contextmanager
def _limit(folder: Path, tensors: int, elements: int) -> Iterator[None]:
    """While inside, a module that registers more than this is not made to its end."""
    seen = {"tensors": 0, "elements": 0}

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        seen["tensors"] += 1
        seen["elements"] += 0 if parameter is None else parameter.numel()
        if seen["tensors"] > tensors or seen["elements"] > elements:
            raise _TooLarge(
                f"the model {printable(folder.name)} has more than {min(seen['elements'], elements):,} parameters by "
                f"its config, far more than its weight files hold: {_ONE_MODEL}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


# ---- after loading ----


def check_loaded(name: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Raises ValueError unless every parameter came from the files, whole, with its own shape, and is finite.

    found: transformers' loading info.
    """
    check_names(name, model, found)
    check_finite(
        f"the model {printable(name)}",
        model.named_parameters(),
        "its weights are damaged or from a run that diverged; copy them again",
    )


def check_names(name: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first few, for tensors that are missing, of another shape, or not the model's.

    Tied weights and what a family computes by itself are not missing. A tensor that the model has no place for is
    refused where it belongs to a matrix the model has (a bias too many, a scale) or repeats one (layers the config does
    not count); a head or tower of another model is left out, as transformers does.
    """
    where = f"the model {printable(name)}"
    if wrong := sorted(found["mismatched_keys"]):
        key, theirs, ours = wrong[0]
        rest = f" ({len(wrong):,} tensors differ)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{where}: {printable(key)} has shape {tuple(theirs)} in its files, and its config asks for "
            f"{tuple(ours)}{rest}: {_ONE_MODEL}"
        )
    if missing := set(found["missing_keys"]):
        raise ValueError(f"the weight files of {where} lack {named(missing)}: copy them whole, or save the model again")
    if foreign := [key for key in found["unexpected_keys"] if _belongs(key, model)]:
        raise ValueError(
            f"the weight files of {where} hold {named(foreign)} that its config has no place for: {_ONE_MODEL}"
        )


def _belongs(key: str, model: nn.Module) -> bool:
    """Whether a tensor is named as a part of a module that holds tensors, any number in the name standing for any."""
    prefix = getattr(model, "base_model_prefix", "")
    holders = {_pattern(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    parent = _pattern(key.rpartition(".")[0])
    return parent in holders or f"{prefix}.{parent}" in holders


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def check_special_tokens(tokenizer: Any, rows: int, name: str) -> None:
    """Raises ValueError when a special token's id has no row in the embedding of this many rows."""
    kinds = ("pad", "bos", "eos", "unk")
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    if beyond := [f"{printable(getattr(tokenizer, f'{k}_token'))} ({i})" for k, i in ids.items() if (i or 0) >= rows]:
        raise ValueError(
            f"the tokenizer of {printable(name)} has {', '.join(dict.fromkeys(beyond))} beyond the {rows:,} rows of "
            "the model's embedding: resize the embedding and save the model, or name a token that has a row"
        )


# ---- other libraries ----


@contextmanager
def quiet() -> Iterator[None]:
    """While inside, transformers and peft say nothing on the terminal: no report, no bar over weights, no warnings of
    what will be deprecated. Bars of downloads stay."""
    import warnings

    from transformers.utils import logging

    def no_bar(factory: Any, args: tuple, kwargs: dict) -> Any:
        return factory(*args, **{**kwargs, "disable": True})

    level, hook = logging.get_verbosity(), logging.set_tqdm_hook(no_bar)
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its kind where the text alone says little."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, ValueError | OSError) and said:
        return printable(said)
    return printable(f"{kind}: {said}" if said else kind)


def _name(source: str | Path) -> str:
    return source.name if isinstance(source, Path) else source
