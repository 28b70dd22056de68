"""Base models by shape: known names, a folder, or a hub id; built without weights on any device."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.initialization import no_init_weights

from meft_bench.host_memory import is_out_of_memory
from meft_bench.inputs import named_model
from meft_bench.train.models import path_of


def _sizes(
    hidden: int, layers: int, heads: int, ffn: int, positions: int, kv_heads: int | None = None
) -> dict[str, Any]:
    """Arguments of a config; as many heads for keys and values as for queries unless kv_heads says otherwise."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }


KNOWN = {
    "llama-7b": LlamaConfig(**_sizes(4096, 32, 32, 11008, 2048)),
    "mistral-7b": MistralConfig(**_sizes(4096, 32, 32, 14336, 32768, kv_heads=8), sliding_window=None),
    "llama-13b": LlamaConfig(**_sizes(5120, 40, 40, 13824, 2048)),
    # Llama 2, whose heads share eight keys and values.
    "llama-70b": LlamaConfig(**_sizes(8192, 80, 64, 28672, 4096, kv_heads=8)),
}
MOST_LAYERS = 4096
"""More would take minutes to lay out without weights; the deepest published decoders have some 130."""


def model_config(name: str) -> Any:
    """The transformers config of a known shape, a folder or a hub id. Raises ValueError with one line otherwise."""
    if name in KNOWN:
        return copy.deepcopy(KNOWN[name])
    try:
        source = path_of(named_model(name))
    except ValueError as error:
        raise ValueError(f"{error}; known shapes are {', '.join(KNOWN)}") from None
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=isinstance(source, Path))
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        raise ValueError(f"cannot read the config of the model {Path(name).name}: {first_line(error)}") from None


def short_name(name: str) -> str:
    """The model's name in file names and tables: never a path."""
    return Path(name).name.lower()


def first_line(error: BaseException) -> str:
    """The error in one line of bearable length, with its kind where the text alone says little."""
    text = (str(error).strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, ValueError) and text else f"{type(error).__name__}: "
    return f"{kind}{text[:200]}".rstrip(": ")


def layers_of(config: Any) -> int:
    """Decoder layers of a config. Raises ValueError unless it says how many, from 1 to MOST_LAYERS."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MOST_LAYERS:
        raise ValueError(f"the config's num_hidden_layers is {layers!r}, not a whole number from 1 to {MOST_LAYERS}")
    return layers


def longest(config: Any) -> int | None:
    """Positions that the model has, in tokens; None where its config sets no limit (ALiBi, as BLOOM and MPT)."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def with_layers(config: Any, layers: int) -> Any:
    """The same shape with this many decoder layers; lists with an entry per layer keep the first ones."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = layers_of(config)
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    return config


def build(config: Any, device: str | torch.device, dtype: torch.dtype, random: bool) -> Any:
    """The causal language model of this config on device in dtype; weights are drawn if random, else left as they
    come (the simulation has none). Attention is what transformers takes: SDPA where the family has it.

    Raises ValueError, in one line, for a config that makes no such model; memory that runs out is torch's own error.
    """
    layers_of(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), contextlib.nullcontext() if random else no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers checks little, so a config that fits nothing may raise any kind
        if is_out_of_memory(error):
            raise
        raise ValueError(f"the config makes no causal language model: {first_line(error)}") from None
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # which no_init_weights leaves out: a head tied to its embedding is one matrix
    model.config.use_cache = False
    return model
