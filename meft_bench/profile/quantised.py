"""A frozen base in 4 bits, as QLoRA (Dettmers et al. 2023) stores it: NF4 codes with doubly quantised scales.

On CUDA the layers are bitsandbytes' own. Where that cannot run, Nf4Linear stands for them: same bytes at rest, and the
same half-precision copy of one weight at a time in forward and in backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_BLOCK, _SCALES_PER_BLOCK = 64, 256


class Nf4Linear(nn.Module):
    """A frozen linear layer: two weights a byte, one 8-bit scale per 64 weights, one fp32 scale per 256 scales."""

    codes: Tensor

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = linear.weight
        self.in_features, self.out_features, self.dtype = *_features(linear), weight.dtype
        self.bias = linear.bias
        blocks = weight.numel() // _BLOCK
        self.register_buffer("codes", weight.new_zeros(weight.numel() // 2, dtype=torch.uint8))
        self.register_buffer("scales", weight.new_zeros(blocks, dtype=torch.uint8))
        self.register_buffer("scale_scales", weight.new_zeros(-(-blocks // _SCALES_PER_BLOCK), dtype=torch.float32))

    def dequantised(self) -> Tensor:
        """A fresh half-precision weight [out, in]; its values are not the point here, its bytes are."""
        weight = self.codes.new_empty(self.out_features, self.in_features, dtype=self.dtype)
        weight.view(-1, 2).copy_(self.codes[:, None].expand(-1, 2))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """Keeps no weight for backward: it is made again, as bitsandbytes does."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantised(), layer.bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.layer.dequantised(), None


def _features(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """(inputs, outputs); a Conv1D, as GPT-2 has, keeps its weight transposed."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def quantise_base(model: nn.Module, layers: nn.ModuleList, simulated: bool) -> None:
    """Replace every frozen linear layer inside the decoder layers; embeddings and output head stay as they are.

    Raises ValueError on CUDA when bitsandbytes is missing, and where peft's LoRA is on a layer's weight as a parameter,
    as it is on dense layers beside a mixture of experts: a 4-bit weight is none that it could be added to.
    """
    for layer in layers:
        linear_layers = [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        frozen = [(n, m) for n, m in linear_layers if not m.weight.requires_grad]
        for name, linear in frozen:
            parent = layer.get_submodule(name.rpartition(".")[0])
            if hasattr(parent, "parameter_name"):  # peft's ParamWrapper; a GPU session has no peft to ask
                raise ValueError(f"peft puts LoRA on {name.removesuffix('.base_layer')} as a parameter, not on 4 bits")
            setattr(parent, name.rpartition(".")[2], Nf4Linear(linear) if simulated else _bitsandbytes(linear))


def _bitsandbytes(linear: nn.Linear | Conv1D) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError("a 4-bit base on a GPU needs bitsandbytes: pip install 'meft-bench[peers]'") from None
    weight = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
    made = bnb.nn.Linear4bit(
        *_features(linear), bias=linear.bias is not None, quant_type="nf4", compute_dtype=weight.dtype
    )
    # Quantisation happens when the weight moves to the device.
    made.weight = bnb.nn.Params4bit(weight.contiguous().cpu(), requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made.to(weight.device)
