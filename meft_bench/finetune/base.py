"""The base model as a job names it: where it is, its tokenizer, its limits, the device it goes to."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from meft_bench import hub, inputs
from meft_bench.finetune.settings import TrainSettings
from meft_bench.harness import models


def base_source(model: str) -> str | Path:
    """The base's folder, hub id or "embedded". Raises ValueError for a folder that is not there."""
    if Path(model).is_dir():
        return Path(model)
    if model != models.EMBEDDED and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ValueError(f"no model folder {model}, and it is no hub id (owner/name)")
    return model


def device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """Both with "auto" resolved. Raises ValueError for cuda without a GPU."""
    device = inputs.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here; see meft-bench doctor, or use --device cpu")
    return device, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    """The base's tokenizer alone. Raises ValueError with one line."""
    hub.check_model(source, revision)
    try:
        return AutoTokenizer.from_pretrained(_path(source), revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
        raise ValueError(f"cannot load the tokenizer of {source}: {_first_line(error)}") from None


def load_config(source: str | Path, revision: str | None) -> Any:
    """The part of the base's config that describes its decoder. Raises ValueError with one line."""
    hub.check_model(source, revision)
    try:
        config = AutoConfig.from_pretrained(_path(source), revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"cannot read the config of {source}: {_first_line(error)}") from None
    return config.get_text_config()


def length_limit(source: str | Path, settings: TrainSettings) -> int:
    """Tokens a sequence may have. Raises ValueError for more than the model takes."""
    own = int(load_config(source, settings.revision).max_position_embeddings)
    if settings.max_length is not None and settings.max_length > own:
        raise ValueError(f"max_length={settings.max_length} is above the model's limit of {own} tokens")
    return settings.max_length or own


def _path(source: str | Path) -> str | Path:
    return models.embedded_dir() if source == models.EMBEDDED else source


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
