"""A training loop in mixed precision. Under autocast the adapter computes in the dtype of its hidden states, as without
it, wherever and whenever its parts run: with overlap they begin in a hook of the FFN, and on a GPU there is always a
router. A GradScaler divides gradients where they show."""

from typing import Any

import pytest
import torch
from torch import Tensor

from meft_bench.meft.engine.budget import at
from meft_bench.meft.model import attach
from tests.meft.tiny_models import LAYERS, D, fill_values, small_config, tiny_llama, tokens

ENGINES: list[dict[str, Any]] = [
    *({"share": share, **how} for share in (0.0, 0.35, 1.0) for how in ({}, {"reading": "union"}, {"scoring": "int8"})),
    {"share": 0.35, "retrieval": "host"},
    {"share": 0.0, "retrieval": "device"},
    {"share": 1.0, "reading": "union", "gate": "softmax"},
    {"share": 1.0, "key_experts": False},
]


def trained(engine: dict[str, Any], overlap: bool, around_backward: bool) -> list[Tensor]:
    options = {name: value for name, value in engine.items() if name != "share"} | {"overlap": overlap}
    budget = at(engine["share"], small_config(**options), LAYERS, D, torch.float32)
    model = tiny_llama().train()
    meft = attach(model, small_config(**options, device_budget=budget))
    fill_values(meft)
    optimizer = meft.make_optimizer(lr=1e-2)
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens(seed=step), labels=tokens(seed=step)).loss
            if around_backward:
                loss.backward()
        if not around_backward:
            loss.backward()
        meft.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for store in meft.stores for p in store.parameters()]


@pytest.mark.parametrize("around_backward", [False, True])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_overlap_changes_no_bit_under_autocast(engine: dict[str, Any], around_backward: bool) -> None:
    serial, beside = (trained(engine, overlap, around_backward) for overlap in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(serial, beside, strict=True))


def test_gradients_of_an_adapter_know_nothing_of_autocast() -> None:
    """Rows' gradients from the same hidden states and the same gradient of the output, with autocast and without."""
    found = []
    for enabled in (False, True):
        meft = attach(tiny_llama().train(), small_config(reading="union"))
        fill_values(meft)
        adapter, h = meft.adapters[0], torch.randn(6, D, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            adapter(h).sum().backward()
        found.append([p.grad.clone() for p in adapter.store.parameters() if p.grad is not None])
    assert len(found[0]) == 3 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_gradients_are_clipped_as_a_scaler_has_left_them(share: float) -> None:
    """A power of two scales exactly, so all bits are those without a scaler."""
    found = []
    for enabled in (False, True):
        budget = at(share, small_config(), LAYERS, D, torch.float32)
        model = tiny_llama().train()
        meft = attach(model, small_config(device_budget=budget))
        fill_values(meft)
        optimizer = meft.make_optimizer(lr=1e-2)
        scaler, norms = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled), []
        for step in range(3):
            for micro in range(2):
                ids = tokens(seed=2 * step + micro)
                scaler.scale(model(ids, labels=ids).loss).backward()
            scaler.unscale_(optimizer)
            assert all(p.grad is not None for store in meft.stores for p in store.parameters())  # as unscale_ does
            norms.append(float(meft.clip_grad_norm_(1.0)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append((norms, [p.detach().clone() for store in meft.stores for p in store.parameters()]))
    assert found[0][0] == found[1][0] and min(found[0][0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
