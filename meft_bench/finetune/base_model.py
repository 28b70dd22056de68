"""The base model as a job names it: where it is, its tokenizer, its limits, the device it goes to."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from meft_bench import hub, inputs
from meft_bench.finetune.settings import TrainSettings
from meft_bench.text import printable
from meft_bench.train import model_files, models


def base_source(model: str) -> str | Path:
    """The base's folder, hub id or "embedded". Raises ValueError for a folder that is not there or holds no model whose
    config and weight files agree."""
    source = inputs.named_model(model)
    if isinstance(source, Path):
        models.model_shape(source)
    return source


def device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """Both with "auto" resolved. Raises ValueError for cuda without a GPU."""
    device = inputs.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(inputs.NO_CUDA)
    return device, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    """The base's tokenizer alone. Raises ValueError, in one line, for one that cannot be read, and for special tokens
    that the base's embedding has no row for."""
    hub.check_model(source, revision)
    tokenizer = models.load_tokenizer(source, revision)
    rows = getattr(load_config(source, revision), "vocab_size", None)
    if isinstance(rows, int):
        model_files.check_special_tokens(tokenizer, rows, str(source))
    return tokenizer


def load_config(source: str | Path, revision: str | None) -> Any:
    """The part of the base's config that describes its decoder. Raises ValueError with one line."""
    hub.check_model(source, revision)
    return model_files.read_config(models.path_of(source), revision).get_text_config()


def length_limit(source: str | Path, settings: TrainSettings) -> int:
    """Tokens a sequence may have. Raises ValueError for more than the model takes, and for a base that has no longest
    sequence (BLOOM, MPT without one: they see positions by ALiBi) when the settings name none."""
    config = load_config(source, settings.revision)
    own = models.longest(config)
    if own is not None and settings.max_length is not None and settings.max_length > own:
        raise ValueError(f"max_length={settings.max_length} is above the model's limit of {own} tokens")
    limit = settings.max_length or own or models.longest(config, models.load_tokenizer(source, settings.revision))
    if limit is None:
        raise ValueError(
            f"the base {printable(source)} states no longest sequence: give --max-length TOKENS, such as 512"
        )
    return limit
