"""Rows in int8 and int4: within half a step of what they were, and an adapter that equals fp32 with those very rows."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import groups, native
from meft_bench.meft.engine.groups import BITS, GROUP
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.quantised import QuantisedAdapter, QuantisedStore, host_bytes, row_bytes
from meft_bench.meft.store import NeuronStore

D, R = 40, 24  # one whole group and one that is filled up
ROWS = pytest.mark.parametrize("rows", BITS)
needs_kernels = pytest.mark.skipif(not native.fits(torch.zeros(1)), reason=native.status())


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(blocks: torch.Tensor, width: int, bits: int, halves: int = 2) -> torch.Tensor:
    out = torch.empty(blocks.shape[0], halves, width)
    return groups.gather_torch(blocks, torch.arange(blocks.shape[0]), out, bits)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from([1, 31, 32, 33, 64, 100]), st.sampled_from([8, 4]), st.integers(-30, 30))
def test_every_number_is_within_half_a_step_of_its_group(seed: int, width: int, bits: int, power: int) -> None:
    rows = some(seed, 5, 2, width) * 2.0**power
    rows[0, 0] = 0.0
    blocks = groups.quantise(rows, bits)
    found = back(blocks, width, bits)
    most = {8: 127, 4: 7}[bits]
    for start in range(0, width, GROUP):
        part = rows[..., start : start + GROUP]
        steps = part.abs().amax(2, keepdim=True) / most
        errors = (found[..., start : start + GROUP] - part).abs()
        assert bool((errors <= steps * (0.5 + 2**-7)).all())  # the step itself is a bf16
    assert bool((found[0, 0] == 0).all())


def test_a_group_by_hand() -> None:
    rows = torch.zeros(1, 1, GROUP)
    rows[0, 0, :4] = torch.tensor([7.0, -3.4, 1.6, -7.0])  # a step of 1
    block = groups.quantise(rows, 4)[0]
    assert block[:2].view(torch.bfloat16).item() == 1.0
    assert [int(code) & 15 for code in block[2:6]] == [15, 5, 10, 1] and block.shape == (18,)
    assert back(block[None], GROUP, 4, halves=1)[0, 0, :4].tolist() == [7.0, -3.0, 2.0, -7.0]
    rows[0, 0, 0] = 127.0
    block = groups.quantise(rows, 8)[0]
    assert block[2:6].view(torch.int8).tolist() == [127, -3, 2, -7] and block.shape == (34,)


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99),
    st.sampled_from([1, 16, 33, 64, 130]),
    st.sampled_from([8, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_kernel_is_torch_s_to_the_bit(seed: int, width: int, bits: int, halves: int, dtype: torch.dtype) -> None:
    blocks = groups.quantise(some(seed, R, 2, width), bits)
    index_U = torch.randperm(R, generator=torch.Generator().manual_seed(seed))[: seed % (R + 1)]
    outs = [torch.empty(index_U.shape[0], halves, width, dtype=dtype) for _ in range(2)]
    groups.gather(blocks, index_U, outs[0], bits)
    groups.gather_torch(blocks, index_U, outs[1], bits)
    assert torch.equal(*outs)


def adapter(**options) -> MeftAdapter:
    config = MeftOptions(neurons=R, kept=4, **options)
    store = NeuronStore(config, D, torch.Generator().manual_seed(0), torch.device("cpu"))
    with torch.no_grad():
        store.values.copy_(some(1, R, D))
    return MeftAdapter(config, store, Link(), BatchInfo(), 1).eval()


CASES = [
    {"experts": 6, "probed": 3},
    {"experts": 6, "probed": 3, "gate": "none", "selection": "relu_first"},
    {"experts": 6, "probed": 3, "reading": "union", "gate": "softmax"},
    {"key_experts": False},
]


@ROWS
@pytest.mark.parametrize("options", CASES)
def test_the_adapter_is_that_of_fp32_with_the_dequantised_rows(rows: str, options: dict) -> None:
    plain, h = adapter(**options), some(2, 2, 7, D)
    narrow = QuantisedAdapter(plain, rows)
    before = plain(h)
    with torch.no_grad():
        found = back(narrow.store.blocks_RB, D, BITS[rows])
        plain.store.keys.copy_(found[:, 0])
        plain.store.values.copy_(found[:, 1])
        expected, made = plain(h), narrow(h)
    assert torch.equal(made, expected)
    assert not torch.equal(made, before) and bool(made.any())
    assert narrow.link is plain.link and narrow.link.bytes["h2d", "rows"] > 0


@ROWS
def test_tokens_that_are_padding_select_nothing(rows: str) -> None:
    narrow, h = QuantisedAdapter(adapter(experts=6, probed=3), rows), some(3, 1, 5, D)
    narrow.batch.attention_mask = torch.tensor([[1, 1, 0, 0, 0]])
    with torch.no_grad():
        made = narrow(h)
    assert bool(made[0, :2].any()) and not bool(made[0, 2:].any())


@ROWS
def test_bytes_are_those_of_the_formula(rows: str) -> None:
    store = adapter(experts=6, probed=3).store
    narrow = QuantisedStore(store, rows)
    group = {"int8": 34, "int4": 18}[rows]
    assert row_bytes(D, rows) == 2 * 2 * group
    assert narrow.blocks_RB.nbytes == R * row_bytes(D, rows)
    assert host_bytes([narrow]) == R * row_bytes(D, rows) + 6 * D * 4
    assert host_bytes([store]) == R * row_bytes(D, "fp32") + 6 * D * 4


def test_quantised_rows_are_not_trained_saved_or_taken_from_the_device() -> None:
    narrow = QuantisedAdapter(adapter(experts=6, probed=3), "int8")
    with pytest.raises(ValueError, match="for inference"):
        narrow.train()(some(4, 1, 3, D).requires_grad_())
    with pytest.raises(ValueError, match="for inference"):
        narrow.store.state_dict()
    resident = adapter(experts=6, probed=3)
    resident.config = dataclasses.replace(resident.config, placement="device")
    with pytest.raises(ValueError, match="rows in host memory"):
        QuantisedAdapter(resident, "int8")
