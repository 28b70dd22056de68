"""The engine on a GPU: copies on streams of their own, host work beside the device's, the numbers of the CPU."""

import pytest
import torch

from meft_bench.meft.adam import RowAdamW
from meft_bench.meft.model import MeftModel, attach
from tests.meft.tiny_models import fill_values, next_token_loss, small_config, tiny_stack, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def meft_on(device: str, **options) -> MeftModel:
    meft = attach(tiny_stack().to(device), small_config(**options), seed=3)
    fill_values(meft)
    meft.model.train()
    return meft


def train(
    meft: MeftModel, device: str, steps: int = 6, accumulation: int = 2
) -> tuple[list[float], list[torch.Tensor]]:
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    assert isinstance(optimizer, RowAdamW)
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            ids = tokens(seed=step * accumulation + micro).to(device)
            loss = next_token_loss(meft.model(ids), ids) / accumulation
            loss.backward()
            losses.append(loss.detach())
        meft.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [float(loss) for loss in losses], [p.detach().cpu().clone() for s in meft.stores for p in s.parameters()]


ENGINES = [
    {"overlap": False},
    {"overlap": True},
    {"overlap": True, "device_budget": 10**8},
    {"overlap": True, "device_budget": 6000},
    {"overlap": True, "lookahead": 0, "scoring": "int8", "probed": 6, "kept": 24, "selection": "signed"},
]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_gpu_trains_as_the_cpu_does(engine: dict) -> None:
    choices = {k: v for k, v in engine.items() if k in ("probed", "kept", "selection")}
    wanted = train(meft_on("cpu", **choices), "cpu")
    got = train(meft_on("cuda", **engine), "cuda")
    assert got[0] == pytest.approx(wanted[0], rel=1e-4)
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_keys_on_the_gpu_are_searched_there() -> None:
    options = {"key_experts": False, "kept": 24, "selection": "signed"}
    wanted = train(meft_on("cpu", **options), "cpu")
    meft = meft_on("cuda", **options, retrieval="device")
    assert train(meft, "cuda")[0] == pytest.approx(wanted[0], rel=1e-4)
    assert ("d2h", "hidden") not in meft.link.bytes


def test_background_and_serial_work_count_the_same_bytes() -> None:
    counts = []
    for overlap in (False, True):
        meft = meft_on("cuda", overlap=overlap)
        train(meft, "cuda")
        counts.append(dict(meft.link.bytes))
    assert counts[0] == counts[1]


def test_a_step_waits_for_no_device(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("a device-wide synchronisation")

    meft = meft_on("cuda", overlap=True)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    train(meft, "cuda", steps=2)
