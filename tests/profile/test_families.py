"""Counts come from the modules: on every family, for every method that attaches, they are the attached model's own."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

from meft_bench.profile import shapes
from meft_bench.profile.quantised import quantise_base
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated import simulate_layers
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.variants import VARIANTS
from meft_bench.simulate import cards
from meft_bench.train.counts import Counted
from meft_bench.train.methods import find_method
from meft_bench.train.models import shape_of
from tests.families import PROFILED as FAMILIES

METHODS = {
    "lora": [{"rank": 3, "targets": targets} for targets in ("attention", "ffn", "all")],
    "adapter_h": [{"size": 5}],
    "parallel_adapter": [{"neurons": 7}],
    "parallel_adapter_offload": [{"neurons": 7}],
    "meft": [{"neurons": 16, "kept": 4}, {"neurons": 16, "kept": 4, "key_experts": False}],
    "full": [{}],
    "galore": [{"rank": 8}],
    "lsp_offload": [{"subspace": 8}],
    "shira": [{"rank": 1, "targets": targets} for targets in ("attention", "ffn", "all")],
}
LLAMA_LIKE = (
    "llama",
    "llama tied",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3 tied",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
)
"""Families that no method may refuse."""


def setting_of(config, **changes) -> Setting:
    shape = shape_of(shapes.build(config, "meta", torch.bfloat16, random=False))
    fields = {"card": cards.card("24GB"), "host": cards.host("desktop"), "accumulations": (1,), **changes}
    return Setting(config=config, shape=shape, **fields)


def spec_of(variant: str, **changes) -> ProfileSpec:
    union = Union(rows=9, source="assumed: for a test", evidence="assumed")
    needed = {"union": union} if VARIANTS[variant].needs_union else {}
    return ProfileSpec(
        **{"model": "tiny", "variant": variant, "neurons": 16, "batch": 2, "seq": 8, **needed, **changes}
    )


def really_attached(config, method: str, options) -> dict[str, int] | str:
    """Groups of the method on a model that has weights, or why it does not attach."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    try:
        return find_method(method).attach(model, options, 0).parameter_groups()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_count_is_the_attached_models(family):
    config = FAMILIES[family]
    counted = Counted(config)
    real = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert setting_of(config).shape.parameters == sum(p.numel() for p in real.parameters())
    for method, all_options in METHODS.items():
        for given in all_options:
            options = find_method(method).Options(**given)
            wanted = really_attached(config, method, options)
            if isinstance(wanted, str):
                assert family not in LLAMA_LIKE and method in ("lora", "adapter_h", "lsp_offload", "shira"), wanted
                with pytest.raises(ValueError):
                    counted.groups(method, options)
            else:
                assert counted.groups(method, options) == wanted, (method, given)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_linear_layers_alone_are_not_said_to_be_a_mixture_of_experts(family):
    """SHiRA and LSP-Offload would train the attention, and leave out nearly all of the FFN in silence."""
    for method, given in (("shira", {"targets": "all"}), ("shira", {"targets": "ffn"}), ("lsp_offload", {})):
        options = find_method(method).Options(**given)
        said = really_attached(FAMILIES[family], method, options)
        assert "is a mixture of experts (model.layers.0.mlp.experts" in said, method


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_profiles(family):
    """A step of it is simulated, and trains and holds what the attached model does."""
    setting = setting_of(FAMILIES[family])
    for variant in ("full", "meft"):
        row, _ = simulated_row(spec_of(variant), setting)
        options = find_method(variant).Options(**row["size"])
        attached = really_attached(FAMILIES[family], variant, options)
        assert row["parameters"]["trainable"] == sum(attached.values())
        assert row["parameters"]["base"] == setting.shape.parameters


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "gpt_neox", "opt", "gemma3_text"])
@pytest.mark.parametrize("variant", ["lora_all", "adapter_h", "q4_parallel_adapter", "qlora"])
def test_a_size_trains_nearly_what_a_parallel_adapter_of_r_does(variant, family):
    setting = setting_of(FAMILIES[family])
    row, _ = simulated_row(spec_of(variant), setting)
    step = Counted(FAMILIES[family])
    method, option = VARIANTS[variant].method, VARIANTS[variant].option
    if option == "neurons":
        return
    size = row["size"][option]
    one_more = step.trainable(method, find_method(method).Options(**{**row["size"], option: size + 1}))
    trained, wanted = row["parameters"]["trainable"], 2 * 16 * 32 * 2
    assert abs(trained - wanted) <= (one_more - trained) / 2


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon"])
def test_a_quantised_layer_keeps_its_bias_and_counts_its_weight(family):
    """GPT-2's transposed layers are layers too, and Falcon's own kind of linear layer."""
    config = FAMILIES[family]
    model = shapes.build(config, "cpu", torch.float32, random=True).requires_grad_(False)
    layers = model.model.decoder.layers if family == "opt" else model.transformer.h
    before = [p for n, p in layers.named_parameters() if n.endswith("weight") and p.dim() == 2]
    biases = sum(p.numel() for n, p in layers.named_parameters() if n.endswith("bias"))
    quantise_base(model, layers, simulated=True)
    codes = sum(b.numel() for n, b in layers.named_buffers() if n.endswith("codes"))
    assert codes == sum(p.numel() for p in before) // 2
    assert sum(p.numel() for n, p in layers.named_parameters() if n.endswith("bias")) == biases
    model(input_ids=torch.arange(8)[None])


def test_lora_on_a_parameter_is_refused_on_four_bits_in_words():
    """Of a dense layer beside experts peft wraps the weight alone."""
    fields = FAMILIES["qwen3_moe"].to_dict() | {"mlp_only_layers": [0]}
    config = Qwen3MoeConfig(**{k: v for k, v in fields.items() if k != "layer_types"})
    with pytest.raises(ValueError, match="peft puts LoRA on mlp.gate_proj as a parameter, not on 4 bits"):
        simulate_layers(spec_of("qlora"), config, 2)
    assert simulate_layers(spec_of("q4_parallel_adapter"), config, 2).base_parameters


def test_layers_that_differ_are_all_simulated():
    """Three dense layers, then three mixtures: 2 and 4 layers do not lead to 6."""
    fields = FAMILIES["qwen3_moe"].to_dict() | {"num_hidden_layers": 6, "mlp_only_layers": [0, 1, 2]}
    config = Qwen3MoeConfig(**{k: v for k, v in fields.items() if k != "layer_types"})
    setting = setting_of(config)
    row, _ = simulated_row(spec_of("full"), setting)
    assert row["parameters"]["base"] == setting.shape.parameters
    whole = simulate_layers(spec_of("full"), config, 6)
    assert whole.base_parameters == setting.shape.parameters
    assert row["memory"]["by_category"]["base weights"] == max(
        p.by_category.get("base weights", 0) for p in whole.peaks["device"].values()
    )


def test_one_layer_is_enough():
    config = shapes.with_layers(FAMILIES["llama"], 1)
    for variant in ("parallel_adapter", "parallel_adapter_zero3", "meft"):
        row, _ = simulated_row(spec_of(variant), setting_of(config))
        assert row["time"]["step_s_by_accumulation"]["1"] > 0


# ---- a model that others have published figures of ----

LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
    max_position_embeddings=131072,
)
"""Llama-3.2-3B."""
PUBLISHED = {
    ("lora_attention", 32): 6_922_348_285,
    ("lora_attention", 64): 7_069_137_037,
    ("full", None): 26_065_965_553,
}
"""peft's method comparison (MetaMathQA on an L40S, bf16, batches of 4): "mem allocated avg", mean of its 20 windows of
250 steps. Its loop clears gradients when the next step begins and reads the allocator while logits and loss live."""
PADDED = 341
"""Tokens of a batch's longest row, on average: not published, taken from the first of the three rows."""
WITHIN = {"lora_attention": 0.0001, "full": 0.0006}
"""Of full fine-tuning's 26 GB, 14 MB are not accounted for."""


def test_llama_3b_is_counted_once():
    setting = setting_of(LLAMA_3B)
    assert setting.shape.parameters == 3_212_749_824
    lora = find_method("lora")
    assert setting.counted.trainable("lora", lora.Options(rank=32)) == 9_175_040
    assert setting.counted.trainable("lora", lora.Options(rank=64)) == 18_350_080
    assert setting.counted.trainable("full", find_method("full").Options()) == 3_212_749_824


@pytest.mark.parametrize(("variant", "rank"), PUBLISHED)
def test_memory_after_the_step_is_the_published_one(variant, rank):
    row, _ = simulated_row(spec_of(variant, rank=rank, batch=4, seq=PADDED), setting_of(LLAMA_3B))
    after = row["memory"]["after_step"]
    assert after["device_bytes"] == sum(after["by_category"].values())
    assert after["kept_gradients_bytes"] == pytest.approx(after["by_category"]["moments"] / 2, rel=1e-3)
    assert after["kept_outputs_bytes"] == 4 * PADDED * 128256 * 2 + 512
    total = after["device_bytes"] + after["kept_gradients_bytes"] + after["kept_outputs_bytes"]
    assert total == pytest.approx(PUBLISHED[variant, rank], rel=WITHIN[variant])


def test_positions_and_layers_are_read_or_refused():
    assert shapes.longest(FAMILIES["bloom"]) is None and shapes.longest(FAMILIES["gpt2"]) == 64
    for layers in (0, -1, 10**6):
        broken = copy.deepcopy(FAMILIES["llama"])
        broken.num_hidden_layers = layers
        with pytest.raises(ValueError, match="num_hidden_layers"):
            shapes.build(broken, "meta", torch.bfloat16, random=False)
    odd = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, activation_function="wobble")
    with pytest.raises(ValueError, match="^the config makes no causal language model: .*wobble") as caught:
        shapes.build(odd, "meta", torch.bfloat16, random=False)
    assert "\n" not in str(caught.value)
