"""torch.inference_mode changes nothing, neither what is computed in it nor what is trained after it."""

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meft_bench.meft.model import MeftModel, attach
from tests.meft.test_engine import POINTS, budget_for, micro_batch, tiny_meft
from tests.meft.tiny_models import fill_values, hidden, named, small_config, tiny_llama, tiny_stack, tokens

OPTIONS = [{}, {"overlap": True}, {"lookahead": 1}, {"scoring": "int8"}, {"scoring": "bf16"}, {"retrieval": "device"},
           {"placement": "device"}, {"reading": "union"}, {"adam": "lazy"}, {"moments": "bf16"}]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluated(meft: MeftModel, mode: AbstractContextManager, folder: Path | None) -> list[Tensor]:
    """What is seen of a model in this mode."""
    with mode:
        meft.model.eval()
        seen = [meft.model(tokens(seed=9))]
        if folder is not None:
            seen += [*meft.model.state_dict().values(), *(p.sum() for p in meft.model.parameters())]
            meft.save(folder)
        meft.model.train()
    return [s.clone() for s in seen]


def trained(options: dict, mode: type, folder: Path | None) -> list[Tensor]:
    meft = tiny_meft(**options)
    optimizer = meft.make_optimizer(lr=1e-2)
    seen = []
    for step in range(6):
        seen += evaluated(meft, mode(), folder) if step % 2 == 0 else []
        for half in range(2):
            micro_batch(meft, 2 * step + half)
        meft.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return seen + [p.detach().clone() for store in meft.stores for p in store.parameters()]


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_training_goes_on_as_after_no_grad(options: dict, reads: bool, tmp_path: Path) -> None:
    folder = tmp_path if reads else None
    plain, ours = (trained(options, mode, folder) for mode in (torch.no_grad, torch.inference_mode))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_rows_on_the_device_are_trained_on(point: str, overlap: bool, reads: bool, tmp_path: Path) -> None:
    options = {"device_budget": budget_for(point, {}), "overlap": overlap}
    folder = tmp_path if reads else None
    plain, ours = (trained(options, mode, folder) for mode in (torch.no_grad, torch.inference_mode))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_padding_is_known_and_text_is_generated(options: dict) -> None:
    def said(mode: type) -> list[Tensor]:
        model = tiny_llama()
        fill_values(attach(model, small_config(**options)), size=1.0)
        with mode():
            ids = tokens()
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            return [
                model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, **cache)
                for cache in ({}, {"cache_implementation": "static", "disable_compile": True})
            ]

    plain, ours = said(torch.no_grad), said(torch.inference_mode)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_was_changed_in_place_is_read_again(mode: type) -> None:
    model = tiny_llama()
    meft = attach(model, small_config(reading="union"))
    fill_values(meft)
    ids = tokens()
    with mode():
        mask = torch.ones_like(ids)
        full = model(ids, attention_mask=mask).logits
        mask[0, :3] = 0
        padded = model(ids, attention_mask=mask).logits
        assert torch.equal(padded, model(ids, attention_mask=mask.clone()).logits) and not torch.equal(padded, full)


def test_an_adapter_that_is_attached_in_inference_mode_works_and_trains() -> None:
    with torch.inference_mode():
        meft = attach(tiny_stack(), small_config(), seed=3)
        fill_values(meft)
        said = meft.model(tokens()).clone()
    assert torch.equal(said, tiny_meft().model(tokens()))
    adapter = meft.adapters[0].train()
    adapter(hidden()).sum().backward()
    assert adapter.store.values.grad.any()
