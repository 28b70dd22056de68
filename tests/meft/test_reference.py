"""Host placement = device placement = the dense formula, step for step, with accumulation, clipping and a schedule."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from meft_bench.meft.adam import RowAdamW
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.model import MeftModel, attach
from meft_bench.meft.reference import ReferenceAdapter
from tests.meft.tiny_models import (
    GATES,
    fill_values,
    hidden,
    make_adapter,
    named,
    next_token_loss,
    small_config,
    tiny_stack,
    tokens,
)

STEPS, WARMUP, MAX_NORM = 20, 4, 0.5
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}
# Few kept of many: the sums run over chosen pairs instead of a dense product, and some rows are never touched.
SPARSE = {"neurons": 96, "experts": 12, "probed": 1, "kept": 2}
MAIN = [{"reading": reading, **gate} for reading in ("per_token", "union") for gate in GATES]
MORE = [
    {"selection": "signed"},
    {"selection": "signed", "activation": "silu"},
    {"selection": "signed", "activation": "silu", "reading": "union", "gate": "softmax"},
    {"selection": "relu_first", "gate": "none"},
    {"frozen_keys": True},
    SPARSE,
    {**SPARSE, "gate": "softmax", "selection": "signed"},
    {"router_init": "mean_key_x50", "selection": "signed", "key_std": 0.02},
]


def warmup_then_linear(step: int) -> float:
    return min((step + 1) / WARMUP, max(0.0, (STEPS - step) / (STEPS - WARMUP)))


def train(model: nn.Module, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, accumulation: int):
    """The usual training loop; returns per step the loss, the gradient norm before clipping and all weights."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_linear)
    path = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulation):
            ids = tokens(seed=step * accumulation + micro)
            loss = next_token_loss(model(ids), ids) / accumulation
            loss.backward()
            total += loss.item()
        norm = clip_grad_norm_(trained, MAX_NORM).item()
        optimizer.step()
        if isinstance(optimizer, RowAdamW):
            optimizer.settle()  # rows that nothing read stay behind otherwise
        schedule.step()
        optimizer.zero_grad()
        path.append((total, norm, [p.detach().clone() for p in trained]))
    return path


def meft_of(config: MeftOptions) -> MeftModel:
    meft = attach(tiny_stack(), config, seed=3)
    fill_values(meft)
    return meft


def train_meft(config: MeftOptions, accumulation: int):
    meft = meft_of(config)
    trained = [p for store in meft.stores for p in store.parameters() if p.requires_grad]
    return train(meft.model, trained, meft.make_optimizer(**ADAMW), accumulation)


def train_reference(config: MeftOptions, accumulation: int):
    model = tiny_stack().requires_grad_(False)
    trained = []
    for layer, store in zip(model.layers, meft_of(config).stores, strict=True):
        layer.mlp = ReferenceAdapter(layer.mlp, store.keys, store.values, store.router, config)
        adapter = layer.mlp.keys, layer.mlp.values, layer.mlp.router
        trained += [p for p in adapter if p is not None and p.requires_grad]
    return train(model, trained, torch.optim.AdamW(trained, **ADAMW), accumulation)


def assert_same_path(got, wanted, rtol: float) -> None:
    for (loss, norm, weights), (loss_, norm_, weights_) in zip(got, wanted, strict=True):
        assert loss == pytest.approx(loss_, rel=rtol)
        assert norm == pytest.approx(norm_, rel=10 * rtol)
        for ours, theirs in zip(weights, weights_, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("variant", "accumulation"),
    [(variant, count) for variant in MAIN for count in (1, 4)] + [(variant, 1) for variant in MORE],
    ids=lambda value: named(value) if isinstance(value, dict) else str(value),
)
def test_host_equals_device_equals_the_formula(variant: dict, accumulation: int) -> None:
    """Both placements do the same fp32 operations in the same order, so those two are equal bit for bit."""
    host = train_meft(small_config(**variant), accumulation)
    device = train_meft(small_config(**variant, placement="device"), accumulation)
    assert_same_path(host, device, rtol=0.0)
    reference = train_reference(small_config(**variant), accumulation)
    assert_same_path(host, reference, rtol=5e-6)
    # The comparison means something only if clipping was at work and all weights moved.
    assert max(norm for _, norm, _ in host) > MAX_NORM
    first, last = host[0][2], host[-1][2]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, last, strict=True))


class PlainParallelAdapter(nn.Module):
    """FFN(h) + relu(h W_A^T) W_B, written with nothing of the package."""

    def __init__(self, ffn: nn.Module, keys_RD: Tensor, values_RD: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.ffn, self.activation = ffn, activation
        self.keys, self.values = nn.Parameter(keys_RD.clone()), nn.Parameter(values_RD.clone())

    def forward(self, h: Tensor) -> Tensor:
        return self.ffn(h) + self.activation(h @ self.keys.T) @ self.values


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("reading", ["per_token", "union"])
def test_all_neurons_without_key_experts_is_the_parallel_adapter(reading: str, activation: str) -> None:
    config = MeftOptions(
        neurons=24, kept=24, key_experts=False, selection="signed", reading=reading, activation=activation
    )
    ours = train_meft(config, accumulation=2)
    model, trained = tiny_stack().requires_grad_(False), []
    for layer, store in zip(model.layers, meft_of(config).stores, strict=True):
        function = nn.SiLU() if activation == "silu" else nn.ReLU()
        layer.mlp = PlainParallelAdapter(layer.mlp, store.keys.data, store.values.data, function)
        trained += [layer.mlp.keys, layer.mlp.values]
    plain = train(model, trained, torch.optim.AdamW(trained, **ADAMW), accumulation=2)
    assert_same_path(ours, plain, rtol=5e-6)


@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("variant", GATES, ids=named)
def test_hidden_gradient_is_that_of_the_formula(variant: dict, reading: str) -> None:
    """The gradient for h, which the layers below live on; it never shows in this layer's own weights."""
    adapter = make_adapter(small_config(**variant, reading=reading))
    store = adapter.store
    reference = ReferenceAdapter(nn.Identity(), store.keys, store.values, store.router, adapter.config)
    ours, theirs, direction = hidden(seed=5).requires_grad_(), hidden(seed=5).requires_grad_(), hidden(seed=6)
    (adapter(ours) * direction).sum().backward()
    ((reference(theirs) - theirs) * direction).sum().backward()
    assert theirs.grad.abs().max() > 0.1
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
