"""LoRA (Hu et al. 2021) by peft, on the attention, the FFN or all linear layers of the decoder."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from meft_bench.train.methods import Attached, ModelShape, require_choice, require_positive
from meft_bench.train.projections import expert_matrices, targeted

TITLE = "LoRA"
NUMERICS = 1
LEARNING_RATES = (4e-3, 1e-2, 2.5e-2)
SIZE = "rank"
CHOICES = {"targets": ("attention", "ffn", "all"), "alpha": ("fixed", "rank")}
SAVED = "peft"


@dataclass(frozen=True, kw_only=True)
class Options:
    rank: int = 8
    targets: str = "attention"
    """"attention": query and value, as the paper compares it; "ffn": its linear layers, and in a mixture of experts
    those of every expert, but no router; "all": "ffn" and all linear layers of the attention."""
    alpha: str = "fixed"
    """"fixed": alpha = 16 whatever the rank, so the scale alpha / rank falls as the rank grows (released scripts).
    "rank": alpha = 2 rank, a constant scale of 2, as a control."""

    def __post_init__(self) -> None:
        require_positive(rank=self.rank)
        require_choice("targets", self.targets, CHOICES["targets"])
        require_choice("alpha", self.alpha, CHOICES["alpha"])


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    """rank x (in + out) per adapted matrix of a LLaMA-like layer."""
    d, f, q = shape.hidden, shape.ffn, shape.query
    into = {"attention": 2 * d, "ffn": 2 * d + f, "all": 3 * d + q + 2 * d + f}
    a = options.rank * into[options.targets] * shape.layers
    return {"lora_a": a, "lora_b": options.rank * shape.ends[options.targets] * shape.layers - a}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    config = _config(model, options)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    groups: dict[str, list[nn.Parameter]] = {"lora_a": [], "lora_b": []}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            groups["lora_a" if "lora_A" in name else "lora_b"].append(parameter)
    return Attached(model=adapted, groups=groups, save=adapted.save_pretrained)


def _config(model: nn.Module, options: Options) -> LoraConfig:
    modules = targeted(model, options.targets)
    experts = [] if options.targets == "attention" else expert_matrices(model)
    renamed = [name for name in modules if name.rsplit(".", 1)[-1] in _renamed(model, modules)]
    return LoraConfig(
        r=options.rank,
        lora_alpha=16 if options.alpha == "fixed" else 2 * options.rank,
        target_modules=[name for name in modules if name not in renamed],
        target_parameters=[*experts, *(f"{name}.weight" for name in renamed)] or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        # GPT-2 and its like keep their weights transposed; peft would find out in every layer, with a warning.
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in modules),
    )


def _renamed(model: nn.Module, modules: list[str]) -> set[str]:
    """Last names that peft takes for experts of older checkpoints and renames, in some families with a mixture of
    experts. It would leave out the shared expert and the dense layers, which bear those names still."""
    last_names = {name.rsplit(".", 1)[-1] for name in modules}
    probes = {name: LoraConfig(target_modules=[name]) for name in last_names}
    changed = set()
    for name, probe in probes.items():
        try:
            convert_peft_config_for_transformers(probe, model, None)
        except ValueError:  # it refuses a gate without its up projection
            changed.add(name)
        if set(probe.target_modules or ()) != {name}:
            changed.add(name)
    return changed
