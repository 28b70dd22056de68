"""The sums over chosen rows against dense one-hot products, on both sides of the dense/sparse threshold."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_bench.meft.engine import products
from meft_bench.meft.engine.products import row_dots, scatter_rows, weighted_rows

THRESHOLD = products._DENSE_BELOW


@st.composite
def cases(draw, sparse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [T, D], rows [U, D], weights [T, K], index [T, K]) with repeats and empty places; maybe no token or row."""
    T, K, D = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    limit = THRESHOLD * K
    U = draw(st.integers(limit + 1, limit + 20) if sparse else st.integers(0, limit))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    index_TK = torch.randint(0, max(U, 1), (T, K), generator=generator)
    empty = draw(st.sampled_from([0.0, 0.3, 1.0])) if U else 1.0
    index_TK[torch.rand(T, K, generator=generator) < empty] = -1
    x_TD, rows_UD, weights_TK = (torch.randn(*shape, generator=generator) for shape in ((T, D), (U, D), (T, K)))
    assert products._prefers_dense(index_TK, U, x_TD.dtype) is not sparse
    return x_TD, rows_UD, weights_TK, index_TK


def scattered(weights_TK: Tensor, x_TD: Tensor, index_TK: Tensor, rows: int) -> Tensor:
    """scatter_rows into memory that held something else, whose rows do not lie side by side."""
    out_U2D = torch.full((rows, 2, x_TD.shape[1]), torch.nan, dtype=x_TD.dtype)
    scatter_rows(weights_TK, x_TD, index_TK, out_U2D[:, 1])
    assert out_U2D[:, 0].isnan().all()
    return out_U2D[:, 1].clone()


def one_hot(index_TK: Tensor, rows: int) -> Tensor:
    """[T, K, U]; all zero at empty places."""
    return F.one_hot(index_TK + 1, rows + 1)[..., 1:].float()


def check_against_one_hot(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x_TD, rows_UD, weights_TK, index_TK = case
    U = rows_UD.shape[0]
    hot_TKU = one_hot(index_TK, U)
    untouched = [tensor.clone() for tensor in case]
    got = (
        row_dots(x_TD, (rows_UD,), index_TK),
        weighted_rows(weights_TK, (rows_UD,), index_TK),
        scattered(weights_TK, x_TD, index_TK, U),
    )
    wanted = (
        torch.einsum("td,ud,tku->tk", x_TD, rows_UD, hot_TKU),
        torch.einsum("tk,tku,ud->td", weights_TK, hot_TKU, rows_UD),
        torch.einsum("tk,tku,td->ud", weights_TK, hot_TKU, x_TD),
    )
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(case, untouched, strict=True)), "an input was written to"


@given(cases(sparse=False))
def test_dense_products_equal_one_hot(case) -> None:
    check_against_one_hot(case)


@given(cases(sparse=True))
def test_sparse_sums_equal_one_hot(case) -> None:
    check_against_one_hot(case)


@pytest.mark.parametrize("rows", [1 * THRESHOLD, 4 * THRESHOLD + 1])
def test_empty_places_are_exactly_zero(rows: int) -> None:
    """Even where the row that -1 would alias, the first or the last, is huge."""
    rows_UD = torch.ones(rows, 3)
    rows_UD[0] = rows_UD[-1] = 1e30
    index_TK = torch.tensor([[-1, 1], [-1, -1]])
    weights_TK, x_TD = torch.ones(2, 2), torch.ones(2, 3)
    assert row_dots(x_TD, (rows_UD,), index_TK).tolist() == [[0.0, 3.0], [0.0, 0.0]]
    assert weighted_rows(weights_TK, (rows_UD,), index_TK).tolist() == [[1.0] * 3, [0.0] * 3]
    scattered_UD = scattered(weights_TK, x_TD, index_TK, rows)
    assert scattered_UD[1].tolist() == [1.0] * 3 and scattered_UD.sum() == 3.0


@pytest.mark.parametrize("rows", [THRESHOLD, 5 * THRESHOLD])
def test_half_precision_keeps_its_type(rows: int) -> None:
    """bfloat16 has no sparse sum on the CPU, so it takes the dense product at any size."""
    x_TD, rows_UD = torch.randn(3, 4).bfloat16(), torch.randn(rows, 4).bfloat16()
    index_TK, weights_TK = torch.tensor([[0, 1], [2, -1], [-1, -1]]), torch.ones(3, 2).bfloat16()
    dots_TK = row_dots(x_TD, (rows_UD,), index_TK)
    assert dots_TK.dtype == weighted_rows(weights_TK, (rows_UD,), index_TK).dtype == torch.bfloat16
    assert scattered(weights_TK, x_TD, index_TK, rows).dtype == torch.bfloat16
    wanted = (x_TD.float() @ rows_UD.float().T).gather(1, index_TK.clamp(min=0)) * (index_TK >= 0)
    torch.testing.assert_close(dots_TK.float(), wanted, rtol=2e-2, atol=2e-2)


@given(cases(sparse=False), st.data())
def test_rows_in_blocks_are_as_good_as_in_one(case, data) -> None:
    """In any order, with rows between them that nobody keeps, and with gaps. In half precision, where all is dense."""
    x_TD, rows_UD, weights_TK = (tensor.bfloat16() for tensor in case[:3])
    index_TK = case[3]
    U, others = rows_UD.shape[0], data.draw(st.integers(0, 3))
    where_U = torch.randperm(U + others, generator=torch.Generator().manual_seed(U))[:U]
    apart_V2D = torch.ones(U + others, 2, x_TD.shape[1], dtype=torch.bfloat16)
    apart_V2D[where_U, 1] = rows_UD
    cut = data.draw(st.integers(0, U + others))
    blocks = (apart_V2D[:cut, 1], apart_V2D[cut:, 1])
    rows = products.Rows(blocks, blocks, where_U=where_U)
    places_TK = rows.placed(index_TK) if U else index_TK
    assert rows.count == U + others and torch.equal(places_TK < 0, index_TK < 0)
    for ours, theirs in (
        (row_dots(x_TD, blocks, places_TK), row_dots(x_TD, (rows_UD,), index_TK)),
        (weighted_rows(weights_TK, blocks, places_TK), weighted_rows(weights_TK, (rows_UD,), index_TK)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)
