"""Small decoders with a MEFT adapter on, through peft."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from meft_bench.integrations.peft_method import MeftConfig, active_adapters
from tests.meft.tiny_models import LAYERS, VOCAB, D, tiny_llama

SIZES: dict[str, Any] = {"r": 24, "n_experts": 6, "p": 2, "k": 5, "task_type": "CAUSAL_LM"}


def tiny_mistral(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=2 * D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).eval()


BASES = {"llama": tiny_llama, "mistral": tiny_mistral}


def fill(model: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Random values in the active adapter: at zero neither keys nor router have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in active_adapters(model):
            adapter.store.values.copy_(size * torch.randn(adapter.store.values.shape, generator=generator))


def with_meft(base: PreTrainedModel | None = None, filled: bool = True, **changes: Any) -> PeftModel:
    model = get_peft_model(base if base is not None else tiny_llama(), MeftConfig(**{**SIZES, **changes}))
    if filled:
        fill(model)
    return model


def rows_of(model: nn.Module) -> list[Tensor]:
    """Every tensor of the active adapter, in order."""
    return [p.detach() for adapter in active_adapters(model) for p in adapter.store.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
