"""Base models: the embedded one, a local folder, or a hub id."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from meft_bench.harness.methods import ModelShape
from meft_bench.meft.sites import text_config

EMBEDDED = "embedded"


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to adapt, with what identifies it in a record."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def embedded_dir() -> Path:
    """Folder of the embedded base model."""
    return Path(__file__).parent.parent / "embedded"


def weights_digest(folder: Path) -> str:
    """First 12 hex digits of the sha256 over a folder's safetensors and tokenizer, in name order.

    Raises ValueError when the folder holds no safetensors weights.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json"), *folder.glob("config.json")])
    if not any(f.suffix == ".safetensors" for f in files):
        raise ValueError(f"no *.safetensors in the model folder {folder.name}: only safetensors weights are loaded")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def load_model(source: str | Path, revision: str | None, dtype: str, device: str) -> LoadedModel:
    """Load tokenizer and weights (safetensors only, no remote code).

    source: "embedded", a folder, or a hub id; revision pins a hub id. Raises ValueError with one line on anything that
    cannot be loaded.
    """
    path: str | Path = embedded_dir() if source == EMBEDDED else source
    arguments: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    if isinstance(path, Path):
        if not path.is_dir():
            raise ValueError(f"no model folder {path}")
        arguments["local_files_only"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **arguments)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, **arguments
        )
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"cannot load the model {Path(path).name if source != EMBEDDED else source}: {first}"
        ) from None
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere; the id only has to exist. lm-eval asks for a token, so name id 0.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.device(device))
    return LoadedModel(model, tokenizer, model.config.max_position_embeddings)


def model_shape(source: str | Path, revision: str | None = None) -> ModelShape:
    """Sizes read from a model's config alone (no weights); parameters are counted on the meta device."""
    path = embedded_dir() if source == EMBEDDED else source
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, revision=revision or "main")
    except Exception as error:
        raise ValueError(f"cannot read the config of {source}: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shape_of(model)


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes of a loaded decoder."""
    config = text_config(model)
    heads = config.num_attention_heads
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
