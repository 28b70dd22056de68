"""A tiny config of every family of decoders that meft-bench trains, by name."""

from typing import Any

import transformers as t

VOCABULARY = 96
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE_HEADS = {**_LLAMA_LIKE, "head_dim": 16}
"""Heads wider together than the hidden size."""
_EQUAL_HEADS = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_OPT = {**{k: v for k, v in _EQUAL_HEADS.items() if k != "intermediate_size"}, "ffn_dim": 80}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}

FAMILIES: dict[str, Any] = {
    "llama": t.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=False),
    "llama-tied": t.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": t.MistralConfig(**_LLAMA_LIKE),
    "qwen2": t.Qwen2Config(**_LLAMA_LIKE),
    "qwen3": t.Qwen3Config(**_WIDE_HEADS),
    "qwen3-tied": t.Qwen3Config(**_WIDE_HEADS, tie_word_embeddings=True),
    "qwen3-moe": t.Qwen3MoeConfig(**_LLAMA_LIKE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": t.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4),
    "gemma": t.GemmaConfig(**_WIDE_HEADS),
    "gemma2": t.Gemma2Config(**_WIDE_HEADS),
    "gemma3": t.Gemma3TextConfig(**_WIDE_HEADS),
    "phi": t.PhiConfig(**_LLAMA_LIKE),
    "phi3": t.Phi3Config(**_LLAMA_LIKE),
    "gpt2": t.GPT2Config(**_GPT),
    "gpt-neo": t.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, vocab_size=VOCABULARY, window_size=16,
                              max_position_embeddings=64, attention_types=[[["global", "local"], 1]]),
    "gpt-neox": t.GPTNeoXConfig(**_EQUAL_HEADS),
    "gpt-j": t.GPTJConfig(**_GPT, rotary_dim=8),
    "opt": t.OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt-350m": t.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bloom": t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "mpt": t.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY, max_seq_len=64),
    "falcon": t.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY),
    "stablelm": t.StableLmConfig(**_LLAMA_LIKE),
    "olmo2": t.Olmo2Config(**_LLAMA_LIKE),
    "cohere": t.CohereConfig(**_LLAMA_LIKE),
    "granite": t.GraniteConfig(**_LLAMA_LIKE),
    "starcoder2": t.Starcoder2Config(**_LLAMA_LIKE),
    "smollm3": t.SmolLM3Config(**_LLAMA_LIKE),
}  # fmt: skip
