"""A base model's files, perhaps a stranger's, as transformers reads them: matched with the model on the meta device
first, and looked at again once they are loaded. What needs neither torch nor transformers is in model_folder.py."""

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
    TensorInfo,
    check_finite,
    named,
)
from meft_bench.text import first_line, printable
from meft_bench.train.model_folder import ONE_MODEL, check_files, entries_of, weight_files

_SLACK = 1 << 24
"""Elements that a model may have beyond its files: 64 MiB in float32, for positions that are computed, not kept."""


def check_folder(folder: Path) -> None:
    """Raises ValueError, in one line, for a folder that holds no decoder of transformers in safetensors, whose config
    asks for more than its weight files hold, or whose tensors are not the model's. No tensor is read."""
    if (state := entries_of(folder)) in _CHECKED:
        return
    config, header = check_files(folder)
    elements = sum(tensor.elements for tensor in header.values())
    if quantized := isinstance(config.get("quantization_config"), dict):  # several weights share a byte
        elements = 8 * sum(file.stat().st_size for file in weight_files(folder, config))
    with _limit(folder, 4 * len(header) + 64, 4 * elements + 4 * _SLACK):
        model = meta_model(read_config(folder, None), folder.name)
    # Masks and tables of positions are in no file; some grow with the square of a length that costs a file little.
    if (tables := sum(buffer.nbytes for buffer in model.buffers())) > 4 * (elements + 4 * _SLACK):
        raise ValueError(
            f"the model {printable(folder.name)} computes tables of {tables / 2**30:,.1f} GiB by its config, beyond "
            f"{elements:,} weights in its files: {ONE_MODEL}"
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
                f"its config, far more than its weight files hold: {ONE_MODEL}"
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
            f"{tuple(ours)}{rest}: {ONE_MODEL}"
        )
    if missing := set(found["missing_keys"]):
        raise ValueError(f"the weight files of {where} lack {named(missing)}: copy them whole, or save the model again")
    if foreign := [key for key in found["unexpected_keys"] if _belongs(key, model)]:
        raise ValueError(
            f"the weight files of {where} hold {named(foreign)} that its config has no place for: {ONE_MODEL}"
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


def _name(source: str | Path) -> str:
    return source.name if isinstance(source, Path) else source
