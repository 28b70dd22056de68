"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) by peft: a few fixed entries of the base's own matrices are trained.

W becomes W + S, S sparse, its places chosen once before training. As many entries a matrix as a LoRA of the same rank
has parameters: rank x (in + out), though S itself is of high rank.
"""

from dataclasses import dataclass

import torch
from peft import ShiraConfig, get_peft_model
from peft.tuners.shira.layer import ShiraLayer
from torch import Tensor, nn

from meft_bench.train.methods import Attached, ModelShape, require_choice, require_positive
from meft_bench.train.projections import refuse_experts, targeted

TITLE = "SHiRA"
NUMERICS = 1
LEARNING_RATES = (1.6e-3, 4e-3, 1e-2)
SIZE = "rank"
CHOICES = {"targets": ("attention", "ffn", "all"), "mask": ("random", "magnitude")}
SAVED = "peft"
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Options:
    rank: int = 8
    targets: str = "all"
    """"attention": query and value; "ffn": its linear layers; "all": "ffn" and all linear layers of the attention."""
    mask: str = "random"
    """Which entries: "random", drawn for each matrix (SHiRA-Rand), or "magnitude", the largest (SHiRA-WM)."""

    def __post_init__(self) -> None:
        require_positive(rank=self.rank)
        require_choice("targets", self.targets, CHOICES["targets"])
        require_choice("mask", self.mask, CHOICES["mask"])


def count(options: Options, shape: ModelShape) -> dict[str, int]:
    """rank x (in + out) per adapted matrix of a LLaMA-like layer."""
    return {"entries": options.rank * shape.ends[options.targets] * shape.layers}


def attach(model: nn.Module, options: Options, seed: int) -> Attached:
    """Raises ValueError where a matrix to adapt is no nn.Linear, as experts are none, or has fewer entries than rank x
    (in + out)."""
    config = ShiraConfig(r=options.rank, target_modules=_targets(model, options), task_type="CAUSAL_LM")
    config.mask_fn = None  # peft's draws one place for all matrices of a shape; ours are set below
    torch.sparse.check_sparse_tensor_invariants.disable()  # as it is anyway; unsaid, torch warns of it
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for layer in (module for module in adapted.modules() if isinstance(module, ShiraLayer)):
        weight, trained = layer.get_base_layer().weight, layer.shira_weight[_ADAPTER]
        if not weight.is_meta:
            layer.shira_indices[_ADAPTER] = places(weight, trained.numel(), options.mask, generator)
        entries.append(trained)
    return Attached(model=adapted, groups={"entries": entries}, save=adapted.save_pretrained)


def places(weight: Tensor, wanted: int, mask: str, generator: torch.Generator) -> Tensor:
    """Row and column [2, wanted] int32 of the entries of weight [out, in] to train, in the order of the matrix."""
    if mask == "magnitude":
        flat = weight.detach().abs().flatten().topk(wanted).indices
    else:
        flat = torch.randperm(weight.numel(), generator=generator)[:wanted].to(weight.device)
    flat = flat.sort().values
    return torch.stack([flat // weight.shape[1], flat % weight.shape[1]]).int()


def _targets(model: nn.Module, options: Options) -> list[str]:
    if options.targets != "attention":
        refuse_experts(model, "SHiRA adapts nn.Linear alone")
    names = targeted(model, options.targets)
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"SHiRA adapts nn.Linear alone; {name} is a {type(module).__name__}: take lora")
        if options.rank * sum(module.weight.shape) > module.weight.numel():
            raise ValueError(f"rank={options.rank} trains more entries than {name} has: take a smaller rank")
    return names
