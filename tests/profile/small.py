"""A small Llama and one step of it, real on the CPU or simulated, for the tests of the profile."""

import torch
from transformers import LlamaConfig

from meft_bench import observe
from meft_bench.profile import shapes
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.step import prepare, training_step
from meft_bench.profile.variants import VARIANTS, attach, make_optimizer, size_options
from meft_bench.train.counts import Counted
from meft_bench.train.models import shape_of

VOCABULARY = 2000
ASSUMED = Union(rows=100, source="assumed: for a test", evidence="assumed")


def small_config(layers: int = 4, **changes) -> LlamaConfig:
    fields = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**fields, **changes})


def small_spec(variant: str, **changes) -> ProfileSpec:
    fields = {"model": "small", "variant": variant, "neurons": 256, "batch": 2, "seq": 64}
    if VARIANTS[variant].needs_union:
        fields["union"] = ASSUMED
    return ProfileSpec(**{**fields, **changes})


def real_parts(spec: ProfileSpec, dtype: torch.dtype, config: LlamaConfig | None = None):
    """(model, attached, optimizer) with random weights in host memory, ready to train."""
    torch.manual_seed(0)
    model = shapes.build(config or small_config(), "cpu", dtype, random=True)
    variant = VARIANTS[spec.variant]
    attached = attach(variant, size_options(variant, spec.neurons, Counted(model.config)), model, simulated=True)
    optimizer = make_optimizer(variant, attached, simulated=True)
    prepare(model, spec)
    return model, attached, optimizer


def real_step(parts, spec: ProfileSpec, *listeners: observe.Listener) -> None:
    _, attached, optimizer = parts
    with observe.listening(*listeners):
        training_step(attached, optimizer, spec, VOCABULARY, "cpu")


def shape_of_config(config: LlamaConfig):
    """The sizes of a config's model, without weights."""
    return shape_of(shapes.build(config, "meta", torch.float32, random=False))
