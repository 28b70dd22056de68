"""Every way to copy, with the bytes that its kernel moves across the link."""

import pytest
import torch

from meft_bench.simulate.device import NAME, simulated_gpu
from meft_bench.simulate.machine import Machine
from meft_bench.simulate.sizes import Sizes


def crossed(code) -> dict[str, int]:
    """Bytes by direction of code(host fp32 [4, 8], device fp32 [4, 8])."""
    with simulated_gpu(), Machine(Sizes({})) as machine:
        host, device = torch.ones(4, 8), torch.ones(4, 8, device=NAME)
        with machine.phase("forward"):
            code(host, device)
        total = {"h2d": 0, "d2h": 0}
        for counts in machine.bytes.values():
            for way, size in counts.items():
                total[way] += size
    return total


FULL, HALF = 4 * 8 * 4, 4 * 8 * 2
FORMS = {
    "to": (lambda h, d: h.to(NAME), FULL, 0),
    "to, non-blocking": (lambda h, d: h.to(NAME, non_blocking=True), FULL, 0),
    "back": (lambda h, d: d.to("cpu"), 0, FULL),
    "copy_": (lambda h, d: d.copy_(h), FULL, 0),
    "copy_ back": (lambda h, d: h.copy_(d), 0, FULL),
    # Blocking: converted on the host. Non-blocking: on the device.
    "to, casting": (lambda h, d: h.to(NAME, torch.bfloat16), HALF, 0),
    "to, casting, non-blocking": (lambda h, d: h.to(NAME, torch.bfloat16, non_blocking=True), FULL, 0),
    "back, casting": (lambda h, d: d.to("cpu", torch.bfloat16), 0, FULL),
    "back, casting, non-blocking": (lambda h, d: d.to("cpu", torch.bfloat16, non_blocking=True), 0, HALF),
    "slice": (lambda h, d: h[:2].to(NAME), FULL // 2, 0),
    "into a slice": (lambda h, d: d[1:2].copy_(h[:1]), FULL // 4, 0),
    "transposed": (lambda h, d: h.T.to(NAME), FULL, 0),
    "into pinned memory": (lambda h, d: torch.empty_like(d, device="cpu", pin_memory=True).copy_(d, True), 0, FULL),
    "foreach": (lambda h, d: torch._foreach_copy_([d, d], [h, h]), 2 * FULL, 0),
    "indexed by the host": (lambda h, d: d[torch.tensor([0, 2])], 2 * 8, 0),
    "written by the host's index": (lambda h, d: d.index_put_((torch.tensor([0, 2]),), d[:2]), 2 * 8, 0),
    "item": (lambda h, d: d.sum().item(), 0, 4),
    "same device": (lambda h, d: d.clone() + d.to(torch.bfloat16), 0, 0),
    "scalar of the host": (lambda h, d: d * torch.tensor(2.0), 0, 0),
    "like": (lambda h, d: torch.empty_like(d, device="cpu"), 0, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_every_form(form):
    code, h2d, d2h = FORMS[form]
    assert crossed(code) == {"h2d": h2d, "d2h": d2h}


def test_through_autograd():
    """A copy's gradient crosses the other way."""

    def code(host, device):
        host.requires_grad_()
        host.to(NAME).sum().backward()

    assert crossed(code) == {"h2d": FULL, "d2h": FULL}


def test_mixed_devices_are_refused():
    with simulated_gpu(), Machine(Sizes({})):
        host, device = torch.ones(4), torch.ones(4, device=NAME)
        with pytest.raises(Exception, match="device"):
            host + device


def test_unknown_sizes_are_refused():
    """No number of rows is made up."""
    with simulated_gpu(), Machine(Sizes({16: 3})):
        assert torch.zeros(16, dtype=torch.bool).nonzero().shape == (3, 1)
        with pytest.raises(ValueError, match="known for 16 alone"):
            torch.zeros(17, dtype=torch.bool).nonzero()
