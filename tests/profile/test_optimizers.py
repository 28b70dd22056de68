"""The optimizers of the cheap alternatives do what they say, on real numbers."""

import pytest
import torch
from torch import nn

from meft_bench.profile import host_adamw
from meft_bench.profile.host_adamw import HostAdamW
from meft_bench.profile.optimizers import EightBitAdam

LR = 1e-2


def model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batches(count: int):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator)) for _ in range(count)]


def train(net, optimizer, steps=4, accumulation=1):
    data = iter(batches(steps * accumulation))
    for _ in range(steps):
        for _ in range(accumulation):
            x, y = next(data)
            dtype = next(net.parameters()).dtype
            (nn.functional.mse_loss(net(x.to(dtype)).float(), y) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("returned", [False, True], ids=["gradients wait", "gradients return"])
def test_host_adamw_is_torchs_adamw(returned, accumulation):
    ours, theirs = model(), model()
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True), accumulation=accumulation)
    host = HostAdamW(ours.parameters(), return_gradients=returned, lr=LR)
    found = train(ours, host, accumulation=accumulation)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("returned", [False, True], ids=["gradients wait", "gradients return"])
def test_clipping_is_torchs_over_the_sum_of_micro_batches(returned, micro_batches):
    net, reference = model(), model()
    host = HostAdamW(net.parameters(), return_gradients=returned, lr=LR)
    plain = torch.optim.AdamW(reference.parameters(), lr=LR, fused=True)
    for x, y in batches(micro_batches):
        nn.functional.mse_loss(net(x), y).backward()
        nn.functional.mse_loss(reference(x), y).backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    torch.testing.assert_close(host.clip_gradients(0.1), expected)
    assert expected > 0.1
    host.step()
    plain.step()
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_masters_keep_what_half_precision_would_lose():
    """Updates far below bf16's resolution add up in the fp32 masters."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    host = HostAdamW([parameter], return_gradients=False, lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        host.step()
    assert parameter[0].item() == pytest.approx(0.99, abs=5e-3)
    assert parameter.dtype == torch.bfloat16


def test_eight_bit_state_is_two_bytes_a_parameter():
    parameter = nn.Parameter(torch.zeros(128, 256))
    optimizer = EightBitAdam([parameter], lr=LR)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = sum(t.nbytes for t in optimizer.state[parameter].values())
    assert size == 2 * parameter.numel() + 2 * 4 * parameter.numel() // 256


def test_an_update_has_work_for_every_thread_and_the_same_bits():
    """In pieces of 2^16 elements, which torch gives to two threads at the most."""
    found, pieces = [], []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            parameter = nn.Parameter(torch.linspace(-1, 1, 5 * 2**16 + 3).bfloat16())
            host = HostAdamW([parameter], return_gradients=False, lr=LR)
            parameter.grad = torch.linspace(1, -2, parameter.numel()).bfloat16()
            host.step()
            found.append(parameter.detach().clone())
            pieces.append([some.numel() for (some,) in host_adamw._pieces(parameter.detach())])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*found) and pieces == [[2**16] * 5 + [3], [4 * 2**16, 2**16 + 3]]
