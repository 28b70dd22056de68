"""torch.compile: the base is compiled, the adapter between its parts is left as it is, and the numbers are the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import CompileConfig

from meft_bench.integrations.peft_method import active_adapters
from meft_bench.meft.model import attach
from tests.integrations.small import rows_of, same, with_meft
from tests.integrations.test_trainer import series, train
from tests.meft.tiny_models import fill_values, small_config, tiny_llama, tokens


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def base() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
    loss.backward()
    return loss


def test_a_compiled_model_has_the_same_loss_and_gradients() -> None:
    plain, twin = with_meft(base()).train(), with_meft(base()).train()
    assert torch.equal(loss_of(plain), loss_of(torch.compile(twin, backend="aot_eager")))
    (ours,), (theirs,) = active_adapters(plain), active_adapters(twin)
    assert ours.usage == theirs.usage == [(10, ours.usage[0][1])]
    for p, q in zip(ours.store.parameters(), theirs.store.parameters(), strict=True):
        assert p.grad.abs().sum() > 0
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7)


def test_the_method_alone_compiles_too() -> None:
    plain, twin = attach(base(), small_config()), attach(base(), small_config())
    for meft in (plain, twin):
        fill_values(meft)
        meft.model.train()
    assert torch.equal(loss_of(plain.model), loss_of(torch.compile(twin.model, backend="eager")))
    assert twin.adapters[0].usage == plain.adapters[0].usage
    for p, q in zip(plain.stores[0].parameters(), twin.stores[0].parameters(), strict=True):
        assert p.grad.abs().sum() > 0 and torch.equal(p.grad, q.grad)


def test_a_trainer_that_compiles_trains_and_saves_the_same(tmp_path: Path) -> None:
    plain = train(with_meft(base()), tmp_path / "plain", max_steps=2)
    ours = train(
        with_meft(base()),
        tmp_path / "compiled",
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
        save_strategy="steps",
        save_steps=2,
    )
    assert isinstance(ours.model_wrapped, torch._dynamo.OptimizedModule)
    assert series(ours, "loss") == series(plain, "loss") and same(rows_of(ours.model), rows_of(plain.model))
    again = PeftModel.from_pretrained(base(), tmp_path / "compiled" / "checkpoint-2")
    assert same(rows_of(again), rows_of(plain.model)) and not same(rows_of(again), rows_of(with_meft(base())))


def test_generate_with_a_static_cache_compiles_and_knows_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA generate does this by itself. With the union reading, padding that selects would change the others."""
    model = with_meft(base(), reading="union", gate="none")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    (adapter,) = active_adapters(model)
    valid, real = [], adapter.batch.valid_tokens

    def watched(h: torch.Tensor) -> torch.Tensor | None:
        valid.append(real(h))
        return valid[-1]

    monkeypatch.setattr(adapter.batch, "valid_tokens", watched)
    settings = CompileConfig(backend="eager")
    settings._compile_all_devices = True
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    seen = valid.copy()
    valid.clear()
    static = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=False,
        cache_implementation="static",
        compile_config=settings,
    )
    assert torch.equal(plain, static) and torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert torch.equal(seen[0], mask.flatten().bool()) and torch.equal(valid[0], seen[0])
    assert seen[1:] == valid[1:] == [None, None]
