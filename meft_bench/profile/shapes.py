"""Base models by shape: known names, a folder, or a hub id; built without weights on any device."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.initialization import no_init_weights

_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
KNOWN = {
    "llama-7b": LlamaConfig(
        **_COMMON, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=2048
    ),
    "mistral-7b": MistralConfig(
        **_COMMON,
        intermediate_size=14336,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        sliding_window=None,
    ),
}


def model_config(name: str) -> Any:
    """The transformers config of a known shape, a folder or a hub id. Raises ValueError with one line otherwise."""
    if name in KNOWN:
        return copy.deepcopy(KNOWN[name])
    looks_local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if not looks_local and name.count("/") != 1:
        raise ValueError(f"unknown model {name!r}: known shapes are {', '.join(KNOWN)}; else give a folder or a hub id")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=looks_local)
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the config of the model {Path(name).name}: {first}") from None


def short_name(name: str) -> str:
    """The model's name in file names and tables: never a path."""
    return Path(name).name.lower()


def with_layers(config: Any, layers: int) -> Any:
    """The same shape with this many decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def build(config: Any, device: str | torch.device, dtype: torch.dtype, random: bool) -> Any:
    """The causal language model of this config on device in dtype; weights are drawn if random, else left as they
    come (the simulation has none)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if random:
                model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
            else:
                with no_init_weights():
                    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model
