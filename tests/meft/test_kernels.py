"""Native kernels against the plain torch that says what they mean; element-wise ones to the bit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meft_bench.meft import dense
from meft_bench.meft.engine import adamw, build, kernels, native, products
from meft_bench.meft.engine.index import quantise
from meft_bench.meft.engine.schedule import step_constants

WIDTHS = st.sampled_from([1, 7, 16, 64, 65, 130, 256])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
R = 12

needs_kernels = pytest.mark.skipif(not native.fits(torch.zeros(1)), reason=native.status())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(seed: int, width: int, neurons: int = R) -> dict[str, Tensor]:
    """Keys, values and whole neurons of one buffer: the row strides that occur."""
    buffer = torch.randn(neurons, 2, width, generator=generator(seed))
    return {"keys": buffer[:, 0], "values": buffer[:, 1], "both": buffer.flatten(1)}


def some_rows(seed: int, neurons: int = R) -> Tensor:
    count = int(torch.randint(0, neurons + 1, (), generator=generator(seed)))
    return torch.randperm(neurons, generator=generator(seed))[:count].sort().values


VIEWS = st.sampled_from(["keys", "values", "both"])


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 99), WIDTHS, VIEWS, st.sampled_from(DTYPES))
def test_gather_is_torch_s_to_the_bit(seed: int, width: int, view: str, dtype: torch.dtype) -> None:
    source, index_U = views(seed, width)[view], some_rows(seed)
    source[0, 0], source[1, 0], source[2, 0] = torch.nan, torch.inf, 1e-41
    outs = [torch.empty(index_U.shape[0], source.shape[1], dtype=dtype) for _ in range(2)]
    kernels.gather(source, index_U, outs[0])
    kernels.gather_torch(source, index_U, outs[1])
    assert torch.equal(outs[0].nan_to_num(7.0), outs[1].nan_to_num(7.0))
    assert torch.equal(outs[0].isnan(), outs[1].isnan())


@needs_kernels
def test_a_large_gather_goes_past_the_caches_unchanged() -> None:
    source = torch.randn(1500, 4096, generator=generator(0))
    index_U = torch.arange(0, 1500, 1)
    for dtype in DTYPES:
        out = torch.empty(1500, 4096, dtype=dtype)
        assert out.nbytes > native._LARGE_BYTES / 2
        assert torch.equal(kernels.gather(source, index_U, out), source.to(dtype))


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 99), WIDTHS, VIEWS, st.sampled_from(DTYPES))
def test_accumulate_squares_and_zero_are_torch_s_to_the_bit(
    seed: int, width: int, view: str, dtype: torch.dtype
) -> None:
    sums, index_U = views(seed, width)[view], some_rows(seed)
    filled_R = torch.rand(R, generator=generator(seed)) < 0.5
    sums[~filled_R] = torch.nan  # what an earlier step left is overwritten
    source = torch.randn(index_U.shape[0], sums.shape[1], generator=generator(seed + 1)).to(dtype)
    theirs, squares, their_squares = sums.clone(), *torch.zeros(2, R, dtype=torch.float64)
    plain = torch.where(filled_R[index_U, None], sums[index_U], 0.0) + source.float()
    kernels.accumulate(sums, index_U, source, filled_R, squares)
    kernels.accumulate_torch(theirs, index_U, source, filled_R, their_squares)
    assert torch.equal(sums[index_U], plain) and torch.equal(sums.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(squares, their_squares)
    torch.testing.assert_close(squares[index_U], plain.double().square().sum(1))
    assert torch.equal(kernels.squares(source), kernels.squares_torch(source))
    others = torch.ones(R, dtype=torch.bool).index_fill_(0, index_U, False)
    assert not squares[others].any()
    sums[~filled_R] = 0.0
    theirs[~filled_R] = 0.0
    kernels.zero(sums, index_U)
    theirs[index_U] = 0.0
    assert torch.equal(sums, theirs)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_with_a_value_are_found_however_small_it_is(width: int, plain: bool, monkeypatch) -> None:
    if plain:
        monkeypatch.setattr(native, "fits", lambda *tensors: False)
    values = [0.0, -0.0, 1.4e-45, -1.4e-45, 3e38, torch.inf, torch.nan, 1.0]
    rows = torch.zeros(len(values), width)
    rows[:, -1] = torch.tensor(values)
    assert kernels.nonzero_rows(rows).tolist() == [False, False, *[True] * 6]


@pytest.mark.parametrize("wide", [8, 32])
def test_gradients_of_another_width_are_refused(wide: int) -> None:
    """A kernel would write beside the rows."""
    sums, marks = torch.zeros(R, 16), torch.zeros(R, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{wide} wide cannot be added to rows 16 wide"):
        kernels.accumulate(sums, some_rows(1), torch.ones(R, wide), marks, torch.zeros(R, dtype=torch.float64))
    assert not sums.any()


def state_of(seed: int, width: int, half: int, moments: torch.dtype) -> adamw.RowState:
    """A state in every condition: large and tiny moments, a row that never had a gradient, one far below rounding."""
    weights = views(seed, width)["keys" if half == 0 else "values"]
    both = torch.zeros(R, 2, 2, width, dtype=moments)[:, half]
    both[:, 0] = torch.randn(R, width, generator=generator(seed + 1)) * 1e-3
    both[:, 1] = torch.rand(R, width, generator=generator(seed + 2)) * 1e-6
    both[R // 2] = 0
    both[1, 0] *= 1e-12
    still_R = torch.zeros(R, dtype=torch.bool)
    return adamw.RowState(weights, both[:, 0], both[:, 1], torch.zeros(R, dtype=torch.int32), still_R, 3 + half)


FIELDS = ("rows_RX", "first_RX", "second_RX", "done_R", "still_R")


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99),
    WIDTHS,
    st.sampled_from([0, 1]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=5),
)
def test_advance_is_torch_s_to_the_bit(
    seed: int, width: int, half: int, moments: torch.dtype, weight_decay: float, plan: list[tuple[int, bool]]
) -> None:
    """Any number of steps missed, with a gradient at the end or none, still rows among them."""
    ours, theirs = state_of(seed, width, half, moments), state_of(seed, width, half, moments)
    table = torch.tensor([step_constants(t, 1e-2 * (t % 7 + 1) / 7, (0.9, 0.999), weight_decay) for t in range(1, 801)])
    grads_RX = torch.randn(R, 2, width, generator=generator(seed))[:, half]
    step = 0
    for number, (missed, with_gradient) in enumerate(plan):
        step += missed
        steps = adamw.Steps(table[:step], 0, 0.9, 0.999, 1e-8, float(table[:step, 0].max()))
        for state, context in ((ours, None), (theirs, native.without_kernels())):
            grads = grads_RX if with_gradient else None
            if context is None:
                adamw.advance(state, grads, some_rows(seed + number), step, steps)
            else:
                with context:
                    adamw.advance(state, grads, some_rows(seed + number), step, steps)
        for name in FIELDS:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, number)


@needs_kernels
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_each_row_may_take_its_own_next_step(moments: torch.dtype) -> None:
    ours, theirs = state_of(0, 33, 0, moments), state_of(0, 33, 0, moments)
    table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.1) for t in range(1, 10)])
    steps = adamw.Steps(table, 0, 0.9, 0.999, 1e-8, 1e-2)
    grads_RX = torch.randn(R, 33, generator=generator(1))
    for index in ([0, 1, 2], [1, 2, 5], [2, 5, 11]):
        adamw.advance(ours, grads_RX, torch.tensor(index), None, steps)
        adamw.advance_torch(theirs, grads_RX, torch.tensor(index), None, steps)
    assert ours.done_R.tolist()[:3] == [1, 2, 3]
    for name in FIELDS[:4]:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@needs_kernels
@pytest.mark.parametrize(("done", "step"), [(3, 5), (9, None), (6, 9)])
def test_rows_whose_steps_are_not_in_the_table_are_refused(done: int, step: int | None) -> None:
    """A kernel would read beside it."""
    state = state_of(0, 33, 0, torch.float32)
    state.done_R.fill_(done)
    table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.1) for t in range(5, 9)])
    before = state.rows_RX.clone()
    with pytest.raises(IndexError, match="constants of steps 5 to 8"):
        adamw.advance(state, None, some_rows(1), step, adamw.Steps(table, 4, 0.9, 0.999, 1e-8, 1e-2))
    assert torch.equal(state.rows_RX, before)


def test_a_still_row_does_not_move_and_says_so_in_time() -> None:
    state = state_of(0, 64, 0, torch.float32)
    table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.0) for t in range(1, 1001)])
    steps = adamw.Steps(table, 0, 0.9, 0.999, 1e-8, 0.1)
    adamw.advance(state, None, torch.arange(R), 400, steps)
    assert state.still_R.all()
    before = state.rows_RX.clone()
    with native.without_kernels():
        state.still_R.zero_()
        adamw.advance(state, None, torch.arange(R), 1000, steps)
    assert torch.equal(before, state.rows_RX)


# ---- searching ----


def search_case(seed: int, tokens: int, width: int, size: int, number: int, probed: int, kind: str) -> tuple:
    made = generator(seed)
    h_TD = torch.randn(tokens, width, generator=made)
    keys_RD = torch.randn(number * size, 2, width, generator=made)[:, 0]
    gates_TP, experts_TP = torch.randn(tokens, number, generator=made).topk(probed, dim=1, sorted=False)
    scales_R = None
    if kind == "bf16":
        keys_RD = keys_RD.bfloat16()
    elif kind == "fp16":
        keys_RD = keys_RD.half()
    elif kind == "int8":
        keys_RD, scales_R = quantise(keys_RD)
    return h_TD, keys_RD, scales_R, experts_TP, gates_TP


def as_scored(h_TD: torch.Tensor, kind: str) -> torch.Tensor:
    """Hidden states as they meet keys of this kind."""
    return h_TD.bfloat16().float() if kind == "bf16" else h_TD


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99),
    st.integers(0, 9),
    WIDTHS,
    st.sampled_from([(1, 5, 3), (4, 6, 2), (7, 3, 3), (33, 2, 1)]),
    st.sampled_from(["fp32", "bf16", "fp16", "int8"]),
    st.booleans(),
    st.booleans(),
)
def test_search_finds_what_torch_finds(
    seed: int, tokens: int, width: int, sizes: tuple[int, int, int], kind: str, gated: bool, relu: bool
) -> None:
    size, number, probed = sizes
    h_TD, keys_RD, scales_R, experts_TP, gates_TP = search_case(seed, tokens, width, size, number, probed, kind)
    arguments = (
        h_TD,
        keys_RD,
        scales_R,
        experts_TP,
        gates_TP if gated else None,
        size,
        max(1, size * probed // 2),
        relu,
    )
    kept_TK, output_TK = kernels.search_experts(*arguments)
    theirs_TK, wanted_TK = kernels.search_experts_torch(*arguments)
    assert kept_TK.shape == theirs_TK.shape and kept_TK.dtype == torch.int64
    torch.testing.assert_close(output_TK.sort(1).values, wanted_TK.sort(1).values, rtol=1e-4, atol=1e-4)
    # Each number's output is its own, numbers are distinct and belong to the token's experts.
    dots_TR = as_scored(h_TD, kind) @ (keys_RD.float() * (1 if scales_R is None else scales_R[:, None])).T
    gates_TN = torch.zeros(tokens, number).scatter_(1, experts_TP, gates_TP)
    all_TR = dots_TR * (gates_TN.repeat_interleave(size, 1) if gated else 1)
    found = all_TR.gather(1, kept_TK)
    torch.testing.assert_close(output_TK, found.relu() if relu else found, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == len(row) for row in kept_TK.tolist())
    assert ((kept_TK // size)[:, :, None] == experts_TP[:, None, :]).any(2).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(0, 9),
    st.sampled_from([(1, 5, 3), (4, 6, 2), (7, 3, 3), (33, 2, 1)]),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.booleans(),
    st.booleans(),
)
def test_one_dense_product_finds_the_same(
    seed: int, tokens: int, sizes: tuple[int, int, int], kind: str, gated: bool, relu: bool
) -> None:
    size, number, probed = sizes
    h_TD, keys_RD, scales_R, experts_TP, gates_TP = search_case(seed, tokens, 40, size, number, probed, kind)
    h_TD = as_scored(h_TD, kind)
    kept = max(1, size * probed // 2)
    given = h_TD, keys_RD, scales_R, experts_TP, gates_TP if gated else None, size, kept, relu
    kept_TK, output_TK, dots_TK = kernels.search_experts_dense(*given)
    wanted_TK = kernels.search_experts_torch(*given)[1]
    torch.testing.assert_close(output_TK.sort(1).values, wanted_TK.sort(1).values, rtol=1e-4, atol=1e-4)
    assert ((kept_TK // size)[:, :, None] == experts_TP[:, None, :]).any(2).all()
    assert all(len(set(row)) == len(row) for row in kept_TK.tolist())
    torch.testing.assert_close(dots_TK, (h_TD @ keys_RD.float().T).gather(1, kept_TK), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_ties_go_to_the_first() -> None:
    h_TD, keys_RD = torch.ones(2, 8), torch.zeros(12, 8)
    experts_TP = torch.tensor([[2, 0], [1, 2]])
    kept_TK, _ = kernels.search_experts(h_TD, keys_RD, None, experts_TP, None, 4, 5, False)
    assert kept_TK.tolist() == [[8, 9, 10, 11, 0], [4, 5, 6, 7, 8]]


@needs_kernels
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("tokens", "width", "size", "number", "probed"),
    [(40, 200, 7, 30, 3), (150, 1100, 21, 3, 2), (9, 520, 16, 2, 2)],  # few and many of an expert, long and short rows
)
def test_a_token_s_result_depends_on_no_other_and_on_no_thread(
    tokens: int, width: int, size: int, number: int, probed: int, kind: str
) -> None:
    h_TD, keys_RD, scales_R, experts_TP, gates_TP = search_case(0, tokens, width, size, number, probed, kind)
    whole = kernels.search_experts(h_TD, keys_RD, scales_R, experts_TP, gates_TP, size, 9, False)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = kernels.search_experts(h_TD, keys_RD, scales_R, experts_TP, gates_TP, size, 9, False)
            assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    finally:
        torch.set_num_threads(before)
    for t in range(tokens):
        alone = kernels.search_experts(
            h_TD[t : t + 1], keys_RD, scales_R, experts_TP[t : t + 1], gates_TP[t : t + 1], size, 9, False
        )
        assert all(torch.equal(a[t : t + 1], b) for a, b in zip(whole, alone, strict=True))


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(1, 150),
    st.sampled_from([510, 512, 513, 544, 1023, 1040, 2100]),
    st.sampled_from([1, 3, 4, 5, 8, 9, 12, 17]),
    st.sampled_from(["fp32", "bf16", "int8"]),
)
def test_long_rows_are_scored_whole(seed: int, tokens: int, width: int, size: int, kind: str) -> None:
    h_TD, keys_RD, scales_R, experts_TP, _ = search_case(seed, tokens, width, size, 4, 2, kind)
    kept_TK, output_TK = kernels.search_experts(h_TD, keys_RD, scales_R, experts_TP, None, size, 2 * size, False)
    wide_RD = keys_RD.double() * (1 if scales_R is None else scales_R.double()[:, None])
    right_TK = (as_scored(h_TD, kind).double() @ wide_RD.T).gather(1, kept_TK)
    assert ((kept_TK // size)[:, :, None] == experts_TP[:, None, :]).any(2).all()
    torch.testing.assert_close(output_TK.double(), right_TK, rtol=1e-5, atol=1e-4 * width**0.5)


# ---- the adapter ----


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(0, 9),
    WIDTHS,
    st.sampled_from([1, 5, 70]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_adapter_is_torch_s(
    seed: int, tokens: int, width: int, kept: int, gated: bool, silu: bool, frozen: bool
) -> None:
    made, union = generator(seed), 9 * kept
    h_TD, grad_TD = (torch.randn(tokens, width, generator=made) for _ in range(2))
    rows_U2D = torch.randn(union, 2, width, generator=made)
    local_TK = torch.stack([torch.randperm(union, generator=made)[:kept] for _ in range(tokens)]) if tokens else None
    local_TK = torch.zeros(0, kept, dtype=torch.int64) if local_TK is None else local_TK
    local_TK[torch.rand(local_TK.shape, generator=made) < 0.3] = -1
    gates_TK = torch.randn(tokens, kept, generator=made) if gated else None
    rows = products.Rows.of(rows_U2D)

    def run() -> list[Tensor]:
        activation = "silu" if silu else "relu"
        out_TD, dots_TK = products.adapter_forward(h_TD, rows, local_TK, gates_TK, activation)
        grads_UHD = torch.full((union, 1 if frozen else 2, width), torch.nan)
        back = products.adapter_backward(grad_TD, h_TD, rows, local_TK, dots_TK, gates_TK, activation, grads_UHD)
        return [out_TD, dots_TK, *back, grads_UHD]

    ours = run()
    with native.without_kernels():
        theirs = run()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


# ---- numbers that are none ----

ODD = st.sampled_from([torch.nan, -torch.nan, torch.inf, -torch.inf])


def assert_same_kind(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)


def negative_nan() -> Tensor:
    """What x86 makes of inf - inf; torch's own NaN has the other sign."""
    return torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)


def cuda_nan() -> Tensor:
    """What a GPU makes of inf - inf: all bits but the sign."""
    return torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 99), ODD, st.sampled_from(["h", "keys", "values", "grad", "gates"]), st.booleans(), st.booleans())
def test_the_adapter_hides_no_nan(seed: int, odd: float, where: str, gated: bool, silu: bool) -> None:
    made, kept, width = generator(seed), 5, 33
    h_TD, grad_TD = (torch.randn(6, width, generator=made) for _ in range(2))
    rows_U2D = torch.randn(9 * kept, 2, width, generator=made)
    local_TK = torch.stack([torch.randperm(9 * kept - 1, generator=made)[:kept] + 1 for _ in range(6)])
    local_TK[torch.rand(local_TK.shape, generator=made) < 0.2] = -1
    gates_TK = torch.randn(6, kept, generator=made) if gated else None
    if where == "gates" and gates_TK is not None:
        gates_TK[2, 3] = odd
    target = {"h": h_TD[2], "grad": grad_TD[2], "keys": rows_U2D[7, 0], "values": rows_U2D[7, 1]}.get(where)
    if target is not None:
        target[seed % width] = odd
    rows = products.Rows.of(rows_U2D)

    def run() -> list[Tensor]:
        activation = "silu" if silu else "relu"
        out_TD, dots_TK = products.adapter_forward(h_TD, rows, local_TK, gates_TK, activation)
        grads_UHD = torch.empty(9 * kept, 2, width)
        back = products.adapter_backward(grad_TD, h_TD, rows, local_TK, dots_TK, gates_TK, activation, grads_UHD)
        return [out_TD, dots_TK, *back, grads_UHD]

    ours = run()
    with native.without_kernels():
        for a, b in zip(ours, run(), strict=True):
            assert_same_kind(a, b)


def test_relu_of_nan_is_nan_and_its_slope_is_torch_s() -> None:
    o = torch.tensor([torch.nan, -1.0, 0.0, 2.0], requires_grad=True)
    o.relu().backward(torch.ones(4))
    assert dense.activate(o.detach(), "relu").isnan().tolist() == [True, False, False, False]
    assert torch.equal(dense.activation_slope(o.detach(), "relu"), o.grad)


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99), ODD, st.sampled_from(["h", "keys", "gates"]), st.sampled_from(["fp32", "bf16"]), st.booleans()
)
def test_the_search_ranks_nan_first_as_torch_does(seed: int, odd: float, where: str, kind: str, relu: bool) -> None:
    h_TD, keys_RD, scales_R, experts_TP, gates_TP = search_case(seed, 5, 33, 6, 7, 3, kind)
    {"h": h_TD[1], "keys": keys_RD[11], "gates": gates_TP[2]}[where][seed % 3] = odd
    case = h_TD, keys_RD, scales_R, experts_TP, gates_TP, 6, 4, relu
    kept_TK, output_TK = kernels.search_experts(*case)
    theirs_TK, wanted_TK = kernels.search_experts_torch(*case)
    assert_same_kind(output_TK.sort(1).values, wanted_TK.sort(1).values)
    for ours, theirs, values in zip(kept_TK, theirs_TK, wanted_TK, strict=True):
        if values.isfinite().all():
            assert set(ours.tolist()) == set(theirs.tolist())


@needs_kernels
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("make", [negative_nan, cuda_nan])
def test_a_key_of_nan_is_always_found(kind: str, make) -> None:
    keys_RD = torch.randn(12, 33, generator=generator(0))
    keys_RD[7, 3] = make()
    narrow, scales_R = (
        quantise(keys_RD) if kind == "int8" else (keys_RD.bfloat16() if kind == "bf16" else keys_RD, None)
    )
    h_TD, experts_TP = torch.randn(3, 33, generator=generator(1)), torch.tensor([[1, 2]] * 3)
    kept_TK, output_TK = kernels.search_experts(h_TD, narrow, scales_R, experts_TP, None, 4, 2, False)
    assert (kept_TK == 7).any(1).all() and output_TK.isnan().any(1).all()


@needs_kernels
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [negative_nan, cuda_nan, lambda: torch.tensor([torch.inf])])
def test_a_gradient_of_nan_makes_its_row_nan(make, moments: torch.dtype) -> None:
    table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.0) for t in range(1, 10)])
    steps = adamw.Steps(table, 0, 0.9, 0.999, 1e-8, 1.0)
    grads_RX = torch.ones(R, 65)
    grads_RX[:, 5] = make()
    states = [state_of(0, 65, 0, moments) for _ in range(2)]
    for step, grads in ((1, grads_RX), (9, None)):
        adamw.advance(states[0], grads, torch.arange(R), step, steps)
        adamw.advance_torch(states[1], grads, torch.arange(R), step, steps)
    for state in states:
        assert state.rows_RX[:, 5].isnan().all() and state.rows_RX[:, :5].isfinite().all()
        assert not state.first_RX[:, 5].isfinite().any() and not state.still_R.any()
    for name in FIELDS[:3]:
        assert torch.equal(getattr(states[0], name).nan_to_num(7.0), getattr(states[1], name).nan_to_num(7.0))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_without_eps_a_row_without_a_gradient_becomes_nan_as_in_torch(moments: torch.dtype) -> None:
    table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.0) for t in range(1, 10)])
    for function in (adamw.advance, adamw.advance_torch):
        state = state_of(0, 65, 0, moments)
        function(state, torch.ones(R, 65), torch.arange(R), 4, adamw.Steps(table, 0, 0.9, 0.999, 0.0, 1.0))
        assert state.rows_RX.isnan().all(1).tolist() == [row == R // 2 for row in range(R)]
        assert not state.still_R[R // 2]


def test_a_row_whose_v_is_infinite_is_never_still() -> None:
    """With beta2 = 0 its v is NaN one step later."""
    table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.0) for t in range(1, 10)])
    for function in (adamw.advance, adamw.advance_torch):
        state = state_of(0, 65, 0, torch.float32)
        state.first_RX.zero_()
        state.second_RX[3, 4] = torch.inf
        function(state, None, torch.arange(R), 4, adamw.Steps(table, 0, 0.9, 0.999, 1e-8, 1.0))
        assert state.still_R.tolist() == [row != 3 for row in range(R)]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_with_nan_is_nan(dtype: torch.dtype) -> None:
    for filled in (False, True):
        sums, source = torch.zeros(3, 65), torch.ones(2, 65)
        source[0, 7], source[1, 8] = negative_nan(), torch.inf
        squares = torch.zeros(3, dtype=torch.float64)
        kernels.accumulate(sums, torch.tensor([2, 0]), source.to(dtype), torch.full((3,), filled), squares)
        assert sums[2, 7].isnan() and sums[0, 8].isinf() and sums.isfinite().sum() == 3 * 65 - 2


# ---- building ----


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


USE = (
    "import torch\n"
    "from meft_bench.meft.engine import kernels, native\n"
    "x = torch.arange(6.0).view(3, 2)\n"
    "for _ in range(2): print(kernels.gather(x, torch.tensor([2, 0]), torch.empty(2, 2)).tolist())\n"
    "print(native.status())\n"
)


@pytest.mark.parametrize(
    "named, why",
    [
        ("no-such-compiler", "no C compiler found (looked for no-such-compiler)"),
        ("cc '-O2", """CC="cc '-O2" is no command line (No closing quotation)"""),
    ],
)
def test_without_a_compiler_everything_works_and_says_so_once(named: str, why: str, tmp_path: Path) -> None:
    done = python(USE, CC=named, MEFT_BENCH_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [str([[4.0, 5.0], [0.0, 1.0]])] * 2
    assert f"plain torch: {why}" in done.stdout
    assert done.stderr.count("host kernels could not be built") == 1


def test_a_failing_compiler_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no such target >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    done = python(USE, CC=str(compiler), MEFT_BENCH_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0 and "failed: no such target" in done.stdout
    assert not list((tmp_path / "cache").glob("*.so"))


def test_torch_can_be_asked_for_in_silence() -> None:
    done = python(USE, MEFT_BENCH_KERNELS="torch")
    assert "plain torch: MEFT_BENCH_KERNELS=torch asks for it" in done.stdout and not done.stderr


@needs_kernels
def test_two_may_build_at_once_and_an_unwritable_cache_is_no_end(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        runs = list(both.map(lambda _: python(USE, MEFT_BENCH_CACHE=str(tmp_path / "cache")), range(2)))
    assert all(run.returncode == 0 and "native kernels" in run.stdout for run in runs), runs
    assert len(list((tmp_path / "cache").glob("*.so"))) == 3 and not list((tmp_path / "cache").glob("building*"))
    (tmp_path / "file").write_text("")
    assert "native kernels" in python(USE, MEFT_BENCH_CACHE=str(tmp_path / "file" / "below")).stdout


@needs_kernels
def test_a_search_leaves_what_another_found() -> None:
    """The room that it works in is used again, also by a larger and a smaller one; other threads have their own."""
    cases = [search_case(seed, tokens, 300, 16, 8, 2, "fp32") for seed, tokens in enumerate((7, 90, 0, 3, 200))]

    def search(case: tuple) -> tuple[Tensor, Tensor]:
        h_TD, keys_RD, _, experts_TP, gates_TP = case
        return kernels.search_experts(h_TD, keys_RD, None, experts_TP, gates_TP, 16, 5, False)

    alone = [[t.clone() for t in search(case)] for case in cases]
    together = [search(case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        beside = list(threads.map(search, cases * 20))
    for i, found in enumerate((*together, *beside)):
        assert all(torch.equal(a, b) for a, b in zip(alone[i % len(cases)], found, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_a_room_of_its_own() -> None:
    (room,) = native._room(1000)
    room.fill_(1)
    child = os.fork()
    if child == 0:
        native._room(1000)[0].fill_(2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and (room == 1).all()


def levels() -> list[str]:
    """The instruction sets that this processor has, the plain one first."""
    known = ["DEFAULT", "AVX2", "AVX512"]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in known:
        pytest.skip(f"no x86-64 levels on {capability}")
    best = [native.kernels().level] if native.kernels().level not in known else []
    return known[: known.index(capability) + 1] + best


@needs_kernels
def test_an_older_compiler_builds_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcc 9, of some images for GPUs: no levels of x86-64 by name, no products of bf16 pairs."""
    levels()
    (command, *_), _ = build.compiler()
    older = tmp_path / "cc"
    older.write_text(
        f"""#!/bin/sh
for given in "$@"; do
    case $given in -march=x86-64-v*|-mavx512bf16) echo "unknown: $given" >&2; exit 1;; esac
done
exec {command} "$@"
"""
    )
    older.chmod(0o755)
    monkeypatch.setenv("CC", str(older))
    monkeypatch.setenv("MEFT_BENCH_CACHE", str(tmp_path / "cache"))
    made = native.kernels.__wrapped__("AVX512_BF16")
    assert made.elementwise is not None and made.level == "AVX512", made.text


@needs_kernels
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tokens", [1, 5, 11, 64, 65, 66, 97, 193, 260])
def test_every_instruction_set_scores_every_number_of_tokens(
    tokens: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, probed = 13, 2
    h_TD, keys_RD, scales_R, experts_TP, _ = search_case(0, tokens, 777, size, 3, probed, kind)
    wide_RD = keys_RD.double() * (1 if scales_R is None else scales_R.double()[:, None])
    right_TR = as_scored(h_TD, kind).double() @ wide_RD.T
    for used in map(native.kernels, levels()):
        monkeypatch.setattr(native, "kernels", lambda used=used: used)
        kept_TK, output_TK = kernels.search_experts(
            h_TD, keys_RD, scales_R, experts_TP, None, size, size * probed, False
        )
        monkeypatch.undo()
        assert all(len(set(row)) == size * probed for row in kept_TK.tolist())
        torch.testing.assert_close(output_TK.double(), right_TR.gather(1, kept_TK), rtol=1e-5, atol=1e-3)


@needs_kernels
def test_hidden_states_meet_bf16_keys_in_bf16_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one key of 1 a score is the hidden state as it was rounded: as torch rounds, halves to even."""
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7FFFFF, 0x00FF8000], dtype=torch.int32)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.0, -3.141592])
    h_TD = torch.cat((halves.view(torch.float32), odd, torch.randn(50, generator=generator(0))))[:, None]
    keys_RD, experts_TP = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(len(h_TD), 1, dtype=torch.int64)
    for used in map(native.kernels, levels()):
        monkeypatch.setattr(native, "kernels", lambda used=used: used)
        _, output_TK = kernels.search_experts(h_TD, keys_RD, None, experts_TP, None, 1, 1, False)
        monkeypatch.undo()
        torch.testing.assert_close(output_TK, h_TD.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    with native.without_kernels():
        _, output_TK = kernels.search_experts(h_TD, keys_RD, None, experts_TP, None, 1, 1, False)
    torch.testing.assert_close(output_TK, h_TD.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_every_instruction_set_gives_the_same_bits() -> None:
    results = []
    for level in levels():
        state = state_of(0, 130, 1, torch.float32)
        table = torch.tensor([step_constants(t, 1e-2, (0.9, 0.999), 0.0) for t in range(1, 90)])
        steps = adamw.Steps(table, 0, 0.9, 0.999, 1e-8, 0.1)
        used = native.kernels(level)
        assert used.level == level and used.elementwise is not None
        before, native.kernels = native.kernels, lambda used=used: used  # type: ignore[assignment]
        try:
            adamw.advance(state, torch.ones(R, 130), torch.arange(0, R, 2), 89, steps)
            adamw.advance(state, None, torch.arange(R), 89, steps)
        finally:
            native.kernels = before
        results.append([getattr(state, name) for name in FIELDS])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
