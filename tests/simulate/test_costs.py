"""Bytes and operations of single operations, by hand. Tensors are 6 x 4 in fp32: 96 bytes."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meft_bench.simulate.costs import work

BYTES = 96


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.noted[func.__name__] = work(func, args, kwargs or {}, out)[:2]
        return out


def _work(run: Callable[[], object], name: str) -> tuple[int, int]:
    with _Noting() as noting, torch.no_grad():
        run()
    return noting.noted[name]


def _ones() -> torch.Tensor:
    return torch.ones(6, 4)


@pytest.mark.parametrize(
    ("name", "run", "arrays"),
    [
        ("add.Tensor", lambda: _ones() + _ones(), 3),
        ("add_.Tensor", lambda: _ones().add_(_ones()), 3),
        ("mul_.Tensor", lambda: _ones().mul_(2.0), 2),
        ("add.out", lambda: torch.add(_ones(), _ones(), out=_ones()), 3),
        ("zero_.default", lambda: _ones().zero_(), 1),
        ("fill_.Scalar", lambda: _ones().fill_(2.0), 1),
        ("copy_.default", lambda: _ones().copy_(_ones()), 2),
        ("_foreach_mul_.Scalar", lambda: torch._foreach_mul_([_ones(), _ones()], 2.0), 4),
        ("_foreach_zero_.default", lambda: torch._foreach_zero_([_ones(), _ones()]), 2),
        ("_foreach_copy_.default", lambda: torch._foreach_copy_([_ones()], [_ones()]), 2),
        ("index_select.default", lambda: torch.ones(50, 4).index_select(0, torch.arange(6)), 2),
        ("index_add_.default", lambda: torch.zeros(50, 4).index_add_(0, torch.arange(6), _ones()), 3),
        ("t.default", lambda: _ones().t(), 0),
    ],
)
def test_bytes_read_and_written(name: str, run: Callable[[], object], arrays: int) -> None:
    assert _work(run, name)[1] == arrays * BYTES


def test_fused_adamw_reads_four_arrays_and_writes_three() -> None:
    parameter = torch.nn.Parameter(_ones())
    parameter.grad = _ones()
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    assert _work(optimizer.step, "_fused_adamw_.default")[1] == 7 * BYTES


def test_topk_looks_at_every_element() -> None:
    assert _work(lambda: torch.ones(6, 40).topk(2), "topk.default")[0] == 240


def test_marking_writes_as_many_places_as_are_given() -> None:
    def mark() -> None:
        torch.zeros(1000, dtype=torch.bool)[torch.arange(6)] = True

    flops, moved = _work(mark, "index_put_.default")
    assert (flops, moved) == (6, 6 * 8 + 2 * 6)


def test_copies_into_some_rows_move_those_alone() -> None:
    """Of 1,000 rows 3 are written, and the rest is not looked at."""
    target, there = torch.zeros(1000, 4), torch.arange(3)
    moved = _work(lambda: target.index_copy_(0, there, torch.ones(3, 4)), "index_copy_.default")[1]
    assert moved == 2 * 3 * 4 * 4 + 3 * 8
    assert _work(lambda: target.index_fill_(0, there, 1.0), "index_fill_.int_Scalar")[1] == 3 * 4 * 4 + 3 * 8


@pytest.mark.parametrize(("rows", "distinct"), [(100, 12), (5, 5)])
def test_row_dots_multiply_every_pair_and_fetch_shared_rows_once(rows: int, distinct: int) -> None:
    chosen = torch.zeros(12, dtype=torch.int64)

    def dots() -> None:
        torch.ops.aten._embedding_bag_per_sample_weights_backward(
            _ones(), torch.ones(rows, 4), chosen, torch.arange(0, 12, 2), torch.arange(6).repeat_interleave(2), 0
        )

    flops, moved = _work(dots, "_embedding_bag_per_sample_weights_backward.default")
    assert flops == 2 * 12 * 4
    assert moved == BYTES + distinct * 4 * 4 + 12 * 4
