"""Where a machine without CUDA would silently do something else than one with it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers.masking_utils
from torch.utils._python_dispatch import TorchDispatchMode

from meft_bench.simulate.device import NAME, simulated_gpu
from meft_bench.simulate.machine import Machine


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def attention(q_dtype=torch.bfloat16, mask=None, width=64, **settings) -> list[str]:
    with simulated_gpu(), Seen() as seen:
        q, k, v = (torch.empty(2, 4, 128, width, dtype=q_dtype, device=NAME, requires_grad=True) for _ in range(3))
        bias = torch.empty(2, 1, 128, 128, dtype=mask, device=NAME) if mask is not None else None
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **settings).sum().backward()
    return seen.names


def test_attention_takes_the_kernels_that_cuda_would():
    assert any("flash_attention_backward" in n for n in attention(is_causal=True))
    assert any("efficient_attention_backward" in n for n in attention(q_dtype=torch.float32))
    assert any("efficient_attention" in n for n in attention(mask=torch.bool))
    assert not any("efficient" in n or "flash" in n for n in attention(q_dtype=torch.float64))


def test_flash_attention_never_stores_the_scores():
    """B x heads x length^2 scores would dwarf everything else at this length."""
    with simulated_gpu(), Machine() as machine, machine.phase("forward"):
        q, k, v = (torch.empty(1, 8, 4096, 64, dtype=torch.bfloat16, device=NAME) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
    peak = max(p.bytes for p in machine.ledger.peaks["device"].values())
    assert peak < 8 * 4096 * 4096


def test_autocast_raises():
    """On a missing GPU, autocast("cuda") only warns and does nothing; here it must not pass unnoticed."""
    with simulated_gpu(), torch.autocast(NAME, dtype=torch.bfloat16), pytest.raises(NotImplementedError):
        torch.ones(2, device=NAME) + 1


def test_a_process_that_ran_a_backward_pass_before_is_told_to_take_another():
    code = (
        "import torch; from meft_bench.simulate.device import simulated_gpu\n"
        "torch.ones((), requires_grad=True).backward()\n"
        "with simulated_gpu(): pass"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].endswith("run the simulation in its own process")


def test_code_sees_a_gpu():
    with simulated_gpu():
        tensor = torch.empty(4, device=NAME)
        assert tensor.is_cuda and tensor.device.type == NAME
        assert not torch.empty(4).is_cuda
    assert not torch.empty(4).is_cuda


def test_addresses_tell_storages_apart():
    with simulated_gpu():
        one, other = torch.empty(4), torch.empty(4)
        assert one.data_ptr() == one.view(2, 2).data_ptr()
        assert one.data_ptr() != other.data_ptr()
        assert one[1:].data_ptr() == one.data_ptr() + 4


def test_transformers_does_not_believe_it_is_traced():
    before = transformers.masking_utils.is_tracing
    with simulated_gpu():
        assert not transformers.masking_utils.is_tracing(torch.empty(1))
    assert transformers.masking_utils.is_tracing is before
