"""A base model in 4 or 8 bits through bitsandbytes, with MEFT on top: only the frozen base is rounded."""

import functools
import importlib.util

import torch
from transformers import BitsAndBytesConfig


def quantization(
    bits: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig:
    """What from_pretrained needs to load a base in 4 bits (NF4, double quantisation, as QLoRA) or 8 bits (LLM.int8).

        base = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quantization(4, "cuda"), device_map="cuda", dtype=torch.bfloat16
        )
        model = peft.get_peft_model(base, MeftConfig(r=8464, k=64, task_type="CAUSAL_LM"))

    dtype is that of the hidden states. A tiny layer is run forward and backward on device first: raises ValueError,
    with the alternative, where bitsandbytes is not installed or does not work there.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}: bitsandbytes stores a base in 4 or 8 bits")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"a base in {bits} bits needs bitsandbytes: pip install 'meft-bench[peers]', or load the base in bf16"
        )
    if reason := _failure(bits, str(device), dtype):
        raise ValueError(
            f"bitsandbytes does not run {bits}-bit layers on {device} here ({reason}): load the base in bf16"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@functools.cache
def _failure(bits: int, device: str, dtype: torch.dtype) -> str | None:
    """Why a quantised layer cannot train what lies below it on device; None when it can."""
    try:
        import bitsandbytes

        layer: torch.nn.Module
        if bits == 4:
            layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        else:
            layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer = layer.to(device)
        h = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
        layer(h).sum().backward()
        return None if h.grad is not None and bool(h.grad.isfinite().all()) else "no gradient comes through"
    except Exception as error:  # its back ends raise kinds of their own
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
