"""One tiny random model of each family of decoders, and where methods belong in it."""

import contextlib
import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, WIDTH, LAYERS = 64, 32, 2

# Every name under which a configuration may keep a size.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embed_dim", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("attention_hidden_size",), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "patch_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("image_size", "state_size"), 32),
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """A model type and, by names relative to a layer, what each method adapts in it."""

    kind: str
    layers: str = "model.layers"
    ffn: str = "mlp"
    qv: str = "self_attn.q_proj self_attn.v_proj"
    attention: str = "self_attn.k_proj self_attn.o_proj"
    """The attention's other linear layers."""
    linears: str = "mlp.gate_proj mlp.up_proj mlp.down_proj"
    dense_linears: str | None = None
    """Those of the first layer where it differs, as a dense layer before experts does."""
    experts: str = ""
    """Parameters with one matrix per expert."""
    made_by: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    """Methods that cannot be meant here."""

    def config(self) -> Any:
        """A new one at every call."""
        config = CONFIG_MAPPING[self.kind]()
        _shrink(config)
        for name, value in self.fields.items():
            *path, last = name.split(".")
            setattr(functools.reduce(getattr, path, config), last, value)
        return copy.deepcopy(config)

    def model(self) -> PreTrainedModel:
        """The same weights at every call."""
        config = self.config()
        torch.manual_seed(0)
        make: Any = (
            getattr(transformers, self.made_by) if self.made_by else transformers.AutoModelForCausalLM.from_config
        )
        return make(config).eval()


def _shrink(config: Any) -> None:
    for name, value in _SIZES.items():
        own = config.attribute_map.get(name, name)
        if getattr(config, own, None) is not None:
            with contextlib.suppress(AttributeError):  # a property, made of other sizes
                setattr(config, own, value)
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _shrink(getattr(config, name))
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) and name in vars(config):
            setattr(config, name, getattr(config, name)[:LAYERS])


_GPT = {"layers": "transformer.h", "qv": "attn.c_attn", "attention": "attn.c_proj", "linears": "mlp.c_fc mlp.c_proj"}
_BLOOM = {"layers": "transformer.h", "qv": "self_attention.query_key_value", "attention": "self_attention.dense",
          "linears": "mlp.dense_h_to_4h mlp.dense_4h_to_h"}  # fmt: skip
_OUT_PROJ = "self_attn.k_proj self_attn.out_proj"
_LOOSE = {"ffn": "fc1", "linears": "fc1 fc2", "attention": _OUT_PROJ, "refuses": ("peft",)}
_DECODER = {"layers": "model.decoder.layers", **_LOOSE}
_FUSED = {"qv": "self_attn.qkv_proj", "attention": "self_attn.o_proj", "linears": "mlp.gate_up_proj mlp.down_proj"}
_EXPERTS: dict[str, Any] = {"linears": "", "experts": "mlp.experts.gate_up_proj mlp.experts.down_proj",
                            "refuses": ("adapter_h",)}  # fmt: skip
_SHARED = "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj"
_VISION: dict[str, Any] = {"layers": "model.language_model.layers"}
_BESIDE = ("meft", "peft", "parallel_adapter", "parallel_adapter_offload")

FAMILIES = {
    **{kind: Family(kind) for kind in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "cohere", "cohere2", "olmo",
        "olmo2", "granite", "smollm3", "exaone4", "bitnet")},
    **{kind: Family(kind, linears="mlp.up_proj mlp.down_proj") for kind in ("apertus", "arcee")},
    "phi": Family("phi", attention="self_attn.k_proj self_attn.dense", linears="mlp.fc1 mlp.fc2"),
    "phi3": Family("phi3", **_FUSED),
    "glm": Family("glm", linears="mlp.gate_up_proj mlp.down_proj"),
    "starcoder2": Family("starcoder2", linears="mlp.c_fc mlp.c_proj"),
    "gpt2": Family("gpt2", **_GPT),
    "gpt_bigcode": Family("gpt_bigcode", **_GPT),
    "gptj": Family("gptj", **{**_GPT, "qv": "attn.q_proj attn.v_proj", "attention": "attn.k_proj attn.out_proj",
                              "linears": "mlp.fc_in mlp.fc_out"}),
    "codegen": Family("codegen", **{**_GPT, "qv": "attn.qkv_proj", "attention": "attn.out_proj",
                                    "linears": "mlp.fc_in mlp.fc_out"}),
    "gpt_neox": Family("gpt_neox", layers="gpt_neox.layers", qv="attention.query_key_value",
                       attention="attention.dense", linears="mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "bloom": Family("bloom", **_BLOOM),
    "falcon": Family("falcon", **_BLOOM),
    "persimmon": Family("persimmon", qv="self_attn.query_key_value", attention="self_attn.dense",
                        linears="mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "mpt": Family("mpt", layers="transformer.blocks", ffn="ffn", qv="attn.Wqkv", attention="attn.out_proj",
                  linears="ffn.up_proj ffn.down_proj"),
    "cpmant": Family("cpmant", layers="cpmant.encoder.layers", ffn="ffn.ffn",
                     qv="self_att.self_attention.project_q self_att.self_attention.project_v",
                     attention="self_att.self_attention.project_k self_att.self_attention.attention_out",
                     linears="ffn.ffn.w_in.w_0 ffn.ffn.w_in.w_1 ffn.ffn.w_out",
                     fields={"dim_head": 8, "dim_ff": 48, "num_attention_heads": 4}),
    "lfm2": Family("lfm2", ffn="feed_forward", attention=_OUT_PROJ,
                   linears="feed_forward.w1 feed_forward.w3 feed_forward.w2",
                   fields={"layer_types": ["full_attention"] * LAYERS}),
    "modernbert-decoder": Family("modernbert-decoder", qv="attn.q_proj attn.v_proj",
                                 attention="attn.k_proj attn.Wo", linears="mlp.Wi mlp.Wo"),
    "xglm": Family("xglm", **_LOOSE),
    **{kind: Family(kind, **_DECODER) for kind in ("opt", "bart", "mbart", "pegasus")},
    "marian": Family("marian", **_DECODER, fields={"decoder_vocab_size": VOCABULARY}),
    # Mixtures of experts: the adapter stands beside the whole of them.
    **{kind: Family(kind, **_EXPERTS) for kind in ("mixtral", "qwen3_moe", "olmoe")},
    "deepseek_v3": Family("deepseek_v3", qv="self_attn.q_b_proj self_attn.kv_b_proj",
                          attention="self_attn.q_a_proj self_attn.kv_a_proj_with_mqa self_attn.o_proj",
                          **{**_EXPERTS, "linears": _SHARED}, fields={"head_dim": 4},
                          dense_linears="mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "qwen2_moe": Family("qwen2_moe", **{**_EXPERTS, "linears": _SHARED.replace("experts", "expert")}),
    "gpt_oss": Family("gpt_oss", **{**_EXPERTS, "refuses": (*_BESIDE, "adapter_h")}),
    "llama4_text": Family("llama4_text", ffn="feed_forward",
                          **{**_EXPERTS, "refuses": (*_BESIDE, "adapter_h"),
                             "linears": _SHARED.replace("experts", "expert").replace("mlp", "feed_forward"),
                             "experts": _EXPERTS["experts"].replace("mlp", "feed_forward")}),
    # Towers of the same depth stand beside the text decoder.
    "llava": Family("llava", made_by="LlavaForConditionalGeneration", **_VISION),
    "qwen2_vl": Family("qwen2_vl", made_by="Qwen2VLForConditionalGeneration", **_VISION,
                       fields={"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                               "mrope_section": [2, 1, 1]}}),
    "gemma3": Family("gemma3", made_by="Gemma3ForConditionalGeneration", **_VISION),
    "paligemma": Family("paligemma", made_by="PaliGemmaForConditionalGeneration", **_VISION),
    "mistral3": Family("mistral3", made_by="Mistral3ForConditionalGeneration", **_VISION),
    "idefics3": Family("idefics3", made_by="Idefics3ForConditionalGeneration", layers="model.text_model.layers"),
}  # fmt: skip

_EVERY = (*_BESIDE, "adapter_h", "lora")
REFUSED = {
    "rwkv": (Family("rwkv", refuses=_EVERY), "returns several tensors|is not made of projections|no query and value"),
    "mamba": (Family("mamba", refuses=_EVERY), "no FFN found in MambaBlock"),
    "bert": (Family("bert", refuses=_EVERY), "no FFN found in BertLayer"),
    "git": (Family("git", made_by="GitForCausalLM", refuses=_EVERY), "no FFN found in GitLayer"),
    "xlm": (Family("xlm", refuses=_EVERY), "no FFN found in"),
    **{kind: (Family(kind, made_by=made_by, refuses=_EVERY), f"{made_by} has an encoder beside its decoder")
       for kind, made_by in {"bart": "BartForConditionalGeneration", "mbart": "MBartForConditionalGeneration",
                             "marian": "MarianMTModel", "t5": "T5ForConditionalGeneration",
                             "pegasus": "PegasusForConditionalGeneration"}.items()},
}  # fmt: skip

_TIED = {"tie_word_embeddings": True}
PROFILED: dict[str, Any] = {
    **{kind: FAMILIES[kind].config() for kind in (
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
        "gpt2", "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon", "stablelm", "olmo2", "cohere", "granite",
        "starcoder2", "smollm3")},
    "llama tied": Family("llama", fields=_TIED).config(),
    "qwen3 tied": Family("qwen3", fields={**_TIED, "head_dim": 16}).config(),
    "gpt_neo": Family("gpt_neo", fields={"attention_types": [[["global", "local"], 1]],
                                         "attention_layers": ["global", "local"], "window_size": 16}).config(),
    "opt-350m": Family("opt", fields={"word_embed_proj_dim": 16, "do_layer_norm_before": False}).config(),
}  # fmt: skip
"""Configs of the families that the profile is tested on, and of those that share or narrow their embeddings."""
