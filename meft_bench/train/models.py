"""Base models: the embedded one, a local folder, or a hub id."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from meft_bench import hub
from meft_bench.meft.sites import text_config
from meft_bench.named import EMBEDDED
from meft_bench.text import first_line, printable
from meft_bench.train import model_files, model_folder
from meft_bench.train.methods import ModelShape

UNLIMITED = 1 << 30
"""Tokens of a model without a longest sequence, as those that see positions by ALiBi."""
_LARGEST_LENGTH = 1 << 24  # above it, a tokenizer's limit means none


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to adapt, with what identifies it in a record."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens a sequence may have; UNLIMITED where neither the model nor its tokenizer says."""


def embedded_dir() -> Path:
    """Folder of the embedded base model."""
    return Path(__file__).parent.parent / "embedded"


def weights_digest(folder: Path) -> str:
    """First 12 hex digits of the sha256 over a folder's safetensors and tokenizer, in name order.

    Raises ValueError when the folder holds no safetensors weights.
    """
    model_files.check_folder(folder)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json"), *folder.glob("config.json")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            while piece := content.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:12]


def load_model(source: str | Path, revision: str | None, dtype: str, device: str) -> LoadedModel:
    """Load tokenizer and weights (safetensors only, no remote code).

    source: "embedded", a folder, or a hub id; revision pins a hub id. Raises ValueError with one line on anything that
    cannot be loaded, and for weights that are missing, of another shape, or not finite.
    """
    path = path_of(source)
    name = source if isinstance(source, str) else source.name
    arguments: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    if isinstance(path, Path):
        model_files.check_folder(path)
        arguments["local_files_only"] = True
    hub.check_model(source, revision)
    tokenizer = load_tokenizer(source, revision)
    decoders: Any = AutoModelForCausalLM
    try:
        with model_files.quiet():
            model, found = decoders.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they can be named below
                **arguments,
            )
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        raise ValueError(f"cannot load the model {printable(name)}: {first_line(error)}") from None
    model_files.check_special_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    model.to(torch.device(device))
    model_files.check_loaded(name, model, found)
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere; the id only has to exist. lm-eval asks for a token, so name id 0; where that is
        # text ("!" of GPT-2), the end token: a tokenizer that is saved with a named one reads and writes it no more.
        is_text = 0 not in tokenizer.all_special_ids and tokenizer.eos_token is not None
        tokenizer.pad_token = tokenizer.eos_token if is_text else tokenizer.convert_ids_to_tokens(0)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return LoadedModel(model, tokenizer, longest(text_config(model), tokenizer) or UNLIMITED)


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone. Raises ValueError with one line."""
    path = path_of(source)
    here = isinstance(path, Path)
    if isinstance(path, Path):
        model_folder.check_tokenizer(path)
    try:
        with model_files.quiet():
            return AutoTokenizer.from_pretrained(
                path, trust_remote_code=False, revision=revision or "main", local_files_only=here
            )
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        again = "; copy its files there again" if here else ""
        raise ValueError(f"cannot load the tokenizer of {printable(source)}: {first_line(error)}{again}") from None


def longest(config: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Tokens a sequence may have by a decoder's config, else by its tokenizer, else None."""
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit >= 1:
            return limit
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 1 <= limit <= _LARGEST_LENGTH else None


def path_of(source: str | Path) -> str | Path:
    """What transformers is given: a Path for a folder, else a hub id."""
    if source == EMBEDDED:
        return embedded_dir()
    return Path(source) if os.path.isdir(source) else source


def model_shape(source: str | Path, revision: str | None = None) -> ModelShape:
    """Sizes read from a model's config alone (no weights); parameters are counted on the meta device."""
    return shape_of(without_weights(source, revision))


def without_weights(source: str | Path, revision: str | None = None) -> nn.Module:
    """The model on the meta device, by its config alone. Raises ValueError with one line."""
    path = path_of(source)
    if isinstance(path, Path):
        model_files.check_folder(path)
    hub.check_model(source, revision)
    return model_files.meta_model(model_files.read_config(path, revision), str(source))


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes of a loaded decoder. Raises ValueError for one without attention heads or a width."""
    config = text_config(model)
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        raise ValueError(
            f"{type(model).__name__} has no attention heads or no one width: need a transformers decoder "
            "(Llama, Mistral, Qwen, Gemma, GPT-NeoX, OPT, GPT-2 are known to work)"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    return ModelShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        ffn=ffn,
        query=heads * head,
        value=(getattr(config, "num_key_value_heads", None) or heads) * head,
        parameters=sum(p.numel() for p in model.parameters()),
    )
