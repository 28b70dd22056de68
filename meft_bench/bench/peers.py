"""Other ways to make one AdamW step on U of R rows: torch's and DeepSpeed's optimizers, and plain indexing.

Each starts from the same rows, moments and gradients as ours, but for those on dense rows, which have U rows of their
own; none of them puts rows off.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.meft.engine.adamw import RowState

DEEPSPEED = "DeepSpeedCPUAdam on gathered rows"
DENSE, DENSE_DEEPSPEED = "fused AdamW on dense rows", "DeepSpeedCPUAdam on dense rows"
_BETAS, _EPS, _LR = (0.9, 0.999), 1e-8, 1e-3


def missing() -> dict[str, str]:
    """Peer -> how to get it, for those that this machine lacks."""
    lacking: dict[str, str] = {}
    if importlib.util.find_spec("deepspeed") is None:
        lacking |= dict.fromkeys((DEEPSPEED, DENSE_DEEPSPEED), 'pip install "meft-bench[deepspeed]"')
    return lacking


def row_adamw(state: RowState, grads_RD: Tensor, index: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    """Name -> one step on the rows index() [U] of this state (fp32 moments) with their gradients."""
    made: dict[str, Callable[[], Any]] = {
        "indexed torch": lambda: indexed(state, grads_RD, index()),
        "fused AdamW on gathered rows": _on_gathered(_fused, state, grads_RD, index),
        "torch.optim.SparseAdam": _sparse_adam(state, grads_RD, index),
        DENSE: dense(index().shape[0], state.rows_RX.shape[1], _fused),
    }
    if DEEPSPEED not in missing():
        made[DEEPSPEED] = _on_gathered(_deepspeed, state, grads_RD, index)
        made[DENSE_DEEPSPEED] = dense(index().shape[0], state.rows_RX.shape[1], _deepspeed)
    return made


def dense_deepspeed(rows: int, width: int) -> Callable[[], Any] | None:
    """One step of DeepSpeed's CPUAdam on a matrix of its own; None where it is missing."""
    return dense(rows, width, _deepspeed) if DENSE_DEEPSPEED not in missing() else None


def dense(rows: int, width: int, make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Callable[[], Any]:
    """One step of an optimizer on a matrix of its own, as large as the rows that are touched: kernel against kernel,
    with nothing gathered and no row left out."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(rows, width, generator=generator))
    parameter.grad = torch.randn(rows, width, generator=generator)
    optimizer = make(parameter)
    optimizer.step()  # makes its state
    return optimizer.step


def indexed(state: RowState, grads_RD: Tensor, index_U: Tensor) -> None:
    """What one writes first: m[rows] = ..."""
    p_RD, m_RD, v_RD = state.rows_RX, state.first_RX, state.second_RX
    g_UD = grads_RD[index_U]
    m_RD[index_U] = m_RD[index_U] * _BETAS[0] + g_UD * (1 - _BETAS[0])
    v_RD[index_U] = v_RD[index_U] * _BETAS[1] + g_UD * g_UD * (1 - _BETAS[1])
    p_RD[index_U] -= _LR * m_RD[index_U] / (v_RD[index_U].sqrt() + _EPS)


def _on_gathered(
    make: Callable[[nn.Parameter], torch.optim.Optimizer],
    state: RowState,
    grads_RD: Tensor,
    index: Callable[[], Tensor],
) -> Callable[[], None]:
    """Gather rows, moments and gradients, let a dense optimizer step on them, scatter what it changed."""
    U, D = index().shape[0], state.rows_RX.shape[1]
    parameter = nn.Parameter(torch.zeros(U, D))
    parameter.grad = torch.zeros(U, D)
    optimizer = make(parameter)
    optimizer.step()  # makes its state
    kept = optimizer.state[parameter]
    pairs = ((state.rows_RX, parameter.data), (state.first_RX, kept["exp_avg"]), (state.second_RX, kept["exp_avg_sq"]))

    def step() -> None:
        index_U = index()
        for whole_RD, own_UD in pairs:
            torch.index_select(whole_RD, 0, index_U, out=own_UD)
        torch.index_select(grads_RD, 0, index_U, out=parameter.grad)
        optimizer.step()
        for whole_RD, own_UD in pairs:
            whole_RD.index_copy_(0, index_U, own_UD)

    return step


def _fused(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter], lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=0.0, fused=True)


def _deepspeed(parameter: nn.Parameter) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([parameter], lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=0.0, adamw_mode=True)


def _sparse_adam(state: RowState, grads_RD: Tensor, index: Callable[[], Tensor]) -> Callable[[], None]:
    """With the gradient as a sparse tensor, made from the rows as part of the step."""
    # Matrices of its own: it does not take a parameter that is every second row of a buffer. Written, so that no page
    # is touched for the first time while the clock runs.
    p_RD, m_RD, v_RD = (t.contiguous() for t in (state.rows_RX, state.first_RX, state.second_RX))
    parameter = nn.Parameter(p_RD)
    optimizer = torch.optim.SparseAdam([parameter], lr=_LR, betas=_BETAS, eps=_EPS)
    optimizer.state[parameter].update(step=0, exp_avg=m_RD, exp_avg_sq=v_RD)

    def step() -> None:
        index_U = index()
        values_UD = grads_RD.index_select(0, index_U)
        parameter.grad = torch.sparse_coo_tensor(
            index_U[None], values_UD, parameter.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()

    return step
